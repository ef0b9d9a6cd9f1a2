"""The backend on the CPU against the float64 reference."""

from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention import reference
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, assert_close, check_attention, make_problem
from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue, WrongState
from kvmanager.tables import BatchTables


def backend_for(problem: Problem) -> MLABackend:
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, max_tokens=512, max_batch=32, max_pages=1024)


def run_step(problem: Problem, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, problem.query_lens)
    backend.write(plan, layer, problem.latent[layer])
    out, lse = backend.decode(plan, layer, problem.q[layer, : plan.num_decode])
    more_out, more_lse = backend.prefill(plan, layer, problem.q[layer, plan.num_decode :])
    return torch.cat([out, more_out]), torch.cat([lse, more_lse])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rank,rope,page_size", [(512, 64, 64), (256, 32, 16), (80, 48, 48)])
@pytest.mark.parametrize("heads", [1, 3, 63])
def test_step_equals_the_reference(heads: int, rank: int, rope: int, page_size: int, dtype: Any) -> None:
    """Ragged decode rows, padding, whole prompts and later chunks; NaN in all other slots, garbage behind every table."""
    layout = LatentLayout(rank, rope, 2, page_size, dtype)
    lengths = [1, 0, page_size - 1, page_size, page_size + 1, 200, 2, 65, 150]
    problem = make_problem(layout, lengths, [1] * 6 + [2, 65, 33], heads, seed=heads)
    check_attention(problem, 1, *run_step(problem, 1))


def test_sequence_gives_the_same_bits_alone_and_in_a_batch() -> None:
    problem = make_problem(LatentLayout(64, 32, 1, 16, "float32"), [33, 90, 7], [1, 1, 1], 5, seed=1, written=True)
    backend = backend_for(problem)
    out, lse = backend.decode(backend.plan(problem.tables, [1, 1, 1]), 0, problem.q[0])
    tables = problem.tables
    for row in range(3):
        pages = tables.pages_of(row)
        alone = BatchTables(1, 16, tables.lengths[row : row + 1], pages, np.array([0, len(pages)], np.int64))
        one_out, one_lse = backend.decode(backend.plan(alone, [1]), 0, problem.q[0, row : row + 1])
        assert torch.equal(out[row], one_out[0]) and torch.equal(lse[row], one_lse[0])


def test_long_prefill_is_cut_into_pieces_that_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are held a bounded number at a time."""
    monkeypatch.setattr("kvmanager.attention.torch_path.SCORES_MAX", 2000)
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float32"), [120], [100], 3, seed=2)
    check_attention(problem, 0, *run_step(problem, 0))


def test_graph_batch_gives_padded_rows_of_zero_on_the_cpu_too() -> None:
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float32"), [20], [1], 3, seed=2, written=True)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [1], graph_batch=4)
    backend.write(plan, 0, torch.zeros(4, 48))
    out, lse = backend.decode(plan, 0, torch.randn(4, 3, 48))
    assert (out[1:] == 0).all() and torch.isneginf(lse[1:]).all() and torch.isfinite(out).all()


def test_steps_without_rows_have_the_right_shapes() -> None:
    layout = LatentLayout(32, 16, 1, 16)
    problem = make_problem(layout, [], [], 3)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [])
    backend.write(plan, 0, torch.empty(0, 48, dtype=torch.bfloat16))
    for run in (backend.decode, backend.prefill):
        out, lse = run(plan, 0, torch.empty(0, 3, 48, dtype=torch.bfloat16))
        assert out.shape == (0, 3, 32) and lse.shape == (0, 3) and lse.dtype == torch.float32


def test_older_plan_is_refused() -> None:
    """Device buffers hold the newest plan only; the CPU says so as well."""
    problem = make_problem(LatentLayout(32, 16, 1, 16), [5], [1], 3)
    backend = backend_for(problem)
    old = backend.plan(problem.tables, [1])
    backend.plan(problem.tables, [1])
    with pytest.raises(WrongState, match="newest"):
        backend.write(old, 0, problem.latent[0])
    with pytest.raises(WrongState, match="newest"):
        backend.decode(old, 0, problem.q[0])


def test_refused_plan_leaves_the_one_before_it_usable() -> None:
    problem = make_problem(LatentLayout(32, 16, 1, 16), [5], [1], 3)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [1])
    with pytest.raises(InvalidValue):
        backend.plan(problem.tables, [7])
    backend.write(plan, 0, problem.latent[0])


def test_wrong_tensors_are_named() -> None:
    problem = make_problem(LatentLayout(32, 16, 2, 16), [5, 9], [1, 4], 3)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [1, 4])
    wrong = [
        (backend.write, 0, problem.latent[0, :4], "latent"),
        (backend.write, 0, problem.latent[0].float(), "latent"),
        (backend.write, 0, problem.latent[0].mT.contiguous().mT, "latent"),
        (backend.write, 2, problem.latent[0], "layer"),
        (backend.decode, 0, problem.q[0], "q"),
        (backend.prefill, 0, problem.q[0, 1:, :2], "q"),
        (backend.prefill, -1, problem.q[0, 1:], "layer"),
    ]
    for run, layer, tensor, field in wrong:
        with pytest.raises(InvalidValue) as caught:
            run(plan, layer, tensor)  # type: ignore[operator]
        assert caught.value.field == field


@pytest.mark.parametrize(
    "field,value", [("num_heads", 0), ("num_heads", 1025), ("softmax_scale", 0.0), ("softmax_scale", float("nan")), ("max_batch", 0)]
)
def test_wrong_backend_is_named(field: str, value: Any) -> None:
    problem = make_problem(LatentLayout(32, 16, 1, 16), [5], [1], 3)
    good: dict[str, Any] = {"num_heads": 3, "softmax_scale": 0.1, "max_tokens": 8, "max_batch": 8, "max_pages": 8}
    with pytest.raises(InvalidValue) as caught:
        MLABackend(problem.memory, **{**good, field: value})
    assert caught.value.field == field


def test_comparison_notices_what_it_is_there_for() -> None:
    """A NaN, a wrong element, a token too many, -inf in the wrong row, a slot of nobody's written."""
    problem = make_problem(LatentLayout(64, 32, 1, 16, "float32"), [40, 0], [1, 1], 3, seed=6)
    out, lse = run_step(problem, 0)
    check_attention(problem, 0, out, lse)
    for index, value in (((0, 1, 5), float("nan")), ((0, 1, 5), 0.5)):
        bad = out.clone()
        bad[index] = value
        with pytest.raises(AssertionError):
            check_attention(problem, 0, bad, lse)
    with pytest.raises(AssertionError, match="lse"):
        check_attention(problem, 0, out, torch.where(torch.isinf(lse), 0.0, lse))
    with pytest.raises(AssertionError, match="cosine"):
        assert_close(out * 1.01, lse, out, lse)
    problem.memory.pages[problem.unread.nonzero()[0, 0], 0, problem.unread.nonzero()[0, 1]] = 1
    with pytest.raises(AssertionError, match="belongs to no sequence"):
        check_attention(problem, 0, out, lse)


FP8_LAYOUTS = [
    LatentLayout(512, 64, 2, 64, "fp8_ds_mla"),
    LatentLayout(80, 48, 2, 16, "float8_e4m3fn", scales=(0.002, 0.0013)),
]


@pytest.mark.parametrize("layout", FP8_LAYOUTS, ids=lambda layout: layout.dtype)
def test_step_over_eight_bits_equals_the_reference_of_what_the_bytes_mean(layout: LatentLayout) -> None:
    """Write, decode and prefill; the tensors that go in and out are bfloat16."""
    edge = layout.page_size
    problem = make_problem(layout, [1, 0, edge - 1, edge, edge + 1, 200, 2, 65, 150], [1] * 6 + [2, 65, 33], 5, seed=edge)
    assert problem.q.dtype == torch.bfloat16
    check_attention(problem, 1, *run_step(problem, 1))


@pytest.mark.parametrize("layout", [*FP8_LAYOUTS, LatentLayout(512, 64, 2, 64), LatentLayout(32, 16, 2, 16, "float32", "half")], ids=str)
def test_raw_write_is_norm_rotation_and_write(layout: LatentLayout) -> None:
    """In the layout's own order of pairs, at the slots of the plan."""
    problem = make_problem(layout, [5, 0, 40], [1, 1, 3], 3, seed=2)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [1, 1, 3])
    rank = layout.kv_lora_rank
    raw, weight = torch.randn(5, layout.entry).to(problem.q.dtype), 1 + 0.1 * torch.randn(rank)
    angle = torch.rand(50, layout.qk_rope_head_dim // 2)
    cos_sin, positions = torch.cat([angle.cos(), angle.sin()], 1), torch.tensor([4, 0, 37, 38, 39])
    backend.write_raw(plan, 1, raw, weight, 1e-6, cos_sin, positions)
    slots = torch.from_numpy(plan.slots)
    assert (slots == -1).sum() == 1
    got = reference.read_latent(reference.select(problem.memory.layer(1), slots), rank, layout.scale_of(1))
    want = reference.project(raw, weight, 1e-6, cos_sin, positions, "interleaved", layout.rope_order)[slots >= 0]
    if layout.scales:
        want = want.clamp(-448 * layout.scale_of(1), 448 * layout.scale_of(1))
    step = 2**-4 + 2**-7 if layout.is_fp8 else 2**-8
    assert ((got - want).abs() <= step * want.abs() + 2e-4).all()


@pytest.mark.parametrize("layout", [*FP8_LAYOUTS, LatentLayout(32, 16, 2, 16, "float32")], ids=lambda layout: layout.dtype)
def test_selected_slots_and_no_others_are_attended_to(layout: LatentLayout) -> None:
    """FlashMLA's convention: physical slots, -1 is padding; what is no slot is left out; an empty list gives 0 and -inf."""
    problem = make_problem(layout, [60, 30, 7], [1, 1, 2], 4, seed=5, written=True)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [1, 1, 2])
    read = (~problem.unread).flatten().nonzero().flatten()
    lists = read[torch.randint(0, len(read), (4, 20))].int()
    lists[0, ::3], lists[1], lists[2, 0], lists[2, 1] = -1, -1, problem.unread.numel(), -64
    out, lse = backend.attend_selected(plan, 1, problem.q[1], lists)
    for token in range(4):
        latent = reference.read_latent(reference.select(problem.memory.layer(1), lists[token]), layout.kv_lora_rank, layout.scale_of(1))
        want = reference.attend(problem.q[1, token : token + 1], latent, layout.kv_lora_rank, problem.scale, causal=False)
        assert_close(out[token : token + 1], lse[token : token + 1], *want)
    assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()


def test_wrong_raw_writes_and_lists_are_named() -> None:
    problem = make_problem(FP8_LAYOUTS[0], [5, 9], [1, 4], 3)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, [1, 4])
    raw, weight, cos_sin, positions = problem.latent[0], torch.ones(512), torch.ones(20, 64), torch.arange(5)
    good = {"raw": raw, "norm_weight": weight, "norm_eps": 1e-6, "cos_sin": cos_sin, "positions": positions, "source_order": "half"}
    for field, bad in (
        ("raw", raw[:4]), ("raw", raw.float()), ("norm_weight", weight[:64]), ("norm_weight", weight.int()), ("norm_eps", float("nan")),
        ("norm_eps", -1.0), ("cos_sin", cos_sin[:, :32]), ("cos_sin", torch.tensor(1.0)), ("positions", positions[:4]),
        ("positions", positions.int()), ("source_order", "neox"),
    ):  # fmt: skip
        with pytest.raises(InvalidValue) as caught:
            backend.write_raw(plan, 0, **{**good, field: bad})  # type: ignore[arg-type]
        assert caught.value.field == field
    q, lists = problem.q[0], torch.zeros((5, 8), dtype=torch.int32)
    for field, arguments in (
        ("q", (q[:4], lists)), ("indices", (q, lists.long())), ("indices", (q, lists[:4])), ("indices", (q, lists[0])),
        ("indices", (q, lists.T.contiguous().T)), ("indices", (q, torch.zeros((5, 2**16 + 1), dtype=torch.int32))),
    ):  # fmt: skip
        with pytest.raises(InvalidValue) as caught:
            backend.attend_selected(plan, 0, *arguments)
        assert caught.value.field == field


def alone(problem: Problem, row: int, begin: int, end: int) -> tuple[BatchTables, torch.Tensor]:
    """Tables and queries of query tokens begin to end of one row, as a step of their own."""
    first, tables = sum(problem.query_lens[:row]), problem.tables
    pages = tables.pages_of(row)
    length = tables.lengths[row : row + 1] - (problem.query_lens[row] - end)
    return BatchTables(1, tables.page_size, length, pages, np.array([0, len(pages)], np.int64)), problem.q[0, first + begin : first + end]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 50, "logit_soft_cap": 4.0}], ids=str)
def test_batch_invariant_backend_gives_a_token_the_same_bits_in_any_step(dtype: Any, changes: dict[str, Any]) -> None:
    """In a batch, alone, as a whole prompt, in chunks of it, behind a cached prefix, as one token of decode."""
    problem = make_problem(LatentLayout(64, 32, 1, 16, dtype), [33, 90, 300, 70], [1, 1, 300, 33], 5, seed=1, written=True)
    sinks = torch.tensor([[0.5, -1.0, 3.0, 0.0, 2.0]])
    backend = MLABackend(
        problem.memory, 5, problem.scale, max_tokens=512, max_batch=32, max_pages=1024, batch_invariant=True, sinks=sinks, **changes
    )
    plan = backend.plan(problem.tables, problem.query_lens)
    out, lse = backend.decode(plan, 0, problem.q[0, :2])
    more_out, more_lse = backend.prefill(plan, 0, problem.q[0, 2:])
    out, lse = torch.cat([out, more_out]), torch.cat([lse, more_lse])
    check_attention(problem, 0, out, lse, True, backend.options, sinks[0])
    for row, begin, end in [(0, 0, 1), (1, 0, 1), (2, 0, 300), (2, 0, 100), (2, 100, 300), (2, 299, 300), (2, 7, 8), (3, 11, 33)]:
        tables, q = alone(problem, row, begin, end)
        plan = backend.plan(tables, [end - begin])
        one_out, one_lse = (backend.decode if end - begin == 1 else backend.prefill)(plan, 0, q)
        first = sum(problem.query_lens[:row])
        assert torch.equal(one_out, out[first + begin : first + end]) and torch.equal(one_lse, lse[first + begin : first + end])


@pytest.mark.parametrize("changes", [{"logit_soft_cap": 2.0}, {"sliding_window": 1}, {"sliding_window": 40}, {}], ids=str)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_options_equal_the_reference(changes: dict[str, Any], has_sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts in pieces, too; a sink of -inf counts for nothing, one of +inf takes all."""
    monkeypatch.setattr("kvmanager.attention.torch_path.SCORES_MAX", 5000)
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float32"), [90, 0, 60, 150], [1, 1, 60, 33], 4, seed=2, written=True)
    sinks = torch.tensor([[1.0, float("-inf"), float("inf"), -3.0]]) if has_sinks else None
    backend = MLABackend(problem.memory, 4, problem.scale, max_tokens=512, max_batch=32, max_pages=1024, sinks=sinks, **changes)
    plan = backend.plan(problem.tables, problem.query_lens)
    out, lse = backend.decode(plan, 0, problem.q[0, :2])
    more_out, more_lse = backend.prefill(plan, 0, problem.q[0, 2:])
    sink = None if sinks is None else sinks[0]
    check_attention(problem, 0, torch.cat([out, more_out]), torch.cat([lse, more_lse]), True, backend.options, sink)


@pytest.mark.parametrize(
    "field,changes",
    [
        ("batch_invariant", {"batch_invariant": 1}),
        ("invariant_tokens", {"batch_invariant": True, "invariant_tokens": 100}),
        ("invariant_tokens", {"invariant_tokens": 256}),
        ("logit_soft_cap", {"logit_soft_cap": 0.0}),
        ("sliding_window", {"sliding_window": 0}),
        ("sinks", {"sinks": torch.zeros(2, 3)}),
        ("sinks", {"sinks": torch.zeros(1, 3).double()}),
    ],
    ids=str,
)
def test_wrong_options_are_named(field: str, changes: dict[str, Any]) -> None:
    problem = make_problem(LatentLayout(32, 16, 1, 16), [5], [1], 3)
    with pytest.raises(InvalidValue) as caught:
        MLABackend(problem.memory, 3, 0.1, max_tokens=8, max_batch=8, max_pages=8, **changes)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "changes", [{"batch_invariant": True}, {"logit_soft_cap": 2.0}, {"sliding_window": 4}, {"sinks": torch.zeros(1, 3)}], ids=str
)
def test_listed_slots_take_no_option(changes: dict[str, Any]) -> None:
    """Refused rather than left out."""
    problem = make_problem(LatentLayout(32, 16, 1, 16), [5], [1], 3, written=True)
    backend = MLABackend(problem.memory, 3, 0.1, max_tokens=8, max_batch=8, max_pages=8, **changes)
    plan = backend.plan(problem.tables, [1])
    with pytest.raises(InvalidValue) as caught:
        backend.attend_selected(plan, 0, problem.q[0], torch.zeros(1, 2, dtype=torch.int32))
    assert caught.value.field in ("batch_invariant", "logit_soft_cap", "sliding_window", "has_sink")


@pytest.mark.parametrize("options", [{"logit_soft_cap": 30.0}, {"sliding_window": 8}, {"sinks": torch.zeros(2, 3)}], ids=str)
def test_lists_are_refused_where_an_option_would_be_left_out(options: dict[str, Any]) -> None:
    problem = make_problem(LatentLayout(32, 16, 2, 16, "float32"), [5], [1], 3, written=True)
    backend = MLABackend(problem.memory, 3, problem.scale, max_tokens=8, max_batch=8, max_pages=8, **options)
    plan = backend.plan(problem.tables, [1])
    with pytest.raises(InvalidValue, match="listed slots"):
        backend.attend_selected(plan, 0, problem.q[0], torch.zeros((1, 4), dtype=torch.int32))
