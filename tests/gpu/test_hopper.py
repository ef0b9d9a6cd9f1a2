"""What the Hopper kernel promises beyond the tests that it shares with the plain one. Skipped on other cards."""

import pytest
import torch

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention, make_problem
from kvmanager.attention.layout import LatentLayout

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("no Hopper card", allow_module_level=True)

V3 = LatentLayout(512, 64, 1, 64)


def backend_for(problem: Problem) -> MLABackend:
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, max_tokens=4096, max_batch=256, max_pages=16384)


def test_the_table_chooses_it_and_says_why() -> None:
    problem = make_problem(V3, [5], [1], 1, "cuda", written=True)
    backend = backend_for(problem)
    assert backend.kernel == "hopper" and "sm_90" in backend.why
    wide = make_problem(LatentLayout(1024, 64, 1, 64), [5], [1], 1, "cuda", written=True)
    assert backend_for(wide).kernel == "triton" and "1024" in backend_for(wide).why


@pytest.mark.parametrize(
    "rank,rope,page_size", [(512, 64, 64), (512, 64, 16), (512, 64, 128), (256, 32, 32), (256, 64, 128), (128, 32, 16)]
)
def test_every_length_around_a_tile(rank: int, rope: int, page_size: int) -> None:
    """Each count of latents in a last tile, at each offset of a last page; the slots behind hold NaN."""
    layout = LatentLayout(rank, rope, 1, page_size)
    lengths = [*range(0, 261, 3), 511, 512, 513]
    problem = make_problem(layout, lengths, [1] * len(lengths), 20, "cuda", seed=rank + page_size, written=True)
    backend = backend_for(problem)
    check_attention(problem, 0, *backend.decode(backend.plan(problem.tables, problem.query_lens), 0, problem.q[0]))


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("heads", [1, 16, 40, 128])
def test_one_to_eight_query_tokens(tokens: int, heads: int) -> None:
    """Causal, packed with the heads into blocks of 64 rows; limits on both sides of a tile's border."""
    lengths = [tokens, 64, 66, 127, 131, 1000, 5000]
    problem = make_problem(V3, [max(length, tokens) for length in lengths], [tokens] * 7, heads, "cuda", seed=tokens, written=True)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, problem.query_lens)
    attend = backend.decode if tokens == 1 else backend.prefill
    check_attention(problem, 0, *attend(plan, 0, problem.q[0]))


def test_long_sequences() -> None:
    """131,072 latents, alone and beside short ones, and 1 program's worth of splits merged."""
    for lengths in ([131072], [131072, 1, 0, 63], [70000] * 3):
        problem = make_problem(V3, lengths, [1] * len(lengths), 16, "cuda", seed=len(lengths), written=True)
        backend = backend_for(problem)
        check_attention(problem, 0, *backend.decode(backend.plan(problem.tables, problem.query_lens), 0, problem.q[0]))


def test_scores_far_apart() -> None:
    """Maxima that climb by hundreds from tile to tile, and rows whose later tiles count for nothing: the lazy maximum must follow."""
    for factor in (1.0, 40.0, 400.0):
        problem = make_problem(V3, [3000, 700, 64], [1] * 3, 64, "cuda", seed=9, written=True)
        q = problem.q[0] * factor
        pages = problem.memory.pages
        pages *= torch.linspace(0.1, 3.0, pages.shape[0], device="cuda", dtype=pages.dtype)[:, None, None, None]
        problem.q[0].copy_(q)
        backend = backend_for(problem)
        out, lse = backend.decode(backend.plan(problem.tables, problem.query_lens), 0, problem.q[0])
        assert torch.isfinite(out).all() and torch.isfinite(lse).all()
        if factor == 1.0:
            check_attention(problem, 0, out, lse)
        else:
            from kvmanager.attention import reference

            want_out, want_lse = reference.decode(problem.q[0], problem.memory.layer(0), problem.tables, 512, problem.scale)
            assert (out.double() - want_out).norm() / want_out.norm() < 1e-2
            assert ((lse.double() - want_lse).abs() / want_lse.abs().clamp(min=1)).max() < 1e-4


@pytest.mark.parametrize("shape", ["contiguous", "tokens apart", "heads apart", "heads first"])
def test_queries_of_any_stride(shape: str) -> None:
    """TMA wants one stride from row to row: others are copied."""
    problem = make_problem(V3, [100, 300, 5], [1] * 3, 16, "cuda", written=True)
    q = problem.q[0]
    if shape == "tokens apart":
        q = torch.empty((3, 2, *q.shape[1:]), dtype=q.dtype, device="cuda")[:, 1].copy_(q)
    elif shape == "heads apart":
        q = torch.empty((*q.shape[:2], 584), dtype=q.dtype, device="cuda")[:, :, 8:].copy_(q)
    elif shape == "heads first":
        q = torch.empty((16, 3, 576), dtype=q.dtype, device="cuda").transpose(0, 1).copy_(q)
    backend = backend_for(problem)
    check_attention(problem, 0, *backend.decode(backend.plan(problem.tables, problem.query_lens), 0, q))


@pytest.mark.parametrize("heads,lengths", [(128, [4096] * 128), (16, [65536]), (128, [9000, 70, 3000, 16000] * 8)])
def test_twenty_runs_give_the_same_bits(heads: int, lengths: list[int]) -> None:
    problem = make_problem(V3, lengths, [1] * len(lengths), heads, "cuda", seed=2, written=True)
    backend = backend_for(problem)
    plan = backend.plan(problem.tables, problem.query_lens)
    out, lse = backend.decode(plan, 0, problem.q[0])
    for _ in range(19):
        again_out, again_lse = backend.decode(plan, 0, problem.q[0])
        assert torch.equal(out, again_out) and torch.equal(lse, again_lse)
