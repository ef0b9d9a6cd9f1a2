"""A prefix read once for several rows, under the interpreter, against the float64 reference."""

import pytest
import torch

from kvmanager.attention.compare import Problem, check_attention, make_problem, run_kernels, share_pages
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.options import Options
from kvmanager.attention.shared_prefix import PrefixGroup
from kvmanager.kernels.mla_decode import Tile

SMALL = Tile(16, 16, 4, 1, 1)


def shared_problem(layout: LatentLayout, heads: int, page_size: int = 16) -> Problem:
    """Eleven rows: two groups, one of them of two levels, rows of their own between, and padding; NaN where no row reads."""
    lengths = [90, 200, 170, 161, 300, 33, 0, 130, 129, 150, 64]
    problem = make_problem(layout, lengths, [1] * len(lengths), heads, seed=heads, written=True)
    return share_pages(problem, [(1, 4, 96 // page_size), (7, 3, 128 // page_size), (8, 2, 128 // page_size)])


GROUPS = [PrefixGroup(1, 4, 96), PrefixGroup(7, 3, 128)]


@pytest.mark.parametrize("heads", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("tile", [SMALL, Tile(64, 32, 4, 1, 1)], ids=str)
def test_groups_equal_the_reference(heads: int, tile: Tile) -> None:
    """Blocks that hold several rows' heads, rows whose heads lie in two blocks, last blocks without rows; few programs and many."""
    problem = shared_problem(LatentLayout(48, 16, 1, 16, "float16"), heads)
    for num_programs in (1, 5, 23):
        check_attention(problem, 0, *run_kernels(problem, 0, tile, num_programs, groups=GROUPS))


@pytest.mark.parametrize("page_size", [16, 32, 48])
def test_a_prefix_may_end_within_a_page(page_size: int) -> None:
    problem = shared_problem(LatentLayout(32, 16, 1, page_size, "float32"), 5, page_size)
    for tokens in (16, 80, 96):
        groups = [PrefixGroup(1, 4, tokens), PrefixGroup(8, 2, tokens - 16 or 16)]
        if page_size == 48:
            groups = groups[:1]
        check_attention(problem, 0, *run_kernels(problem, 0, SMALL, 7, groups=groups))


@pytest.mark.parametrize("options", [Options(), Options(logit_soft_cap=2.0)], ids=str)
def test_a_sink_counts_once_and_scores_are_capped(options: Options) -> None:
    problem = shared_problem(LatentLayout(32, 16, 1, 16, "float32"), 5)
    sink = torch.tensor([0.5, -4.0, 6.0, float("-inf"), float("inf")])
    for num_programs in (1, 9):
        out, lse = run_kernels(problem, 0, SMALL, num_programs, True, options, sink, groups=GROUPS)
        check_attention(problem, 0, out, lse, True, options, sink)


def test_the_same_list_gives_the_same_bits_and_all_rows_may_be_one_group() -> None:
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float16"), [113] * 6, [1] * 6, 3, seed=2, written=True)
    problem = share_pages(problem, [(0, 6, 7)])
    groups = [PrefixGroup(0, 6, 112)]  # tails of one token
    out, lse = run_kernels(problem, 0, SMALL, 5, groups=groups)
    check_attention(problem, 0, out, lse)
    again = run_kernels(problem, 0, SMALL, 5, groups=groups)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    alone = run_kernels(problem, 0, SMALL, 5)
    torch.testing.assert_close(out, alone[0], atol=1e-3, rtol=1e-3)
