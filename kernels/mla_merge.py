"""Merge partial attention results of disjoint stretches of one sequence, by their log-sum-exp.

Floor: partials read once in float32, outputs written once. The order of the sum is that of the list: same list, same bits.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MERGE_FIELDS", "merge"]

MERGE_FIELDS = 8  # int32: first_token, query_len, row, first partial, partial count (0: nothing to do), 3 unused


def merge(partial_out: Tensor, partial_lse: Tensor, merges: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge the partials of each listed block of rows.

    partial_out  [num_partials, block_rows, rank]  float32; partial_lse [num_partials, block_rows], natural log, -inf for an empty row
    merges       [num_merges, 8]                   int32, MERGE_FIELDS; `row` counts (query token, head) within the sequence
    out          [num_tokens, heads, rank]         contiguous; lse [num_tokens, heads] float32: rows of the blocks listed are written

    A row whose partials are all empty gives 0 and -inf. One launch, no allocation, no host sync: safe under graph capture."""
    if merges.shape[0] == 0:
        return
    block_rows, rank = partial_out.shape[1], partial_out.shape[2]
    block_rank = triton.next_power_of_2(rank)
    _merge_kernel[(block_rows, merges.shape[0])](
        partial_out,
        partial_lse,
        merges,
        out,
        lse,
        out.shape[1],
        RANK=rank,
        BLOCK_RANK=block_rank,
        BLOCK_ROWS=block_rows,
        BLOCK_PARTIALS=8,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_heads"])
def _merge_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    merges_ptr,
    out_ptr,
    lse_ptr,
    num_heads,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
):
    merge_ptr = merges_ptr + tl.program_id(1).to(tl.int64) * 8
    count = tl.load(merge_ptr + 4)
    if count > 0:
        first_token = tl.load(merge_ptr)
        num_rows = tl.load(merge_ptr + 1) * num_heads
        row = tl.load(merge_ptr + 2) + tl.program_id(0)
        first = tl.load(merge_ptr + 3).to(tl.int64)
        if row < num_rows:
            column = tl.arange(0, BLOCK_RANK)
            is_value = column < RANK
            top = float("-inf")
            total = 0.0
            acc = tl.zeros([BLOCK_RANK], tl.float32)
            for start in range(0, count, BLOCK_PARTIALS):
                part = start + tl.arange(0, BLOCK_PARTIALS)  # [BLOCK_PARTIALS]
                is_part = part < count
                part_row = (first + part) * BLOCK_ROWS + tl.program_id(0)
                norm = tl.load(partial_lse_ptr + part_row, mask=is_part, other=float("-inf")) * 1.4426950408889634
                value = tl.load(
                    partial_out_ptr + part_row[:, None] * RANK + column[None, :], mask=is_part[:, None] & is_value[None, :], other=0.0
                )
                new_top = tl.maximum(top, tl.max(norm, 0))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                weight = tl.exp2(norm - base)
                keep = tl.exp2(top - base)
                total = total * keep + tl.sum(weight, 0)
                acc = acc * keep + tl.sum(weight[:, None] * value, 0)
                top = new_top
            seen = total > 0
            divisor = tl.where(seen, total, 1.0)
            out_row = first_token.to(tl.int64) * num_heads + row
            tl.store(out_ptr + out_row * RANK + column, (acc / divisor).to(out_ptr.dtype.element_ty), mask=is_value)
            tl.store(lse_ptr + out_row, tl.where(seen, (top + tl.log2(divisor)) * 0.6931471805599453, float("-inf")))
