"""FlashMLA's list of dense decode tests (deepseek-ai/FlashMLA: tests/test_flash_mla_dense_decoding.py), its data and its tolerances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvmanager.attention import reference as golden
from kvmanager.attention import torch_path
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


class ListedCase(NamedTuple):
    """Of FlashMLA's list of sparse decode tests (tests/test_flash_mla_sparse_decoding.py), head_dim 576."""

    batch: int
    query_len: int
    length: int
    topk: int
    page_size: int
    heads: int
    has_length: bool
    has_sink: bool = True
    none_valid: bool = False
    zeros: bool = False


def listed(batch: int) -> list[ListedCase]:
    shapes = (
        (512, 64, 2),
        (512, 64, 64),
        (512, 64, 69),
        (1024, 576, 2),
        (1024, 576, 61),
        (2046, 2048, 2),
        (2046, 2048, 64),
        (2046, 2048, 576),
    )
    cases = [
        ListedCase(batch, tokens, *shape, heads, has_length)
        for has_length in (False, True)
        for heads in (64, 128)
        for shape in shapes
        for tokens in (1, 3)
    ]
    return cases + [
        ListedCase(batch, 3, *shape, heads, has_length, has_sink, none_valid, zeros)
        for has_length in (False, True)
        for heads in (64, 128)
        for shape in ((512, 64, 61), (650, 576, 53))
        for none_valid in (True, False)
        for zeros in (True, False)
        for has_sink in (True, False)
        if none_valid or zeros or has_sink
    ]


def run_listed(case: ListedCase, device: str, is_fp8: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
    """One case against the float64 reference of what the listed bytes mean; every byte that is not listed is 0xff, NaN in all three formats."""
    on_host = torch.Generator().manual_seed(seed)
    batch, tokens, heads, topk = case.batch, case.query_len, case.heads, case.topk
    pages_each = -(-case.length // case.page_size) + 1
    num_slots = batch * pages_each * case.page_size
    lengths = torch.randint(1, case.length + 1, (batch,), generator=on_host)
    if case.zeros:
        lengths[torch.rand(batch, generator=on_host) < 0.5] = 0
    table = torch.randperm(batch * pages_each, generator=on_host).view(batch, pages_each)
    place = (torch.rand((batch, tokens, topk), generator=on_host) * lengths[:, None, None]).long()
    rows = torch.arange(batch)[:, None, None].expand_as(place)
    indices = table[rows, place // case.page_size] * case.page_size + place % case.page_size
    indices[torch.rand(place.shape, generator=on_host) < 0.1] = -1
    indices[..., -1] = num_slots + 3
    if case.none_valid:
        indices.fill_(-1)
    indices[lengths == 0] = -1
    topk_length = torch.randint(0, topk + 1, (batch,), generator=on_host) if case.has_length else torch.full((batch,), topk)
    counted = torch.where(torch.arange(topk) < topk_length[:, None, None], indices, -1)

    kept = counted.flatten().unique()
    kept = kept[(kept >= 0) & (kept < num_slots)]
    latent = (torch.randn((len(kept), ENTRY), generator=on_host) / 10).clamp(-1, 1).to(dtype)
    if is_fp8:
        cache = torch.full((num_slots, 656), 255, dtype=torch.uint8)
        cache[kept] = torch_path.encode(latent, torch.uint8)
    else:
        cache = torch.full((num_slots, ENTRY), float("nan"), dtype=dtype)
        cache[kept] = latent
    cache = cache.view(batch * pages_each, case.page_size, 1, -1).to(device)
    q = (torch.randn((batch, tokens, heads, ENTRY), generator=on_host) / 10).clamp(-1, 1).to(dtype).to(device)
    sink = torch.randn(heads, generator=on_host)
    sink[::7], sink[1::9] = float("inf"), float("-inf")
    sink = sink.to(device) if case.has_sink else None
    given = counted if not case.has_length else indices
    out, lse = flash_mla_with_kvcache(
        q,
        cache,
        None,
        None,
        RANK,
        get_mla_metadata()[0],
        is_fp8_kvcache=is_fp8,
        indices=given.int().to(device),
        attn_sink=sink,
        topk_length=topk_length.int().to(device) if case.has_length else None,
    )
    assert out.dtype == dtype and tuple(lse.shape) == (batch, heads, tokens)
    want_out, want_lse = (
        torch.empty(out.shape, dtype=torch.float64, device=device),
        torch.empty(q.shape[:3], dtype=torch.float64, device=device),
    )
    for row in range(batch):
        for token in range(tokens):
            slots = counted[row, token].to(device)
            wide = golden.read_latent(golden.select(cache[:, :, 0], slots), RANK)
            part = attend(q[row, token : token + 1], wide, RANK, ENTRY**-0.5, causal=False, sink=sink)
            want_out[row, token], want_lse[row, token] = part[0][0], part[1][0]
    want_lse = torch.where(torch.isneginf(want_lse), float("inf"), want_lse).transpose(1, 2)
    try:
        assert_close(out, lse, want_out, want_lse)
    except AssertionError as error:
        raise AssertionError(f"{case}: {error}") from None
