"""The latent write under the interpreter: exact bytes where they belong, and nothing anywhere else."""

import pytest
import torch

from kvmanager.kernels.latent_write import write_latent


@pytest.mark.parametrize("rank,rope,page_size", [(32, 16, 16), (48, 32, 48), (512, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_write_puts_each_latent_into_its_slot_and_touches_nothing_else(rank: int, rope: int, page_size: int, dtype: torch.dtype) -> None:
    """Strided rows in, one layer of page-major memory out; slot -1, far below, and past the end write nothing (FastDeploy's wrote before the cache)."""
    generator = torch.Generator().manual_seed(rank)
    num_pages, entry = 7, rank + rope
    whole = torch.full((num_pages + 2, 2, page_size, entry), 7.0, dtype=dtype)  # a canary page before and behind
    pages = whole[1:-1, 1]
    num_slots = num_pages * page_size
    slots = torch.randperm(num_slots, generator=generator)[:19]
    slots[[0, 5, 9, 18]] = torch.tensor([-1, num_slots, 2**31, -page_size])
    latent = torch.randn((19, 2, entry), generator=generator).to(dtype)[:, 0]
    want = whole.clone()
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < num_slots:
            want[1 + slot // page_size, 1, slot % page_size] = latent[token]
    write_latent(latent, slots, pages, rank)
    assert torch.equal(whole, want)


def test_write_of_no_tokens_launches_nothing() -> None:
    """An empty step is legal."""
    write_latent(torch.empty(0, 48), torch.empty(0, dtype=torch.int64), torch.empty(2, 16, 48), 32)
