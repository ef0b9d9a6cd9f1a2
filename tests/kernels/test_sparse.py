"""Attention to listed slots, under the interpreter, against the float64 reference of what their bytes mean."""

import pytest
import torch
from torch import Tensor

from kvmanager.attention import reference
from kvmanager.attention.compare import Problem, assert_close, make_problem, poisoned
from kvmanager.attention.layout import LatentLayout
from kvmanager.kernels.latent_formats import view_pages
from kvmanager.kernels.mla_decode import Tile
from kvmanager.kernels.mla_decode_sparse import attend_selected, cut_lists

LAYOUTS = [
    LatentLayout(512, 64, 2, 64, "fp8_ds_mla"),
    LatentLayout(80, 48, 2, 16, "float16"),
    LatentLayout(48, 16, 2, 48, "float8_e4m3fn", scales=(0.002, 0.0013)),
]


def make_lists(problem: Problem, topk: int, seed: int) -> Tensor:
    """Slots of the problem's sequences, in any order, among padding and numbers that are no slots; one token lists nothing, one a single slot."""
    generator = torch.Generator().manual_seed(seed)
    read = (~problem.unread).flatten().nonzero().flatten()
    tokens = problem.q.shape[1]
    lists = read[torch.randint(0, len(read), (tokens, topk), generator=generator)].int()
    lists[torch.rand(lists.shape, generator=generator) < 0.3] = -1
    lists[:, 0], lists[:, topk // 2] = problem.unread.numel(), -64
    lists[1], lists[2] = -1, -1
    lists[2, -1] = int(read[3])
    lists[3, :2] = torch.tensor([2**31 - 1, -(2**31)])
    return lists


def run(problem: Problem, layer: int, lists: Tensor, tile: Tile, num_programs: int, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    layout, q = problem.memory.layout, problem.q[layer]
    cut = cut_lists(*q.shape[:2], lists.shape[1], tile, num_programs)
    rank = layout.kv_lora_rank
    out, lse = poisoned((*q.shape[:2], rank), q.dtype, "cpu"), poisoned(tuple(q.shape[:2]), torch.float32, "cpu")
    partial_out = poisoned((cut.partials, tile.block_rows, rank), torch.float32, "cpu")
    partial_lse = poisoned((cut.partials, tile.block_rows), torch.float32, "cpu")
    stored = view_pages(problem.memory.layer(layer), rank, layout.scale_of(layer))
    attend_selected(q, stored, lists, out, lse, partial_out, partial_lse, problem.scale, tile, cut, sink)
    return out, lse


@pytest.mark.parametrize("heads", [3, 16, 33])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)
def test_listed_slots_and_no_others_are_attended_to(layout: LatentLayout, heads: int) -> None:
    """Whole lists and lists in pieces; NaN everywhere else, in slot 0 too, which padding must not read."""
    problem = make_problem(layout, [100, 40, 7, 90, 64], [1] * 5, heads, seed=heads, written=True, value_dtype=torch.float16)
    memory, rank = problem.memory, layout.kv_lora_rank
    memory.layer(1).view(torch.uint8)[0] = 255  # page 0: no list names it
    problem.unread[0] = True
    lists = make_lists(problem, 70, seed=heads)
    for tile, num_programs in ((Tile(16, 16, 4, 1, 1), 1), (Tile(16, 16, 4, 1, 1), 40), (Tile(32, 32, 4, 1, 1), 12)):
        out, lse = run(problem, 1, lists, tile, num_programs)
        for token in range(5):
            latent = reference.read_latent(reference.select(memory.layer(1), lists[token]), rank, layout.scale_of(1))
            want = reference.attend(problem.q[1, token : token + 1], latent, rank, problem.scale, causal=False)
            assert_close(out[token : token + 1], lse[token : token + 1], *want)
        assert (out[1] == 0).all() and torch.isneginf(lse[1]).all()


def test_sink_scales_the_output_and_leaves_lse() -> None:
    """Infinite ones too, and a token that lists nothing; whole lists and lists in pieces."""
    layout, heads = LAYOUTS[1], 5
    problem = make_problem(layout, [100, 40, 7, 90, 64], [1] * 5, heads, seed=1, written=True)
    lists = make_lists(problem, 70, seed=2)
    sink = torch.tensor([0.0, float("-inf"), float("inf"), 2.0, -1.0])
    for num_programs in (1, 40):
        tile = Tile(16, 16, 4, 1, 1)
        out, lse = run(problem, 1, lists, tile, num_programs, sink)
        plain, plain_lse = run(problem, 1, lists, tile, num_programs)
        assert torch.equal(lse, plain_lse) and not out[1].any() and not out[:, 2].any() and torch.equal(out[:, 1], plain[:, 1])
        for token in (0, 2, 3, 4):
            latent = reference.read_latent(reference.select(problem.memory.layer(1), lists[token]), layout.kv_lora_rank, 1.0)
            want = reference.attend(problem.q[1, token : token + 1], latent, layout.kv_lora_rank, problem.scale, causal=False, sink=sink)
            assert_close(out[token : token + 1], lse[token : token + 1], *want)


@pytest.mark.parametrize(
    "tokens,heads,topk,programs", [(1, 16, 2048, 132), (1, 128, 2048, 264), (128, 128, 2048, 132), (3, 5, 1, 9), (4, 16, 0, 9)]
)
def test_pieces_cover_each_list_once_and_partials_are_bounded_by_programs(tokens: int, heads: int, topk: int, programs: int) -> None:
    tile = Tile(16, 64, 4, 2, 1)
    cut = cut_lists(tokens, heads, topk, tile, programs)
    assert cut.piece_tokens * cut.pieces >= topk > cut.piece_tokens * (cut.pieces - 1) or topk == 0
    assert cut.partials <= programs and cut.pieces >= 1


def test_no_tokens_launch_nothing() -> None:
    empty = torch.empty((0, 3, 64), dtype=torch.float16)
    tile, pages = Tile(16, 16, 4, 1, 1), torch.empty((2, 16, 64), dtype=torch.float16)
    cut = cut_lists(0, 3, 16, tile, 4)
    none = torch.empty((0, 16, 48))
    attend_selected(
        empty, pages, torch.empty((0, 16), dtype=torch.int32), empty[..., :48], none[..., 0], none, none[..., 0], 1.0, tile, cut
    )
