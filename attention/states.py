"""States of attention over disjoint parts of one sequence, and the state of the parts together.

A state is (out, lse): out_i = sum_j p_ij v_j over the part's positions, lse_i = log sum_j exp(s_ij). Of parts 1 to n together
    lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i
(FlashAttention, arXiv 2205.14135, section 3.1; as a merge of states: FlashInfer, arXiv 2501.01005, section 2.2). A part in which a row sees
nothing has lse -inf and out 0, counts for nothing, and a row without any part has that state too. Sums are in float32 and in the order given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.errors import InvalidValue

__all__ = ["merge_pair", "merge_states"]


def merge_states(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """outs [parts, ..., width] and lses float32 [parts, ...], natural log, to out [..., width] in the dtype of outs and lse float32 [...].

    Which part comes first changes the last bits, nothing else does. One launch on CUDA; never waits for the device."""
    if outs.ndim < 2 or outs.shape[0] < 1 or not outs.is_floating_point():
        raise InvalidValue("outs", "floats [parts, ..., width], one part or more", f"{outs.dtype} {list(outs.shape)}")
    if lses.dtype != torch.float32 or lses.shape != outs.shape[:-1] or lses.device != outs.device:
        expected = f"float32 {list(outs.shape[:-1])} on {outs.device}"
        raise InvalidValue("lses", expected, f"{lses.dtype} {list(lses.shape)} on {lses.device}")
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    parts, width = outs.shape[0], outs.shape[-1]
    merge_rows(outs.reshape(parts, -1, width), lses.reshape(parts, -1), out.view(-1, width), lse.view(-1))
    return out, lse


def merge_rows(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """outs [parts, rows, width] and lses [parts, rows] into out [rows, width] and lse [rows]; outs and lses may have strides between parts."""
    if outs.device.type == "cuda":
        from kvmanager.kernels import state_merge

        state_merge.merge_states(outs, lses, out, lse)
        return
    top = lses.amax(0)
    base = torch.where(torch.isinf(top), 0.0, top)
    total, acc = torch.zeros_like(top), torch.zeros(out.shape, dtype=torch.float32)
    for part_out, part_lse in zip(outs, lses, strict=True):
        weight = torch.exp(part_lse - base)
        total += weight
        acc += weight[:, None] * part_out.float()
    _finish(acc, total, top, out, lse)


def merge_pair(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    """Two states [tokens, heads, width] and [tokens, heads] of any strides and dtypes into a third, which may be one of them."""
    if out.device.type == "cuda":
        from kvmanager.kernels import state_merge

        state_merge.merge_pair(a, a_lse, b, b_lse, out, out_lse)
        return
    top = torch.maximum(a_lse, b_lse)
    base = torch.where(torch.isinf(top), 0.0, top)
    a_weight, b_weight = torch.exp(a_lse - base), torch.exp(b_lse - base)
    _finish(a_weight[..., None] * a.float() + b_weight[..., None] * b.float(), a_weight + b_weight, top, out, out_lse)


def _finish(acc: Tensor, total: Tensor, top: Tensor, out: Tensor, lse: Tensor) -> None:
    divisor = torch.where(total > 0, total, 1.0)
    out.copy_(acc / divisor[..., None])
    lse.copy_(torch.where(total > 0, top + torch.log(divisor), float("-inf")))
