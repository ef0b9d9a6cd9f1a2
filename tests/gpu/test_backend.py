"""The backend on CUDA against the float64 reference: whole steps of write, decode and prefill."""

import pytest
import torch

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention, make_problem
from kvmanager.attention.layout import LatentLayout

DIMS = [(512, 64), (256, 32), (256, 64), (512, 32), (128, 32), (448, 64), (80, 48), (336, 16), (48, 16)]


def backend_for(problem: Problem) -> MLABackend:
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, max_tokens=4096, max_batch=128, max_pages=16384)


def run_step(problem: Problem, backend: MLABackend) -> None:
    plan = backend.plan(problem.tables, problem.query_lens)
    for layer in range(problem.memory.layout.num_layers):
        backend.write(plan, layer, problem.latent[layer])
        out, lse = backend.decode(plan, layer, problem.q[layer, : plan.num_decode])
        more_out, more_lse = backend.prefill(plan, layer, problem.q[layer, plan.num_decode :])
        check_attention(problem, layer, torch.cat([out, more_out]), torch.cat([lse, more_lse]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("rank,rope", DIMS, ids=[f"D{rank}+{rope}" for rank, rope in DIMS])
def test_step_equals_the_reference(rank: int, rope: int, page_size: int, dtype: str) -> None:
    """Ragged decode rows, one of padding, around a page's edges, and prefill of whole prompts and later chunks; 1 to 128 heads."""
    layout = LatentLayout(rank, rope, 2, page_size, dtype)
    lengths = [1, 0, page_size - 1, page_size, page_size + 1, 777, 5000, 2, 65, 300, 1500]
    query_lens = [1] * 7 + [2, 65, 33, 4]
    for heads in (1, 3, 8, 9, 16, 17, 40, 63, 64, 96, 126, 128):
        problem = make_problem(layout, lengths, query_lens, heads, "cuda", seed=heads + page_size + rank)
        run_step(problem, backend_for(problem))


@pytest.mark.parametrize("rank,rope,page_size,dtype", [(1024, 256, 64, "bfloat16"), (512, 128, 48, "bfloat16"), (128, 64, 64, "float32")])
def test_step_equals_the_reference_at_the_edges_of_the_layout(rank: int, rope: int, page_size: int, dtype: str) -> None:
    """The widest entries, a page that is no power of two, float32."""
    layout = LatentLayout(rank, rope, 1, page_size, dtype)  # type: ignore[arg-type]
    problem = make_problem(layout, [1, 130, 3000, 40, 200], [1, 1, 1, 40, 7], 33, "cuda", seed=rank)
    run_step(problem, backend_for(problem))


def test_pages_past_two_billion_elements_are_reached() -> None:
    """61 layers page-major: pages from id 955 on lie past 2**31 elements, where 32-bit address arithmetic would wrap."""
    layout = LatentLayout(512, 64, 61, 64)
    problem = make_problem(layout, [64 * 500, 64 * 400 + 1, 64 * 200 - 1], [1, 1, 3], 16, "cuda", seed=5, spare_pages=3)
    assert problem.memory.pages.numel() > 2**31
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, problem.query_lens)
    for layer in (0, 60):
        backend.write(plan, layer, problem.latent[layer])
        out, lse = backend.decode(plan, layer, problem.q[layer, : plan.num_decode])
        more_out, more_lse = backend.prefill(plan, layer, problem.q[layer, plan.num_decode :])
        check_attention(problem, layer, torch.cat([out, more_out]), torch.cat([lse, more_lse]))


def test_same_plan_gives_the_same_bits() -> None:
    """No atomics, no tile chosen by timing."""
    problem = make_problem(LatentLayout(512, 64, 1, 64), [5000, 70, 3000], [1, 1, 1], 128, "cuda", seed=2, written=True)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, problem.query_lens)
    out, lse = backend.decode(plan, 0, problem.q[0])
    for _ in range(5):
        again_out, again_lse = backend.decode(plan, 0, problem.q[0])
        assert torch.equal(out, again_out) and torch.equal(lse, again_lse)


def test_empty_steps_have_the_right_shapes() -> None:
    """No rows at all, no decode rows, no prefill rows."""
    layout = LatentLayout(64, 32, 1, 64)
    for lengths, query_lens in (([], []), ([5], [5]), ([5], [1]), ([0, 0], [1, 1])):
        problem = make_problem(layout, lengths, query_lens, 3, "cuda")
        run_step(problem, backend_for(problem))


def test_step_path_never_waits_for_the_device() -> None:
    """torch raises on any synchronising call; the ring of pinned buffers goes round more than twice."""
    problem = make_problem(LatentLayout(512, 64, 2, 64), [300, 4000, 40, 90], [1, 1, 40, 9], 16, "cuda", seed=4)
    backend = backend_for(problem)
    run_step(problem, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            plan = backend.plan(problem.tables, problem.query_lens)
            for layer in range(2):
                backend.write(plan, layer, problem.latent[layer])
                backend.decode(plan, layer, problem.q[layer, : plan.num_decode])
                backend.prefill(plan, layer, problem.q[layer, plan.num_decode :])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_staging_ring_never_overwrites_a_copy_on_its_way() -> None:
    """Plans issued far ahead of a busy device: each step must still see its own slots."""
    layout = LatentLayout(64, 32, 1, 16)
    problem = make_problem(layout, [1] * 64, [1] * 64, 1, "cuda", seed=8, spare_pages=64)
    backend = backend_for(problem)
    busy = torch.randn(8192, 8192, device="cuda")
    rounds = [torch.randn((64, layout.entry), device="cuda").bfloat16() for _ in range(16)]
    tables = problem.tables
    for _ in range(20):
        busy = busy @ busy * 1e-2
    for index, latent in enumerate(rounds):
        lengths = tables.lengths + index
        plan = backend.plan(type(tables)(index, 16, lengths, tables.page_ids, tables.page_indptr), [1] * 64)
        backend.write(plan, 0, latent)
    torch.cuda.synchronize()
    pages = problem.memory.layer(0)
    first = torch.from_numpy(tables.page_ids[tables.page_indptr[:-1]].astype("int64")).cuda()
    for index, latent in enumerate(rounds):
        assert torch.equal(pages[first, index], latent)
