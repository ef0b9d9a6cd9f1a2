"""The compiled kernels alone: FlashMLA's list of tests with its tolerances, every tile, and slots that must not be written."""

import pytest
import torch

from kvmanager.attention.compare import check_attention, make_problem, run_kernels
from kvmanager.attention.layout import LatentLayout
from kvmanager.kernels.latent_write import write_latent
from kvmanager.kernels.mla_decode import Tile, choose_tile

V3 = LatentLayout(512, 64, 1, 64)


HOPPER = pytest.param("hopper", marks=pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="no Hopper card")) if torch.cuda.is_available() else "hopper"  # fmt: skip


@pytest.mark.parametrize("kernel", ["triton", HOPPER])
@pytest.mark.parametrize("batch", [1, 2, 6, 64])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_list_of_flashmla(batch: int, tokens: int, kernel: str) -> None:
    """KV 20, 140, 4,096; 1 to 128 heads; ragged, causal, some lengths 0 (deepseek-ai/FlashMLA: tests/test_flash_mla_dense_decoding.py)."""
    card = torch.cuda.get_device_properties("cuda")
    generator = torch.Generator().manual_seed(batch * 10 + tokens)
    for mean in (20, 140, 4096):
        for ragged in (False, True):
            for zeros in (False, True):
                lengths = torch.full((batch,), mean)
                if ragged:
                    lengths = torch.normal(float(mean), mean / 2, (batch,), generator=generator).clamp(tokens, 2 * mean).long()
                if zeros:
                    lengths[torch.rand(batch, generator=generator) < 0.3] = 0
                for heads in (1, 3, 9, 63, 64, 126, 128):
                    problem = make_problem(V3, lengths.tolist(), [tokens] * batch, heads, "cuda", seed=heads, written=True)
                    tile = choose_tile(heads, 512, 64, torch.bfloat16, card.major * 10 + card.minor, tokens > 1)
                    if kernel == "hopper":
                        tile = None
                    for causal in (True, False) if tokens > 1 else (True,):
                        out, lse = run_kernels(problem, 0, tile, card.multi_processor_count, causal)
                        check_attention(problem, 0, out, lse, causal)


TILES = [Tile(rows, tokens, 8 if rows == 64 else 4, 2, 1) for rows in (64, 32, 16) for tokens in (64, 32, 16)] + [Tile(16, 16, 4, 1, 1)]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"R{tile.block_rows}-T{tile.block_tokens}-W{tile.num_warps}-S{tile.num_stages}")
def test_every_tile_is_right(tile: Tile) -> None:
    """One that compiled, ran and was wrong has been seen: each is compared, whichever card chooses it."""
    for heads, programs in ((16, 132), (65, 20)):
        problem = make_problem(V3, [4096, 1, 0, 999, 64], [1] * 5, heads, "cuda", seed=heads, written=True)
        check_attention(problem, 0, *run_kernels(problem, 0, tile, programs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank,rope", [(512, 64), (256, 32), (80, 48)])
@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_write_touches_no_page_but_its_own(rank: int, rope: int, page_size: int, dtype: torch.dtype) -> None:
    """Canary pages before and behind the pool; slots -1, -64, num_slots, 2**31 and 2**62 are dropped."""
    num_pages, num_tokens, entry = 40, 300, rank + rope
    whole = torch.full((num_pages + 2, 3, page_size, entry), 7.0, dtype=dtype, device="cuda")
    pages, num_slots = whole[1:-1, 1], num_pages * page_size
    slots = torch.randperm(num_slots)[:num_tokens]
    slots[[0, 7, 50, 90, 299]] = torch.tensor([-1, -64, num_slots, 2**31, 2**62])
    latent = torch.randn((num_tokens, 2, entry), device="cuda").to(dtype)[:, 1]
    want = whole.clone()
    inside = (slots >= 0) & (slots < num_slots)
    kept = slots[inside].cuda()
    want[1 + kept // page_size, 1, kept % page_size] = latent[inside.cuda()]
    write_latent(latent, slots.cuda(), pages, rank)
    assert torch.equal(whole, want)
