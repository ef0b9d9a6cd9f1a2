"""Absorbed MLA decode over latents stored in eight bits, for Hopper (sm_90), in Gluon: the work list and the results of mla_decode.py.

Tensor cores want bf16, so each latent has to be fetched, converted and put into shared memory once; what is left is to keep that off the way
of the products. Two partitions of warps do it:

    readers (two warpgroups)   global memory -> registers, a tile ahead | e4m3 -> bf16, times the scale -> shared memory, two tiles
    math    (one warpgroup)    S^T = K Q^T | softmax over tokens | O^T += V^T P^T

Latents are the rows of both products (64 of them fill wgmma's 64 rows, which 16 heads would not), K and V are the same bytes in shared memory,
the second time read across. A thread of the readers has one latent of a tile, so it looks up one page.

Floor: mla_decode.py's, of fewer bytes: 656 or 576 a token. Shared memory moves 72 KiB in and 136 KiB out a tile of 64 tokens: 1,660 cycles; to
bring a tile of fp8_ds_mla takes an H100's memory about 2,900.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from kvmanager.kernels.latent_formats import Stored
from kvmanager.kernels.mla_decode_hopper import _HAS_REINTERPRET, _barrier, _load_item, _new_barrier, _release

__all__ = ["BLOCK_TOKENS", "attend", "block_rows", "constants"]

BLOCK_TOKENS = 64
NUM_WARPS = 4  # of the math partition
READER_WARPS = gl.constexpr(8)
# Tokens, scale groups, 32-bit words. Eight rows of four lanes store their 16 bytes to 32 different banks of the swizzled tile.
_WORDS = gl.constexpr(gl.BlockedLayout([1, 1, 4], [8, 1, 4], [8, 1, 1], [2, 1, 0]))
_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_SHARED_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))


def block_rows(num_heads: int, several_tokens: bool) -> int:
    """(query token, head) rows of an item: 512 values of each are a warpgroup's accumulators."""
    return 32 if several_tokens or num_heads > 16 else 16


def constants(stored: Stored, rows: int, causal: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for. Strides are those of 32-bit words."""
    values, rope, group_scales, _ = stored
    return {
        "STRIDE_VALUES_SLOT": values.stride(1) // 4,
        "STRIDE_ROPE_SLOT": rope.stride(1) * rope.element_size() // 4,
        "STRIDE_SCALES_SLOT": 0 if group_scales is None else group_scales.stride(1),
        "PAGE_SIZE": values.shape[1],
        "HAS_GROUPS": group_scales is not None,
        "BLOCK_ROWS": rows,
        "IS_CAUSAL": causal,
    }


def attend(
    q: Tensor,
    stored: Stored,
    page_ids: Tensor,
    programs: Tensor,
    items: Tensor,
    out: Tensor,
    lse: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    causal: bool = True,
) -> None:
    """Run a work list over one layer. As mla_decode.attend, but for

    q        [num_tokens, heads, 576]  bf16; entry contiguous
    stored   one layer of float8_e4m3fn or fp8_ds_mla at 512 + 64
    items    `begin` is a multiple of BLOCK_TOKENS, `row` of partial_out's block_rows

    One launch of a fixed grid, no allocation, no host sync: safe under graph capture, replayable with new work lists. No atomics."""
    values, rope, group_scales, stored_scale = stored
    scales = values if group_scales is None else group_scales
    rows = partial_out.shape[1]
    _attend_kernel[(programs.shape[0] - 1,)](
        q,
        values.view(torch.int32),
        rope.view(torch.int32),
        scales if group_scales is not None else lse,
        page_ids,
        programs,
        items,
        out,
        lse,
        partial_out,
        partial_lse,
        scale * stored_scale * 1.4426950408889634,  # exp2 inside
        stored_scale,
        q.shape[1],
        q.stride(0),
        q.stride(1),
        values.stride(0) // 4,
        rope.stride(0) * rope.element_size() // 4,
        scales.stride(0),
        num_warps=NUM_WARPS,
        **constants(stored, rows, causal),
    )


@gluon.jit
def _widen(words, scale):
    """Four e4m3 a word, times scale: bf16, the first two and the last two."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b, c, d; .reg .b32 x, y; .reg .f32 e, f, g, h; mov.b32 {a, b}, $2;"
        " cvt.rn.f16x2.e4m3x2 x, a; cvt.rn.f16x2.e4m3x2 y, b; mov.b32 {a, b}, x; mov.b32 {c, d}, y;"
        " cvt.f32.f16 e, a; cvt.f32.f16 f, b; cvt.f32.f16 g, c; cvt.f32.f16 h, d;"
        " mul.f32 e, e, $3; mul.f32 f, f, $3; mul.f32 g, g, $3; mul.f32 h, h, $3;"
        " cvt.rn.bf16x2.f32 $0, f, e; cvt.rn.bf16x2.f32 $1, h, g; }",
        "=r,=r,r,f", [words, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _page_of(table_ptr, start, end, PAGE_SIZE: gl.constexpr):
    """Page id of each row of the tile at `start`. Past the end the last latent is read again: nothing that nobody wrote is ever touched."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, _WORDS)))
    position = gl.maximum(gl.minimum(start + row, end - 1), 0)
    return gl.load(table_ptr + position // PAGE_SIZE, mask=row * 0 + start < end, other=0)


@gluon.jit
def _fetch(
    pointers, strides, page, start, end,
    STRIDE_VALUES_SLOT: gl.constexpr, STRIDE_ROPE_SLOT: gl.constexpr, STRIDE_SCALES_SLOT: gl.constexpr, PAGE_SIZE: gl.constexpr, HAS_GROUPS: gl.constexpr,
):  # fmt: skip
    """One tile as it is stored, in registers."""
    values_ptr, rope_ptr, scales_ptr = pointers
    stride_values_page, stride_rope_page, stride_scales_page = strides
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, _WORDS)))
    offset = gl.maximum(gl.minimum(start + row, end - 1), 0) % PAGE_SIZE
    wide = page.to(gl.int64)
    group = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, _WORDS)))
    word = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, _WORDS))), 0), 1)
    ROPE_WORDS: gl.constexpr = 32 if HAS_GROUPS else 16
    rope_word = gl.expand_dims(gl.expand_dims(gl.arange(0, ROPE_WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, _WORDS))), 0), 1)
    values_slot = values_ptr + (wide * stride_values_page + offset * STRIDE_VALUES_SLOT)
    rope_slot = rope_ptr + (wide * stride_rope_page + offset * STRIDE_ROPE_SLOT)
    live = start < end
    values = gl.load(gl.expand_dims(gl.expand_dims(values_slot, 1) + gl.expand_dims(group * 32, 0), 2) + word, mask=live, other=0)
    rope = gl.load(gl.expand_dims(gl.expand_dims(rope_slot, 1), 2) + rope_word, mask=live, other=0)
    if HAS_GROUPS:
        scales_slot = scales_ptr + (wide * stride_scales_page + offset * STRIDE_SCALES_SLOT)
        scales = gl.load(gl.expand_dims(scales_slot, 1) + gl.expand_dims(group, 0), mask=live, other=0.0)
    else:
        scales = gl.full([64, 4], 1.0, gl.float32, gl.SliceLayout(2, _WORDS))
    return values, rope, scales


@gluon.jit
def _readers(
    memory, full, free, programs, items_ptr, page_ids_ptr, pointers, strides,
    STRIDE_VALUES_SLOT: gl.constexpr, STRIDE_ROPE_SLOT: gl.constexpr, STRIDE_SCALES_SLOT: gl.constexpr, PAGE_SIZE: gl.constexpr, HAS_GROUPS: gl.constexpr,
):  # fmt: skip
    k, k_rope = memory
    first, last = programs
    full0, full1 = full
    free0, free1 = free
    k_words = _words(k, [2, 64, 256])
    rope_words = _words(k_rope, [2, 64, 32])
    turn = 0
    for index in range(first, last):
        page_start, _, _, _, _, begin, end, _ = _load_item(items_ptr, index)
        tiles = (end - begin + 63) // 64
        table_ptr = page_ids_ptr + page_start.to(gl.int64)
        page = _page_of(table_ptr, begin, end, PAGE_SIZE)
        values, rope, scales = _fetch(
            pointers, strides, page, begin, end, STRIDE_VALUES_SLOT, STRIDE_ROPE_SLOT, STRIDE_SCALES_SLOT, PAGE_SIZE, HAS_GROUPS
        )
        page = _page_of(table_ptr, begin + 64, end, PAGE_SIZE)
        for tile in range(tiles):
            start = begin + tile * 64
            next_values, next_rope, next_scales = _fetch(
                pointers, strides, page, start + 64, end, STRIDE_VALUES_SLOT, STRIDE_ROPE_SLOT, STRIDE_SCALES_SLOT, PAGE_SIZE, HAS_GROUPS
            )
            page = _page_of(table_ptr, start + 128, end, PAGE_SIZE)
            slot = turn & 1
            if slot == 0:
                mbarrier.wait(free0, ((turn >> 1) & 1) ^ 1)
            else:
                mbarrier.wait(free1, ((turn >> 1) & 1) ^ 1)
            low, high = _widen(values, gl.expand_dims(scales, 2))
            k_words.index(slot).store(gl.reshape(gl.join(low, high), [64, 256]))
            if HAS_GROUPS:
                rope_words.index(slot).store(gl.reshape(rope, [64, 32]))
            else:
                low, high = _widen(rope, gl.full([64, 1, 16], 1.0, gl.float32, _WORDS))
                rope_words.index(slot).store(gl.reshape(gl.join(low, high), [64, 32]))
            fence_async_shared()
            if slot == 0:
                _release(full0)
            else:
                _release(full1)
            values, rope, scales = next_values, next_rope, next_scales
            turn += 1


@gluon.jit
def _words(memory, shape: gl.constexpr):
    if _HAS_REINTERPRET:
        return memory.reinterpret(gl.int32, shape, _SHARED_WORDS)
    else:
        return memory._reinterpret(gl.int32, shape, _SHARED_WORDS)


@gluon.jit
def _math(
    memory, full, free, programs, items_ptr, q_ptr, outputs, scale_log2, stored_scale, num_heads, stride_q_token, stride_q_head,
    BLOCK_ROWS: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    q, q_rope, k, k_rope, probabilities = memory
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr = outputs
    first, last = programs
    full0, full1 = full
    free0, free1 = free
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_ROWS, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    QUERY_ROPE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    turn = 0
    for index in range(first, last):
        _, first_token, query_len, length, row0, begin, end, partial = _load_item(items_ptr, index)
        rows = query_len * num_heads - row0
        _load_query(q_ptr, q, first_token, row0, rows, num_heads, stride_q_token, stride_q_head, 0, BLOCK_ROWS, 512, QUERY)
        _load_query(q_ptr, q_rope, first_token, row0, rows, num_heads, stride_q_token, stride_q_head, 512, BLOCK_ROWS, 64, QUERY_ROPE)
        fence_async_shared()
        _barrier()
        row = row0 + gl.arange(0, BLOCK_ROWS, layout=ROW)
        seen_to = length - query_len + row // num_heads + 1 if IS_CAUSAL else row * 0 + length
        limit = gl.minimum(seen_to, end)
        clear = end
        if IS_CAUSAL:
            clear = gl.minimum(length - query_len + row0 // num_heads + 1, end)  # positions that every row sees
        acc = gl.zeros([512, BLOCK_ROWS], gl.float32, SCORE)
        sums = gl.zeros([64, BLOCK_ROWS], gl.float32, SCORE)
        top = gl.full([BLOCK_ROWS], -1.0e30, gl.float32, ROW)  # not -inf: a row that sees nothing would get exp2(-inf + inf)
        tiles = (end - begin + 63) // 64
        for tile in range(tiles):
            start = begin + tile * 64
            slot = turn & 1
            phase = (turn >> 1) & 1
            if slot == 0:
                mbarrier.wait(full0, phase)
            else:
                mbarrier.wait(full1, phase)
            score = gl.zeros([64, BLOCK_ROWS], gl.float32, SCORE)
            score = warpgroup_mma(k.index(slot), q.permute((1, 0)), score, use_acc=False, is_async=True)
            score = warpgroup_mma(k_rope.index(slot), q_rope.permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=(score,))
            if start + 64 > clear:
                position = start + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORE))
                score = gl.where(gl.expand_dims(position, 1) < gl.expand_dims(limit, 0), score, float("-inf"))
            new_top = gl.maximum(top, gl.max(score, 0) * scale_log2)
            p = gl.exp2(score * scale_log2 - gl.expand_dims(new_top, 0))
            keep = gl.expand_dims(gl.exp2(top - new_top), 0)
            top = new_top
            probabilities.permute((1, 0)).store(p.to(probabilities.dtype))
            fence_async_shared()
            _barrier()
            sums = sums * keep + p
            acc = acc * keep
            acc = warpgroup_mma(k.index(slot).permute((1, 0)), probabilities.permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            if slot == 0:
                _release(free0)
            else:
                _release(free1)
            turn += 1
        total = gl.sum(sums, 0)
        seen = total > 0
        acc = acc * gl.expand_dims(gl.where(seen, stored_scale / total, 0.0), 0)
        norm = gl.where(seen, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
        row = gl.arange(0, BLOCK_ROWS, layout=ROW)
        column = gl.expand_dims(gl.arange(0, 512, layout=gl.SliceLayout(1, SCORE)), 1)
        at = gl.expand_dims(row * 512, 0) + column
        is_value = gl.expand_dims(row < rows, 0) & (column < 512)
        if partial < 0:
            base = first_token.to(gl.int64) * num_heads + row0
            gl.store(out_ptr + base * 512 + at, acc.to(out_ptr.dtype.element_ty), mask=is_value)
            gl.store(lse_ptr + base + row, norm, mask=row < rows)
        else:
            base = partial.to(gl.int64) * BLOCK_ROWS
            gl.store(partial_out_ptr + base * 512 + at, acc, mask=is_value)
            gl.store(partial_lse_ptr + base + row, norm, mask=row < rows)


@gluon.jit
def _load_query(
    q_ptr, memory, first_token, row0, rows, num_heads, stride_q_token, stride_q_head,
    COLUMN: gl.constexpr, BLOCK_ROWS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    row = gl.arange(0, BLOCK_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    token = (first_token + (row0 + row) // num_heads).to(gl.int64)
    head = ((row0 + row) % num_heads).to(gl.int64)
    at = gl.expand_dims(token * stride_q_token + head * stride_q_head, 1) + gl.expand_dims(COLUMN + column, 0)
    memory.store(gl.load(q_ptr + at, mask=gl.expand_dims(row < rows, 1) & gl.expand_dims(column < WIDTH, 0), other=0.0))


@gluon.jit(do_not_specialize=["num_heads"])
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
    scale_log2,
    stored_scale,
    num_heads,
    stride_q_token,
    stride_q_head,
    stride_values_page,
    stride_rope_page,
    stride_scales_page,
    STRIDE_VALUES_SLOT: gl.constexpr,
    STRIDE_ROPE_SLOT: gl.constexpr,
    STRIDE_SCALES_SLOT: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    HAS_GROUPS: gl.constexpr,
    BLOCK_ROWS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    memory = (
        gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 512], _SHARED),
        gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 64], _SHARED),
        gl.allocate_shared_memory(dtype, [2, 64, 512], _SHARED),
        gl.allocate_shared_memory(dtype, [2, 64, 64], _SHARED),
        gl.allocate_shared_memory(dtype, [BLOCK_ROWS, 64], _SHARED),
    )
    full = (_new_barrier(1), _new_barrier(1))
    free = (_new_barrier(1), _new_barrier(1))
    fence_async_shared()
    programs = (gl.load(programs_ptr + gl.program_id(0)), gl.load(programs_ptr + gl.program_id(0) + 1))
    outputs = (out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr)
    pointers = (values_ptr, rope_ptr, scales_ptr)
    strides = (stride_values_page, stride_rope_page, stride_scales_page)
    # Triton 3.6 spills below 160; the accumulators of 32 rows leave the readers no more than 144, and then they do.
    READER_REGISTERS: gl.constexpr = 160 if BLOCK_ROWS == 16 else 144
    gl.warp_specialize(
        [
            (_math, (memory, full, free, programs, items_ptr, q_ptr, outputs, scale_log2, stored_scale, num_heads, stride_q_token, stride_q_head, BLOCK_ROWS, IS_CAUSAL)),
            (_readers, (memory[2:4], full, free, programs, items_ptr, page_ids_ptr, pointers, strides, STRIDE_VALUES_SLOT, STRIDE_ROPE_SLOT, STRIDE_SCALES_SLOT, PAGE_SIZE, HAS_GROUPS)),
        ],
        [READER_WARPS],
        [READER_REGISTERS],
    )  # fmt: skip
