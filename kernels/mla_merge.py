"""Merge partial attention results of disjoint stretches of one sequence, by their log-sum-exp.

Floor: partials read once in float32, outputs written once. The order of the sum is that of the list: same list, same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

__all__ = ["MERGE_FIELDS", "merge"]

MERGE_FIELDS = 8  # int32: first_token, query_len, row, first partial, partial count (0: nothing to do), 3 unused


_PROGRAMS_MAX = 4096  # a captured graph launches as many as its longest list may need, and most lists are shorter


class _Tile(NamedTuple):
    """What a program merges at a time."""

    block_partials: int
    block_columns: int
    num_warps: int


_TILES = ((1, _Tile(64, 32, 4)), (4, _Tile(8, 128, 1)), (2**31, _Tile(8, 512, 4)))  # by lists at most: few lists have many partials each


def merge(
    partial_out: Tensor, partial_lse: Tensor, merges: Tensor, out: Tensor, lse: Tensor, rows_max: int | None = None, overlap: bool = False
) -> None:
    """Merge the partials of each listed block of rows.

    partial_out  [num_partials, block_rows, rank]  float32; partial_lse [num_partials, block_rows], natural log, -inf for an empty row
    merges       [num_merges, 8]                   int32, MERGE_FIELDS; `row` counts (query token, head) within the sequence; rows of
                                                   count 0 stand last
    out          [num_tokens, heads, rank]         contiguous; lse [num_tokens, heads] float32: rows of the blocks listed are written
    rows_max     rows that any listed block has, if fewer than block_rows
    overlap      sm_90 and newer: start while the kernel before still runs, and wait for its end inside (programmatic dependent launch)

    A row whose partials are all empty gives 0 and -inf. One launch, no allocation, no host sync: safe under graph capture. How many lists
    there are may change the last bits, so a captured graph and an eager plan of the same graph_batch agree: both count the padding."""
    if merges.shape[0] == 0:
        return
    block_rows, rank = partial_out.shape[1], partial_out.shape[2]
    rows_max = block_rows if rows_max is None else min(rows_max, block_rows)
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
        out.shape[1],
        num_tasks,
        rows_max,
        RANK=rank,
        BLOCK_COLUMNS=block_columns,
        PIECES=pieces,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTIALS=tile.block_partials,
        HAS_OVERLAP=overlap,
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
    num_heads,
    num_tasks,
    rows_max,
    RANK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    HAS_OVERLAP: tl.constexpr,
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
            column = piece * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            is_value = column < RANK
            top = float("-inf")
            total = 0.0
            acc = tl.zeros([BLOCK_COLUMNS], tl.float32)
            for start in range(0, count, BLOCK_PARTIALS):
                is_part = start + part < count
                part_row = first_row + (start + part) * BLOCK_ROWS
                norm = tl.load(partial_lse_ptr + part_row, mask=is_part, other=float("-inf")) * 1.4426950408889634
                is_part_value = is_part[:, None] & is_value[None, :]
                value = tl.load(partial_out_ptr + part_row[:, None] * RANK + column[None, :], mask=is_part_value, other=0.0)
                new_top = tl.maximum(top, tl.max(norm, 0))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                weight = tl.exp2(norm - base)
                keep = tl.exp2(top - base)
                total = total * keep + tl.sum(weight, 0)
                acc = acc * keep + tl.sum(weight[:, None] * value, 0)
                top = new_top
            divisor = tl.where(total > 0, total, 1.0)
            out_row = tl.load(merge_ptr).to(tl.int64) * num_heads + row
            tl.store(out_ptr + out_row * RANK + column, (acc / divisor).to(out_ptr.dtype.element_ty), mask=is_value)
            if piece == 0:
                tl.store(lse_ptr + out_row, tl.where(total > 0, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf")))
        task = tl.where(count > 0, task + tl.num_programs(0), num_tasks)  # nothing follows a row of count 0
