"""Attention over expanded keys and values by a library, with its LSE: what a chunk of long_prefill.py runs on.

All take q [tokens, heads, qk_dim], k [heads, length, qk_dim], v [heads, length, v_dim] and give out [tokens, heads, v_dim] and lse float32
[tokens, heads], natural log, both possibly strided. Causal: the query tokens are the last of the keys, and see none behind their own.

  cudnn   cuDNN's attention, by the operator that F.scaled_dot_product_attention calls: v may be narrower than k; a shape not seen before
          costs the host tens of milliseconds, so shapes are rounded up (long_prefill.py). Causal with as many keys as query tokens only
  flash   torch.nn.attention.varlen.varlen_attn, torch's public name of FlashAttention with its LSE: q, k and v of one width, so v is padded
  plain   matrix products in float32, a bounded number of scores at a time: the CPU, float32, and widths that neither library takes
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.attention import torch_path

__all__ = ["attend_cudnn", "attend_flash", "attend_plain"]


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """sm_90 and newer, bf16 and fp16."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse = attend(q.transpose(0, 1)[None], k[None], v[None], None, True, 0.0, causal, False, scale=scale)[:2]
    return out[0].transpose(0, 1), lse.view(lse.shape[1:3]).transpose(0, 1)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, ends: Tensor) -> tuple[Tensor, Tensor]:
    """sm_80 and newer, bf16 and fp16, widths to 256; k and v equally wide. ends: int32 [2, 2] on the device, 0 in its first column."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    (tokens, _, _), length = q.shape, k.shape[1]
    ends[0, 1:].fill_(tokens)  # a fill, no copy from the host: nothing waits
    ends[1, 1:].fill_(length)
    window = (-1, 0) if causal else (-1, -1)
    lengths = (ends[0], ends[1], tokens, length)
    out, lse = varlen_attn(
        q, k.transpose(0, 1), v.transpose(0, 1), *lengths, return_aux=AuxRequest(lse=True), scale=scale, window_size=window
    )
    return out, lse.transpose(0, 1)  # lse comes as [heads, tokens]


def attend_plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Any device, dtype and widths."""
    (tokens, heads, _), length = q.shape, k.shape[1]
    out = torch.empty((tokens, heads, v.shape[2]), dtype=torch.float32, device=q.device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    step = max(1, torch_path.SCORES_MAX // max(heads * length, 1))
    keys, values = k.float().transpose(1, 2), v.float()
    for begin in range(0, tokens, step):
        part = slice(begin, min(begin + step, tokens))
        scores = torch.bmm(q[part].float().transpose(0, 1), keys) * scale  # [heads, tokens of this part, length]
        if causal:
            seen = torch.arange(length, device=q.device) <= torch.arange(part.start, part.stop, device=q.device)[:, None] + length - tokens
            scores.masked_fill_(~seen, float("-inf"))
        norm = torch.logsumexp(scores, dim=-1)
        lse[part] = norm.T
        out[part] = torch.bmm(torch.exp(scores - norm[..., None]), values).transpose(0, 1)
    return out, lse
