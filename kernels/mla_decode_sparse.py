"""Absorbed MLA attention of each query token to its own list of slots (DeepSeek sparse attention: an indexer chose them).

A program takes one query token, some of its heads and a stretch of its list. The lists are all of one length, so who does what follows from
the shapes alone: there is no work list, and lists may be made on the device in the same step. Where few tokens are in a step the lists are
cut, and a second kernel merges the pieces in their order.

Floor: bytes = tokens * topk * slot_bytes + rows * (entry + rank) * itemsize at copy bandwidth; FLOPs = rows * topk * 2 * (entry + rank). No
two tokens share what they read, unlike in dense decode, but heads of a token do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmanager.kernels import mla_decode
from kvmanager.kernels.latent_formats import GROUP, Stored, load_latents, view_pages
from kvmanager.kernels.mla_decode import Tile

__all__ = ["Cut", "attend_selected", "choose_tile", "cut_lists"]

PIECE_TILES_MIN = 2  # no piece of a list is shorter: merging it would cost more than it saves


class Cut(NamedTuple):
    """How lists are cut: `pieces` of `piece_tokens` each, the last may be shorter; partials: slots of block_rows rows that they need."""

    pieces: int
    piece_tokens: int
    partials: int


def choose_tile(num_heads: int, rank: int, rope: int, dtype: torch.dtype, arch: int) -> Tile:
    """As mla_decode.choose_tile; dtype is that of page memory."""
    return mla_decode.choose_tile(num_heads, rank, rope, dtype, arch, several_tokens=False)


def cut_lists(num_tokens: int, num_heads: int, topk: int, tile: Tile, num_programs: int) -> Cut:
    """As many pieces as keep num_programs programs busy and no more, so that no more than num_programs partial slots are needed."""
    blocks = num_tokens * triton.cdiv(num_heads, tile.block_rows)
    tiles = triton.cdiv(topk, tile.block_tokens)
    pieces = max(1, min(num_programs // max(blocks, 1), tiles // PIECE_TILES_MIN))
    piece_tiles = triton.cdiv(tiles, pieces)
    pieces = max(1, triton.cdiv(tiles, max(piece_tiles, 1)))
    return Cut(pieces, piece_tiles * tile.block_tokens, blocks * pieces if pieces > 1 else 0)


def attend_selected(
    q: Tensor,
    pages: Tensor | Stored,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    tile: Tile,
    cut: Cut,
    sink: Tensor | None = None,
) -> None:
    """Attention of each query token to the slots that it lists.

    q            [num_tokens, heads, entry]       bf16 | fp16 | fp32, device; entry contiguous, tokens and heads may be strided
    pages        [num_pages, page_size, entry]    dtype of q; one layer's view; or one layer Stored, in any format
    indices      [num_tokens, topk]               int32; page_id * page_size + offset, as FlashMLA has them; -1 and all else out of range is
                                                  left out; topk contiguous, tokens may be strided. A slot listed twice counts twice
    out          [num_tokens, heads, rank]        dtype of q, contiguous; lse [num_tokens, heads] float32, natural log
    partial_out  [>= cut.partials, block_rows, rank]  float32; partial_lse [>= cut.partials, block_rows]
    sink         float32 [heads]: out is scaled by exp(lse) / (exp(lse) + exp(sink)); lse stays without it

    A token that lists nothing gives 0 and -inf. One launch, two where lists are cut; no allocation, no host sync: safe under graph capture.
    No atomics: the same shapes and inputs give the same bits."""
    num_tokens, num_heads, entry = q.shape
    rank, topk = out.shape[-1], indices.shape[1]
    if num_tokens == 0:
        return
    values, k_rope, group_scales, stored_scale = pages if isinstance(pages, Stored) else view_pages(pages, rank)
    scales = values if group_scales is None else group_scales
    blocks = triton.cdiv(num_heads, tile.block_rows)
    _attend_selected_kernel[(num_tokens * cut.pieces * blocks,)](
        q,
        values,
        k_rope,
        scales,
        indices,
        out,
        lse,
        partial_out,
        partial_lse,
        sink if sink is not None else lse,
        scale * stored_scale * 1.4426950408889634,  # exp2 inside
        stored_scale,
        num_heads,
        topk,
        cut.pieces,
        cut.piece_tokens,
        values.shape[0] * values.shape[1],
        q.stride(0),
        q.stride(1),
        indices.stride(0),
        values.stride(0),
        k_rope.stride(0),
        scales.stride(0),
        STRIDE_VALUES_SLOT=values.stride(1),
        STRIDE_ROPE_SLOT=k_rope.stride(1),
        STRIDE_SCALES_SLOT=scales.stride(1),
        GROUP=GROUP if group_scales is not None else 0,
        PAGE_SIZE=values.shape[1],
        RANK=rank,
        ROPE=entry - rank,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(entry - rank),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_TOKENS=tile.block_tokens,
        BLOCKS=blocks,
        IS_CUT=cut.pieces > 1,
        HAS_SINK=sink is not None,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if cut.pieces > 1:
        _merge_selected_kernel[(num_tokens * num_heads,)](
            partial_out,
            partial_lse,
            out,
            lse,
            sink if sink is not None else lse,
            num_heads,
            cut.pieces,
            RANK=rank,
            BLOCK_RANK=triton.next_power_of_2(rank),
            BLOCK_ROWS=tile.block_rows,
            BLOCKS=blocks,
            HAS_SINK=sink is not None,
            num_warps=4 if rank >= 512 else 1,
        )


@triton.jit(do_not_specialize=["num_heads", "topk", "pieces", "piece_tokens"])
def _attend_selected_kernel(
    q_ptr,
    values_ptr,
    rope_ptr,
    scales_ptr,
    indices_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    sink_ptr,
    scale_log2,
    stored_scale,
    num_heads,
    topk,
    pieces,
    piece_tokens,
    num_slots,
    stride_q_token,
    stride_q_head,
    stride_indices_token,
    stride_values_page,
    stride_rope_page,
    stride_scales_page,
    STRIDE_VALUES_SLOT: tl.constexpr,
    STRIDE_ROPE_SLOT: tl.constexpr,
    STRIDE_SCALES_SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_CUT: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    block = tl.program_id(0) % BLOCKS  # neighbours read the same latents
    piece = tl.program_id(0) // BLOCKS % pieces
    token = (tl.program_id(0) // BLOCKS // pieces).to(tl.int64)
    column = tl.arange(0, BLOCK_RANK)
    rope = tl.arange(0, BLOCK_ROPE)
    head = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    is_head = head < num_heads
    q_row = q_ptr + token * stride_q_token + head.to(tl.int64) * stride_q_head
    q = tl.load(q_row[:, None] + column[None, :], mask=is_head[:, None] & (column < RANK)[None, :], other=0.0)
    q_rope = tl.load(q_row[:, None] + RANK + rope[None, :], mask=is_head[:, None] & (rope < ROPE)[None, :], other=0.0)

    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)  # running maximum, in log2
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
    begin = piece * piece_tokens
    for start in tl.range(begin, tl.minimum(begin + piece_tokens, topk), BLOCK_TOKENS):
        place = start + tl.arange(0, BLOCK_TOKENS)
        slot = tl.load(indices_ptr + token * stride_indices_token + place, mask=place < topk, other=-1).to(tl.int64)
        keep = (slot >= 0) & (slot < num_slots)  # before // and %, which truncate toward zero
        slot = tl.where(keep, slot, 0)
        kv, k_rope = load_latents(
            values_ptr,
            rope_ptr,
            scales_ptr,
            slot // PAGE_SIZE,
            slot % PAGE_SIZE,
            keep,
            stride_values_page,
            stride_rope_page,
            stride_scales_page,
            STRIDE_VALUES_SLOT,
            STRIDE_ROPE_SLOT,
            STRIDE_SCALES_SLOT,
            RANK,
            ROPE,
            BLOCK_RANK,
            BLOCK_ROPE,
            GROUP,
            True,
            q.dtype,
        )
        score = tl.dot(q, tl.trans(kv), input_precision="ieee")
        score = tl.dot(q_rope, tl.trans(k_rope), score, input_precision="ieee") * scale_log2
        score = tl.where(keep[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        probability = tl.exp2(score - base[:, None])
        rescale = tl.exp2(top - base)
        total = total * rescale + tl.sum(probability, 1)
        acc = tl.dot(probability.to(q.dtype), kv, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    seen = total > 0
    value = acc / tl.where(seen, total, 1.0)[:, None] * stored_scale
    norm = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    is_value = is_head[:, None] & (column < RANK)[None, :]
    if IS_CUT:
        row = ((token * pieces + piece) * BLOCKS + block) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tl.store(partial_out_ptr + row[:, None] * RANK + column[None, :], value, mask=is_value)
        tl.store(partial_lse_ptr + row, norm, mask=is_head)
    else:
        if HAS_SINK:
            sink = tl.load(sink_ptr + head, mask=is_head, other=float("-inf"))
            value = value / (1.0 + tl.exp2((sink - tl.where(seen, norm, 0.0)) * 1.4426950408889634))[:, None]
        row = token * num_heads + head
        tl.store(out_ptr + row[:, None] * RANK + column[None, :], value.to(out_ptr.dtype.element_ty), mask=is_value)
        tl.store(lse_ptr + row, norm, mask=is_head)


@triton.jit(do_not_specialize=["num_heads", "pieces"])
def _merge_selected_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
    num_heads,
    pieces,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token, head = row // num_heads, row % num_heads
    column = tl.arange(0, BLOCK_RANK)
    first = token * pieces * BLOCKS * BLOCK_ROWS + head  # blocks of a piece lie end to end: head h is its row h
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_RANK], tl.float32)
    for piece in range(pieces):
        part = first + piece * BLOCKS * BLOCK_ROWS
        norm = tl.load(partial_lse_ptr + part) * 1.4426950408889634
        value = tl.load(partial_out_ptr + part * RANK + column, mask=column < RANK, other=0.0)
        new_top = tl.maximum(top, norm)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight, keep = tl.exp2(norm - base), tl.exp2(top - base)
        total = total * keep + weight
        acc = acc * keep + weight * value
        top = new_top
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    value = acc / divisor
    norm = tl.where(seen, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf"))
    if HAS_SINK:
        value = value / (1.0 + tl.exp2((tl.load(sink_ptr + head) - tl.where(seen, norm, 0.0)) * 1.4426950408889634))
    tl.store(out_ptr + row * RANK + column, value.to(out_ptr.dtype.element_ty), mask=column < RANK)
    tl.store(lse_ptr + row, norm)
