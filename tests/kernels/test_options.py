"""Soft cap, sliding window, attention sink and batch invariance of the plain kernel, under the interpreter."""

from dataclasses import replace

import pytest
import torch

from kvmanager.attention.compare import Problem, check_attention, make_problem, run_kernels
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.options import Options
from kvmanager.kernels.mla_decode import Tile
from kvmanager.tables import BatchTables

SMALL = Tile(16, 16, 4, 1, 1)
INVARIANT = Options(batch_invariant=True, invariant_tokens=256)


def part_of(problem: Problem, row: int, begin: int, end: int) -> Problem:
    """Query tokens begin to end of one sequence of a problem, as a step of their own."""
    first, dropped = sum(problem.query_lens[:row]), problem.query_lens[row] - end
    tokens, tables = slice(first + begin, first + end), problem.tables
    pages = tables.pages_of(row)
    lengths = tables.lengths[row : row + 1] - dropped
    indptr = torch.tensor([0, len(pages)]).numpy()
    one = BatchTables(1, tables.page_size, lengths, pages, indptr)
    return replace(problem, tables=one, query_lens=[end - begin], q=problem.q[:, tokens])


@pytest.mark.parametrize(
    "options",
    [Options(logit_soft_cap=2.0), Options(sliding_window=1), Options(sliding_window=40), Options(logit_soft_cap=30.0, sliding_window=17)],
    ids=str,
)
@pytest.mark.parametrize("query_lens", [[1, 1, 1, 1], [3, 2, 17, 9]], ids=str)
@pytest.mark.parametrize("has_sink", [False, True])
def test_options_equal_the_reference(options: Options, query_lens: list[int], has_sink: bool) -> None:
    """Cut and uncut; windows within a tile, across pages and splits; a sink that counts for nothing and one that takes all."""
    layout = LatentLayout(32, 16, 1, 16, "float32")
    problem = make_problem(layout, [0, 15, 130, 200], query_lens, 5, seed=3, written=True)
    sink = torch.tensor([0.5, -4.0, 6.0, float("-inf"), float("inf")]) if has_sink else None
    for num_programs in (1, 9):
        out, lse = run_kernels(problem, 0, SMALL, num_programs, True, options, sink)
        check_attention(problem, 0, out, lse, True, options, sink)


@pytest.mark.parametrize(
    "options,tile", [(INVARIANT, Tile(64, 32, 4, 1, 1)), (replace(INVARIANT, sliding_window=270), Tile(16, 64, 4, 1, 1))], ids=str
)
def test_a_token_gets_the_same_bits_in_whatever_step_it_is_computed(tile: Tile, options: Options) -> None:
    """Alone, in a batch, on few and many programs, in a whole prompt, in chunks of it, as one token; none, one and several pieces."""
    layout = LatentLayout(32, 16, 1, 16, "float16")
    lengths, query_lens = [5, 300, 530], [5, 9, 3]
    problem = make_problem(layout, lengths, query_lens, 3, seed=4, written=True)
    sink = torch.tensor([0.5, -4.0, 3.0])
    out, lse = run_kernels(problem, 0, tile, 7, True, options, sink)
    check_attention(problem, 0, out, lse, True, options, sink)
    again = run_kernels(problem, 0, tile, 23, True, options, sink)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    for row, count in enumerate(query_lens):
        start = sum(query_lens[:row])
        for begin, end in {(count - 1, count), (count // 3, count - count // 4)}:
            part = part_of(problem, row, begin, end)
            one = run_kernels(part, 0, tile, 5, True, options, sink)
            tokens = slice(start + begin, start + end)
            assert torch.equal(out[tokens], one[0]) and torch.equal(lse[tokens], one[1]), (row, begin, end)


def test_the_free_schedule_is_not_invariant() -> None:
    """What the option is for; if this fails, the test above shows nothing."""
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float16"), [700], [1], 3, seed=4, written=True)
    one, many = run_kernels(problem, 0, SMALL, 1), run_kernels(problem, 0, SMALL, 23)
    assert not torch.equal(one[1], many[1])
