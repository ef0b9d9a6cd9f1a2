"""Merge partial attention results of disjoint stretches of one sequence, by their log-sum-exp.

Floor: partials read once in float32, outputs written once. The order of the sum is that of the list: same list, same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

__all__ = ["MERGE_FIELDS", "merge"]

# int32: first_token, query_len, row, first partial, partial count (0: nothing to do); then of a prefix that several sequences share: first
# partial, count (0: none), and how many rows of its group come before this sequence's.
MERGE_FIELDS = 8


_PROGRAMS_MAX = 4096  # a captured graph launches as many as its longest list may need, and most lists are shorter


class _Tile(NamedTuple):
    """What a program merges at a time."""

    block_partials: int
    block_columns: int
    num_warps: int


_TILES = ((1, _Tile(64, 32, 4)), (4, _Tile(8, 128, 1)), (2**31, _Tile(8, 512, 4)))  # by lists at most: few lists have many partials each


class _OrderedTile(NamedTuple):
    """What a program merges at a time where partials are added one by one: it changes no bits."""

    block_rows: int
    block_columns: int
    unroll: int  # partials asked for at once
    num_warps: int


_ORDERED_TILES = ((4, _OrderedTile(1, 64, 32, 1)), (64, _OrderedTile(2, 256, 8, 4)), (2**31, _OrderedTile(4, 512, 2, 4)))


def merge(
    partial_out: Tensor,
    partial_lse: Tensor,
    merges: Tensor,
    out: Tensor,
    lse: Tensor,
    rows_max: int | None = None,
    overlap: bool = False,
    sink: Tensor | None = None,
    ordered: bool = False,
) -> None:
    """Merge the partials of each listed block of rows.

    partial_out  [num_partials, block_rows, rank]  float32; partial_lse [num_partials, block_rows], natural log, -inf for an empty row
    merges       [num_merges, 8]                   int32, MERGE_FIELDS; `row` counts (query token, head) within the sequence; rows of
                                                   count 0 stand last. Partials of a shared prefix come before the row's own: with p of
                                                   them, row r of its group has slots first + r // block_rows * p and after, and there
                                                   row r % block_rows
    out          [num_tokens, heads, rank]         contiguous; lse [num_tokens, heads] float32: rows of the blocks listed are written
    rows_max     rows that any listed block has, if fewer than block_rows
    overlap      sm_90 and newer: start while the kernel before still runs, and wait for its end inside (programmatic dependent launch)

    sink         float32 [heads]: out is scaled by exp(lse) / (exp(lse) + exp(sink)); lse stays without it
    ordered      partials are added one by one, first to last: what a row gets depends on its partials alone. Else how many lists there are
                 may change the last bits; a captured graph and an eager plan of the same graph_batch agree: both count the padding.
                 Lists with a shared prefix are not taken: what rows share depends on the batch

    A row whose partials are all empty gives 0 and -inf. If ordered, empty partials change no bits wherever they stand, and one that is alone
    is given back as it is. One launch, no allocation, no host sync: safe under graph capture."""
    if merges.shape[0] == 0:
        return
    block_rows, rank = partial_out.shape[1], partial_out.shape[2]
    rows_max = block_rows if rows_max is None else min(rows_max, block_rows)
    if ordered:
        _merge_in_order(partial_out, partial_lse, merges, out, lse, rows_max, overlap, sink)
        return
    tile = next(tile for lists_max, tile in _TILES if merges.shape[0] <= lists_max)
    block_columns = min(tile.block_columns, triton.next_power_of_2(rank))
    pieces = triton.cdiv(rank, block_columns)
    num_tasks = merges.shape[0] * rows_max * pieces
    _merge_kernel[(min(num_tasks, _PROGRAMS_MAX),)](
        partial_out,
        partial_lse,
        merges,
        out,
        lse,
        sink if sink is not None else partial_lse,
        out.shape[1],
        num_tasks,
        rows_max,
        RANK=rank,
        BLOCK_COLUMNS=block_columns,
        PIECES=pieces,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTIALS=tile.block_partials,
        HAS_OVERLAP=overlap,
        HAS_SINK=sink is not None,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if overlap else {}),
    )


@triton.jit(do_not_specialize=["num_heads", "num_tasks", "rows_max"])
def _merge_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    merges_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
    num_heads,
    num_tasks,
    rows_max,
    RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    part = tl.arange(0, BLOCK_PARTIALS)  # [BLOCK_PARTIALS]
    if HAS_OVERLAP:
        gdc_wait()
    task = tl.program_id(0)
    while task < num_tasks:
        merge_ptr = merges_ptr + (task // (rows_max * PIECES)).to(tl.int64) * 8
        block_row = task // PIECES % rows_max
        piece = task % PIECES
        count = tl.load(merge_ptr + 4)
        row = tl.load(merge_ptr + 2) + block_row
        if (count > 0) & (row < tl.load(merge_ptr + 1) * num_heads):
            first_row = tl.load(merge_ptr + 3).to(tl.int64) * BLOCK_ROWS + block_row
            prefix = tl.load(merge_ptr + 6)
            group_row = tl.load(merge_ptr + 7) + row
            prefix_row = (tl.load(merge_ptr + 5) + group_row // BLOCK_ROWS * prefix).to(tl.int64) * BLOCK_ROWS + group_row % BLOCK_ROWS
            first_row -= prefix * BLOCK_ROWS  # of its own partials, counted behind those of the prefix
            count += prefix
            column = piece * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            is_value = column < RANK
            top = float("-inf")
            total = 0.0
            acc = tl.zeros([BLOCK_COLUMNS], tl.float32)
            for start in range(0, count, BLOCK_PARTIALS):
                is_part = start + part < count
                part_row = tl.where(start + part < prefix, prefix_row, first_row) + (start + part) * BLOCK_ROWS
                norm = tl.load(partial_lse_ptr + part_row, mask=is_part, other=float("-inf"))  # natural: one alone comes back as it was
                is_part_value = is_part[:, None] & is_value[None, :]
                value = tl.load(partial_out_ptr + part_row[:, None] * RANK + column[None, :], mask=is_part_value, other=0.0)
                new_top = tl.maximum(top, tl.max(norm, 0))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                weight = tl.exp2((norm - base) * 1.4426950408889634)
                keep = tl.exp2((top - base) * 1.4426950408889634)
                total = total * keep + tl.sum(weight, 0)
                acc = acc * keep + tl.sum(weight[:, None] * value, 0)
                top = new_top
            divisor = tl.where(total > 0, total, 1.0)
            out_row = tl.load(merge_ptr).to(tl.int64) * num_heads + row
            value = acc / divisor
            norm = tl.where(total > 0, top + tl.log2(divisor) * 0.6931471805599453, float("-inf"))
            if HAS_SINK:
                above = tl.load(sink_ptr + row % num_heads) - tl.where(total > 0, norm, 0.0)
                value = value / (1.0 + tl.exp2(above * 1.4426950408889634))
            tl.store(out_ptr + out_row * RANK + column, value.to(out_ptr.dtype.element_ty), mask=is_value)
            if piece == 0:
                tl.store(lse_ptr + out_row, norm)
        task = tl.where(count > 0, task + tl.num_programs(0), num_tasks)  # nothing follows a row of count 0


def _merge_in_order(
    partial_out: Tensor, partial_lse: Tensor, merges: Tensor, out: Tensor, lse: Tensor, rows_max: int, overlap: bool, sink: Tensor | None
) -> None:
    block_rows, rank = partial_out.shape[1], partial_out.shape[2]
    tile = next(tile for lists_max, tile in _ORDERED_TILES if merges.shape[0] <= lists_max)
    columns = min(tile.block_columns, triton.next_power_of_2(rank))
    groups, pieces = triton.cdiv(rows_max, tile.block_rows), triton.cdiv(rank, columns)
    num_tasks = merges.shape[0] * groups * pieces
    _merge_in_order_kernel[(min(num_tasks, _PROGRAMS_MAX),)](
        partial_out,
        partial_lse,
        merges,
        out,
        lse,
        sink if sink is not None else partial_lse,
        out.shape[1],
        num_tasks,
        groups,
        rows_max,
        RANK=rank,
        BLOCK_COLUMNS=columns,
        PIECES=pieces,
        PARTIAL_ROWS=block_rows,
        BLOCK_ROWS=tile.block_rows,
        UNROLL=tile.unroll,
        HAS_OVERLAP=overlap,
        HAS_SINK=sink is not None,
        num_warps=tile.num_warps,
        **({"launch_pdl": True} if overlap else {}),
    )


@triton.jit(do_not_specialize=["num_heads", "num_tasks", "groups", "rows_max"])
def _merge_in_order_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    merges_ptr,
    out_ptr,
    lse_ptr,
    sink_ptr,
    num_heads,
    num_tasks,
    groups,
    rows_max,
    RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    PARTIAL_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    part = tl.arange(0, 16)
    if HAS_OVERLAP:
        gdc_wait()
    task = tl.program_id(0)
    while task < num_tasks:
        merge_ptr = merges_ptr + (task // (groups * PIECES)).to(tl.int64) * 8
        block_row = task // PIECES % groups * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
        column = task % PIECES * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        count = tl.load(merge_ptr + 4)
        row = tl.load(merge_ptr + 2) + block_row
        is_row = (block_row < rows_max) & (row < tl.load(merge_ptr + 1) * num_heads)
        first_row = tl.load(merge_ptr + 3).to(tl.int64) * PARTIAL_ROWS + block_row
        has = tl.where(is_row, count, 0)
        top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        for start in range(0, count, 16):
            is_part = (start + part < count)[None, :] & is_row[:, None]
            norm = tl.load(partial_lse_ptr + first_row[:, None] + (start + part)[None, :] * PARTIAL_ROWS, mask=is_part, other=float("-inf"))
            top = tl.maximum(top, tl.max(norm, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, count, UNROLL):
            for step in tl.static_range(UNROLL):
                is_part = start + step < has  # [BLOCK_ROWS]
                part_row = first_row + (start + step) * PARTIAL_ROWS
                norm = tl.load(partial_lse_ptr + part_row, mask=is_part, other=float("-inf"))
                is_part_value = is_part[:, None] & (column < RANK)[None, :]
                value = tl.load(partial_out_ptr + part_row[:, None] * RANK + column[None, :], mask=is_part_value, other=0.0)
                weight = tl.exp2((norm - base) * 1.4426950408889634)
                total += weight
                acc += weight[:, None] * value
        divisor = tl.where(total > 0, total, 1.0)
        value = acc / divisor[:, None]
        norm = tl.where(total > 0, top + tl.log2(divisor) * 0.6931471805599453, float("-inf"))
        if HAS_SINK:
            above = tl.load(sink_ptr + row % num_heads, mask=is_row, other=0.0) - tl.where(total > 0, norm, 0.0)
            value = value / (1.0 + tl.exp2(above * 1.4426950408889634))[:, None]
        out_row = tl.load(merge_ptr).to(tl.int64) * num_heads + row
        is_value = (has > 0)[:, None] & (column < RANK)[None, :]
        tl.store(out_ptr + out_row[:, None] * RANK + column[None, :], value.to(out_ptr.dtype.element_ty), mask=is_value)
        if task % PIECES == 0:
            tl.store(lse_ptr + out_row, norm, mask=has > 0)
        task = tl.where(count > 0, task + tl.num_programs(0), num_tasks)  # nothing follows a row of count 0
