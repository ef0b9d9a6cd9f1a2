"""Prefill with expanded heads on CUDA: each library and the absorbed path against float64, and nothing that waits."""

from typing import Any

import pytest
import torch

from kvmanager.attention import LongPrefill, merge_states
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.choice import LIBRARIES
from kvmanager.attention.compare import Heads, Problem, check_expanded, make_heads, make_problem
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.states import merge_pair
from kvmanager.errors import InvalidValue


def prefill_for(problem: Problem, nope: int, v: int, library: str | None, workspace_bytes: int = 2**29) -> LongPrefill:
    heads, layout = problem.q.shape[2], problem.memory.layout
    scale = (nope + layout.qk_rope_head_dim) ** -0.5
    backend = MLABackend(problem.memory, heads, scale, max_tokens=4096, max_batch=64, max_pages=16384)
    try:
        return LongPrefill(backend, nope, v, workspace_bytes=workspace_bytes, library=library)
    except InvalidValue as error:
        if error.field == "library":
            pytest.skip(str(error))
        raise


def run_step(prefill: LongPrefill, problem: Problem, heads: Heads, layer: int, absorbed: bool = False) -> None:
    plan = prefill.backend.plan(problem.tables, problem.query_lens)
    prefill.backend.write(plan, layer, problem.latent[layer])
    run = prefill.run_absorbed if absorbed else prefill.run
    out, lse = run(plan, layer, *heads.tail(plan.num_decode))
    check_expanded(problem, layer, heads, prefill.backend.softmax_scale, out, lse, plan.num_decode)


def with_chunk(problem: Problem, nope: int, v: int, library: str | None, tokens: int) -> LongPrefill:
    """One whose pieces are of so many tokens, or not many more."""
    workspace_bytes = 2**18
    while True:
        try:
            prefill = prefill_for(problem, nope, v, library, workspace_bytes)
            if prefill.chunk_tokens >= tokens and prefill.library == (library or prefill.library):
                return prefill
        except InvalidValue as error:
            assert error.field == "workspace_bytes"
        workspace_bytes = workspace_bytes * 5 // 4


@pytest.mark.parametrize("library", [*LIBRARIES, "absorbed"])
@pytest.mark.parametrize(
    "rank,rope,nope,v,heads,dtype",
    [
        (512, 64, 128, 128, 128, "bfloat16"),
        (512, 64, 128, 128, 16, "float16"),
        (128, 32, 32, 80, 7, "float16"),
    ],
)
def test_ragged_steps_equal_the_reference(rank: int, rope: int, nope: int, v: int, heads: int, dtype: Any, library: str | None) -> None:
    """Whole prompts and later pieces around pages' and chunks' edges, as many query tokens as heads among them; NaN in all other slots."""
    layout = LatentLayout(rank, rope, 2, 64, dtype)
    lengths = [50, 0, 2, 128, 63, 200, 700, 333, 1025]
    problem = make_problem(layout, lengths, [1, 1, 2, 128, 63, 16, 256, 7, 1025 if heads < 100 else 300], heads, "cuda", seed=heads + rank)
    weights = make_heads(problem, nope, v, seed=rank)
    if library == "absorbed":
        run_step(prefill_for(problem, nope, v, None), problem, weights, 1, absorbed=True)
        return
    for chunk in (512, 1280):
        run_step(with_chunk(problem, nope, v, library, chunk), problem, weights, 1)


@pytest.mark.parametrize("dtype,scales", [("float8_e4m3fn", (0.01,)), ("fp8_ds_mla", ()), ("float32", ())])
def test_other_formats(dtype: Any, scales: tuple[float, ...]) -> None:
    layout = LatentLayout(512, 64, 1, 32, dtype, scales=scales)
    problem = make_problem(layout, [500, 333], [100, 333], 8, "cuda", seed=2)
    weights = make_heads(problem, 128, 128)
    prefill = prefill_for(problem, 128, 128, None, 2**23)
    if dtype == "float32":
        assert prefill.library == "plain"
        torch.backends.cuda.matmul.allow_tf32 = False
    run_step(prefill, problem, weights, 0)


@pytest.mark.parametrize("library", [None, "flash"])
def test_a_context_of_131072(library: str | None) -> None:
    problem = make_problem(LatentLayout(512, 64, 1, 64), [131072], [70], 8, "cuda", seed=1)
    weights = make_heads(problem, 128, 128)
    run_step(prefill_for(problem, 128, 128, library, 2**26), problem, weights, 0)


def test_pages_past_two_billion_elements_are_gathered() -> None:
    problem = make_problem(LatentLayout(512, 64, 61, 64), [64 * 990], [40], 2, "cuda", seed=5)
    assert problem.memory.pages.numel() > 2**31
    run_step(prefill_for(problem, 128, 128, None, 2**25), problem, make_heads(problem, 128, 128), 60)


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_of_one_sequence_reaches_another(library: str) -> None:
    """NaN latents of the first sequence stay in its own rows, whatever is rounded up."""
    problem = make_problem(LatentLayout(512, 64, 1, 64), [900, 301], [300, 301], 16, "cuda", seed=6, written=True)
    weights = make_heads(problem, 128, 128)
    pages = torch.from_numpy(problem.tables.pages_of(0)[:15].astype("int64")).cuda()
    problem.memory.pages[pages] = float("nan")
    prefill = prefill_for(problem, 128, 128, library)
    for _ in range(2):
        out, lse = prefill.run(prefill.backend.plan(problem.tables, problem.query_lens), 0, *weights.tail(0))
        assert torch.isnan(out[:300]).all() and torch.isfinite(out[300:]).all() and torch.isfinite(lse[300:]).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_step_never_waits_and_gives_the_same_bits(library: str) -> None:
    problem = make_problem(LatentLayout(512, 64, 1, 64), [300, 40, 3000], [1, 40, 700], 16, "cuda", seed=4)
    weights = make_heads(problem, 128, 128)
    prefill = prefill_for(problem, 128, 128, library, 2**25)
    results = []

    def step() -> None:
        plan = prefill.backend.plan(problem.tables, problem.query_lens)
        prefill.backend.write(plan, 0, problem.latent[0])
        results.append(prefill.attend(plan, 0, *weights.tail(0)))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_expanded(problem, 0, weights, prefill.backend.softmax_scale, *results[0])
    assert all(torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1]) for out, lse in results)


@pytest.mark.parametrize("parts,rows,width", [(1, 5, 512), (2, 1000, 512), (8, 33, 80), (3, 7, 1024)])
def test_states_merge_on_the_card_as_on_the_host(parts: int, rows: int, width: int) -> None:
    outs, lses = torch.randn(parts, rows, width).bfloat16(), torch.randn(parts, rows) * 20
    lses[torch.rand_like(lses) < 0.3] = float("-inf")
    outs[torch.isinf(lses)] = 0
    want, want_lse = merge_states(outs, lses)
    out, lse = merge_states(outs.cuda(), lses.cuda())
    assert torch.allclose(out.cpu().float(), want.float(), atol=1e-2, rtol=1e-2) and torch.allclose(
        lse.cpu(), want_lse, rtol=1e-5, atol=1e-5
    )
    if parts == 2:
        pair, pair_lse = torch.empty_like(out, dtype=torch.float32)[:, None], torch.empty_like(lse)[:, None]
        merge_pair(outs[0, :, None].cuda(), lses[0, :, None].cuda(), outs[1, :, None].cuda(), lses[1, :, None].cuda(), pair, pair_lse)
        assert torch.allclose(pair[:, 0].cpu(), want.float(), atol=1e-2, rtol=1e-2)
