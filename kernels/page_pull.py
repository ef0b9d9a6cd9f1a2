"""Copy token slots of page-major memory at an address - another card's, reached over NVLink, or this one's - into own pages, in one launch.

Floor: bytes over the link, or 2 * bytes at copy bandwidth within a card; no arithmetic. A program copies one stretch of one run in 16-byte
vectors, 128 bytes a thread in flight: NVLink's latency (about 3 us) times its bandwidth is some 1.2 MB for the whole card.
A staging buffer is a memory of as many pages as it holds: gathering and scattering are this kernel with 0, 1, 2, ... on one side.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["pull_pages"]

# words of 8 bytes that a program copies, and its warps: long runs (whole pages), and runs of a page's slots in one layer
TILES = {True: (2048, 8), False: (1024, 4)}


def pull_pages(
    source_address: int,
    target: Tensor,
    segments: Tensor,
    *,
    source_page_size: int,
    whole: bool,
    first_layer: int,
    end_layer: int,
) -> None:
    """Copy each segment's slots, of layers first_layer up to end_layer.

    source_address   of [pages, num_layers, source_page_size, num_words] int64, contiguous, aligned to 16 bytes, readable by target's device
    target           [num_pages, num_layers, page_size, num_words]  int64, contiguous, device; may pass 2**31 words
    segments         [n, 5]  int32, contiguous, device: source page, its first slot, target page, its first slot, slots; all in range
    whole            every segment is a whole page of either side: one run for all layers

    Targets must be distinct. One launch, no allocation, no host sync: safe under graph capture."""
    num_segments = segments.shape[0]
    if num_segments == 0:
        return
    _, num_layers, page_size, num_words = target.shape
    block, warps = TILES[whole]
    count = end_layer - first_layer
    longest = (count * page_size if whole else min(page_size, source_page_size)) * num_words
    blocks = triton.cdiv(longest, block)
    layers = 1 if whole else count
    _pull_pages_kernel[(blocks * layers * num_segments,)](
        source_address,
        target,
        segments,
        blocks,
        layers,
        first_layer,
        num_layers * source_page_size * num_words,
        source_page_size * num_words,
        num_layers * page_size * num_words,
        page_size * num_words,
        count if whole else 1,
        NUM_WORDS=num_words,
        BLOCK_WORDS=block,
        num_warps=warps,
    )


@triton.jit
def _pull_pages_kernel(
    source_address,
    target_ptr,
    segments_ptr,
    blocks,
    layers,
    first_layer,
    stride_source_page,
    stride_source_layer,
    stride_target_page,
    stride_target_layer,
    layers_in_run,
    NUM_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % blocks
    layer = (pid // blocks) % layers + first_layer
    row = segments_ptr + (pid // blocks // layers) * 5
    source_page = tl.load(row).to(tl.int64)
    source_slot = tl.load(row + 1)
    target_page = tl.load(row + 2).to(tl.int64)
    target_slot = tl.load(row + 3)
    words = tl.load(row + 4) * NUM_WORDS * layers_in_run
    source_ptr = tl.multiple_of(source_address.to(tl.pointer_type(tl.int64)), 16)  # an entry is whole vectors of 16 bytes, so all runs are
    source = source_ptr + source_page * stride_source_page + (layer * stride_source_layer + source_slot * NUM_WORDS)
    target = target_ptr + target_page * stride_target_page + (layer * stride_target_layer + target_slot * NUM_WORDS)
    word = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)  # [BLOCK_WORDS], within a page: int32 will do
    keep = word < words
    value = tl.load(source + word, mask=keep, other=0)
    tl.store(target + word, value, mask=keep)
