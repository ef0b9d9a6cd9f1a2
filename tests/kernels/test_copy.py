"""The page copy under the interpreter: the leading slots of every layer, and nothing anywhere else."""

import pytest
import torch

from kvmanager.kernels.page_copy import copy_pages


@pytest.mark.parametrize("page_size,entry", [(16, 48), (48, 80), (64, 576)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_copy_takes_the_leading_slots_of_all_layers_and_touches_nothing_else(page_size: int, entry: int, dtype: torch.dtype) -> None:
    """No slot, one, all but one, all; NaN is copied as it is and never spread; padding and pages that do not exist copy nothing."""
    generator = torch.Generator().manual_seed(page_size)
    whole = torch.randn((12, 3, page_size, entry), generator=generator).to(dtype)
    whole[3, :, 1:] = float("nan")
    pages = whole[1:-1]
    copies = [[2, 0, 1], [4, 1, page_size - 1], [4, 3, page_size], [9, 5, 0], [-1, 6, 4], [6, -1, 4], [10, 7, 4], [4, 10, 4], [4, 8, 9999]]
    want = whole.clone()
    for source, target, tokens in copies:
        if 0 <= source < 10 and 0 <= target < 10:
            want[1 + target, :, :tokens] = want[1 + source, :, :tokens]
    copy_pages(pages, torch.tensor(copies, dtype=torch.int32))
    assert torch.equal(whole.nan_to_num(nan=1e4), want.nan_to_num(nan=1e4))


def test_no_copies_launch_nothing() -> None:
    copy_pages(torch.empty(2, 1, 16, 48), torch.empty((0, 3), dtype=torch.int32))
