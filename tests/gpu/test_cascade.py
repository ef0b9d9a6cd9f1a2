"""Prefixes that several rows share, read once, on CUDA: all kernels and formats against the float64 reference, graphs, options."""

from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention import shared_prefix, staging
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention, make_problem, share_pages
from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables

LAYOUTS = [
    LatentLayout(512, 64, 1, 64), LatentLayout(512, 64, 1, 16), LatentLayout(256, 32, 1, 128, "float16"), LatentLayout(80, 48, 1, 48),
    LatentLayout(512, 64, 1, 64, "fp8_ds_mla"), LatentLayout(512, 64, 1, 32, "float8_e4m3fn", scales=(0.002,)),
]  # fmt: skip


def backend_for(problem: Problem, **options: Any) -> MLABackend:
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, max_tokens=256, max_batch=64, max_pages=16384, **options)


def shared_problem(layout: LatentLayout, heads: int, seed: int = 0) -> Problem:
    """Rows of their own, padding, a group of 9, one of 3 in which two share more, and two equal tables."""
    lengths = [700, 0, *([3500] * 4), 3073, 4000, 5000, 3200, 3077, 90, *([2100, 2300, 2222]), 5, 1200, 1200]
    problem = make_problem(layout, lengths, [1] * len(lengths), heads, "cuda", seed=seed, written=True)
    size = layout.page_size
    return share_pages(problem, [(2, 9, 3072 // size), (12, 3, 1000 // size), (13, 2, 2000 // size), (16, 2, 1200 // size)])


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups wherever there is a common tile: what pays is another question than what is right."""
    monkeypatch.setattr(shared_prefix, "gain", lambda shape, rows, tiles: float(rows * tiles))
    monkeypatch.setattr(staging, "WORTH", float("inf"))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.dtype}-D{layout.kv_lora_rank}-P{layout.page_size}")
@pytest.mark.parametrize("heads", [1, 16, 40, 96, 128])
def test_groups_equal_the_reference(layout: LatentLayout, heads: int) -> None:
    """With and without sinks; the same bits each time; near the bits of rows that are read alone."""
    problem = shared_problem(layout, heads, heads)
    sinks = torch.randn(1, heads, device="cuda")
    for given in (None, sinks):
        backend = backend_for(problem, sinks=given)
        plan = backend.plan(problem.tables, problem.query_lens)
        assert plan.device is not None and len(plan.device.groups) >= 3
        out, lse = backend.decode(plan, 0, problem.q[0])
        check_attention(problem, 0, out, lse, True, backend.options, None if given is None else given[0])
        again = backend.decode(plan, 0, problem.q[0])
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    alone = backend_for(problem, share_prefixes=False)
    plan = alone.plan(problem.tables, problem.query_lens)
    assert plan.device is not None and plan.device.groups == ()
    check_attention(problem, 0, *alone.decode(plan, 0, problem.q[0]))


@pytest.mark.usefixtures("always")
def test_one_graph_serves_steps_that_share_and_steps_that_do_not() -> None:
    """Captured on an empty plan, replayed with groups that come, change and go: bitwise like eager, padding 0."""
    problem, graph_batch = shared_problem(LatentLayout(512, 64, 1, 64), 16), 20
    backend, tables = backend_for(problem), problem.tables
    q = torch.zeros((graph_batch, 16, 576), dtype=torch.bfloat16, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    empty = BatchTables(0, 64, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(1, np.int64))
    with torch.cuda.stream(stream):
        backend.decode(backend.plan(empty, [], graph_batch=graph_batch), 0, q)
        plan = backend.plan(empty, [], graph_batch=graph_batch)
        with torch.cuda.graph(graph, stream=stream):
            out, lse = backend.decode(plan, 0, q)
        seen = set()
        for rows in ([*range(18)], [*range(6, 16)], [0, 1, 11], [2, 3, 4, 16, 17], [*range(17, -1, -1)]):
            pages = [tables.pages_of(row) for row in rows]
            indptr = np.cumsum([0, *(len(one) for one in pages)])
            some = BatchTables(1, 64, tables.lengths[rows], np.concatenate(pages), indptr)
            q[: len(rows)] = problem.q[0][rows]
            plan = backend.plan(some, [1] * len(rows), graph_batch=graph_batch)
            assert plan.device is not None
            seen.add(len(plan.device.groups))
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            graph.replay()
            got = out.clone(), lse.clone()
            eager = backend.decode(plan, 0, q)
            assert torch.equal(got[0], eager[0]) and torch.equal(got[1], eager[1])
            assert not got[0][len(rows) :].any() and torch.isneginf(got[1][len(rows) :]).all()
            part = Problem(problem.memory, some, [1] * len(rows), problem.latent, q[None, : len(rows)], problem.scale, problem.unread)
            check_attention(part, 0, got[0][: len(rows)], got[1][: len(rows)])
        assert 0 in seen and len(seen) > 2
    torch.cuda.current_stream().wait_stream(stream)


def test_options_that_rule_it_out_are_refused_by_name() -> None:
    problem = shared_problem(LatentLayout(512, 64, 1, 64), 16)
    for options in ({"batch_invariant": True}, {"sliding_window": 300}):
        with pytest.raises(InvalidValue, match="share_prefixes"):
            backend_for(problem, share_prefixes=True, **options)
        backend = backend_for(problem, **options)
        plan = backend.plan(problem.tables, problem.query_lens)
        assert plan.device is not None and plan.device.groups == ()
        check_attention(problem, 0, *backend.decode(plan, 0, problem.q[0]), True, backend.options)
