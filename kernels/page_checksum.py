"""The 64-bit sum of token slots in page-major memory, the same number that the CPU computes.

Floor: every byte of the slots read once, at read bandwidth. Integer work: one 64-bit product and two sums for 8 bytes.
Partial sums meet in one atomic integer addition each: any order gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["sum_pages"]

BLOCK_SLOTS = 16
BLOCK_WORDS = 128


def sum_pages(words: Tensor, segments: Tensor, first_layer: int, end_layer: int, by_slot: Tensor, by_word: Tensor) -> Tensor:
    """Sum (by_slot[l, counted + i] + by_word[w]) * words[page, l, slot + i, w] modulo 2**64 over layers, slots i and words.

    words     [num_pages, num_layers, page_size, num_words]  int64, contiguous, device; may pass 2**31 values
    segments  [n, 4]                                         int32, contiguous, device: page, slot, slots, counted; all in range
    by_slot   [num_layers, factor_page_size]                 int64, contiguous
    by_word   [num_words]                                    int64, contiguous
    returns   [n]                                            int64, device

    One launch and one small allocation, no host sync."""
    num_segments = segments.shape[0]
    sums = torch.zeros(num_segments, dtype=torch.int64, device=words.device)
    if num_segments == 0:
        return sums
    num_words = words.shape[3]
    _sum_pages_kernel[(num_segments, end_layer - first_layer)](
        words,
        segments,
        by_slot,
        by_word,
        sums,
        first_layer,
        words.stride(0),
        words.stride(1),
        by_slot.stride(0),
        NUM_WORDS=num_words,
        BLOCK_SLOTS=BLOCK_SLOTS,
        BLOCK_WORDS=BLOCK_WORDS,
        num_warps=4,
    )
    return sums


@triton.jit
def _sum_pages_kernel(
    words_ptr,
    segments_ptr,
    by_slot_ptr,
    by_word_ptr,
    sums_ptr,
    first_layer,
    stride_words_page,
    stride_words_layer,
    stride_by_slot_layer,
    NUM_WORDS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    row = segments_ptr + tl.program_id(0) * 4
    page = tl.load(row).to(tl.int64)
    first_slot = tl.load(row + 1)
    slots = tl.load(row + 2)
    counted = tl.load(row + 3)
    layer = first_layer + tl.program_id(1)
    base = words_ptr + page * stride_words_page + layer.to(tl.int64) * stride_words_layer
    total = tl.zeros([BLOCK_SLOTS, BLOCK_WORDS], dtype=tl.int64)
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)  # [BLOCK_SLOTS], within a page: int32 will do from here on
        there = slot < slots
        by_slot = tl.load(by_slot_ptr + layer * stride_by_slot_layer + counted + slot, mask=there, other=0)
        for first_word in tl.static_range(0, NUM_WORDS, BLOCK_WORDS):
            word = first_word + tl.arange(0, BLOCK_WORDS)  # [BLOCK_WORDS]
            by_word = tl.load(by_word_ptr + word, mask=word < NUM_WORDS, other=0)
            inside = there[:, None] & (word < NUM_WORDS)[None, :]
            value = tl.load(base + (first_slot + slot)[:, None] * NUM_WORDS + word[None, :], mask=inside, other=0)
            total += (by_slot[:, None] + by_word[None, :]) * value
    tl.atomic_add(sums_ptr + tl.program_id(0), tl.sum(tl.sum(total, axis=1), axis=0), sem="relaxed")
