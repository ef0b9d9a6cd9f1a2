"""Copy token slots of page-major memory at an address - another card's, reached over NVLink, or this one's - into own pages, in one launch: as
they are, or converted from bfloat16 to eight bits.

Floor: bytes over the link, or 2 * bytes at copy bandwidth within a card; no arithmetic. A program copies one stretch of one run in 16-byte
vectors, 128 bytes a thread in flight: NVLink's latency (about 3 us) times its bandwidth is some 1.2 MB for the whole card.
A staging buffer is a memory of as many pages as it holds: gathering and scattering are this kernel with 0, 1, 2, ... on one side.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvmanager.kernels.latent_formats import GROUP, Stored, divide_groups, to_e4m3

__all__ = ["convert_pages", "pull_pages"]

# words of 8 bytes that a program copies, and its warps: long runs (whole pages), and runs of a page's slots in one layer
TILES = {True: (2048, 8), False: (1024, 4)}
CONVERT_TOKENS, CONVERT_WARPS = 8, 8  # token slots of one layer that a program converts: 9 KiB of DeepSeek-V3's, on their way at once


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
def _load_segment(segments_ptr, index):
    """Source page, its first slot, target page, its first slot, slots; pages as int64."""
    row = segments_ptr + index * 5
    source_page, target_page = tl.load(row).to(tl.int64), tl.load(row + 2).to(tl.int64)
    return source_page, tl.load(row + 1), target_page, tl.load(row + 3), tl.load(row + 4)


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
    source_page, source_slot, target_page, target_slot, slots = _load_segment(segments_ptr, pid // blocks // layers)
    words = slots * NUM_WORDS * layers_in_run
    source_ptr = tl.multiple_of(source_address.to(tl.pointer_type(tl.int64)), 16)  # an entry is whole vectors of 16 bytes, so all runs are
    source = source_ptr + source_page * stride_source_page + (layer * stride_source_layer + source_slot * NUM_WORDS)
    target = target_ptr + target_page * stride_target_page + (layer * stride_target_layer + target_slot * NUM_WORDS)
    word = block * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)  # [BLOCK_WORDS], within a page: int32 will do
    keep = word < words
    value = tl.load(source + word, mask=keep, other=0)
    tl.store(target + word, value, mask=keep)


def convert_pages(
    source_address: int,
    target: Stored,
    inverse: Tensor,
    segments: Tensor,
    *,
    source_page_size: int,
    first_layer: int,
    end_layer: int,
) -> None:
    """Write each segment's slots in the target's format, of layers first_layer up to end_layer: the bytes of `write_quantised`.

    source_address   of [pages, num_layers, source_page_size, rank + rope] bfloat16, contiguous, aligned to 16 bytes, readable by target's device
    target           float8_e4m3fn or fp8_ds_mla, of all layers: values [num_pages, num_layers, page_size, rank] and the rest alike, device; may
                     pass 2**31 elements; its scale is not read
    inverse          [num_layers]  float32, device: what values are multiplied by before they are rounded, where the format has one scale a layer
    segments         [n, 5]  int32, contiguous, device: source page, its first slot, target page, its first slot, slots; all in range

    Targets must be distinct. One launch, no allocation, no host sync: safe under graph capture."""
    num_segments = segments.shape[0]
    if num_segments == 0:
        return
    values, rope, group_scales, _ = target
    _, num_layers, page_size, rank = values.shape
    width = rope.shape[-1]
    scales = values if group_scales is None else group_scales
    blocks = triton.cdiv(min(page_size, source_page_size), CONVERT_TOKENS)
    layers = end_layer - first_layer
    _convert_pages_kernel[(blocks * layers * num_segments,)](
        source_address,
        values,
        rope,
        scales,
        inverse,
        segments,
        blocks,
        layers,
        first_layer,
        num_layers * source_page_size * (rank + width),
        source_page_size * (rank + width),
        *values.stride()[:2],
        *rope.stride()[:2],
        *scales.stride()[:2],
        RANK=rank,
        ROPE=width,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(width),
        STRIDE_VALUES_SLOT=values.stride(2),
        STRIDE_ROPE_SLOT=rope.stride(2),
        STRIDE_SCALES_SLOT=scales.stride(2),
        GROUP=GROUP if group_scales is not None else 0,
        BLOCK_TOKENS=CONVERT_TOKENS,
        num_warps=CONVERT_WARPS,
    )


@triton.jit
def _convert_pages_kernel(
    source_address,
    values_ptr,
    rope_ptr,
    scales_ptr,
    inverse_ptr,
    segments_ptr,
    blocks,
    layers,
    first_layer,
    stride_source_page,
    stride_source_layer,
    stride_values_page,
    stride_values_layer,
    stride_rope_page,
    stride_rope_layer,
    stride_scales_page,
    stride_scales_layer,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    STRIDE_VALUES_SLOT: tl.constexpr,
    STRIDE_ROPE_SLOT: tl.constexpr,
    STRIDE_SCALES_SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    pid = tl.program_id(0)
    block = pid % blocks
    layer = ((pid // blocks) % layers + first_layer).to(tl.int64)
    source_page, source_slot, target_page, target_slot, slots = _load_segment(segments_ptr, pid // blocks // layers)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
    is_token = (token < slots)[:, None]
    column, rope = tl.arange(0, BLOCK_RANK), tl.arange(0, BLOCK_ROPE)
    is_column, is_rope = (column < RANK)[None, :], (rope < ROPE)[None, :]

    source_ptr = tl.multiple_of(source_address.to(tl.pointer_type(tl.bfloat16)), 16)
    source = source_ptr + source_page * stride_source_page + layer * stride_source_layer
    from_slot = (source_slot + token) * (RANK + ROPE)  # within a page and layer: int32 will do
    value = tl.load(source + from_slot[:, None] + column[None, :], mask=is_token & is_column, other=0.0).to(tl.float32)
    k_pe = tl.load(source + from_slot[:, None] + RANK + rope[None, :], mask=is_token & is_rope, other=0.0)  # [BLOCK_TOKENS, BLOCK_ROPE]

    slot = target_slot + token
    values = values_ptr + target_page * stride_values_page + layer * stride_values_layer
    ropes = rope_ptr + target_page * stride_rope_page + layer * stride_rope_layer
    if GROUP:
        groups, group_scales = divide_groups(value, BLOCK_TOKENS * (BLOCK_RANK // GROUP), GROUP)
        value = tl.reshape(groups, [BLOCK_TOKENS, BLOCK_RANK])
        group_scales = tl.reshape(group_scales, [BLOCK_TOKENS, BLOCK_RANK // GROUP])
        group = tl.arange(0, BLOCK_RANK // GROUP)
        scales = scales_ptr + target_page * stride_scales_page + layer * stride_scales_layer
        is_group = is_token & (group < RANK // GROUP)[None, :]
        tl.store(scales + (slot * STRIDE_SCALES_SLOT)[:, None] + group[None, :], group_scales, mask=is_group)
        k_pe_stored = k_pe
    else:
        inverse = tl.load(inverse_ptr + layer)
        value = value * inverse
        k_pe_stored = to_e4m3(k_pe.to(tl.float32) * inverse)
    tl.store(values + (slot * STRIDE_VALUES_SLOT)[:, None] + column[None, :], to_e4m3(value), mask=is_token & is_column)
    tl.store(ropes + (slot * STRIDE_ROPE_SLOT)[:, None] + rope[None, :], k_pe_stored, mask=is_token & is_rope)
