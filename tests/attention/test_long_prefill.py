"""Prefill with expanded heads against float64, beside the absorbed path, on the CPU; how a sequence is cut, and which path a step takes."""

from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention import LongPrefill
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.choice import Choice, choose_library, choose_prefill
from kvmanager.attention.compare import Heads, Problem, check_expanded, make_heads, make_problem
from kvmanager.attention.expanded import attend_plain
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.long_prefill import Piece, cut_sequence
from kvmanager.errors import InvalidValue, WrongState
from kvmanager.tables import BatchTables

SMALL = LatentLayout(32, 16, 2, 16, "float32")
V3_DIMS = (512, 64, 128, 128)


def prefill_for(problem: Problem, nope: int, v: int, chunk: int, **options: Any) -> LongPrefill:
    """chunk: latents that the workspace is made for, roughly: at least that many."""
    heads, layout = problem.q.shape[2], problem.memory.layout
    scale = (nope + layout.qk_rope_head_dim) ** -0.5
    backend = MLABackend(problem.memory, heads, scale, max_tokens=4096, max_batch=32, max_pages=8192, **options)
    a_token = heads * (nope + layout.qk_rope_head_dim + v) * 4 + layout.slot_bytes + (layout.entry * 8 if layout.is_fp8 else 0)
    return LongPrefill(backend, nope, v, workspace_bytes=chunk * a_token + 2 * layout.page_size * layout.slot_bytes)


def run_step(prefill: LongPrefill, problem: Problem, heads: Heads, layer: int, absorbed: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    backend = prefill.backend
    plan = backend.plan(problem.tables, problem.query_lens)
    backend.write(plan, layer, problem.latent[layer])
    run = prefill.run_absorbed if absorbed else prefill.run
    return (*run(plan, layer, *heads.tail(plan.num_decode)), plan.num_decode)


@pytest.mark.parametrize("absorbed", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("heads,rank,rope,nope,v", [(1, 32, 16, 16, 32), (3, 64, 32, 48, 16), (9, 512, 64, 128, 128)])
def test_both_paths_equal_the_reference(heads: int, rank: int, rope: int, nope: int, v: int, dtype: Any, absorbed: bool) -> None:
    """Ragged rows around pages' and chunks' edges, whole prompts and later pieces of them; NaN in all other slots, garbage behind tables."""
    layout = LatentLayout(rank, rope, 2, 16, dtype)
    lengths = [5, 0, 2, 63, 64, 65, 33, 200, 150, 131]
    problem = make_problem(layout, lengths, [1, 1, 2, 63, 2, 65, 17, 7, 150, 100], heads, seed=heads)
    weights = make_heads(problem, nope, v, seed=rank)
    prefill = prefill_for(problem, nope, v, chunk=64)
    assert prefill.chunk_tokens == 64 and prefill.library == "plain"
    out, lse, first = run_step(prefill, problem, weights, 1, absorbed)
    check_expanded(problem, 1, weights, prefill.backend.softmax_scale, out, lse, first)


@pytest.mark.parametrize("dtype,scales", [("float8_e4m3fn", (0.01, 0.02)), ("fp8_ds_mla", ())])
def test_eight_bit_latents_are_expanded_as_the_numbers_that_their_bytes_mean(dtype: Any, scales: tuple[float, ...]) -> None:
    problem = make_problem(LatentLayout(512, 64, 2, 32, dtype, scales=scales), [100, 70], [30, 70], 2, seed=3)
    weights = make_heads(problem, 32, 16)
    prefill = prefill_for(problem, 32, 16, chunk=32)
    out, lse, _ = run_step(prefill, problem, weights, 1, False)
    assert out.dtype == torch.bfloat16
    check_expanded(problem, 1, weights, prefill.backend.softmax_scale, out, lse)


@pytest.mark.parametrize("lengths,counts", [([100], [40]), ([37, 300, 64], [37, 150, 3]), ([257, 16], [2, 16]), ([200], [200])])
def test_shapes_rounded_up_for_cudnn_change_no_value(monkeypatch: pytest.MonkeyPatch, lengths: list[int], counts: list[int]) -> None:
    """A stand-in that takes what cuDNN takes: few shapes, and a causal mask from the first key on. The workspace begins as NaN."""
    shapes: list[tuple[int, int, bool]] = []

    def stand_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        assert q.shape[0] % 16 == 0 and k.shape[1] % 16 == 0 and (not causal or q.shape[0] == k.shape[1])
        shapes.append((q.shape[0], k.shape[1], causal))
        return attend_plain(q, k, v, scale, causal)

    monkeypatch.setattr("kvmanager.attention.long_prefill.choose_library", lambda *_: Choice("cudnn", "a test"))
    monkeypatch.setattr("kvmanager.attention.long_prefill.attend_cudnn", stand_in)
    monkeypatch.setattr("kvmanager.attention.long_prefill.CUDNN_GRAIN", 16)
    problem = make_problem(SMALL, lengths, counts, 3, seed=9)
    weights = make_heads(problem, 16, 16)
    for chunk in (48, 80, 400):
        prefill = prefill_for(problem, 16, 16, chunk=chunk)
        assert prefill.library == "cudnn" and prefill.chunk_tokens == chunk
        shapes.clear()
        assert prefill.warm_up(max(counts)) == len(shapes) == len(set(shapes))
        warm = set(shapes)
        prefill._k.fill_(float("nan"))
        prefill._v.fill_(float("nan"))
        out, lse, _ = run_step(prefill, problem, weights, 0, False)
        check_expanded(problem, 0, weights, prefill.backend.softmax_scale, out, lse)
        assert len(shapes) > len(warm)
        assert warm.issuperset(shapes[len(warm) :])


def test_every_split_between_cached_and_new_gives_the_same_answer() -> None:
    """A prompt of 75 in pieces of any size behind any prefix, chunks of one page: each token sees what came before it and nothing else."""
    for count in range(2, 76):
        problem = make_problem(SMALL, [75], [count], 2, seed=7)
        weights = make_heads(problem, 16, 16)
        prefill = prefill_for(problem, 16, 16, chunk=16)
        out, lse, _ = run_step(prefill, problem, weights, 0, False)
        check_expanded(problem, 0, weights, prefill.backend.softmax_scale, out, lse)


def test_a_context_of_131072() -> None:
    """The longest that is promised, behind three new tokens; the workspace holds a sixteenth of it."""
    layout = LatentLayout(16, 16, 1, 128, "float32")
    problem = make_problem(layout, [131072], [3], 1, seed=1)
    weights = make_heads(problem, 16, 16)
    prefill = prefill_for(problem, 16, 16, chunk=8192)
    assert prefill.chunk_tokens == 8192
    out, lse, _ = run_step(prefill, problem, weights, 0, False)
    check_expanded(problem, 0, weights, prefill.backend.softmax_scale, out, lse)


@pytest.mark.parametrize("page_size", [48, 112, 128])
def test_long_pieces_begin_and_end_inside_of_pages(page_size: int) -> None:
    """Pieces of 2,048, which these pages do not divide, or do."""
    problem = make_problem(LatentLayout(16, 16, 1, page_size, "float32"), [5000, 4500], [3, 2100], 1, seed=page_size)
    weights = make_heads(problem, 16, 16)
    prefill = prefill_for(problem, 16, 16, chunk=2048)
    assert prefill.chunk_tokens == 2048
    out, lse, _ = run_step(prefill, problem, weights, 0, False)
    check_expanded(problem, 0, weights, prefill.backend.softmax_scale, out, lse)


def test_scores_far_apart_merge_without_overflow() -> None:
    """Chunks whose lse differ by hundreds: the lesser one counts for nothing and nothing is infinite."""
    problem = make_problem(SMALL, [100], [40], 2, seed=5)
    weights = make_heads(problem, 16, 16)
    pages = problem.memory.pages
    pages *= torch.linspace(0.1, 500, pages.shape[0])[:, None, None, None]
    problem.latent.mul_(1000)
    prefill = prefill_for(problem, 16, 16, chunk=16)
    out, lse, _ = run_step(prefill, problem, weights, 0, False)
    assert lse.max() - lse.min() > 100
    assert torch.isfinite(out).all()
    plan_lse = run_step(prefill_for(problem, 16, 16, chunk=112), problem, weights, 0, False)[1]
    assert torch.allclose(lse, plan_lse, rtol=1e-5)


def test_a_sequence_gives_the_same_bits_alone_and_in_a_batch() -> None:
    problem = make_problem(SMALL, [90, 40, 70], [30, 40, 2], 3, seed=4, written=True)
    weights = make_heads(problem, 16, 16)
    prefill = prefill_for(problem, 16, 16, chunk=32)
    out, lse = prefill.run(prefill.backend.plan(problem.tables, problem.query_lens), 0, *weights.tail(0))
    begin = 0
    for row, count in enumerate(problem.query_lens):
        ids = problem.tables.pages_of(row)
        alone = BatchTables(1, 16, problem.tables.lengths[row : row + 1], ids, np.array([0, len(ids)], np.int64))
        part = slice(begin, begin + count)
        one, one_lse = prefill.run(
            prefill.backend.plan(alone, [count]), 0, weights.q_nope[part], weights.q_pe[part], weights.w_uk, weights.w_uv
        )
        assert torch.equal(out[part], one) and torch.equal(lse[part], one_lse)
        begin += count


def test_nothing_of_one_sequence_reaches_another_through_the_workspace() -> None:
    """The first sequence's latents are NaN, all of them; the second one's answer has none."""
    problem = make_problem(SMALL, [60, 50], [20, 20], 2, seed=6, written=True)
    weights = make_heads(problem, 16, 16)
    problem.memory.pages[torch.from_numpy(problem.tables.pages_of(0)[:4].astype(np.int64))] = float("nan")
    prefill = prefill_for(problem, 16, 16, chunk=32)
    for _ in range(2):
        out, lse = prefill.run(prefill.backend.plan(problem.tables, problem.query_lens), 0, *weights.tail(0))
        assert torch.isnan(out[:20]).all() and torch.isfinite(out[20:]).all() and torch.isfinite(lse[20:]).all()


@pytest.mark.parametrize("count", [3, 40])
def test_attend_takes_a_whole_step(count: int) -> None:
    """Decode rows, padding, and rows of several tokens by the path that the table names; 40 tokens of 32 + 16 are enough, 3 are not."""
    problem = make_problem(SMALL, [33, 0, 70], [1, 1, count], 3, seed=8)
    weights = make_heads(problem, 16, 16)
    prefill = prefill_for(problem, 16, 16, chunk=32)
    plan = prefill.backend.plan(problem.tables, problem.query_lens)
    assert prefill.choose(plan).kernel == ("expanded" if count == 40 else "absorbed")
    prefill.backend.write(plan, 0, problem.latent[0])
    out, lse = prefill.attend(plan, 0, *weights.tail(0))
    check_expanded(problem, 0, weights, prefill.backend.softmax_scale, out, lse)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()


def test_steps_without_prefill_rows_have_the_right_shapes() -> None:
    for lengths, counts in (([], []), ([5], [1])):
        problem = make_problem(SMALL, lengths, counts, 3)
        weights = make_heads(problem, 16, 32)
        prefill = prefill_for(problem, 16, 32, chunk=32)
        plan = prefill.backend.plan(problem.tables, counts)
        prefill.backend.write(plan, 0, problem.latent[0])
        out, lse = prefill.run(plan, 0, *weights.tail(plan.num_decode))
        assert out.shape == (0, 3, 32) and lse.shape == (0, 3) and lse.dtype == torch.float32
        assert prefill.attend(plan, 0, *weights.tail(0))[0].shape == (len(counts), 3, 32)


@pytest.mark.parametrize("grain", [0, 16])
@pytest.mark.parametrize(
    "length,count,chunk", [(1, 1, 16), (10, 10, 16), (100, 3, 16), (103, 50, 48), (64, 32, 32), (5, 2, 112), (1000, 77, 128)]
)
def test_pieces_cover_what_each_query_token_sees_once(length: int, count: int, chunk: int, grain: int) -> None:
    seen = np.zeros((count, length), int)
    for piece in cut_sequence(length, count, chunk, grain):
        assert 0 < piece.end - piece.begin <= chunk
        middle = piece.first + piece.own
        for token in range(piece.first, count):
            end = piece.end - piece.own + token - piece.first + 1 if token < middle else piece.end
            seen[token, piece.begin : end] += 1
        if grain and not piece.own:
            assert piece.end - piece.begin in (chunk, 16, 32, 64)
    assert (seen == (np.arange(length)[None] <= length - count + np.arange(count)[:, None])).all()


def test_pieces_are_as_few_as_may_be() -> None:
    """What stands before this step's tokens goes with them if it fits; with a grain, the rest of it does."""
    assert list(cut_sequence(100, 40, 100)) == [Piece(0, 100, 0, 40)]
    assert list(cut_sequence(100, 40, 96)) == [Piece(0, 60, 0, 0), Piece(60, 100, 0, 40)]
    assert list(cut_sequence(100, 40, 32)) == [Piece(0, 32, 0, 0), Piece(32, 60, 0, 0), Piece(60, 92, 0, 32), Piece(92, 100, 32, 8)]
    assert list(cut_sequence(100, 40, 48, 16)) == [Piece(0, 48, 0, 0), Piece(48, 96, 0, 36), Piece(96, 100, 36, 4)]


def test_workspace_is_bounded_and_one_page_must_fit() -> None:
    problem = make_problem(SMALL, [50], [20], 3)
    backend = MLABackend(problem.memory, 3, 0.2, max_tokens=64, max_batch=4, max_pages=4096)
    for workspace_bytes in (40_000, 100_000, 1_000_000):
        prefill = LongPrefill(backend, 16, 16, workspace_bytes=workspace_bytes)
        assert workspace_bytes // 2 < prefill.workspace_bytes <= workspace_bytes
    with pytest.raises(InvalidValue, match="one page") as caught:
        LongPrefill(backend, 16, 16, workspace_bytes=1000)
    need = int(str(caught.value.details["expected"]).split()[2].rstrip(","))
    assert LongPrefill(backend, 16, 16, workspace_bytes=need).chunk_tokens == 16
    with pytest.raises(InvalidValue, match="workspace_bytes"):
        LongPrefill(backend, 16, 16, workspace_bytes=need - 1)
    few = MLABackend(problem.memory, 3, 0.2, max_tokens=64, max_batch=4, max_pages=8)
    assert LongPrefill(few, 16, 16).chunk_tokens == 8 * 16  # no more than a step may hold


def test_wrong_use_is_named() -> None:
    problem = make_problem(SMALL, [50], [20], 3, written=True)
    weights = make_heads(problem, 16, 16)
    prefill = prefill_for(problem, 16, 16, chunk=32)
    plan = prefill.backend.plan(problem.tables, [20])
    good = {"q_nope": weights.q_nope, "q_pe": weights.q_pe, "w_uk": weights.w_uk, "w_uv": weights.w_uv}
    for field, value in good.items():
        for bad in (value[1:], value.double(), value[..., :-1]):
            with pytest.raises(InvalidValue) as caught:
                prefill.run(plan, 0, **{**good, field: bad})
            assert caught.value.field == field
    prefill.backend.plan(problem.tables, [20])
    with pytest.raises(WrongState, match="newest"):
        prefill.run(plan, 0, **good)
    for field, option in (("batch_invariant", True), ("logit_soft_cap", 3.0), ("sliding_window", 9)):
        with pytest.raises(InvalidValue, match=field):
            prefill_for(problem, 16, 16, chunk=32, **{field: option})
    for field, args in (("qk_nope_head_dim", (0, 16)), ("v_head_dim", (16, "16")), ("library", (16, 16))):
        with pytest.raises(InvalidValue, match=field):
            LongPrefill(prefill.backend, *args, library="cudnn" if field == "library" else None)  # type: ignore[arg-type]


def test_the_table_goes_by_lengths_and_dimensions() -> None:
    """Few query tokens stay absorbed, many are expanded; where most of the work is decides; heads that are no narrower are never expanded."""

    def chosen(kernel: str, heads: int, dims: tuple[int, int, int, int], rows: list[tuple[int, int]], library: str = "cudnn") -> str:
        lengths, counts = (np.array([row[place] for row in rows], np.int64) for place in (0, 1))
        return choose_prefill(kernel, library, heads, dims, lengths, counts).kernel

    assert chosen("hopper", 128, V3_DIMS, [(4096 + 256, 256)]) == "absorbed"
    assert chosen("hopper", 128, V3_DIMS, [(4096 + 512, 512)]) == "expanded"
    assert chosen("hopper", 16, V3_DIMS, [(4096 + 512, 512)]) == "absorbed"
    assert chosen("hopper", 16, V3_DIMS, [(4096 + 1024, 1024)]) == "expanded"
    assert chosen("hopper", 128, V3_DIMS, [(9000, 2)] * 4 + [(4096 + 1024, 1024)]) == "expanded"
    assert chosen("hopper", 128, V3_DIMS, [(131072, 100)] * 4 + [(512, 512)]) == "absorbed"
    assert chosen("torch", 4, (128, 64, 512, 512), [(4096, 4096)]) == "absorbed"
    assert chosen("hopper", 128, V3_DIMS, []) == "absorbed"
    assert chosen("hopper", 128, V3_DIMS, [(4096 + 512, 512)], "flash") == chosen("hopper_fp8", 32, V3_DIMS, [(4480, 384)]) == "absorbed"
    assert chosen("triton", 128, V3_DIMS, [(4096 + 256, 256)]) == "expanded"
    assert "2.4 x 171" in choose_prefill("hopper", "cudnn", 128, V3_DIMS, np.array([9]), np.array([9])).why


def test_the_library_goes_by_dtype_dimensions_and_architecture() -> None:
    assert choose_library("bfloat16", 192, 128, 90).kernel == "cudnn"
    assert choose_library("bfloat16", 192, 128, 80).kernel == "flash"
    assert choose_library("bfloat16", 192, 192, 90).kernel == choose_library("bfloat16", 192, 100, 90).kernel == "flash"
    assert choose_library("float32", 192, 128, 90).kernel == "plain"
    assert choose_library("bfloat16", 320, 128, 90).kernel == "plain"
    assert choose_library("bfloat16", 192, 128, 0).kernel == "plain"
    with pytest.raises(InvalidValue, match="plain"):
        choose_library("bfloat16", 192, 128, 0, "flash")
