"""The golden answer: absorbed MLA in float64, one sequence at a time, sharing no code with the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.tables import BatchTables

__all__ = ["attend", "decode", "gather_latent", "prefill"]


def attend(q: Tensor, latent: Tensor, rank: int, scale: float, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Query tokens q [n, heads, entry] over latents [length, entry]; token t sees length - n + t + 1 of them if causal, else all.

    Gives out [n, heads, rank] and lse [n, heads], float64; a token that sees nothing gets 0 and -inf.
    """
    count, length = q.shape[0], latent.shape[0]
    wide = latent.double()
    scores = torch.einsum("thd,ld->thl", q.double(), wide) * scale
    if causal:
        sees = torch.arange(length, device=q.device)[None, :] < (length - count + 1 + torch.arange(count, device=q.device))[:, None]
        scores = scores.masked_fill(~sees[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if length else scores.new_full(scores.shape[:2], float("-inf"))
    probability = torch.where(torch.isinf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    return torch.einsum("thl,lr->thr", probability, wide[:, :rank]), lse


def gather_latent(pages: Tensor, tables: BatchTables, row: int) -> Tensor:
    """Latents [length, entry] of one sequence out of one layer's pages [num_pages, page_size, entry], token by token."""
    length = int(tables.lengths[row])
    table = torch.from_numpy(tables.pages_of(row)[: -(-length // tables.page_size)].astype("int64")).to(pages.device)
    position = torch.arange(length, device=pages.device)
    return pages[table[position // tables.page_size], position % tables.page_size]


def decode(q: Tensor, pages: Tensor, tables: BatchTables, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """One query token a sequence: q [batch, heads, entry]."""
    return prefill(q, pages, tables, [1] * tables.batch, rank, scale)


def prefill(
    q: Tensor, pages: Tensor, tables: BatchTables, query_lens: list[int], rank: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """query_lens[b] query tokens of each sequence, one after the other in q [tokens, heads, entry]."""
    parts = []
    for row, part in enumerate(torch.split(q, query_lens)):
        parts.append(attend(part, gather_latent(pages, tables, row), rank, scale, causal))
    if not parts:
        return q.new_zeros((0, q.shape[1], rank), dtype=torch.float64), q.new_zeros((0, q.shape[1]), dtype=torch.float64)
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
