"""Batch invariance, soft cap, sliding window and sinks on CUDA."""

from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention, make_problem
from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables


def backend_for(problem: Problem, **options: Any) -> MLABackend:
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, max_tokens=4096, max_batch=256, max_pages=16384, **options)


def run_all(backend: MLABackend, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    plan = backend.plan(problem.tables, problem.query_lens)
    out, lse = backend.decode(plan, 0, problem.q[0, : plan.num_decode])
    more_out, more_lse = backend.prefill(plan, 0, problem.q[0, plan.num_decode :])
    return torch.cat([out, more_out]), torch.cat([lse, more_lse])


def part(problem: Problem, rows: list[tuple[int, int, int]]) -> tuple[BatchTables, list[int], list[torch.Tensor]]:
    """Query tokens begin to end of some sequences as a step: tables, query_lens, and which tokens of the problem these are."""
    lengths, pages, counts, tokens = [], [], [], []
    for row, begin, end in rows:
        lengths.append(int(problem.tables.lengths[row]) - (problem.query_lens[row] - end))
        pages.append(problem.tables.pages_of(row))
        counts.append(end - begin)
        first = sum(problem.query_lens[:row])
        tokens.append(torch.arange(first + begin, first + end, device="cuda"))
    indptr = np.cumsum([0, *(len(one) for one in pages)])
    return BatchTables(1, problem.tables.page_size, np.array(lengths, np.int32), np.concatenate(pages), indptr), counts, tokens


def assert_same_bits(problem: Problem, backend: MLABackend, out: torch.Tensor, lse: torch.Tensor, rows: list[tuple[int, int, int]]) -> None:
    tables, counts, tokens = part(problem, rows)
    plan = backend.plan(tables, counts)
    where = torch.cat(tokens)
    q = problem.q[0, where]
    one_out, one_lse = backend.decode(plan, 0, q[: plan.num_decode])
    more_out, more_lse = backend.prefill(plan, 0, q[plan.num_decode :])
    assert torch.equal(torch.cat([one_lse, more_lse]), lse[where]), f"lse of {rows}"
    assert torch.equal(torch.cat([one_out, more_out]), out[where]), f"out of {rows}"


LAYOUTS = [
    LatentLayout(512, 64, 1, 64), LatentLayout(512, 64, 1, 16), LatentLayout(256, 32, 1, 128, "float16"), LatentLayout(128, 64, 1, 32),
    LatentLayout(1024, 64, 1, 64), LatentLayout(64, 32, 1, 48),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"D{layout.kv_lora_rank}+{layout.qk_rope_head_dim}-P{layout.page_size}")
@pytest.mark.parametrize("heads", [1, 16, 40, 128])
def test_a_token_gets_the_same_bits_in_whatever_step_it_is_computed(layout: LatentLayout, heads: int) -> None:
    """Alone, in a batch, on other programs; in a whole prompt, in chunks of it, behind a cached prefix, in groups of 2 to 8, as one token."""
    lengths = [1, 0, 777, 5000, 4096, 2049, 9000, 300, 700, 2500, 4100]
    query_lens = [1] * 6 + [4, 300, 129, 3, 8]
    problem = make_problem(layout, lengths, query_lens, heads, "cuda", seed=heads, written=True)
    sinks = torch.randn(1, heads, device="cuda")
    for tokens in (None, 256):
        backend = backend_for(problem, batch_invariant=True, invariant_tokens=tokens, sinks=sinks)
        out, lse = run_all(backend, problem)
        check_attention(problem, 0, out, lse, True, backend.options, sinks[0])
        for row, count in enumerate(query_lens):
            assert_same_bits(problem, backend, out, lse, [(row, 0, count)])
            assert_same_bits(problem, backend, out, lse, [(row, count - 1, count)])
        assert_same_bits(problem, backend, out, lse, [(3, 0, 1), (6, 3, 4), (9, 2, 3), (10, 0, 1)])
        assert_same_bits(problem, backend, out, lse, [(9, 1, 3), (7, 100, 227), (8, 1, 129), (10, 2, 6), (7, 227, 300), (7, 0, 99)])
        assert_same_bits(problem, backend, out, lse, [(7, at, at + 1) for at in (0, 62, 63, 64, 100, 127, 128, 255, 256, 298)])
        assert_same_bits(problem, backend, out, lse, [(5, 0, 1)] * 100)


def test_invariant_backend_replays_bitwise_and_serves_graphs() -> None:
    problem = make_problem(LatentLayout(512, 64, 1, 64), [5000, 70, 3000, 9000], [1] * 4, 128, "cuda", seed=2, written=True)
    backend = backend_for(problem, batch_invariant=True)
    out, lse = run_all(backend, problem)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    q = torch.zeros((9, 128, 576), dtype=torch.bfloat16, device="cuda")
    q[:4] = problem.q[0]
    with torch.cuda.stream(stream):
        empty = BatchTables(0, 64, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(1, np.int64))
        backend.decode(backend.plan(empty, [], graph_batch=9), 0, q)
        plan = backend.plan(empty, [], graph_batch=9)
        with torch.cuda.graph(graph, stream=stream):
            captured = backend.decode(plan, 0, q)
        backend.plan(problem.tables, problem.query_lens, graph_batch=9)
        graph.replay()
    stream.synchronize()
    assert torch.equal(captured[0][:4], out) and torch.equal(captured[1][:4], lse)
    assert not captured[0][4:].any() and torch.isneginf(captured[1][4:]).all()


def test_prefill_in_waves_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial results than there are slots: several launches. More pieces than the work list holds: refused by name."""
    problem = make_problem(LatentLayout(512, 64, 1, 64), [6000], [600], 16, "cuda", seed=2, written=True)
    backend = backend_for(problem, batch_invariant=True, invariant_tokens=256)
    out, lse = run_all(backend, problem)
    small = MLABackend(
        problem.memory, 16, problem.scale, max_tokens=600, max_batch=1, max_pages=94, batch_invariant=True, invariant_tokens=256
    )
    plan = small.plan(problem.tables, problem.query_lens)
    assert plan.device is not None and len(plan.device.prefill) > 5
    again = small.prefill(plan, 0, problem.q[0])
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    monkeypatch.setattr("kvmanager.attention.staging.PREFILL_PIECES_MAX", 100)
    tiny = MLABackend(
        problem.memory, 16, problem.scale, max_tokens=600, max_batch=1, max_pages=94, batch_invariant=True, invariant_tokens=256
    )
    with pytest.raises(InvalidValue, match="query_lens"):
        tiny.plan(problem.tables, problem.query_lens)


OPTIONS: list[dict[str, Any]] = [
    {"logit_soft_cap": 3.0}, {"sliding_window": 100}, {"sliding_window": 1}, {"logit_soft_cap": 30.0, "sliding_window": 2000}, {},
    {"sliding_window": 700, "batch_invariant": True, "invariant_tokens": 256},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [3, 16, 128])
def test_options_equal_the_reference(options: dict[str, Any], heads: int) -> None:
    """Decode and prefill, cut and uncut, with and without sinks; the table says why the plain kernel serves a cap or a window."""
    lengths, query_lens = [1, 0, 99, 5000, 20000, 300, 130, 4100], [1] * 5 + [300, 3, 8]
    problem = make_problem(LatentLayout(512, 64, 1, 64), lengths, query_lens, heads, "cuda", seed=heads, written=True)
    sinks = torch.randn(1, heads, device="cuda") * 3
    sinks[0, 0] = float("-inf")
    for given in (None, sinks):
        backend = backend_for(problem, sinks=given, **options)
        check_attention(problem, 0, *run_all(backend, problem), True, backend.options, None if given is None else given[0])
        for field in ("logit_soft_cap", "sliding_window"):
            assert field not in options or backend.kernel == "triton"
        if "sliding_window" in options and "batch_invariant" in options:
            out, lse = run_all(backend, problem)
            for row, count in enumerate(query_lens):
                assert_same_bits(problem, backend, out, lse, [(row, count - 1, count)])
