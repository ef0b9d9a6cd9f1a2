"""Merge partial attention states (out, lse) of disjoint parts of one sequence: two of any strides, or one of each rank, in their order.

Floor: every partial out read once, the result written once, at copy bandwidth; the arithmetic is nothing. What a row gets depends on its own
partials and their order alone.
"""

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_pair", "merge_states"]

BLOCK_ROWS = 4  # (token, head) rows of a program
BLOCK_COLUMNS_MAX = 512


def merge_pair(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    """out, out_lse = the state of a's and b's parts together; out may be a or b itself.

    a, b, out           [tokens, heads, width]  any float dtype each, device; width contiguous, other strides any, may pass 2**31 elements
    a_lse, b_lse, ...   [tokens, heads]         float32, natural log, any strides; -inf: that part is empty

    A row whose parts are both empty gives 0 and -inf. One launch, no allocation, no host sync: safe under graph capture."""
    tokens, heads, width = out.shape
    if tokens == 0:
        return
    columns = min(triton.next_power_of_2(width), BLOCK_COLUMNS_MAX)
    _merge_pair_kernel[(triton.cdiv(tokens * heads, BLOCK_ROWS), triton.cdiv(width, columns))](
        a,
        a_lse,
        b,
        b_lse,
        out,
        out_lse,
        tokens * heads,
        heads,
        *(stride for state in ((a, a_lse), (b, b_lse), (out, out_lse)) for tensor in state for stride in tensor.stride()[:2]),
        WIDTH=width,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=columns,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _merge_pair_kernel(
    a_ptr,
    a_lse_ptr,
    b_ptr,
    b_lse_ptr,
    out_ptr,
    out_lse_ptr,
    num_rows,
    heads,
    stride_a_token,
    stride_a_head,
    stride_a_lse_token,
    stride_a_lse_head,
    stride_b_token,
    stride_b_head,
    stride_b_lse_token,
    stride_b_lse_head,
    stride_out_token,
    stride_out_head,
    stride_out_lse_token,
    stride_out_lse_head,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row = row < num_rows
    is_value = is_row[:, None] & (column < WIDTH)[None, :]
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    a_norm = tl.load(a_lse_ptr + token * stride_a_lse_token + head * stride_a_lse_head, mask=is_row, other=float("-inf"))
    b_norm = tl.load(b_lse_ptr + token * stride_b_lse_token + head * stride_b_lse_head, mask=is_row, other=float("-inf"))
    a = tl.load(a_ptr + (token * stride_a_token + head * stride_a_head)[:, None] + column[None, :], mask=is_value, other=0.0)
    b = tl.load(b_ptr + (token * stride_b_token + head * stride_b_head)[:, None] + column[None, :], mask=is_value, other=0.0)
    top = tl.maximum(a_norm, b_norm)
    base = tl.where(top == float("-inf"), 0.0, top)
    a_weight = tl.exp2((a_norm - base) * 1.4426950408889634)
    b_weight = tl.exp2((b_norm - base) * 1.4426950408889634)
    total = a_weight + b_weight
    divisor = tl.where(total > 0, total, 1.0)
    value = (a.to(tl.float32) * a_weight[:, None] + b.to(tl.float32) * b_weight[:, None]) / divisor[:, None]
    norm = tl.where(total > 0, top + tl.log2(divisor) * 0.6931471805599453, float("-inf"))
    place = (token * stride_out_token + head * stride_out_head)[:, None] + column[None, :]
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=is_value)
    if tl.program_id(1) == 0:
        tl.store(out_lse_ptr + token * stride_out_lse_token + head * stride_out_lse_head, norm, mask=is_row)


def merge_states(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """out, lse = the state of all parts together, added in their order.

    outs  [parts, rows, width]  any float dtype, device; parts and rows of any stride, width contiguous
    lses  [parts, rows]         float32, natural log; parts of any stride, rows contiguous; -inf: that part of the row is empty
    out   [rows, width]         any float dtype, contiguous; lse [rows] float32

    A row whose parts are all empty gives 0 and -inf. One launch, no allocation, no host sync: safe under graph capture."""
    parts, rows, width = outs.shape
    if rows == 0:
        return
    columns = min(triton.next_power_of_2(width), BLOCK_COLUMNS_MAX)
    _merge_states_kernel[(triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(width, columns))](
        outs,
        lses,
        out,
        lse,
        parts,
        rows,
        outs.stride(0),
        outs.stride(1),
        lses.stride(0),
        WIDTH=width,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLUMNS=columns,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["parts", "num_rows"])
def _merge_states_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    parts,
    num_rows,
    stride_outs_part,
    stride_outs_row,
    stride_lses_part,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)  # [BLOCK_ROWS]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row = row < num_rows
    is_value = is_row[:, None] & (column < WIDTH)[None, :]
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    norms_ptr = lses_ptr + row
    for _ in range(parts):
        top = tl.maximum(top, tl.load(norms_ptr, mask=is_row, other=float("-inf")))
        norms_ptr += stride_lses_part
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    norms_ptr = lses_ptr + row
    values_ptr = outs_ptr + (row * stride_outs_row)[:, None] + column[None, :]
    for _ in range(parts):
        weight = tl.exp2((tl.load(norms_ptr, mask=is_row, other=float("-inf")) - base) * 1.4426950408889634)
        acc += weight[:, None] * tl.load(values_ptr, mask=is_value, other=0.0).to(tl.float32)
        total += weight
        norms_ptr += stride_lses_part
        values_ptr += stride_outs_part
    divisor = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row[:, None] * WIDTH + column[None, :], (acc / divisor[:, None]).to(out_ptr.dtype.element_ty), mask=is_value)
    if tl.program_id(1) == 0:
        norm = tl.where(total > 0, top + tl.log2(divisor) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + row, norm, mask=is_row)
