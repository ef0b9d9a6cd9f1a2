"""FlashMLA's list of dense decode tests (deepseek-ai/FlashMLA: tests/test_flash_mla_dense_decoding.py), its data and its tolerances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvmanager.attention.compare import GARBAGE_PAGE, assert_close
from kvmanager.attention.reference import attend
from kvmanager.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata

HEADS, KV_HEADS, PAGE, ENTRY, RANK = (1, 3, 9, 63, 64, 126, 128), (1, 2, 3, 8), 64, 576, 512


class Case(NamedTuple):
    batch: int
    query_len: int
    length: int
    heads: int
    kv_heads: int
    ragged: bool
    causal: bool
    zeros: bool = False


def grid(batch: int, query_len: int) -> list[Case]:
    return [
        Case(batch, query_len, length, heads, kv_heads, ragged, causal)
        for length in (20, 140, 4096)
        for heads in HEADS
        for kv_heads in KV_HEADS
        for ragged in (False, True)
        for causal in (False, True)
        if heads % kv_heads == 0
    ]


def corners() -> list[Case]:
    return [
        Case(128, 2, 4096, heads, kv_heads, True, causal, True)
        for heads in HEADS
        for kv_heads in KV_HEADS
        for causal in (False, True)
        if heads % kv_heads == 0
    ]


def run(case: Case, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """One case against the float64 reference: NaN in all slots behind a length, garbage in the table there; +inf for rows that see nothing."""
    generator = torch.Generator(device).manual_seed(seed)
    on_host = torch.Generator().manual_seed(seed)
    lengths = torch.full((case.batch,), case.length)
    if case.ragged:
        drawn = torch.normal(float(case.length), case.length / 2, (case.batch,), generator=on_host)
        lengths = drawn.clamp(case.query_len, 4 * case.length).long()
    if case.zeros:
        lengths[torch.rand(case.batch, generator=on_host) < 0.5] = 0
    pages_each = -(-int(lengths.max()) // 256) * 4
    table = torch.randperm(case.batch * pages_each, generator=on_host).view(case.batch, pages_each)
    shape = (case.batch * pages_each, PAGE, case.kv_heads, ENTRY)
    cache = torch.randn(shape, generator=generator, device=device, dtype=dtype).div_(10).clamp_(-1, 1)  # in place: up to 15 GB
    q = torch.randn((case.batch, case.query_len, case.heads, ENTRY), generator=generator, device=device)
    q = (q / 10).clamp(-1, 1).to(dtype)
    position = torch.arange(pages_each * PAGE).view(pages_each, PAGE)
    unread = torch.zeros(shape[:2], dtype=torch.bool)
    unread[table.flatten()] = (position[None] >= lengths[:, None, None]).flatten(0, 1)
    cache[unread.to(device)] = float("nan")
    given = torch.where(torch.arange(pages_each) * PAGE < lengths[:, None], table, GARBAGE_PAGE).int()

    meta, splits = get_mla_metadata()
    arguments = (cache, given.to(device), lengths.int().to(device), RANK, meta, splits)
    out, lse = flash_mla_with_kvcache(q, *arguments, causal=case.causal)
    assert out.dtype == dtype and tuple(lse.shape) == (case.batch, case.heads, case.query_len)
    want_out, want_lse = reference(q, cache, table.to(device), lengths.tolist(), case.causal)
    try:
        assert_close(out, lse, want_out, want_lse)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None


def reference(q: Tensor, cache: Tensor, table: Tensor, lengths: list[int], causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty((*q.shape[:3], RANK), dtype=torch.float64), q.new_empty(q.shape[:3], dtype=torch.float64)
    heads = q.shape[2] // cache.shape[2]
    for row, length in enumerate(lengths):
        latents = cache[table[row, : -(-length // PAGE)]].flatten(0, 1)[:length]
        for index in range(cache.shape[2]):
            part = slice(index * heads, (index + 1) * heads)
            out[row][:, part], lse[row][:, part] = attend(q[row][:, part], latents[:, index], RANK, ENTRY**-0.5, causal)
    return out, torch.where(torch.isneginf(lse), float("inf"), lse).transpose(1, 2)
