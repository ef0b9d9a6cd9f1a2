"""The one comparison that every kernel test and benchmark uses: hostile inputs, and FlashMLA's published tolerances.

Inputs: fresh random latents; NaN in every slot that no sequence reads; 2147480000 in table entries past a length; outputs poisoned with NaN.
Latents stored in eight bits are compared as the numbers that their bytes mean: what rounding them cost is the format's, not the kernel's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention import reference, torch_path
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.options import Options, piece_tokens
from kvmanager.attention.shared_prefix import PrefixGroup
from kvmanager.attention.shared_work import shared_decode_work
from kvmanager.attention.work import Shape, decode_work, prefill_work
from kvmanager.tables import BatchTables

if TYPE_CHECKING:
    from kvmanager.kernels.mla_decode import Tile

__all__ = [
    "GARBAGE_PAGE",
    "Heads",
    "Problem",
    "assert_close",
    "check_attention",
    "check_expanded",
    "make_heads",
    "make_problem",
    "poisoned",
    "run_kernels",
    "share_pages",
]

GARBAGE_PAGE = 2147480000
OUT_ABS, OUT_REL, OUT_COSINE = 8e-4, 2.01 / 128, 5e-6
LSE_ABS, LSE_REL = 1e-6, 8.01 / 65536
# Of expanded heads in 16 bits: out by norm, lse in nats. A key that is rounded moves its score by some 2**-9 of it, and a lone key's score is the lse.
EXPANDED_OUT, EXPANDED_LSE = 6e-3, 3e-3
_PLAIN = Options()
LATENT_SCALE, QUERY_SCALE = 0.1, 3.0  # FlashMLA draws both at 0.1, which leaves the softmax flat; the absolute limits want small values


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An output buffer whose every unwritten element shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """One step's input. The latents of this step's own tokens are in `latent` and not yet in the memory, where their slots hold NaN."""

    memory: PageMemory
    tables: BatchTables
    query_lens: list[int]
    latent: Tensor  # [num_layers, tokens, entry]
    q: Tensor  # [num_layers, tokens, heads, entry]
    scale: float
    unread: Tensor  # bool [num_pages, page_size]: slots of no sequence


def make_problem(
    layout: LatentLayout,
    lengths: Sequence[int],
    query_lens: Sequence[int],
    num_heads: int,
    device: str | torch.device = "cpu",
    seed: int = 0,
    spare_pages: int = 5,
    reserved_entries: int = 2,
    written: bool = False,
    value_dtype: torch.dtype | None = None,
) -> Problem:
    """A step over fresh random data. A row of length 0 has no pages. `written`: this step's latents are in the memory already.

    value_dtype: of q and latent, if not the layout's (the interpreter cannot multiply bfloat16)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    used = [-(-length // layout.page_size) for length in lengths]
    num_pages = sum(used) + spare_pages
    order = np.random.default_rng(seed).permutation(num_pages).astype(np.int32)
    rows, start = [], 0
    for count in used:
        rows.append(np.concatenate([order[start : start + count], np.full(reserved_entries, GARBAGE_PAGE, np.int32)]))
        start += count
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    page_ids = np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)
    tables = BatchTables(seed + 1, layout.page_size, np.array(lengths, np.int32), page_ids, indptr)

    memory = PageMemory(layout, num_pages, device)
    if layout.is_fp8:
        memory.pages.view(torch.uint8).fill_(255)  # NaN as e4m3, float32 and bfloat16
    else:
        memory.pages.fill_(float("nan"))
    unread = torch.ones((num_pages, layout.page_size), dtype=torch.bool)
    for row, (length, count) in enumerate(zip(lengths, query_lens, strict=True)):
        position = np.arange(length)
        page, offset = tables.pages_of(row)[position // layout.page_size].astype(np.int64), position % layout.page_size
        unread[page, offset] = False
        past = length if written else max(length - count, 0)
        values = torch.randn((past, layout.num_layers, layout.entry), generator=generator, device=device) * LATENT_SCALE
        where = (torch.from_numpy(page[:past]).to(device), torch.from_numpy(offset[:past]).to(device))
        if layout.is_fp8:
            for layer in range(layout.num_layers):
                stored = torch_path.encode(values[:, layer], memory.pages.dtype, layout.scale_of(layer)).view(torch.uint8)
                memory.layer(layer).view(torch.uint8)[where] = stored
        else:
            memory.pages[where[0], :, where[1]] = values.to(memory.pages.dtype)
    tokens = sum(query_lens)
    latent = torch.randn((layout.num_layers, tokens, layout.entry), generator=generator, device=device) * LATENT_SCALE
    q = torch.randn((layout.num_layers, tokens, num_heads, layout.entry), generator=generator, device=device) * QUERY_SCALE
    dtype = value_dtype or getattr(torch, layout.value_dtype)
    return Problem(memory, tables, list(query_lens), latent.to(dtype), q.to(dtype), layout.entry**-0.5, unread)


def share_pages(problem: Problem, groups: Sequence[tuple[int, int, int]]) -> Problem:
    """The problem with other tables: of each (first row, rows, pages), the rows begin with the first one's pages. What theirs were is NaN now.

    The problem's memory is changed; `written` problems only."""
    tables, page_ids, unread = problem.tables, problem.tables.page_ids.copy(), problem.unread.clone()
    kept = set()
    for first, rows, pages in groups:
        start = int(tables.page_indptr[first])
        for row in range(first + 1, first + rows):
            other = int(tables.page_indptr[row])
            page_ids[other : other + pages] = page_ids[start : start + pages]
    for row in range(tables.batch):
        used = -(-int(tables.lengths[row]) // tables.page_size)
        kept.update(page_ids[tables.page_indptr[row] :][:used].tolist())
    dropped = torch.tensor(sorted(set(range(problem.memory.num_pages)) - kept), dtype=torch.int64)
    raw, where = problem.memory.pages, dropped.to(problem.memory.device)
    if problem.memory.layout.is_fp8:
        raw.view(torch.uint8)[where] = 255
    else:
        raw[where] = float("nan")
    unread[dropped] = True
    return replace(problem, tables=replace(tables, page_ids=page_ids), unread=unread)


def _close(name: str, got: Tensor, want: Tensor, abs_limit: float, rel_limit: float) -> None:
    if got.shape != want.shape:
        raise AssertionError(f"{name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}")
    got, want = got.double(), want.double()
    if torch.isnan(got).any():
        raise AssertionError(f"{name}: {int(torch.isnan(got).sum())} of {got.numel()} values are NaN")
    if not torch.equal(torch.isinf(got), torch.isinf(want)):
        raise AssertionError(f"{name}: infinities stand elsewhere than in the reference")
    finite = ~torch.isinf(want)
    error = torch.where(finite, (got - want).abs(), 0.0)
    bad = (error > abs_limit) & (error > rel_limit * want.abs())
    if bad.any():
        worst = int(error.flatten().argmax())
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} values off by more than {abs_limit} and {rel_limit:.2e} of theirs; "
            f"worst: expected {want.flatten()[worst]:.6f}, got {got.flatten()[worst]:.6f}"
        )


def assert_close(out: Tensor, lse: Tensor, want_out: Tensor, want_lse: Tensor) -> None:
    """Raise AssertionError unless out and lse are within FlashMLA's tolerances of the reference."""
    _close("lse", lse, want_lse, LSE_ABS, LSE_REL)
    _close("out", out, want_out, OUT_ABS, OUT_REL)
    x, y = out.double().flatten(), want_out.double().flatten()
    total = (x * x + y * y).sum()
    if total > 0 and (cosine := float(1 - 2 * (x * y).sum() / total)) > OUT_COSINE:
        raise AssertionError(f"out: cosine difference {cosine:.2e}, expected at most {OUT_COSINE}")


def run_kernels(
    problem: Problem,
    layer: int,
    tile: Tile | None,
    num_programs: int,
    causal: bool = True,
    options: Options = _PLAIN,
    sink: Tensor | None = None,
    groups: Sequence[PrefixGroup] = (),
) -> tuple[Tensor, Tensor]:
    """The attention and merge kernels alone, over the problem's own page tables, garbage entries included; all outputs poisoned first.

    tile: of the plain kernel; None runs the Hopper kernel. groups: decode rows whose common prefix is read once."""
    from kvmanager.kernels import latent_formats, mla_decode, mla_merge

    q, pages, tables, layout = problem.q[layer], problem.memory.layer(layer), problem.tables, problem.memory.layout
    pieces = piece_tokens(options, q.shape[1])
    if tile is None:
        from kvmanager.attention.cuda_path import hopper_shape

        shape = hopper_shape(q.shape[1], problem.memory.layout.kv_lora_rank, num_programs, pieces)
    else:
        window = options.sliding_window or 0
        shape = Shape(q.shape[1], tile.block_rows, tile.block_tokens, num_programs, piece_tiles=pieces // tile.block_tokens, window=window)
    lengths, counts, starts = tables.lengths.astype(np.int64), np.array(problem.query_lens, np.int64), tables.page_indptr[:-1]
    if groups:
        work, _ = shared_decode_work(shape, starts, lengths, groups, len(lengths))
    elif (counts == 1).all():
        work = decode_work(shape, starts, lengths)
    else:
        work = prefill_work(shape, starts, lengths, counts, np.cumsum(counts) - counts, causal)
    programs, items, merges, page_ids = (
        torch.from_numpy(array).to(q.device) for array in (work.programs, work.items, work.merges, tables.page_ids)
    )
    rank = problem.memory.layout.kv_lora_rank
    out, lse = poisoned((*q.shape[:2], rank), q.dtype, q.device), poisoned(tuple(q.shape[:2]), torch.float32, q.device)
    partials = (max(work.num_partials, 1), shape.block_rows)
    partial_out, partial_lse = poisoned((*partials, rank), torch.float32, q.device), poisoned(partials, torch.float32, q.device)
    if tile is None:
        from kvmanager.kernels import mla_decode_hopper as hopper

        described = hopper.describe_pages(pages, rank)
        lists = (page_ids, programs, items, out, lse, partial_out, partial_lse, problem.scale)
        hopper.attend(q, described, *lists, causal, options.batch_invariant, sink)
    else:
        stored = latent_formats.view_pages(pages, rank, layout.scale_of(layer))
        lists = (page_ids, programs, items, out, lse, partial_out, partial_lse, problem.scale)
        mla_decode.attend(q, stored, *lists, tile, causal, options.logit_soft_cap, options.sliding_window, sink)
    mla_merge.merge(partial_out, partial_lse, merges, out, lse, overlap=tile is None, sink=sink, ordered=options.batch_invariant)
    return out, lse


def check_attention(
    problem: Problem,
    layer: int,
    out: Tensor,
    lse: Tensor,
    causal: bool = True,
    options: Options = _PLAIN,
    sink: Tensor | None = None,
) -> None:
    """Compare a whole step's out [tokens, heads, rank] and lse with the float64 reference over the memory as it now is."""
    pages, layout = problem.memory.layer(layer), problem.memory.layout
    rank, scale, changes = layout.kv_lora_rank, problem.scale, (options.logit_soft_cap, options.sliding_window, sink)
    stored_scale = layout.scale_of(layer)
    want = reference.prefill(problem.q[layer], pages, problem.tables, problem.query_lens, rank, scale, causal, stored_scale, *changes)
    assert_close(out, lse, *want)
    unread = problem.unread.to(pages.device)
    untouched = (pages.view(torch.uint8)[unread] == 255).all() if layout.is_fp8 else torch.isnan(pages[unread].float()).all()
    if not untouched:
        raise AssertionError("pages: a slot that belongs to no sequence was written")


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """What attention with expanded heads takes beside a problem's latents; keys come out as spread as its latents are."""

    q_nope: Tensor  # [tokens, heads, nope]
    q_pe: Tensor  # [tokens, heads, rope]
    w_uk: Tensor  # [heads, nope, rank]
    w_uv: Tensor  # [heads, rank, v]

    def tail(self, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments for the tokens from `first` on."""
        return self.q_nope[first:], self.q_pe[first:], self.w_uk, self.w_uv


def make_heads(problem: Problem, nope: int, v: int, seed: int = 0) -> Heads:
    """Queries and weights in the dtype of the problem's q; w_uk and w_uv are views of one weight, as a model's are."""
    layout, (_, tokens, heads, _), dtype, device = problem.memory.layout, problem.q.shape, problem.q.dtype, problem.q.device
    generator = torch.Generator(device=device).manual_seed(seed)
    rank = layout.kv_lora_rank
    weight = (torch.randn((heads, nope + v, rank), generator=generator, device=device) * rank**-0.5).to(dtype)
    q = (torch.randn((tokens, heads, nope + layout.qk_rope_head_dim), generator=generator, device=device) * QUERY_SCALE).to(dtype)
    return Heads(q[..., :nope], q[..., nope:], weight[:, :nope], weight[:, nope:].transpose(1, 2))


def check_expanded(problem: Problem, layer: int, heads: Heads, scale: float, out: Tensor, lse: Tensor, first_row: int = 0) -> None:
    """Compare out [tokens, heads, v] and lse of the rows from first_row on with float64 over the memory as it now is."""
    layout, counts = problem.memory.layout, problem.query_lens
    start = sum(counts[:first_row])
    if out.shape[0] != sum(counts) - start:
        raise AssertionError(f"out: expected {sum(counts) - start} tokens, got {out.shape[0]}")
    half = out.dtype != torch.float32
    begin = start
    for row in range(first_row, len(counts)):
        part = slice(begin, begin + counts[row])
        stored = reference.gather_latent(problem.memory.layer(layer), problem.tables, row)
        latent = reference.read_latent(stored, layout.kv_lora_rank, layout.scale_of(layer))
        want, want_lse = reference.attend_expanded(heads.q_nope[part], heads.q_pe[part], latent, heads.w_uk, heads.w_uv, scale)
        here = slice(begin - start, begin - start + counts[row])
        got, got_lse = out[here].double(), lse[here].double()
        if not torch.isfinite(got).all() or not torch.equal(torch.isinf(got_lse), torch.isinf(want_lse)):
            raise AssertionError(f"row {row}: NaN or infinities where there are none in the reference")
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        seen = ~torch.isinf(want_lse)
        lse_error = float((got_lse - want_lse)[seen].abs().max()) if seen.any() else 0.0
        if error > (EXPANDED_OUT if half else 1e-5) or lse_error > (EXPANDED_LSE if half else 1e-5):
            raise AssertionError(f"row {row} of length {int(problem.tables.lengths[row])}: out off by {error:.1e}, lse by {lse_error:.1e}")
        begin += counts[row]
    unread = problem.unread.to(out.device)
    pages = problem.memory.layer(layer)
    untouched = (pages.view(torch.uint8)[unread] == 255).all() if layout.is_fp8 else torch.isnan(pages[unread].float()).all()
    if not untouched:
        raise AssertionError("pages: a slot that belongs to no sequence was written")
