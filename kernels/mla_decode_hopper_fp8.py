"""Absorbed MLA decode over latents stored in eight bits, for Hopper (sm_90), in Gluon: the work list and the results of mla_decode.py.

Bytes stay bytes until a warp holds them in registers. e4m3 is exact in fp16, one instruction makes two of them, and wgmma takes its left
operand from registers; so latents are the rows of both products, and nothing that was converted is ever stored:

    loader (one warp)              tiles of 64 tokens by TMA, two places for each of the others; they take turns
    even, odd (a warpgroup each)   S_g = K_g Q_g^T | softmax over tokens | O_g += V_g^T (P s_g)^T       for each group g of 128 values
                                   once an item is done, the odd tiles' result is added to the even ones'

64 tokens, or 64 columns, fill wgmma's 64 rows, which 16 heads would not. What a group of a token is multiplied by (s_g) is a factor of its
scores, and goes with the probabilities on the other side: fp8_ds_mla costs 64 x 16 multiplications a group, not 64 x 128. The maximum that
probabilities are taken from is that of score + log2(largest s_g of the token), so that P s_g is at most 2**14 whatever the scales are.
Queries become fp16 of the same value, each row by a power of two in its range.

K wants pairs of neighbouring values of one token, which is what lies in memory. V^T wants pairs of neighbouring tokens of one value: ldmatrix
transposes pairs of values, and a byte permutation makes two rows of it, an even and an odd one.

Floor: mla_decode.py's, of fewer bytes: 656 or 576 a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvmanager.kernels.latent_formats import Stored
from kvmanager.kernels.mla_decode_hopper import (
    _HAS_REINTERPRET,
    _allow_next_kernel,
    _barrier,
    _box,
    _load_boxes,
    _load_item,
    _load_pages,
    _new_barrier,
    _opaque_zero,
    _release,
)

__all__ = ["BLOCK_ROWS", "BLOCK_TOKENS", "StoredDescriptors", "attend", "constants", "describe"]

BLOCK_TOKENS = 64
BLOCK_ROWS = 16  # (query token, head) rows of an item: 512 values of each are half of a warpgroup's registers. 32 spill
NUM_WARPS = 4  # a partition's; the loader has one
_ROWS = gl.constexpr(BLOCK_ROWS)
_SCORE = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_ROWS, 16]))
_PROBABILITY = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=2 * BLOCK_ROWS, element_bitwidth=16, rank=2))
_LEAST_SCALE = gl.constexpr(2.0**-60)  # no logarithm of zero; the scales of tokens of zeros may be anything
_HEADROOM = gl.constexpr(14.0)  # log2 of the largest probability: fp16 ends at 2**16
_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_SHARED_BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
_HALF = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
_HALF_BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=3))
_SCALES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
_SCALES_BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


class StoredDescriptors(NamedTuple):
    """TMA's view of one layer: made once, for as long as the memory lives. Values and the rotary keys of e4m3 as 16-bit pairs."""

    values: TensorDescriptor
    rope: TensorDescriptor
    group_scales: TensorDescriptor | None
    page_size: int
    scale: float


def describe(stored: Stored) -> StoredDescriptors:
    """One layer of float8_e4m3fn or fp8_ds_mla at 512 + 64."""
    values, rope, group_scales, scale = stored
    page_size = values.shape[1]
    box = _box(page_size)
    if group_scales is None:
        rotary = TensorDescriptor.from_tensor(rope.view(torch.int16), [1, box, 32], _HALF_BOX.value)
        scales = None
    else:
        rotary = TensorDescriptor.from_tensor(rope, [1, box, 64], _SHARED_BOX.value)
        scales = TensorDescriptor.from_tensor(group_scales, [1, box, 4], _SCALES_BOX.value)
    pairs = TensorDescriptor.from_tensor(values.view(torch.int16), [1, box, 64], _SHARED_BOX.value)
    return StoredDescriptors(pairs, rotary, scales, page_size, scale)


def constants(pages: StoredDescriptors, causal: bool) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "PAGE_SIZE": pages.page_size,
        "BOX": _box(pages.page_size),
        "HAS_GROUPS": pages.group_scales is not None,
        "IS_CAUSAL": causal,
    }


def attend(
    q: Tensor,
    pages: StoredDescriptors,
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
    pages    describe of the layer
    items    `begin` is a multiple of BLOCK_TOKENS, `row` of BLOCK_ROWS

    One launch of a fixed grid, no allocation, no host sync: safe under graph capture, replayable with new work lists. No atomics."""
    _attend_kernel[(programs.shape[0] - 1,)](
        q,
        pages.values,
        pages.rope,
        pages.group_scales if pages.group_scales is not None else pages.rope,
        page_ids,
        programs,
        items,
        out,
        lse,
        partial_out,
        partial_lse,
        scale * pages.scale * 1.4426950408889634,  # exp2 inside
        pages.scale,
        q.shape[1],
        q.stride(0),
        q.stride(1),
        num_warps=NUM_WARPS,
        **constants(pages, causal),
    )


@gluon.jit
def _view(memory, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    if _HAS_REINTERPRET:
        return memory.reinterpret(dtype, shape, layout)
    else:
        return memory._reinterpret(dtype, shape, layout)


@gluon.jit
def _widen(pairs):
    """Two neighbouring pairs of e4m3 a register: fp16, the first pair and the second."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
        "=r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _widen_across(pairs):
    """The same pair of two neighbouring tokens a register: fp16, the two first values and the two second ones."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 a, b; .reg .b32 t; prmt.b32 t, $2, 0, 0x3120; mov.b32 {a, b}, t;"
        " cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }",
        "=r,=r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def _request(
    full, free, phase, memory, descs, pages, start, end,
    PLACE: gl.constexpr, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, HAS_GROUPS: gl.constexpr,
):  # fmt: skip
    """One tile into place PLACE, as soon as it is free."""
    values, rope, scales = memory
    values_desc, rope_desc, scales_desc = descs
    mbarrier.wait(free, phase)
    mbarrier.expect(full, 64 * (656 if HAS_GROUPS else 576))
    for group in gl.static_range(4):
        _load_boxes(values_desc, pages, start, end, group * 64, full, values, PLACE * 4 + group, 64, BOX, PAGE_SIZE, False)
    _load_boxes(rope_desc, pages, start, end, 0, full, rope, PLACE, 64, BOX, PAGE_SIZE, False)
    if HAS_GROUPS:
        _load_boxes(scales_desc, pages, start, end, 0, full, scales, PLACE, 64, BOX, PAGE_SIZE, False)


@gluon.jit
def _loader(
    memory, full, free, programs, items_ptr, descs, page_ids_ptr,
    BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, HAS_GROUPS: gl.constexpr,
):  # fmt: skip
    values, rope, scales = memory
    first, last = programs
    full0, full1, full2, full3 = full
    free0, free1, free2, free3 = free
    ROPE_BOX: gl.constexpr = _SHARED_BOX if HAS_GROUPS else _HALF_BOX
    ROPE_PAIRS: gl.constexpr = 64 if HAS_GROUPS else 32
    BOXES: gl.constexpr = 64 // BOX
    boxes = (
        _view(values, gl.int16, [16 * BOXES, 1, BOX, 64], _SHARED_BOX),
        _view(rope, rope.dtype, [4 * BOXES, 1, BOX, ROPE_PAIRS], ROPE_BOX),
        _view(scales, gl.float32, [4 * BOXES, 1, BOX, 4], _SCALES_BOX) if HAS_GROUPS else scales,
    )
    even, odd = 0, 0  # tiles that each warpgroup was given
    for index in range(first, last):
        page_start, _, _, _, _, begin, end, _ = _load_item(items_ptr, index)
        tiles = (end - begin + 63) // 64
        table_ptr = page_ids_ptr + page_start.to(gl.int64)
        pages = _load_pages(table_ptr, begin, end, 64, BOX, PAGE_SIZE)
        for tile in range(tiles):
            start = begin + tile * 64
            next_pages = _load_pages(table_ptr, start + 64, end, 64, BOX, PAGE_SIZE)
            if tile & 1 == 0:
                phase = ((even >> 1) & 1) ^ 1
                if even & 1 == 0:
                    _request(full0, free0, phase, boxes, descs, pages, start, end, 0, BOX, PAGE_SIZE, HAS_GROUPS)
                else:
                    _request(full1, free1, phase, boxes, descs, pages, start, end, 1, BOX, PAGE_SIZE, HAS_GROUPS)
                even += 1
            else:
                phase = ((odd >> 1) & 1) ^ 1
                if odd & 1 == 0:
                    _request(full2, free2, phase, boxes, descs, pages, start, end, 2, BOX, PAGE_SIZE, HAS_GROUPS)
                else:
                    _request(full3, free3, phase, boxes, descs, pages, start, end, 3, BOX, PAGE_SIZE, HAS_GROUPS)
                odd += 1
            pages = next_pages


@gluon.jit
def _mask(score, start, row0, query_len, length, end, num_heads, BOX: gl.constexpr, IS_CAUSAL: gl.constexpr):
    """-inf where a row of the tile at `start` holds no latent of the item, or one that the query must not see. As mla_decode_hopper._mask."""
    LAYOUT: gl.constexpr = score.type.layout
    place = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    have = gl.minimum(gl.maximum(end - start, 0), 64)
    whole = have // BOX * BOX
    shift = BOX - have % BOX
    in_next = (place >= whole + shift) & (place < whole + BOX)
    position = gl.where(place < whole, start + place, gl.where(in_next, start + place - shift, 0x7FFFFFFF))
    row = row0 + gl.arange(0, score.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    seen_to = length - query_len + row // num_heads + 1 if IS_CAUSAL else row * 0 + length
    limit = gl.minimum(seen_to, end)
    return gl.where(gl.expand_dims(position, 1) < gl.expand_dims(limit, 0), score, float("-inf"))


@gluon.jit
def _scales_of(scales, place):
    """The four scales of each token of a tile."""
    SCALES: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
    TOKEN: gl.constexpr = gl.SliceLayout(1, _SCORE)
    even, odd = gl.split(gl.reshape(_view(scales, gl.float32, [4, 64, 4], _PLAIN).index(place).load(SCALES), [64, 2, 2]))
    scale0, scale2 = gl.split(even)
    scale1, scale3 = gl.split(odd)
    return (
        gl.convert_layout(scale0, TOKEN, assert_trivial=True),
        gl.convert_layout(scale1, TOKEN, assert_trivial=True),
        gl.convert_layout(scale2, TOKEN, assert_trivial=True),
        gl.convert_layout(scale3, TOKEN, assert_trivial=True),
    )


@gluon.jit
def _score_group(values, q, place, zero, GROUP: gl.constexpr):
    LATENT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=_SCORE, k_width=2)
    first, second = _widen(values.index(place * 4 + GROUP + zero).load(LATENT))
    score = gl.zeros([64, _ROWS], gl.float32, _SCORE)
    score = warpgroup_mma(first, q.index(2 * GROUP + zero).permute((1, 0)), score, use_acc=False, is_async=True)
    score = warpgroup_mma(second, q.index(2 * GROUP + 1 + zero).permute((1, 0)), score, is_async=True)
    return score, first, second


@gluon.jit
def _scores(memory, place, scales, row_scale, rope_scale, HAS_GROUPS: gl.constexpr):
    """Scores of a tile in log2. Two groups are under way, the next one is converted meanwhile."""
    q, q_rope, values, rope = memory
    zero = _opaque_zero()
    rotary = gl.zeros([64, _ROWS], gl.float32, _SCORE)
    if HAS_GROUPS:
        rotary = warpgroup_mma(rope.index(place + zero), q_rope.index(zero).permute((1, 0)), rotary, use_acc=False, is_async=True)
        score, first, second = _score_group(values, q, place, zero, 0)
        rotary = warpgroup_mma_wait(2, deps=(rotary,))
    else:
        LATENT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=_SCORE, k_width=2)
        rope_first, rope_second = _widen(rope.index(place + zero).load(LATENT))
        rotary = warpgroup_mma(rope_first, q_rope.index(zero).permute((1, 0)), rotary, use_acc=False, is_async=True)
        rotary = warpgroup_mma(rope_second, q_rope.index(1 + zero).permute((1, 0)), rotary, is_async=True)
        score, first, second = _score_group(values, q, place, zero, 0)
        rotary, _, _ = warpgroup_mma_wait(2, deps=(rotary, rope_first, rope_second))
    latent = gl.zeros([64, _ROWS], gl.float32, _SCORE)
    for n in gl.static_range(1, 4):
        next_score, next_first, next_second = _score_group(values, q, place, zero, n)
        score, _, _ = warpgroup_mma_wait(2, deps=(score, first, second))
        latent += score * gl.expand_dims(scales[n - 1], 1) if HAS_GROUPS else score
        score, first, second = next_score, next_first, next_second
    score, _, _ = warpgroup_mma_wait(0, deps=(score, first, second))
    if HAS_GROUPS:
        return (latent + score * gl.expand_dims(scales[3], 1)) * gl.expand_dims(row_scale, 0) + rotary * rope_scale
    else:
        return (latent + score + rotary) * gl.expand_dims(row_scale, 0)


@gluon.jit
def _add_values(acc, values, probabilities, place, zero, GROUP: gl.constexpr, P: gl.constexpr):
    """Ask for one group's products; the even and odd values are in registers until they are done."""
    LATENT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=_SCORE, k_width=2)
    even, odd = _widen_across(values.index(place * 4 + GROUP + zero).permute((1, 0)).load(LATENT))
    p = probabilities.index(P + zero)
    return (warpgroup_mma(even, p, acc[0], is_async=True), warpgroup_mma(odd, p, acc[1], is_async=True)), (even, odd)


@gluon.jit
def _finish(acc, latents):
    """Wait for all products but those of the group asked for last."""
    even, odd, _, _ = warpgroup_mma_wait(2, deps=(acc[0], acc[1], latents[0], latents[1]))
    return even, odd


@gluon.jit
def _finish_both(acc, latents, last_acc, last_latents):
    deps = (acc[0], acc[1], last_acc[0], last_acc[1], latents[0], latents[1], last_latents[0], last_latents[1])
    even, odd, last_even, last_odd, _, _, _, _ = warpgroup_mma_wait(0, deps=deps)
    return (even, odd), (last_even, last_odd)


@gluon.jit
def _math(
    memory, full, free, turns, programs, items_ptr, q_ptr, outputs, scale_log2, stored_scale, num_heads, stride_q_token, stride_q_head,
    IS_ODD: gl.constexpr, BOX: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_GROUPS: gl.constexpr,
):  # fmt: skip
    """Every other tile of each item. The even tiles' warpgroup loads the queries before, and adds up and stores the results after."""
    q, q_rope, values, rope, scales_memory, probabilities, row_scales, swap, swap_rows = memory
    first, last = programs
    full0, full1 = full
    free0, free1 = free
    q_ready, given, taken = turns
    ROW: gl.constexpr = gl.SliceLayout(0, _SCORE)
    PLACES: gl.constexpr = probabilities.shape[0]
    SWAPS: gl.constexpr = swap.shape[0]
    FIRST: gl.constexpr = 1 if IS_ODD else 0
    turn, shared_items, swaps = 0, 0, 0
    for index in range(first, last):
        _, first_token, query_len, length, row0, begin, end, partial = _load_item(items_ptr, index)
        rows = query_len * num_heads - row0
        tiles = (end - begin + 63) // 64
        is_shared = tiles > 1  # between both warpgroups
        if IS_ODD:
            if is_shared:
                mbarrier.wait(q_ready, shared_items & 1)
        else:
            _load_query(
                q_ptr, q, q_rope, row_scales, scale_log2, first_token, row0, rows, num_heads, stride_q_token, stride_q_head, HAS_GROUPS
            )
            fence_async_shared()
            _barrier()
            mbarrier.arrive(q_ready, count=1, pred=is_shared)
        row_scale = row_scales.load(ROW)
        clear = end
        if IS_CAUSAL:
            clear = gl.minimum(length - query_len + row0 // num_heads + 1, end)  # positions that every row sees
        empty = gl.zeros([64, _ROWS], gl.float32, _SCORE)
        acc0, acc1, acc2, acc3 = (empty, empty), (empty, empty), (empty, empty), (empty, empty)
        sums = empty
        top = gl.full([_ROWS], -1.0e30, gl.float32, ROW)  # not -inf: a row that sees nothing would get exp2(-inf + inf)
        for tile in range(FIRST, tiles, 2):
            start = begin + tile * 64
            slot = turn & 1
            phase = (turn >> 1) & 1
            if slot == 0:
                mbarrier.wait(full0, phase)
            else:
                mbarrier.wait(full1, phase)
            place = 2 * FIRST + slot
            scales = _scales_of(scales_memory, place) if HAS_GROUPS else (top, top, top, top)
            score = _scores((q, q_rope, values, rope), place, scales, row_scale, scale_log2, HAS_GROUPS)
            if start + 64 > clear:
                score = _mask(score, start, row0, query_len, length, end, num_heads, BOX, IS_CAUSAL)
            if HAS_GROUPS:
                largest = gl.maximum(gl.maximum(scales[0], scales[1]), gl.maximum(scales[2], scales[3]))
                weight = gl.log2(gl.maximum(largest, _LEAST_SCALE))
                high = gl.max(score + gl.expand_dims(weight, 1), 0)
            else:
                high = gl.max(score, 0)
            new_top = gl.maximum(top, high)
            p = gl.exp2(score - gl.expand_dims(new_top - _HEADROOM, 0))
            keep = gl.expand_dims(gl.exp2(top - new_top), 0)
            top = new_top
            sums = sums * keep + p
            for n in gl.static_range(PLACES):
                weighted = p * gl.expand_dims(scales[n], 1) if HAS_GROUPS else p
                probabilities.index(n).store(weighted.to(gl.float16))
            fence_async_shared()
            _barrier()
            acc0 = (acc0[0] * keep, acc0[1] * keep)
            acc1 = (acc1[0] * keep, acc1[1] * keep)
            acc2 = (acc2[0] * keep, acc2[1] * keep)
            acc3 = (acc3[0] * keep, acc3[1] * keep)
            zero = _opaque_zero()
            acc0, latents0 = _add_values(acc0, values, probabilities, place, zero, 0, 0)
            acc1, latents1 = _add_values(acc1, values, probabilities, place, zero, 1, 1 % PLACES)
            acc0 = _finish(acc0, latents0)
            acc2, latents2 = _add_values(acc2, values, probabilities, place, zero, 2, 2 % PLACES)
            acc1 = _finish(acc1, latents1)
            acc3, latents3 = _add_values(acc3, values, probabilities, place, zero, 3, 3 % PLACES)
            acc2, acc3 = _finish_both(acc2, latents2, acc3, latents3)
            if slot == 0:
                _release(free0)
            else:
                _release(free1)
            turn += 1
        total = gl.sum(sums, 0)
        acc = acc0 + acc1 + acc2 + acc3
        if IS_ODD:
            if is_shared:
                mbarrier.wait(taken, (swaps & 1) ^ 1)
                swap_rows.index(0).store(top)
                swap_rows.index(1).store(total)
                for n in gl.static_range(8):
                    if n % SWAPS == 0 and n > 0:
                        _release(given)
                        swaps += 1
                        mbarrier.wait(taken, (swaps & 1) ^ 1)
                    swap.index(n % SWAPS).store(acc[n])
                _release(given)
                swaps += 1
        else:
            if is_shared:
                mbarrier.wait(given, swaps & 1)
                other_top = swap_rows.index(0).load(ROW)
                new_top = gl.maximum(top, other_top)
                mine, others = gl.exp2(top - new_top), gl.exp2(other_top - new_top)
                total = total * mine + swap_rows.index(1).load(ROW) * others
                top = new_top
                mine, others = gl.expand_dims(mine, 0), gl.expand_dims(others, 0)
                joined = ()
                for n in gl.static_range(8):
                    if n % SWAPS == 0 and n > 0:
                        _release(taken)
                        swaps += 1
                        mbarrier.wait(given, swaps & 1)
                    theirs = swap.index(n % SWAPS).load(_SCORE)
                    joined = joined + (acc[n] * mine + theirs * others,)  # type: ignore[assignment]  # noqa: RUF005
                _release(taken)
                swaps += 1
                acc = joined  # type: ignore[assignment]
            if index == last - 1:
                _allow_next_kernel()
            _store(acc, top, total, stored_scale, first_token, row0, rows, partial, num_heads, outputs)
        if is_shared:
            shared_items += 1


@gluon.jit
def _store(acc, top, total, stored_scale, first_token, row0, rows, partial, num_heads, outputs):
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr = outputs
    seen = total > 0
    factor = gl.expand_dims(gl.where(seen, stored_scale / total, 0.0), 0)
    norm = gl.where(seen, (top - _HEADROOM + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(0, _SCORE))
    value = 2 * gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, _SCORE)), 1)
    at = gl.expand_dims(row * 512, 0) + value
    is_row = gl.expand_dims(row < rows, 0) & (value >= 0)
    at = gl.join(at, at + 1)
    is_value = gl.join(is_row, is_row)
    base = first_token.to(gl.int64) * num_heads + row0
    slot = partial.to(gl.int64) * _ROWS
    for group in gl.static_range(4):
        joined = gl.join(acc[2 * group] * factor, acc[2 * group + 1] * factor)
        if partial < 0:
            gl.store(out_ptr + base * 512 + (at + 128 * group), joined.to(out_ptr.dtype.element_ty), mask=is_value)
        else:
            gl.store(partial_out_ptr + slot * 512 + (at + 128 * group), joined, mask=is_value)
    if partial < 0:
        gl.store(lse_ptr + base + row, norm, mask=row < rows)
    else:
        gl.store(partial_lse_ptr + slot + row, norm, mask=row < rows)


@gluon.jit
def _load_query(
    q_ptr, q, q_rope, row_scales, scale_log2, first_token, row0, rows, num_heads, stride_q_token, stride_q_head,
    HAS_GROUPS: gl.constexpr,
):  # fmt: skip
    """Queries as fp16, each row times a power of two that brings its largest value to 2**14, columns as _widen has them.

    What fp16 loses then is below 2**-39 of a row's largest. Beside bf16 rotary keys their queries stay as they are."""
    WHOLE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    PIECE: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, WHOLE))
    token = (first_token + (row0 + row) // num_heads).to(gl.int64)
    head = ((row0 + row) % num_heads).to(gl.int64)
    base = token * stride_q_token + head * stride_q_head
    is_row = gl.expand_dims(row < rows, 1)
    column = gl.expand_dims(gl.arange(0, 512, layout=gl.SliceLayout(0, WHOLE)), 0)
    value = gl.load(q_ptr + gl.expand_dims(base, 1) + column, mask=is_row & (column >= 0), other=0.0).to(gl.float32)
    largest = gl.max(gl.abs(value), 1)
    if not HAS_GROUPS:
        column = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, WHOLE)), 0)
        value = gl.load(q_ptr + gl.expand_dims(base, 1) + 512 + column, mask=is_row & (column >= 0), other=0.0).to(gl.float32)
        largest = gl.maximum(largest, gl.max(gl.abs(value), 1))
    exponent = gl.minimum(127 + 14 + 127 - (largest.to(gl.int32, bitcast=True) >> 23), 127 + 100)
    factor = (exponent << 23).to(gl.float32, bitcast=True)
    row_scales.store(scale_log2 * ((254 - exponent) << 23).to(gl.float32, bitcast=True))

    PIECE_ROW: gl.constexpr = gl.SliceLayout(1, PIECE)
    base = gl.expand_dims(gl.convert_layout(base, PIECE_ROW), 1)
    factor = gl.expand_dims(gl.convert_layout(factor, PIECE_ROW), 1)
    is_row = gl.expand_dims(gl.arange(0, _ROWS, layout=PIECE_ROW) < rows, 1)
    column = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, PIECE)), 0)
    paired = column // 2 * 4 + column % 2
    for n in gl.static_range(8):
        piece = gl.load(q_ptr + base + (n // 2 * 128 + n % 2 * 2) + paired, mask=is_row & (column >= 0), other=0.0)
        q.index(n).store((piece.to(gl.float32) * factor).to(gl.float16))
    if HAS_GROUPS:
        q_rope.index(0).store(gl.load(q_ptr + base + 512 + column, mask=is_row & (column >= 0), other=0.0))
    else:
        column = gl.expand_dims(gl.arange(0, 32, layout=gl.SliceLayout(0, PIECE)), 0)
        paired = column // 2 * 4 + column % 2
        for n in gl.static_range(2):
            piece = gl.load(q_ptr + base + (512 + n * 2) + paired, mask=is_row & (column >= 0), other=0.0)
            q_rope.index(n).store((piece.to(gl.float32) * factor).to(gl.float16))


@gluon.jit(do_not_specialize=["num_heads"])
def _attend_kernel(
    q_ptr,
    values_desc,
    rope_desc,
    scales_desc,
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
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    HAS_GROUPS: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
):
    ROPE_LAYOUT: gl.constexpr = _SHARED if HAS_GROUPS else _HALF
    ROPE_PAIRS: gl.constexpr = 64 if HAS_GROUPS else 32
    ROPE_QUERIES: gl.constexpr = 1 if HAS_GROUPS else 2
    rope_dtype: gl.constexpr = gl.bfloat16 if HAS_GROUPS else gl.int16
    rope_query_dtype: gl.constexpr = gl.bfloat16 if HAS_GROUPS else gl.float16
    q = gl.allocate_shared_memory(gl.float16, [8, _ROWS, 64], _SHARED)
    q_rope = gl.allocate_shared_memory(rope_query_dtype, [ROPE_QUERIES, _ROWS, ROPE_PAIRS], ROPE_LAYOUT)
    values = gl.allocate_shared_memory(gl.int16, [16, 64, 64], _SHARED)
    rope = gl.allocate_shared_memory(rope_dtype, [4, 64, ROPE_PAIRS], ROPE_LAYOUT)
    scales = gl.allocate_shared_memory(gl.float32, [4, 64, 4], _SCALES) if HAS_GROUPS else rope
    row_scales = gl.allocate_shared_memory(gl.float32, [_ROWS], _LINE)
    swap = gl.allocate_shared_memory(gl.float32, [4, 64, _ROWS], _PLAIN)
    swap_rows = gl.allocate_shared_memory(gl.float32, [2, _ROWS], _LINE)
    PLACES: gl.constexpr = 4 if HAS_GROUPS else 1
    even_p = gl.allocate_shared_memory(gl.float16, [PLACES, 64, _ROWS], _PROBABILITY)
    odd_p = gl.allocate_shared_memory(gl.float16, [PLACES, 64, _ROWS], _PROBABILITY)
    full = (_new_barrier(1), _new_barrier(1), _new_barrier(1), _new_barrier(1))
    free = (_new_barrier(1), _new_barrier(1), _new_barrier(1), _new_barrier(1))
    turns = (_new_barrier(1), _new_barrier(1), _new_barrier(1))
    fence_async_shared()
    programs = (gl.load(programs_ptr + gl.program_id(0)), gl.load(programs_ptr + gl.program_id(0) + 1))
    outputs = (out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr)
    descs = (values_desc, rope_desc, scales_desc)
    # The loader keeps the page ids of all boxes of a tile.
    LOADER_REGISTERS: gl.constexpr = 24 if BOX == 64 else 32
    even = (q, q_rope, values, rope, scales, even_p, row_scales, swap, swap_rows)
    odd = (q, q_rope, values, rope, scales, odd_p, row_scales, swap, swap_rows)
    gl.warp_specialize(
        [
            (_math, (even, full[0:2], free[0:2], turns, programs, items_ptr, q_ptr, outputs, scale_log2, stored_scale, num_heads, stride_q_token, stride_q_head, False, BOX, IS_CAUSAL, HAS_GROUPS)),
            (_math, (odd, full[2:4], free[2:4], turns, programs, items_ptr, q_ptr, outputs, scale_log2, stored_scale, num_heads, stride_q_token, stride_q_head, True, BOX, IS_CAUSAL, HAS_GROUPS)),
            (_loader, ((values, rope, scales), full, free, programs, items_ptr, descs, page_ids_ptr, BOX, PAGE_SIZE, HAS_GROUPS)),
        ],
        [4, 1],
        [240, LOADER_REGISTERS],
    )  # fmt: skip
