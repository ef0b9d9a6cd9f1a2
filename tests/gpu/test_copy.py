"""The page copy, compiled: exact bytes, beyond 2**31 values as well."""

import pytest
import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory


@pytest.mark.parametrize(
    "layout", [LatentLayout(512, 64, 61, 64), LatentLayout(256, 32, 3, 16, "float16"), LatentLayout(32, 16, 2, 48, "float32")]
)
def test_copy_takes_the_leading_slots_of_all_layers(layout: LatentLayout) -> None:
    memory = PageMemory(layout, 40, "cuda")
    memory.pages.normal_()
    sources, targets = [0, 0, 5, -1, 39, 7], [11, 12, 13, 14, 15, -1]
    tokens = [1, layout.page_size, layout.page_size - 1, 3, 0, 3]
    want = memory.pages.clone()
    for source, target, count in zip(sources, targets, tokens, strict=True):
        if source >= 0 and target >= 0:
            want[target, :, :count] = want[source, :, :count]
    memory.copy_pages(sources, targets, tokens)
    assert torch.equal(memory.pages, want)
    memory.close()


def test_pages_far_behind_the_first_two_billion_values() -> None:
    layout = LatentLayout(512, 64, 61, 64)
    memory = PageMemory(layout, 1200, "cuda")  # 2.7e9 values
    memory.pages[3].normal_()
    memory.pages[1199] = 0
    memory.copy_pages([3], [1199], [40])
    assert torch.equal(memory.pages[1199, :, :40], memory.pages[3, :, :40])
    assert not memory.pages[1199, :, 40:].any()
    memory.copy_pages([1199], [0], [40])
    assert torch.equal(memory.pages[0, :, :40], memory.pages[3, :, :40])
    memory.close()
