"""Absorbed MLA attention over paged latents: decode, and causal prefill of several tokens, are one kernel.

A row is one (query token, head). A program takes rows BLOCK_ROWS at a time through a work list that the host made: which rows, which
stretch of the sequence's latents, and where the result goes (the output, or a partial slot that mla_merge.py merges). All rows of a block
share each latent that is loaded, as K (all of it) and as V (its first `rank` values).

Floor of a decode step: bytes = tokens * entry * itemsize + rows * (entry + rank) * itemsize at copy bandwidth; FLOPs = rows * tokens * 2 *
(entry + rank) at the matmul rate. At 512 + 64 in bf16 the two meet near 100 heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvmanager.kernels.latent_formats import GROUP, Stored, load_latents, view_pages

__all__ = ["ITEM_FIELDS", "TRITON_VERSION", "Tile", "attend", "choose_tile"]

TRITON_VERSION = triton.__version__
ITEM_FIELDS = 8  # int32: page_start, first_token, query_len, length, row, begin, end, partial slot or -1


class Tile(NamedTuple):
    """What a program works on at a time. Depends on heads, entry, dtype and architecture alone: a tile chosen by timing changes bits."""

    block_rows: int  # (query token, head) rows
    block_tokens: int  # latents of the sequence
    num_warps: int
    num_stages: int
    programs_per_sm: int


_SHARED_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB a program may have, by architecture
_TOKENS_AND_STAGES = ((64, 2), (32, 2), (16, 2), (16, 1))


def choose_tile(num_heads: int, rank: int, rope: int, dtype: torch.dtype, arch: int, several_tokens: bool) -> Tile:
    """The tile for one model on one architecture (90 is Hopper); several_tokens: rows of prefill, which fill a tall tile at any head count.

    dtype: of page memory; float8_e4m3fn and uint8 (fp8_ds_mla) are read in eight bits and multiplied in sixteen."""
    block_rank, width = triton.next_power_of_2(rank), triton.next_power_of_2(rank) + triton.next_power_of_2(rope)
    if dtype == torch.float32:
        return Tile(16, 16, 4, 1, 1)
    heights = (64, 32, 16) if (several_tokens or num_heads > 16) and block_rank <= 512 else (16,)
    is_fp8 = dtype.itemsize == 1
    budget = _SHARED_BYTES.get(arch, 99) * 1024 - 2048
    if is_fp8:
        # Heights of 16: smaller tiles and more programs hide more of the conversion (0.60 against 0.67 ms at 128 x 16 x 8,192 on an H100).
        for tile in (Tile(64, 64, 8, 2, 1), Tile(64, 32, 8, 2, 1)) if heights[0] == 64 else ():
            if (tile.block_tokens + 64) * width * 2 + tile.block_tokens * (width + 80) <= budget:
                return tile
        fits = 32 * (width * 2 + 2 * (width + 80)) <= budget
        return Tile(16, 32, 4, 2, 2) if fits else Tile(16, 16, 4, 1, 1)
    for block_rows in heights:
        for block_tokens, num_stages in _TOKENS_AND_STAGES[: 2 if block_rows > 16 else None]:
            num_warps = 8 if block_rows == 64 and block_rank > 128 else 4
            exchange = block_rows * block_tokens if num_warps == 8 else 0  # probabilities cross between two warpgroups
            if ((block_rows + num_stages * block_tokens) * width + exchange) * 2 <= budget:
                return Tile(block_rows, block_tokens, num_warps, num_stages, 2 if block_rows == 16 or block_rank <= 256 else 1)
    return Tile(16, 16, 4, 1, 1)


def attend(
    q: Tensor,
    pages: Tensor | Stored,
    page_ids: Tensor,
    programs: Tensor,
    items: Tensor,
    out: Tensor,
    lse: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    tile: Tile,
    causal: bool = True,
    soft_cap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> None:
    """Run a work list over one layer.

    q            [num_tokens, heads, entry]      bf16 | fp16 | fp32, device; entry contiguous, tokens and heads may be strided
    pages        [num_pages, page_size, entry]   dtype of q; one layer's view, page stride may pass 2**31 elements; or one layer Stored, in
                                                 eight bits: its latents become numbers of q's dtype as they are read
    page_ids     [any]                           int32; an item's pages are at its page_start and after; those past its `end` are never read
    programs     [num_programs + 1]              int32; program p runs items[programs[p] : programs[p + 1]]
    items        [any, 8]                        int32, ITEM_FIELDS; `begin` is a multiple of block_tokens, `row` of block_rows
    out          [num_tokens, heads, rank]       dtype of q, contiguous; rows of unsplit items are written here
    lse          [num_tokens, heads]             float32, contiguous; natural log
    partial_out  [num_partials, block_rows, rank]  float32; partial_lse [num_partials, block_rows]: rows of split items

    soft_cap     scores s become soft_cap * tanh(s / soft_cap)
    window       a query token sees so many positions at most, its own or the last one (not causal) included
    sink         float32 [heads]: out is scaled by exp(lse) / (exp(lse) + exp(sink)); lse and partials stay without it

    Query token t of an item sees positions up to length - query_len + t if causal, else all. A row that sees nothing gives 0 and -inf.
    One launch of a fixed grid, no allocation, no host sync: safe under graph capture, replayable with new work lists. No atomics."""
    rank, rope = out.shape[-1], q.shape[-1] - out.shape[-1]
    values, k_rope, group_scales, stored_scale = pages if isinstance(pages, Stored) else view_pages(pages, rank)
    scales = values if group_scales is None else group_scales
    _attend_kernel[(programs.shape[0] - 1,)](
        q,
        values,
        k_rope,
        scales,
        page_ids,
        programs,
        items,
        out,
        lse,
        partial_out,
        partial_lse,
        sink if sink is not None else lse,
        scale * stored_scale * 1.4426950408889634,  # exp2 inside
        (soft_cap or 1.0) * 1.4426950408889634,
        stored_scale,
        q.shape[1],
        window or 0,
        q.stride(0),
        q.stride(1),
        values.stride(0),
        k_rope.stride(0),
        scales.stride(0),
        STRIDE_VALUES_SLOT=values.stride(1),
        STRIDE_ROPE_SLOT=k_rope.stride(1),
        STRIDE_SCALES_SLOT=scales.stride(1),
        GROUP=GROUP if group_scales is not None else 0,
        HAS_SCALE=stored_scale != 1.0,
        PAGE_SIZE=values.shape[1],
        RANK=rank,
        ROPE=rope,
        BLOCK_RANK=triton.next_power_of_2(rank),
        BLOCK_ROPE=triton.next_power_of_2(rope),
        BLOCK_ROWS=tile.block_rows,
        BLOCK_TOKENS=tile.block_tokens,
        IS_CAUSAL=causal,
        HAS_CAP=soft_cap is not None,
        HAS_WINDOW=window is not None,
        HAS_SINK=sink is not None,
        IS_WIDE=tile.num_warps == 8 and tile.block_rows == 64,  # two warpgroups of wgmma
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit(do_not_specialize=["num_heads", "window"])
def _attend_kernel(
    q_ptr,
    values_ptr,
    rope_ptr,
    scales_ptr,
    page_ids_ptr,
    programs_ptr,
    items_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    sink_ptr,
    scale_log2,
    cap_log2,
    stored_scale,
    num_heads,
    window,
    stride_q_token,
    stride_q_head,
    stride_values_page,
    stride_rope_page,
    stride_scales_page,
    STRIDE_VALUES_SLOT: tl.constexpr,
    STRIDE_ROPE_SLOT: tl.constexpr,
    STRIDE_SCALES_SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINK: tl.constexpr,
    IS_WIDE: tl.constexpr,
):
    first = tl.load(programs_ptr + tl.program_id(0))
    last = tl.load(programs_ptr + tl.program_id(0) + 1)
    column = tl.arange(0, BLOCK_RANK)
    rope = tl.arange(0, BLOCK_ROPE)
    block_row = tl.arange(0, BLOCK_ROWS)
    block_token = tl.arange(0, BLOCK_TOKENS)
    for index in range(first, last):
        item_ptr = items_ptr + index * 8  # 2**24 items at most
        table_ptr = page_ids_ptr + tl.load(item_ptr).to(tl.int64)
        first_token = tl.load(item_ptr + 1)
        query_len = tl.load(item_ptr + 2)
        length = tl.load(item_ptr + 3)
        row0 = tl.load(item_ptr + 4)
        begin = tl.load(item_ptr + 5)
        end = tl.load(item_ptr + 6)
        partial = tl.load(item_ptr + 7)

        row = row0 + block_row  # [BLOCK_ROWS]
        is_row = row < query_len * num_heads
        token = row // num_heads
        head = row % num_heads
        sees = tl.where(IS_CAUSAL, length - query_len + token + 1, length)
        limit = tl.minimum(sees, end)
        token = (first_token + token).to(tl.int64)

        q_row_ptr = q_ptr + token * stride_q_token + head.to(tl.int64) * stride_q_head
        q = tl.load(q_row_ptr[:, None] + column[None, :], mask=is_row[:, None] & (column < RANK)[None, :], other=0.0)
        q_rope = tl.load(q_row_ptr[:, None] + RANK + rope[None, :], mask=is_row[:, None] & (rope < ROPE)[None, :], other=0.0)

        top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)  # running maximum, in log2
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_RANK], tl.float32)
        for start in tl.range(begin, end, BLOCK_TOKENS):
            # Past the end the last latent is read again: table entries and slots nobody wrote are never touched, and its probability is 0.
            position = tl.minimum(start + block_token, end - 1)  # [BLOCK_TOKENS]
            if PAGE_SIZE % BLOCK_TOKENS == 0:
                page = tl.load(table_ptr + start // PAGE_SIZE).to(tl.int64)
            else:
                page = tl.load(table_ptr + position // PAGE_SIZE).to(tl.int64)
            kv, k_rope = load_latents(
                values_ptr,
                rope_ptr,
                scales_ptr,
                page,
                (position % PAGE_SIZE).to(tl.int64),
                position,
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
                False,
                q.dtype,
            )
            if IS_WIDE:
                # Two warpgroups. Triton puts a product that leads to another into one column of warps, and here both groups would then
                # compute all of it. The scaling keeps the two score products apart; the `if`, always taken, hides the way to the third.
                score = tl.dot(q, tl.trans(kv)) * scale_log2
                score += tl.dot(q_rope, tl.trans(k_rope)) * scale_log2
                probability = score.to(kv.dtype)
                keep = total
                if num_heads > 0:
                    if HAS_CAP:
                        score = _capped(score, cap_log2)
                    score = tl.where((start + block_token)[None, :] < limit[:, None], score, float("-inf"))
                    if HAS_WINDOW:
                        score = tl.where((start + block_token)[None, :] >= (sees - window)[:, None], score, float("-inf"))
                    probability, keep, top, total = _softmax(score, top, total, kv.dtype)
            else:
                score = tl.dot(q, tl.trans(kv), input_precision="ieee")
                score = tl.dot(q_rope, tl.trans(k_rope), score, input_precision="ieee") * scale_log2
                if HAS_CAP:
                    score = _capped(score, cap_log2)
                score = tl.where((start + block_token)[None, :] < limit[:, None], score, float("-inf"))
                if HAS_WINDOW:
                    score = tl.where((start + block_token)[None, :] >= (sees - window)[:, None], score, float("-inf"))
                probability, keep, top, total = _softmax(score, top, total, kv.dtype)
            acc = tl.dot(probability, kv, acc * keep[:, None], input_precision="ieee")

        seen = total > 0
        value = acc / tl.where(seen, total, 1.0)[:, None]
        if HAS_SCALE:
            value = value * stored_scale
        norm = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
        is_value = is_row[:, None] & (column < RANK)[None, :]
        if partial < 0:
            out_row = token * num_heads + head
            if HAS_SINK:
                above = tl.load(sink_ptr + head) - tl.where(seen, norm, 0.0)
                value = value / (1.0 + tl.exp2(above * 1.4426950408889634))[:, None]
            tl.store(out_ptr + out_row[:, None] * RANK + column[None, :], value.to(out_ptr.dtype.element_ty), mask=is_value)
            tl.store(lse_ptr + out_row, norm, mask=is_row)
        else:
            partial_row = partial.to(tl.int64) * BLOCK_ROWS + block_row
            tl.store(partial_out_ptr + partial_row[:, None] * RANK + column[None, :], value, mask=is_value)
            tl.store(partial_lse_ptr + partial_row, norm, mask=is_row)


@triton.jit
def _capped(score, cap):
    """cap * tanh(score / cap), both in log2."""
    x = score / cap
    square = x * x
    # Near 0 the difference below loses its digits; the series is good to 3e-8 up to 0.3.
    near = score * (1.0 - square * (0.3333333333 - square * (0.1333333333 - square * (0.0539682540 - square * 0.0218694885))))
    return tl.where(square < 0.09, near, cap * (1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))))


@triton.jit
def _softmax(score, top, total, dtype: tl.constexpr):
    """One step of the running softmax: probabilities of `score` (log2, -inf where masked), and what earlier results are scaled by."""
    new_top = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen nothing yet: exp2(-inf), not exp2(-inf + inf)
    probability = tl.exp2(score - base[:, None])
    keep = tl.exp2(top - base)
    return probability.to(dtype), keep, new_top, total * keep + tl.sum(probability, 1)
