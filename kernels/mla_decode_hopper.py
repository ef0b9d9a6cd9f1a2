"""Absorbed MLA attention for Hopper (sm_90), in Gluon: the work list, the rows and the results of mla_decode.py, two warpgroups that take turns.

64 rows x 512 values of the output don't fit one warpgroup's registers, so the left warpgroup keeps the first half of the columns and the right
one the second. Latents are taken as pairs of tiles that stay in shared memory from their scores to their values:

    left    S0 = Q K0^T,  P0 = softmax(S0)  ------>  O_left  = O_left  + P0 V0_left,                 + P1 V1_left
    right   S1 = Q K1^T,                             O_right = O_right + P0 V0_right,  P1 = softmax(S1),  + P1 V1_right

so that one's softmax runs under the other's matrix products. P0, P1 and the running maxima cross through shared memory. A third partition of
one warp loads: it asks the tensor memory accelerator (TMA) for each half tile as soon as both of its readers are done with it.

TMA fills with zeros what lies outside of a page, at either end. Unless `placed`, a tile that is not full is fetched from that many rows earlier, so that its
latents come last and rows of zeros stand before them: a slot that nobody wrote is never read, and nothing has to be cleared (0 x NaN).

A row's maximum is kept until a score exceeds it by LAZY_TOP in log2: then, and only then, what was summed so far is scaled. Probabilities are
up to 2**LAZY_TOP in between, which costs bf16 and fp16 no precision, and most tiles find the accumulators ready.

Floor: mla_decode.py's. 4,352 cycles of the tensor cores a pair of tiles, 4,776 of shared memory (128 B each) at 512 + 64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["BLOCK_ROWS", "PageDescriptors", "attend", "block_tokens", "describe_pages"]

BLOCK_ROWS = 64  # (query token, head) rows of a program's item
NUM_WARPS = 4  # a partition's; the loader has one

# Names that moved between Triton 3.6 and 3.9.
_async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_HAS_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

_LAZY_TOP = gl.constexpr(8.0)
_SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_SHARED_BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_FLAG = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


class PageDescriptors(NamedTuple):
    """TMA's view of one layer's pages: made once, for as long as the memory lives."""

    kv: TensorDescriptor
    rope: TensorDescriptor
    page_size: int


def _box(page_size: int) -> int:
    """Rows that one TMA request takes: what divides both a tile and a page."""
    return next(box for box in (64, 32, 16) if page_size % box == 0)


def describe_pages(pages: Tensor, rank: int) -> PageDescriptors:
    """pages [num_pages, page_size, entry]: one layer's view of page-major memory, bf16 or fp16; its page stride may pass 2**31 elements."""
    page_size = pages.shape[1]
    box = _box(page_size)
    width = _group(rank) if box == _tile(rank) else 64  # a box of fewer rows than a tile fills no more than one swizzled column of it
    layout = _SHARED_BOX.value
    kv = TensorDescriptor.from_tensor(pages[:, :, :rank], [1, box, width], layout)
    rope = TensorDescriptor.from_tensor(pages[:, :, rank:], [1, box, 64], layout)
    return PageDescriptors(kv, rope, page_size)


def _block_rank(rank: int) -> int:
    return max(128, triton.next_power_of_2(rank))


def _tile(rank: int) -> int:
    """Latents of a tile: as many as registers and shared memory hold, since what a tile costs besides its products is the same for any."""
    return 64 if _block_rank(rank) > 256 else 128


def block_tokens(rank: int) -> int:
    """Latents between two places where a sequence may be cut: a pair of tiles."""
    return 2 * _tile(rank)


def _rows(q: Tensor) -> Tensor:
    """q as [tokens * heads, entry], copied only where TMA could not read it."""
    tokens, heads, entry = q.shape
    stride = q.stride(1) if heads > 1 else q.stride(0) if tokens > 1 else entry
    if (tokens > 1 and heads > 1 and q.stride(0) != heads * stride) or stride % 8 or q.data_ptr() % 16:
        q, stride = q.clone(memory_format=torch.contiguous_format), entry
    return q.as_strided((tokens * heads, entry), (stride, 1))


def _group(rank: int) -> int:
    """Columns that one barrier stands for."""
    return min(128, _block_rank(rank) // 2)


def constants(rank: int, rope: int, page_size: int, causal: bool, placed: bool = False, has_sink: bool = False) -> dict[str, int | bool]:
    """What the kernel is compiled for."""
    return {
        "PAGE_SIZE": page_size,
        "BOX": _box(page_size),
        "RANK": rank,
        "BLOCK_RANK": _block_rank(rank),
        "BLOCK_ROPE": triton.next_power_of_2(rope),
        "TILE": _tile(rank),
        "IS_CAUSAL": causal,
        "IS_PLACED": placed,
        "HAS_SINK": has_sink,
    }


def attend(
    q: Tensor,
    pages: PageDescriptors,
    page_ids: Tensor,
    programs: Tensor,
    items: Tensor,
    out: Tensor,
    lse: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    causal: bool = True,
    placed: bool = False,
    sink: Tensor | None = None,
) -> None:
    """Run a work list over one layer. As mla_decode.attend, but for

    q            [num_tokens, heads, entry]  bf16 | fp16; entry contiguous. TMA wants one stride, a multiple of 16 bytes, from each (token, head)
                                             to the next, and a base at one: a q that has none is copied first
    pages        describe_pages of the layer
    items        `begin` is a multiple of block_tokens, `row` of BLOCK_ROWS
    placed       a latent's column within its tile depends on its position alone, not on where the item ends: a row's bits then depend on
                 what it sees and on `begin`, not on the rows beside it. Slots behind `end` of a page that the item reads are loaded,
                 and zeros put in their place before they are multiplied
    sink         float32 [heads], as in mla_decode.attend

    One launch of a fixed grid, no allocation, no host sync: safe under graph capture, replayable with new work lists. No atomics."""
    rank, rope = out.shape[-1], q.shape[-1] - out.shape[-1]
    rows = _rows(q)
    group = _group(rank)
    _attend_kernel[(programs.shape[0] - 1,)](
        TensorDescriptor.from_tensor(rows[:, :rank], [BLOCK_ROWS, group], _SHARED.value),
        TensorDescriptor.from_tensor(rows[:, rank:], [BLOCK_ROWS, 64], _SHARED.value),
        pages.kv,
        pages.rope,
        page_ids,
        programs,
        items,
        out,
        lse,
        partial_out,
        partial_lse,
        sink if sink is not None else lse,
        scale * 1.4426950408889634,  # exp2 inside
        q.shape[1],
        num_warps=NUM_WARPS,
        **constants(rank, rope, pages.page_size, causal, placed, sink is not None),
    )


@gluon.jit
def _view(memory, shape: gl.constexpr, layout: gl.constexpr):
    if _HAS_REINTERPRET:
        return memory.reinterpret(memory.dtype, shape, layout)
    else:
        return memory._reinterpret(memory.dtype, shape, layout)


@gluon.jit
def _new_barrier(count: gl.constexpr):
    # One allocation each: waits on an array of them make the compiler synchronise the warpgroup before every wait.
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=count)
    return barrier


@gluon.jit
def _release(barrier):
    """Arrive once all of the warpgroup is here."""
    _barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _opaque_zero():
    # Added to an index, it keeps the compiler from computing every matrix descriptor before the loop, where they cost registers and spill.
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _allow_next_kernel():
    """Programmatic dependent launch: once all programs are here, the merge is launched as they end, and waits for the last by itself.

    Not earlier: the first few multiprocessors to be free would get all of it."""
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_item(items_ptr, index):
    item_ptr = items_ptr + index * 8  # 2**24 items at most
    return (
        gl.load(item_ptr),
        gl.load(item_ptr + 1),
        gl.load(item_ptr + 2),
        gl.load(item_ptr + 3),
        gl.load(item_ptr + 4),
        gl.load(item_ptr + 5),
        gl.load(item_ptr + 6),
        gl.load(item_ptr + 7),
    )


@gluon.jit
def _mask(score, start, row0, query_len, length, end, num_heads, BOX: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_PLACED: gl.constexpr):
    """-inf where a column of the tile at `start` holds no latent of the item, or one that the row must not see."""
    TILE: gl.constexpr = score.shape[1]
    LAYOUT: gl.constexpr = score.type.layout
    column = gl.arange(0, TILE, layout=gl.SliceLayout(0, LAYOUT))
    if IS_PLACED:
        position = start + column
    else:
        have = gl.minimum(gl.maximum(end - start, 0), TILE)
        whole = have // BOX * BOX  # columns of full boxes; the next box has its latents last
        shift = BOX - have % BOX
        in_next = (column >= whole + shift) & (column < whole + BOX)
        position = gl.where(column < whole, start + column, gl.where(in_next, start + column - shift, 0x7FFFFFFF))
    row = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    if IS_CAUSAL:
        limit = gl.minimum(length - query_len + row // num_heads + 1, end)
    else:
        limit = gl.full([64], 0, gl.int32, gl.SliceLayout(1, LAYOUT)) + gl.minimum(length, end)
    return gl.where(gl.expand_dims(position, 0) < gl.expand_dims(limit, 1), score, float("-inf"))


@gluon.jit
def _clear_values(
    memory, start, end,
    TILE_INDEX: gl.constexpr, GROUPS: gl.constexpr, IS_PLACED: gl.constexpr,
):  # fmt: skip
    """Under IS_PLACED, zeros in place of the latents of a tile from `end` on: nobody wrote some of them, and 0 x NaN is NaN.

    memory: one half of the columns, which only this warpgroup multiplies probabilities by. The other may read scores from it meanwhile:
    those of such columns are masked, whatever they are."""
    TILE: gl.constexpr = memory.shape[1]
    if IS_PLACED:  # noqa: SIM102 (known when it is compiled, the other is not)
        if start + TILE > end:
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
            row = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, LAYOUT))
            zero = _opaque_zero()
            for n in gl.static_range(GROUPS):
                group = memory.index(TILE_INDEX * GROUPS + n + zero)
                for piece in gl.static_range(memory.shape[2] // 64):
                    part = group.slice(piece * 64, 64, dim=1)
                    value = part.load(LAYOUT)
                    part.store(gl.where(gl.expand_dims(row < end, 1), value, gl.zeros_like(value)))
            fence_async_shared()
            _barrier()


@gluon.jit
def _raise_top(top, high, tops, flags):
    """The running maximum after one more tile, told to the other warpgroup; flags: whether it moved for any row of each warp."""
    moves = high > top + _LAZY_TOP
    new_top = gl.where(moves, high, top)
    tops.store(new_top)
    any_moves = gl.inline_asm_elementwise(
        "{ .reg .pred p, q; setp.ne.s32 p, $2, 0; setp.ne.s32 q, $3, 0; or.pred p, p, q; vote.sync.any.pred p, p, 0xffffffff;"
        " selp.s32 $0, 1, 0, p; mov.b32 $1, $0; }",
        "=r,=r,r,r", [gl.where(moves, 1, 0)], dtype=gl.int32, is_pure=True, pack=2,
    )  # fmt: skip
    flags.store(any_moves)
    return new_top


@gluon.jit
def _moved(flags):
    first, second, third, fourth = flags.slice(0, 1), flags.slice(16, 1), flags.slice(32, 1), flags.slice(48, 1)
    return gl.max(first.load(_FLAG) | second.load(_FLAG) | third.load(_FLAG) | fourth.load(_FLAG), 0) > 0


@gluon.jit
def _probability(score, top, scale_log2):
    return gl.exp2(score * scale_log2 - gl.expand_dims(gl.convert_layout(top, gl.SliceLayout(1, score.type.layout)), 1))


@gluon.constexpr_function
def _store_layout(columns, contiguous):
    """As the accumulator's, but that a thread has `contiguous` neighbouring columns: the four threads of a row exchange what they have."""
    registers = [[0, 1 << bit] for bit in range(8) if 1 << bit < contiguous] + [[8, 0]]
    registers += [[0, 1 << bit] for bit in range(8) if 4 * contiguous <= 1 << bit < columns]
    lanes = [[0, contiguous], [0, 2 * contiguous], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, columns])


@gluon.jit
def _store_rows(ptr, value, rows, RANK: gl.constexpr, IS_RIGHT: gl.constexpr):
    COLUMNS: gl.constexpr = value.shape[1]
    LAYOUT: gl.constexpr = value.type.layout
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)) + COLUMNS * IS_RIGHT
    at = gl.expand_dims(row * RANK, 1) + gl.expand_dims(column, 0)
    is_value = gl.expand_dims(row < rows, 1) & gl.expand_dims(column < RANK, 0)
    gl.store(ptr + at, value, mask=is_value)


@gluon.jit
def _store(
    acc,
    top,
    total,
    first_token,
    query_len,
    row0,
    partial,
    num_heads,
    outputs,
    RANK: gl.constexpr,
    IS_RIGHT: gl.constexpr,
    HAS_SINK: gl.constexpr,
):
    """Rows of an item that is not split to the output, those of one that is to its partial slot; 16 bytes a thread at a time.

    The order of these lines is worth 3 % at 128 x 128 x 4,096: with the exchange inside of _store_rows ptxas keeps the thread's place in
    uniform registers, and the loop above waits for them."""
    out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, sink_ptr = outputs
    seen = total > 0
    acc = acc * gl.expand_dims(gl.where(seen, 1.0 / total, 0.0), 1)
    norm = gl.where(seen, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    row = gl.arange(0, 64, layout=total.type.layout)
    rows = query_len * num_heads - row0
    if partial < 0:
        if HAS_SINK:
            above = gl.load(sink_ptr + (row0 + row) % num_heads) - gl.where(seen, norm, 0.0)
            acc = acc / gl.expand_dims(1.0 + gl.exp2(above * 1.4426950408889634), 1)
        base = first_token.to(gl.int64) * num_heads + row0
        value = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), _store_layout(acc.shape[1], 8))
        _store_rows(out_ptr + base * RANK, value, rows, RANK, IS_RIGHT)
        if not IS_RIGHT:
            gl.store(lse_ptr + base + row, norm, mask=row < rows)
    else:
        base = partial.to(gl.int64) * 64
        _store_rows(partial_out_ptr + base * RANK, gl.convert_layout(acc, _store_layout(acc.shape[1], 4)), rows, RANK, IS_RIGHT)
        if not IS_RIGHT:
            gl.store(partial_lse_ptr + base + row, norm, mask=row < rows)


@gluon.jit
def _left(
    memory, exchange, full, free, turns, programs, items_ptr, outputs, scale_log2, num_heads,
    RANK: gl.constexpr, BLOCK_ROPE: gl.constexpr, BOX: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_PLACED: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """Scores of tile 0, and the left half of the output."""
    q, q_rope, left, right, rope = memory
    tops0, tops1, flags0, flags1, totals0, totals1 = exchange
    full_q, full_left0, full_right0, full_rope0 = full
    left0_free, left1_free, q_free = free
    p0_ready, p1_ready, scored0, done0, done1 = turns
    first, last = programs
    HALF: gl.constexpr = left.shape[2]
    GROUP: gl.constexpr = q.shape[2]
    GROUPS: gl.constexpr = HALF // GROUP
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    PROBABILITY: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    TILE: gl.constexpr = left.shape[1]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    left_k = _view(left, [2 * GROUPS, TILE, GROUP], _SHARED)
    right_k = _view(right, [2 * GROUPS, TILE, GROUP], _SHARED)
    probabilities = _view(rope, [2, 64, TILE], _SHARED)
    turn = 0
    for index in range(first, last):
        _, first_token, query_len, length, row0, begin, end, partial = _load_item(items_ptr, index)
        pairs = gl.maximum((end - begin + 2 * TILE - 1) // (2 * TILE), 1)
        clear = end
        if IS_CAUSAL:
            clear = gl.minimum(length - query_len + row0 // num_heads + 1, end)  # positions that every row sees
        acc = gl.zeros([64, HALF], gl.float32, ACC)
        top = gl.full([64], -1.0e30, gl.float32, ROW)  # not -inf: a row that sees nothing would get exp2(-inf + inf)
        total = gl.zeros([64], gl.float32, ROW)
        mbarrier.wait(full_q, (index - first) & 1)
        for pair in range(pairs):
            start = begin + pair * (2 * TILE)
            phase = turn & 1
            zero = _opaque_zero()
            score = gl.zeros([64, TILE], gl.float32, SCORE)
            for n in gl.static_range(GROUPS):
                mbarrier.wait(full_left0[n], phase)
                score = warpgroup_mma(q.index(n + zero), left_k.index(n + zero).permute((1, 0)), score, use_acc=n > 0, is_async=True)
            for n in gl.static_range(GROUPS):
                mbarrier.wait(full_right0[n], phase)
                score = warpgroup_mma(q.index(GROUPS + n + zero), right_k.index(n + zero).permute((1, 0)), score, is_async=True)
            mbarrier.wait(full_rope0, phase)
            score = warpgroup_mma(
                q_rope.slice(0, BLOCK_ROPE, dim=1), rope.index(zero).slice(0, BLOCK_ROPE, dim=1).permute((1, 0)), score, is_async=True
            )
            mbarrier.arrive(scored0, count=1)
            score = warpgroup_mma_wait(0, deps=(score,))
            if pair == pairs - 1:
                mbarrier.arrive(q_free, count=1)
            if start + 2 * TILE > clear:
                score = _mask(score, start, row0, query_len, length, end, num_heads, BOX, IS_CAUSAL, IS_PLACED)
            top0 = _raise_top(top, gl.convert_layout(gl.max(score, 1), ROW) * scale_log2, tops0, flags0)
            p = _probability(score, top0, scale_log2)
            probabilities.index(0).store(p.to(rope.dtype))
            fence_async_shared()
            _release(p0_ready)
            keep = gl.exp2(top - top0)
            if _moved(flags0):
                acc = acc * gl.expand_dims(keep, 1)
            _clear_values(left_k, start, end, 0, GROUPS, IS_PLACED)
            acc = warpgroup_mma(gl.convert_layout(p.to(rope.dtype), PROBABILITY), left.index(zero), acc, is_async=True)
            total = total * keep + gl.convert_layout(gl.sum(p, 1), ROW)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(left0_free)
            mbarrier.wait(p1_ready, phase)
            top = tops1.load(ROW)
            keep = gl.exp2(top0 - top)
            total = total * keep
            if _moved(flags1):
                acc = acc * gl.expand_dims(keep, 1)
            _clear_values(left_k, start + TILE, end, 1, GROUPS, IS_PLACED)
            acc = warpgroup_mma(probabilities.index(1 + zero), left.index(1 + zero), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(left1_free)
            turn += 1
        totals0.store(total)
        _release(done0)
        mbarrier.wait(done1, (index - first) & 1)
        total += totals1.load(ROW)
        if index == last - 1:
            _allow_next_kernel()
        _store(acc, top, total, first_token, query_len, row0, partial, num_heads, outputs, RANK, False, HAS_SINK)


@gluon.jit
def _right(
    memory, exchange, full, free, turns, programs, items_ptr, outputs, scale_log2, num_heads,
    RANK: gl.constexpr, BLOCK_ROPE: gl.constexpr, BOX: gl.constexpr, IS_CAUSAL: gl.constexpr, IS_PLACED: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    """Scores of tile 1, and the right half of the output."""
    q, q_rope, left, right, rope = memory
    tops0, tops1, flags0, flags1, totals0, totals1 = exchange
    full_q, full_left1, full_right1, full_rope1 = full
    right0_free, right1_free, q_free = free
    p0_ready, p1_ready, scored0, done0, done1 = turns
    first, last = programs
    HALF: gl.constexpr = left.shape[2]
    GROUP: gl.constexpr = q.shape[2]
    GROUPS: gl.constexpr = HALF // GROUP
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)
    PROBABILITY: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    TILE: gl.constexpr = left.shape[1]
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    left_k = _view(left, [2 * GROUPS, TILE, GROUP], _SHARED)
    right_k = _view(right, [2 * GROUPS, TILE, GROUP], _SHARED)
    probabilities = _view(rope, [2, 64, TILE], _SHARED)
    turn = 0
    for index in range(first, last):
        _, first_token, query_len, length, row0, begin, end, partial = _load_item(items_ptr, index)
        pairs = gl.maximum((end - begin + 2 * TILE - 1) // (2 * TILE), 1)
        clear = end
        if IS_CAUSAL:
            clear = gl.minimum(length - query_len + row0 // num_heads + 1, end)
        acc = gl.zeros([64, HALF], gl.float32, ACC)
        top = gl.full([64], -1.0e30, gl.float32, ROW)
        total = gl.zeros([64], gl.float32, ROW)
        mbarrier.wait(full_q, (index - first) & 1)
        for pair in range(pairs):
            start = begin + pair * (2 * TILE)
            phase = turn & 1
            zero = _opaque_zero()
            score = gl.zeros([64, TILE], gl.float32, SCORE)
            mbarrier.wait(scored0, phase)  # in turn: the left scores would slow down if the tensor cores were shared
            for n in gl.static_range(GROUPS):
                mbarrier.wait(full_left1[n], phase)
                score = warpgroup_mma(
                    q.index(n + zero), left_k.index(GROUPS + n + zero).permute((1, 0)), score, use_acc=n > 0, is_async=True
                )
            for n in gl.static_range(GROUPS):
                mbarrier.wait(full_right1[n], phase)
                score = warpgroup_mma(q.index(GROUPS + n + zero), right_k.index(GROUPS + n + zero).permute((1, 0)), score, is_async=True)
            mbarrier.wait(full_rope1, phase)
            score = warpgroup_mma(
                q_rope.slice(0, BLOCK_ROPE, dim=1), rope.index(1 + zero).slice(0, BLOCK_ROPE, dim=1).permute((1, 0)), score, is_async=True
            )
            score = warpgroup_mma_wait(0, deps=(score,))
            if pair == pairs - 1:
                mbarrier.arrive(q_free, count=1)
            if start + 2 * TILE > clear:
                score = _mask(score, start + TILE, row0, query_len, length, end, num_heads, BOX, IS_CAUSAL, IS_PLACED)
            high = gl.convert_layout(gl.max(score, 1), ROW) * scale_log2
            mbarrier.wait(p0_ready, phase)
            top0 = tops0.load(ROW)
            keep0 = gl.exp2(top - top0)
            if _moved(flags0):
                acc = acc * gl.expand_dims(keep0, 1)
            _clear_values(right_k, start, end, 0, GROUPS, IS_PLACED)
            acc = warpgroup_mma(probabilities.index(zero), right.index(zero), acc, is_async=True)
            top = _raise_top(top0, high, tops1, flags1)
            p = _probability(score, top, scale_log2)
            probabilities.index(1).store(p.to(rope.dtype))
            fence_async_shared()
            _release(p1_ready)
            keep1 = gl.exp2(top0 - top)
            total = total * keep0 * keep1 + gl.convert_layout(gl.sum(p, 1), ROW)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(right0_free)
            if _moved(flags1):
                acc = acc * gl.expand_dims(keep1, 1)
            _clear_values(right_k, start + TILE, end, 1, GROUPS, IS_PLACED)
            acc = warpgroup_mma(gl.convert_layout(p.to(rope.dtype), PROBABILITY), right.index(1 + zero), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _release(right1_free)
            turn += 1
        totals1.store(total)
        _release(done1)
        mbarrier.wait(done0, (index - first) & 1)
        total += totals0.load(ROW)
        _store(acc, top, total, first_token, query_len, row0, partial, num_heads, outputs, RANK, True, HAS_SINK)


@gluon.jit
def _page_of(table_ptr, start, end, PAGE_SIZE: gl.constexpr):
    """Page id of the box at `start`; table entries past the item's end are never read."""
    return gl.load(table_ptr + start // PAGE_SIZE, mask=start < end, other=0)


@gluon.jit
def _row_of(start, end, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, IS_PLACED: gl.constexpr):
    """First row of the box within its page: earlier by what it lacks, and before the page if it has nothing."""
    have = gl.minimum(gl.maximum(end - start, 0), BOX)
    if IS_PLACED:
        have = gl.where(have > 0, BOX, 0)
    return gl.where(have > 0, start % PAGE_SIZE, 0) + have - BOX


@gluon.jit
def _load_boxes(
    desc,
    pages,
    start,
    end,
    column,
    barrier,
    memory,
    TILE_INDEX: gl.constexpr,
    TILE: gl.constexpr,
    BOX: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    IS_PLACED: gl.constexpr,
):
    """Ask for columns from `column` on of one tile, box by box."""
    BOXES: gl.constexpr = TILE // BOX
    for n in gl.static_range(BOXES):
        row = _row_of(start + n * BOX, end, BOX, PAGE_SIZE, IS_PLACED)
        _async_load(desc, [pages[n], row, column], barrier, memory.index(TILE_INDEX * BOXES + n))


@gluon.jit
def _load_half(
    desc, pages, start, end, barriers, memory,
    TILE_INDEX: gl.constexpr, COLUMN: gl.constexpr, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, TILE: gl.constexpr,
    IS_PLACED: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = desc.block_shape[2]
    PIECES: gl.constexpr = GROUP // WIDTH
    for n in gl.static_range(GROUPS):
        mbarrier.expect(barriers[n], TILE * GROUP * 2)
        for piece in gl.static_range(PIECES):
            _load_boxes(
                desc, pages, start, end, COLUMN + n * GROUP + piece * WIDTH, barriers[n], memory,
                (TILE_INDEX * GROUPS + n) * PIECES + piece, TILE, BOX, PAGE_SIZE, IS_PLACED,
            )  # fmt: skip


@gluon.jit
def _load_pages(table_ptr, start, end, TILE: gl.constexpr, BOX: gl.constexpr, PAGE_SIZE: gl.constexpr):
    """Page ids of the boxes of one tile."""
    if TILE == BOX:
        return (_page_of(table_ptr, start, end, PAGE_SIZE),)
    else:
        HALF: gl.constexpr = TILE // 2
        return _load_pages(table_ptr, start, end, HALF, BOX, PAGE_SIZE) + _load_pages(table_ptr, start + HALF, end, HALF, BOX, PAGE_SIZE)


@gluon.jit
def _loader(
    memory, full, free, programs, items_ptr, descs, page_ids_ptr, num_heads,
    BOX: gl.constexpr, PAGE_SIZE: gl.constexpr, IS_PLACED: gl.constexpr,
):  # fmt: skip
    """Queries of each item and its latents, each as soon as its place is free."""
    q, q_rope, left, right, rope = memory
    full_q, full_left0, full_right0, full_rope0, full_left1, full_right1, full_rope1 = full
    left0_free, left1_free, right0_free, right1_free, q_free = free
    q_desc, q_rope_desc, kv_desc, k_rope_desc = descs
    first, last = programs
    HALF: gl.constexpr = left.shape[2]
    GROUP: gl.constexpr = q.shape[2]
    GROUPS: gl.constexpr = HALF // GROUP
    WIDTH: gl.constexpr = kv_desc.block_shape[2]
    TILE: gl.constexpr = left.shape[1]
    BOXES: gl.constexpr = TILE // BOX
    left_boxes = _view(left, [2 * (HALF // WIDTH) * BOXES, 1, BOX, WIDTH], _SHARED_BOX)
    right_boxes = _view(right, [2 * (HALF // WIDTH) * BOXES, 1, BOX, WIDTH], _SHARED_BOX)
    rope_boxes = _view(rope, [2 * BOXES, 1, BOX, 64], _SHARED_BOX)
    turn = 0
    for index in range(first, last):
        page_start, first_token, _, _, row0, begin, end, _ = _load_item(items_ptr, index)
        pairs = gl.maximum((end - begin + 2 * TILE - 1) // (2 * TILE), 1)
        table_ptr = page_ids_ptr + page_start.to(gl.int64)
        mbarrier.wait(q_free, ((index - first) & 1) ^ 1)
        mbarrier.expect(full_q, 64 * (2 * HALF + 64) * 2)
        q_row = first_token * num_heads + row0
        for n in gl.static_range(2 * GROUPS):
            _async_load(q_desc, [q_row, n * GROUP], full_q, q.index(n))
        _async_load(q_rope_desc, [q_row, 0], full_q, q_rope)
        for pair in range(pairs):
            start = begin + pair * (2 * TILE)
            phase = (turn & 1) ^ 1
            pages0 = _load_pages(table_ptr, start, end, TILE, BOX, PAGE_SIZE)
            mbarrier.wait(left0_free, phase)
            _load_half(kv_desc, pages0, start, end, full_left0, left_boxes, 0, 0, BOX, PAGE_SIZE, GROUP, GROUPS, TILE, IS_PLACED)
            mbarrier.wait(right0_free, phase)
            _load_half(kv_desc, pages0, start, end, full_right0, right_boxes, 0, HALF, BOX, PAGE_SIZE, GROUP, GROUPS, TILE, IS_PLACED)
            mbarrier.expect(full_rope0, TILE * 64 * 2)
            _load_boxes(k_rope_desc, pages0, start, end, 0, full_rope0, rope_boxes, 0, TILE, BOX, PAGE_SIZE, IS_PLACED)
            pages1 = _load_pages(table_ptr, start + TILE, end, TILE, BOX, PAGE_SIZE)
            mbarrier.wait(left1_free, phase)
            _load_half(kv_desc, pages1, start + TILE, end, full_left1, left_boxes, 1, 0, BOX, PAGE_SIZE, GROUP, GROUPS, TILE, IS_PLACED)
            mbarrier.wait(right1_free, phase)
            _load_half(
                kv_desc, pages1, start + TILE, end, full_right1, right_boxes, 1, HALF, BOX, PAGE_SIZE, GROUP, GROUPS, TILE, IS_PLACED
            )
            mbarrier.expect(full_rope1, TILE * 64 * 2)
            _load_boxes(k_rope_desc, pages1, start + TILE, end, 0, full_rope1, rope_boxes, 1, TILE, BOX, PAGE_SIZE, IS_PLACED)
            turn += 1


@gluon.jit
def _barriers(GROUPS: gl.constexpr):
    if GROUPS == 1:
        return (_new_barrier(1),)
    else:
        return (_new_barrier(1), _new_barrier(1))


@gluon.jit(do_not_specialize=["num_heads"])
def _attend_kernel(
    q_desc,
    q_rope_desc,
    kv_desc,
    k_rope_desc,
    page_ids_ptr,
    programs_ptr,
    items_ptr,
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    sink_ptr,
    scale_log2,
    num_heads,
    PAGE_SIZE: gl.constexpr,
    BOX: gl.constexpr,
    RANK: gl.constexpr,
    BLOCK_RANK: gl.constexpr,
    BLOCK_ROPE: gl.constexpr,
    TILE: gl.constexpr,
    IS_CAUSAL: gl.constexpr,
    IS_PLACED: gl.constexpr,
    HAS_SINK: gl.constexpr,
):
    HALF: gl.constexpr = BLOCK_RANK // 2
    GROUP: gl.constexpr = q_desc.block_shape[1]
    GROUPS: gl.constexpr = HALF // GROUP
    dtype: gl.constexpr = kv_desc.dtype
    memory = (
        gl.allocate_shared_memory(dtype, [2 * GROUPS, 64, GROUP], _SHARED),
        gl.allocate_shared_memory(dtype, [64, 64], _SHARED),
        gl.allocate_shared_memory(dtype, [2, TILE, HALF], _SHARED),
        gl.allocate_shared_memory(dtype, [2, TILE, HALF], _SHARED),
        gl.allocate_shared_memory(dtype, [2, TILE, 64], _SHARED),  # k_rope of a tile; once its scores are there, their probabilities
    )
    exchange = (
        gl.allocate_shared_memory(gl.float32, [64], _LINE),
        gl.allocate_shared_memory(gl.float32, [64], _LINE),
        gl.allocate_shared_memory(gl.int32, [64], _LINE),
        gl.allocate_shared_memory(gl.int32, [64], _LINE),
        gl.allocate_shared_memory(gl.float32, [64], _LINE),
        gl.allocate_shared_memory(gl.float32, [64], _LINE),
    )
    full_q, full_rope0, full_rope1 = _new_barrier(1), _new_barrier(1), _new_barrier(1)
    full_left0, full_right0, full_left1, full_right1 = _barriers(GROUPS), _barriers(GROUPS), _barriers(GROUPS), _barriers(GROUPS)
    left0_free, left1_free, right0_free, right1_free = _new_barrier(1), _new_barrier(1), _new_barrier(1), _new_barrier(1)
    q_free = _new_barrier(2)
    turns = (_new_barrier(1), _new_barrier(1), _new_barrier(1), _new_barrier(1), _new_barrier(1))  # p0 and p1 ready, scored0, done0, done1
    fence_async_shared()
    programs = (gl.load(programs_ptr + gl.program_id(0)), gl.load(programs_ptr + gl.program_id(0) + 1))
    full0 = (full_q, full_left0, full_right0, full_rope0)
    full1 = (full_q, full_left1, full_right1, full_rope1)
    left_free, right_free = (left0_free, left1_free, q_free), (right0_free, right1_free, q_free)
    full = (full_q, full_left0, full_right0, full_rope0, full_left1, full_right1, full_rope1)
    free = (left0_free, left1_free, right0_free, right1_free, q_free)
    outputs = (out_ptr, lse_ptr, partial_out_ptr, partial_lse_ptr, sink_ptr)
    descs = (q_desc, q_rope_desc, kv_desc, k_rope_desc)
    # The loader keeps the page ids of all boxes of a tile.
    LOAD_REGISTERS: gl.constexpr = 24 if TILE == BOX else 40
    MATH_REGISTERS: gl.constexpr = 240 if TILE == BOX else 232
    gl.warp_specialize(
        [
            (_left, (memory, exchange, full0, left_free, turns, programs, items_ptr, outputs, scale_log2, num_heads, RANK, BLOCK_ROPE, BOX, IS_CAUSAL, IS_PLACED, HAS_SINK)),
            (_right, (memory, exchange, full1, right_free, turns, programs, items_ptr, outputs, scale_log2, num_heads, RANK, BLOCK_ROPE, BOX, IS_CAUSAL, IS_PLACED, HAS_SINK)),
            (_loader, (memory, full, free, programs, items_ptr, descs, page_ids_ptr, num_heads, BOX, PAGE_SIZE, IS_PLACED)),
        ],
        [4, 1],
        [MATH_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
