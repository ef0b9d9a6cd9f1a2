"""The backend's arithmetic in plain torch, for CPU tensors: float32 inside, any entry dtype outside.

One sequence at a time, so a sequence gives the same bits whatever else is in the batch. Under batch_invariant one query token at a time as
well: a matrix product's bits may depend on how many rows it has, and so on how a prompt is cut into steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.attention.layout import DS_MLA_DIMS, DS_MLA_GROUP
from kvmanager.attention.options import Options
from kvmanager.attention.plan import Plan

__all__ = ["attend_rows", "attend_selected", "attend_sequence", "encode", "project", "read_latent", "write_latent"]

SCORES_MAX = 2**23  # float32 scores held at a time: 32 MiB
E4M3_MAX = 448.0
GROUP_SCALE_MIN = 2.0**-13
_PLAIN = Options()


def write_latent(latent: Tensor, slots: Tensor, pages: Tensor, scale: float = 1.0) -> None:
    """Scatter latent [num_tokens, entry] to slots int64 [num_tokens] of pages [num_pages, page_size, storage_width], in their format; slots out
    of range are dropped."""
    page_size = pages.shape[1]
    inside = (slots >= 0) & (slots < pages.shape[0] * page_size)
    kept = slots[inside]
    rows = encode(latent[inside], pages.dtype, scale)
    if pages.element_size() == 1:  # torch does not index e4m3
        rows, pages = rows.view(torch.uint8), pages.view(torch.uint8)
    pages[kept // page_size, kept % page_size] = rows


def _to_e4m3(values: Tensor) -> Tensor:
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)  # clamp keeps NaN


def encode(latent: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """latent [num_tokens, entry] as page memory of `dtype` stores it, [num_tokens, storage_width]; uint8 is fp8_ds_mla. What e4m3 cannot hold,
    infinities too, becomes the largest it can; NaN stays. A group's scale is chosen by its finite values."""
    if dtype == torch.float8_e4m3fn:
        return _to_e4m3(latent.float() * torch.tensor(1.0 / scale, dtype=torch.float32))
    if dtype != torch.uint8:
        return latent.to(dtype)
    rank = DS_MLA_DIMS[0]
    groups = latent[:, :rank].float().unflatten(1, (-1, DS_MLA_GROUP))
    top = torch.where(torch.isfinite(groups), groups.abs(), 0.0).amax(-1, keepdim=True)
    fraction, exponent = torch.frexp(top)  # top = fraction * 2**exponent, fraction from 0.5; 448 = 0.875 * 2**9
    group_scale = torch.where(top > 0, torch.ldexp(torch.ones_like(top), exponent - 9 + (fraction > 0.875)), 0.0).clamp_min(GROUP_SCALE_MIN)
    parts = _to_e4m3(groups / group_scale).flatten(1), group_scale.flatten(1), latent[:, rank:].to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def read_latent(stored: Tensor, rank: int, scale: float = 1.0) -> Tensor:
    """Latents [..., entry] in float32 of what page memory holds, stored [..., storage_width]; uint8 is fp8_ds_mla."""
    if stored.dtype != torch.uint8:
        return stored.float() * scale if scale != 1.0 else stored.float()
    ends = (rank, rank + rank // DS_MLA_GROUP * 4)
    values, scales, rope = stored[..., : ends[0]], stored[..., ends[0] : ends[1]], stored[..., ends[1] :]
    groups = values.contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (-1, DS_MLA_GROUP))
    wide = groups * scales.contiguous().view(torch.float32).unsqueeze(-1)
    return torch.cat([wide.flatten(-2), rope.contiguous().view(torch.bfloat16).float()], -1)


def project(raw: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, positions: Tensor, source_order: str, target_order: str) -> Tensor:
    """Latents [num_tokens, entry] of the raw projection: RMSNorm of its first len(weight) values, rotation of the rest; in the dtype of raw.
    A position outside of cos_sin makes k_pe NaN."""
    rank = len(weight)
    kv, k_pe = raw[:, :rank].float(), raw[:, rank:].float()
    kv = kv * torch.rsqrt(kv.square().mean(1, keepdim=True) + eps) * weight.float()
    inside = (positions >= 0) & (positions < len(cos_sin))
    angles = torch.where(inside[:, None], cos_sin[torch.where(inside, positions, 0)].float(), float("nan"))
    cos, sin = angles.chunk(2, 1)
    x, y = (k_pe[:, 0::2], k_pe[:, 1::2]) if source_order == "interleaved" else k_pe.chunk(2, 1)
    pair = (x * cos - y * sin, y * cos + x * sin)
    rotated = torch.stack(pair, 2).flatten(1) if target_order == "interleaved" else torch.cat(pair, 1)
    return torch.cat([kv, rotated], 1).to(raw.dtype)


def attend_rows(
    plan: Plan,
    is_decode: bool,
    pages: Tensor,
    q: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    stored_scale: float = 1.0,
    options: Options = _PLAIN,
    sink: Tensor | None = None,
) -> None:
    """Causal absorbed attention of the plan's decode rows, or of the others. q, out and lse hold the tokens of those rows only."""
    rows, first_token = (range(plan.num_decode), 0) if is_decode else (range(plan.num_decode, plan.batch), plan.num_decode)
    for row in rows:
        length, count = int(plan.lengths[row]), int(plan.query_lens[row])
        start = int(plan.query_starts[row]) - first_token
        ids = torch.from_numpy(plan.page_ids[plan.pages_of(row)])
        kept = _take(pages, ids).flatten(0, 1)[:length]  # cut before any arithmetic: the rest may be NaN
        latent = read_latent(kept, out.shape[-1], stored_scale)
        part = slice(start, start + count)
        attend_sequence(q[part], latent, scale, out[part], lse[part], True, options, sink)


def attend_sequence(
    q: Tensor,
    latent: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    causal: bool = True,
    options: Options = _PLAIN,
    sink: Tensor | None = None,
) -> None:
    """Query tokens q [n, heads, entry] over latent float32 [length, entry] into out [n, heads, rank] and lse [n, heads].

    Token t sees length - n + t + 1 latents if causal, else all; one that sees nothing gets 0 and -inf."""
    (count, heads, _), length, rank = q.shape, latent.shape[0], out.shape[-1]
    step = 1 if options.batch_invariant else max(1, SCORES_MAX // max(heads * length, 1))
    for begin in range(0, count, step):
        end = min(begin + step, count)
        seen = max(length - count + end, 0) if causal else length  # no token of this chunk sees past it
        first = 0
        if options.sliding_window is not None:
            first = max((length - count + begin + 1 if causal else length) - options.sliding_window, 0)
        part = latent[first:seen]
        if not len(part):
            out[begin:end] = 0
            lse[begin:end] = float("-inf")
            continue
        scores = (q[begin:end].float().flatten(0, 1) @ part.T).unflatten(0, (end - begin, heads)) * scale
        if options.logit_soft_cap is not None:
            scores = options.logit_soft_cap * torch.tanh(scores / options.logit_soft_cap)
        if end - begin > 1 and causal:
            position = torch.arange(first, seen)
            limit = torch.arange(length - count + begin, length - count + end)[:, None, None]
            hidden = position > limit
            if options.sliding_window is not None:
                hidden |= position <= limit - options.sliding_window
            scores.masked_fill_(hidden, float("-inf"))
        norm = torch.logsumexp(scores, dim=-1)
        lse[begin:end] = norm
        probability = torch.exp(scores - torch.where(torch.isinf(norm), 0.0, norm)[..., None])
        if sink is not None:
            probability *= torch.sigmoid(norm - sink)[..., None]
        out[begin:end] = (probability.flatten(0, 1) @ part[:, :rank]).unflatten(0, (end - begin, heads)).to(out.dtype)


def attend_selected(
    pages: Tensor,
    q: Tensor,
    indices: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    stored_scale: float = 1.0,
    sink: Tensor | None = None,
) -> None:
    """Attention of each query token q [num_tokens, heads, entry] to the slots indices [num_tokens, topk] alone; slots out of range are left out."""
    rank, page_size, num_slots = out.shape[-1], pages.shape[1], pages.shape[0] * pages.shape[1]
    for token, chosen in enumerate(indices.long()):
        kept = chosen[(chosen >= 0) & (chosen < num_slots)]
        if len(kept) == 0:
            out[token], lse[token] = 0, float("-inf")
            continue
        latent = read_latent(_take(pages, kept // page_size, kept % page_size), rank, stored_scale)
        scores = (q[token].float() @ latent.T) * scale
        lse[token] = torch.logsumexp(scores, dim=-1)
        probability = torch.exp(scores - lse[token, :, None])
        if sink is not None:
            probability *= torch.sigmoid(lse[token] - sink)[:, None]
        out[token] = (probability @ latent[:, :rank]).to(out.dtype)


def _take(pages: Tensor, *index: Tensor) -> Tensor:
    """pages[index], of any dtype: torch does not index e4m3."""
    return pages.view(torch.uint8)[index].view(pages.dtype) if pages.dtype == torch.float8_e4m3fn else pages[index]
