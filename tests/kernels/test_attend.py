"""Decode, prefill and merge under the interpreter against the float64 reference. bfloat16 is left to the GPU: the interpreter's dot is wrong there."""

import pytest
import torch

from kvmanager.attention import work
from kvmanager.attention.compare import Problem, check_attention, make_problem, run_kernels
from kvmanager.attention.layout import LatentLayout
from kvmanager.kernels import mla_decode, mla_merge
from kvmanager.kernels.mla_decode import Tile, choose_tile

SMALL = Tile(16, 16, 4, 1, 1)


def run(problem: Problem, layer: int, tile: Tile, num_programs: int, causal: bool = True) -> None:
    out, lse = run_kernels(problem, layer, tile, num_programs, causal)
    check_attention(problem, layer, out, lse, causal)


@pytest.mark.parametrize("heads", [1, 3, 16, 17, 63])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_decode_equals_the_reference_for_any_head_count(heads: int, dtype: str) -> None:
    """Ragged lengths around a page's edges, one empty, split over few and many programs."""
    layout = LatentLayout(48, 16, 2, 16, dtype)
    problem = make_problem(layout, [1, 0, 15, 16, 17, 90], [1] * 6, heads, seed=heads, written=True)
    for num_programs in (1, 5, 16):
        run(problem, 1, SMALL, num_programs)


@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 112, 128])
@pytest.mark.parametrize("tile", [SMALL, Tile(16, 64, 4, 1, 1), Tile(64, 32, 4, 1, 1)], ids=str)
def test_decode_equals_the_reference_for_any_page_size(page_size: int, tile: Tile) -> None:
    """Pages shorter than a tile, equal to one, longer, and no multiple of one."""
    layout = LatentLayout(64, 32, 1, page_size, "float16")
    problem = make_problem(layout, [page_size - 1, page_size + 1, 200], [1] * 3, 20, seed=page_size, written=True)
    run(problem, 0, tile, 7)


@pytest.mark.parametrize("rank,rope", [(512, 64), (256, 32), (512, 32), (80, 48), (336, 16)])
def test_decode_equals_the_reference_for_any_dimensions(rank: int, rope: int) -> None:
    """Pairs that models use and pairs that nobody listed."""
    problem = make_problem(LatentLayout(rank, rope, 1, 32, "float16"), [33, 97], [1, 1], 3, seed=rank, written=True)
    run(problem, 0, Tile(16, 32, 4, 1, 1), 3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths,query_lens", [([33, 40], [33, 5]), ([0, 20, 64], [2, 2, 4]), ([70], [3])], ids=str)
def test_prefill_sees_up_to_its_own_position(lengths: list[int], query_lens: list[int], causal: bool) -> None:
    """Whole prompts, later chunks, several tokens of decode; an empty row has output 0 and LSE -inf."""
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float32"), lengths, query_lens, 5, seed=7, written=True)
    for num_programs in (2, 9):
        run(problem, 0, SMALL, num_programs, causal)


def test_merge_gives_the_same_as_no_split() -> None:
    """The same sequence on one program and cut into pieces for many, one partial list longer than a merge block."""
    problem = make_problem(LatentLayout(32, 16, 1, 32, "float32"), [400], [1], 4, seed=3, written=True)
    whole, split = run_kernels(problem, 0, SMALL, 1), run_kernels(problem, 0, SMALL, 12)
    torch.testing.assert_close(split[0], whole[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(split[1], whole[1], atol=1e-5, rtol=1e-5)


def test_every_tile_of_the_table_is_possible() -> None:
    """Tensor cores want 16 rows and 16 tokens; a tile must divide evenly into powers of two."""
    for arch in (80, 89, 90, 100, 120, 75):
        for heads in (1, 16, 17, 33, 128, 1024):
            for rank, rope in ((16, 16), (256, 32), (512, 64), (512, 256), (1024, 256)):
                for dtype in (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.uint8):
                    for several in (False, True):
                        tile = choose_tile(heads, rank, rope, dtype, arch, several)
                        assert tile.block_rows in (16, 32, 64)
                        assert tile.block_tokens in (16, 32, 64)


def test_work_lists_and_kernels_agree_on_their_fields() -> None:
    """The host builds lists without importing Triton, so both sides name the width of a row."""
    assert (work.ITEM_FIELDS, work.MERGE_FIELDS) == (mla_decode.ITEM_FIELDS, mla_merge.MERGE_FIELDS)
