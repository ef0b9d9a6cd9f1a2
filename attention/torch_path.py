"""The backend's arithmetic in plain torch, for CPU tensors: float32 inside, any entry dtype outside.

One sequence at a time, so a sequence gives the same bits whatever else is in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.attention.plan import Plan

__all__ = ["attend_rows", "write_latent"]

SCORES_MAX = 2**23  # float32 scores held at a time: 32 MiB


def write_latent(latent: Tensor, slots: Tensor, pages: Tensor) -> None:
    """Scatter latent [num_tokens, entry] to slots int64 [num_tokens] of pages [num_pages, page_size, entry]; slots out of range are dropped."""
    page_size = pages.shape[1]
    inside = (slots >= 0) & (slots < pages.shape[0] * page_size)
    kept = slots[inside]
    pages[kept // page_size, kept % page_size] = latent[inside]


def attend_rows(plan: Plan, is_decode: bool, pages: Tensor, q: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Causal absorbed attention of the plan's decode rows, or of the others. q, out and lse hold the tokens of those rows only."""
    rows, first_token = (range(plan.num_decode), 0) if is_decode else (range(plan.num_decode, plan.batch), plan.num_decode)
    rank = out.shape[-1]
    for row in rows:
        length, count = int(plan.lengths[row]), int(plan.query_lens[row])
        start = int(plan.query_starts[row]) - first_token
        if length == 0:
            out[start : start + count] = 0
            lse[start : start + count] = float("-inf")
            continue
        ids = torch.from_numpy(plan.page_ids[plan.page_starts[row] : plan.page_starts[row + 1]])
        latent = pages.index_select(0, ids).flatten(0, 1)[:length].float()  # cut before any arithmetic: the rest may be NaN
        heads = q.shape[1]
        step = max(1, SCORES_MAX // (heads * length))
        for begin in range(0, count, step):
            end = min(begin + step, count)
            seen = length - count + end  # no row of this chunk sees past it
            part = latent[:seen]
            scores = (q[start + begin : start + end].float().flatten(0, 1) @ part.T).unflatten(0, (end - begin, heads)) * scale
            if end - begin > 1:
                limit = torch.arange(length - count + begin, length - count + end)
                scores.masked_fill_(torch.arange(seen) > limit[:, None, None], float("-inf"))
            norm = torch.logsumexp(scores, dim=-1)
            lse[start + begin : start + end] = norm
            probability = torch.exp(scores - norm[..., None]).flatten(0, 1)
            out[start + begin : start + end] = (probability @ part[:, :rank]).unflatten(0, (end - begin, heads)).to(out.dtype)
