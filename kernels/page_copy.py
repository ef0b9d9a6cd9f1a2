"""Copy the leading slots of pages to other pages, in all layers, in one launch.

Floor: 2 * tokens * num_layers * entry * itemsize bytes a copy, at copy bandwidth; no arithmetic. In page-major memory the leading slots
of one page and layer are one contiguous run, so a program copies a stretch of it in 16-byte vectors.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["copy_pages"]

BLOCK = 4096  # values a program copies: 8 KiB of bf16


def copy_pages(pages: Tensor, copies: Tensor) -> None:
    """Copy slots [0, tokens) of page `source` to page `target`, for each row of `copies`.

    pages   [num_pages, num_layers, page_size, entry]  contiguous, any dtype, device; may pass 2**31 values
    copies  [num_copies, 3]                            int32, contiguous, device: source, target, tokens; source or target out of range (-1
                                                       is padding) copies nothing, tokens beyond the page are cut off

    No page may be a source and a target; targets must be distinct. One launch, no allocation, no host sync: safe under graph capture."""
    num_copies = copies.shape[0]
    if num_copies == 0:
        return
    num_pages, num_layers, page_size, entry = pages.shape
    _copy_pages_kernel[(num_copies, num_layers, triton.cdiv(page_size * entry, BLOCK))](
        pages,
        copies,
        num_pages,
        pages.stride(0),
        pages.stride(1),
        PAGE_SIZE=page_size,
        ENTRY=entry,
        BLOCK_VALUES=BLOCK,
        num_warps=4,
    )


@triton.jit
def _copy_pages_kernel(
    pages_ptr,
    copies_ptr,
    num_pages,
    stride_pages_page,
    stride_pages_layer,
    PAGE_SIZE: tl.constexpr,
    ENTRY: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    row = copies_ptr + tl.program_id(0) * 3
    source = tl.load(row).to(tl.int64)
    target = tl.load(row + 1).to(tl.int64)
    tokens = tl.minimum(tl.load(row + 2), PAGE_SIZE)
    if (source < 0) | (source >= num_pages) | (target < 0) | (target >= num_pages):
        return
    layer = pages_ptr + tl.program_id(1).to(tl.int64) * stride_pages_layer
    value = tl.program_id(2) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)  # [BLOCK_VALUES], below PAGE_SIZE * ENTRY: int32 will do
    keep = value < tokens * ENTRY
    copied = tl.load(layer + source * stride_pages_page + value, mask=keep)
    tl.store(layer + target * stride_pages_page + value, copied, mask=keep)
