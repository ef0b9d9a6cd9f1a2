"""The golden answer: what stored bytes mean, and absorbed MLA in float64, one sequence at a time, sharing no code with the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.tables import BatchTables

__all__ = ["attend", "attend_expanded", "decode", "e4m3_values", "gather_latent", "prefill", "project", "read_latent", "select"]


def e4m3_values() -> Tensor:
    """float64 [256]: the number that each byte means in e4m3: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinities, 0x7f is NaN."""
    byte = torch.arange(256)
    exponent, mantissa = (byte >> 3) & 15, (byte & 7).double()
    size = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.exp2((exponent - 7).double()))
    size[(byte & 127) == 127] = float("nan")
    return torch.where(byte < 128, size, -size)


def read_latent(stored: Tensor, rank: int, scale: float = 1.0) -> Tensor:
    """Latents [..., entry], float64, of what page memory holds [..., storage_width]; uint8 is fp8_ds_mla, byte by byte."""
    if stored.dtype == torch.float8_e4m3fn:
        return e4m3_values().to(stored.device)[stored.view(torch.uint8).int()] * scale
    if stored.dtype != torch.uint8:
        return stored.double() * scale
    wide = stored.to(torch.int64)
    values = e4m3_values().to(stored.device)[wide[..., :rank]]
    groups = rank // 128
    bits = sum(wide[..., rank + byte : rank + 4 * groups : 4] << (8 * byte) for byte in range(4))  # little-endian float32
    scales = torch.as_tensor(bits).to(torch.int32).view(torch.float32).double()
    rope = wide[..., rank + 4 * groups :]
    k_pe = ((rope[..., 0::2] + (rope[..., 1::2] << 8)) << 16).to(torch.int32).view(torch.float32).double()  # bf16: a float32's upper half
    return torch.cat([values * scales.repeat_interleave(128, -1), k_pe], -1)


def project(raw: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, positions: Tensor, source_order: str, target_order: str) -> Tensor:
    """Latents [num_tokens, entry], float64, of the raw projection: one complex number a rotating pair."""
    rank = len(weight)
    kv = raw[:, :rank].double()
    kv = kv / (kv.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    half = (raw.shape[1] - rank) // 2
    source, target = (
        torch.arange(2 * half).view(half, 2) if order == "interleaved" else torch.arange(2 * half).view(2, half).T
        for order in (source_order, target_order)
    )
    pairs = torch.view_as_complex(raw[:, rank:].double()[:, source].contiguous())
    angle = cos_sin[positions].double()
    rotated = torch.view_as_real(pairs * torch.complex(angle[:, :half], angle[:, half:]))
    k_pe = torch.empty_like(raw[:, rank:], dtype=torch.float64)
    k_pe[:, target] = rotated
    return torch.cat([kv, k_pe], 1)


def attend(
    q: Tensor,
    latent: Tensor,
    rank: int,
    scale: float,
    causal: bool = True,
    soft_cap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Query tokens q [n, heads, entry] over latents [length, entry]; token t sees length - n + t + 1 of them if causal, else all.

    Of these the last `window` only, if there is one. A score s is soft_cap * tanh(s / soft_cap). sink [heads] is one more logit of each head
    whose value is 0: it scales out, and is not in lse.
    Gives out [n, heads, rank] and lse [n, heads], float64; a token that sees nothing gets 0 and -inf.
    """
    count, length = q.shape[0], latent.shape[0]
    wide = latent.double()
    scores = torch.einsum("thd,ld->thl", q.double(), wide) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    limit = torch.full((count,), length, device=q.device)
    if causal:
        limit = length - count + 1 + torch.arange(count, device=q.device)
    position = torch.arange(length, device=q.device)[None, :]
    sees = position < limit[:, None]
    if window is not None:
        sees &= position >= limit[:, None] - window
    scores = scores.masked_fill(~sees[:, None, :], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if length else scores.new_full(scores.shape[:2], float("-inf"))
    probability = torch.where(torch.isinf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    out = torch.einsum("thl,lr->thr", probability, wide[:, :rank])
    if sink is not None:  # softmax over [scores, sink], the sink's value being 0
        out = out * torch.sigmoid(torch.where(torch.isinf(lse), 0.0, lse) - sink.double())[..., None]
    return out, lse


def attend_expanded(
    q_nope: Tensor,
    q_pe: Tensor,
    latent: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Causal attention with keys and values expanded: q_nope [n, heads, nope], q_pe [n, heads, rope], latents [length, rank + rope].

    w_uk [heads, nope, rank] and w_uv [heads, rank, v]. dtype: what keys and values are rounded to, once. Gives out [n, heads, v] and lse
    [n, heads], float64."""
    rank, count, length = w_uk.shape[2], q_nope.shape[0], latent.shape[0]
    wide = latent.double()
    k_nope = torch.einsum("lr,hdr->lhd", wide[:, :rank], w_uk.double()).to(dtype).double()
    v = torch.einsum("lr,hrd->lhd", wide[:, :rank], w_uv.double()).to(dtype).double()
    scores = torch.einsum("thd,lhd->thl", q_nope.double(), k_nope) + torch.einsum("thd,ld->thl", q_pe.double(), wide[:, rank:])
    sees = torch.arange(length, device=q_pe.device)[None] < length - count + 1 + torch.arange(count, device=q_pe.device)[:, None]
    scores = (scores * scale).masked_fill(~sees[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if length else scores.new_full(scores.shape[:2], float("-inf"))
    probability = torch.where(torch.isinf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    return torch.einsum("thl,lhd->thd", probability, v), lse


def select(pages: Tensor, indices: Tensor) -> Tensor:
    """Rows [any, storage_width] of one layer's pages [num_pages, page_size, storage_width] by slot; indices outside of the pool are left out."""
    page_size = pages.shape[1]
    kept = indices[(indices >= 0) & (indices < pages.shape[0] * page_size)].long()
    return _rows(pages, kept // page_size, kept % page_size)


def _rows(pages: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    if pages.element_size() == 1:
        return pages.view(torch.uint8)[page, offset].view(pages.dtype)
    return pages[page, offset]


def gather_latent(pages: Tensor, tables: BatchTables, row: int) -> Tensor:
    """Rows [length, storage_width] of one sequence out of one layer's pages [num_pages, page_size, storage_width], token by token."""
    length = int(tables.lengths[row])
    table = torch.from_numpy(tables.pages_of(row)[: -(-length // tables.page_size)].astype("int64")).to(pages.device)
    position = torch.arange(length, device=pages.device)
    return _rows(pages, table[position // tables.page_size], position % tables.page_size)


def decode(q: Tensor, pages: Tensor, tables: BatchTables, rank: int, scale: float, stored_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """One query token a sequence: q [batch, heads, entry]."""
    return prefill(q, pages, tables, [1] * tables.batch, rank, scale, stored_scale=stored_scale)


def prefill(
    q: Tensor,
    pages: Tensor,
    tables: BatchTables,
    query_lens: list[int],
    rank: int,
    scale: float,
    causal: bool = True,
    stored_scale: float = 1.0,
    soft_cap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """query_lens[b] query tokens of each sequence, one after the other in q [tokens, heads, entry]."""
    parts = []
    for row, part in enumerate(torch.split(q, query_lens)):
        latent = read_latent(gather_latent(pages, tables, row), rank, stored_scale)
        parts.append(attend(part, latent, rank, scale, causal, soft_cap, window, sink))
    if not parts:
        return q.new_zeros((0, q.shape[1], rank), dtype=torch.float64), q.new_zeros((0, q.shape[1]), dtype=torch.float64)
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])
