"""Plans of transfers against a model that copies one token at a time; sums of pages; who pulls from whom."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.attention.checksum import sum_segments, sum_target
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.move import plan_move
from kvmanager.errors import InvalidValue
from kvmanager.pages.handoff import source_of
from kvmanager.tables import div_ceil

LAYERS, SLOT = 3, 8


def token_by_token(source, target, src, dst, tokens, source_skip, target_skip, layers):  # type: ignore[no-untyped-def]
    """The model: source and target are [pages, layers, slots, bytes]."""
    for token in range(tokens):
        s, d = divmod(token + source_skip, source.shape[2]), divmod(token + target_skip, target.shape[2])
        target[dst[d[0]], layers[0] : layers[1], d[1]] = source[src[s[0]], layers[0] : layers[1], s[1]]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_runs_move_what_the_model_moves(data: st.DataObject) -> None:
    """Any two page sizes, skips, token counts and layer groups; runs never overlap in the target and touch nothing else."""
    sizes = data.draw(st.tuples(st.sampled_from([16, 32, 48, 64]), st.sampled_from([16, 32, 48, 64])))
    skips = tuple(data.draw(st.integers(0, size - 1)) for size in sizes)
    tokens = data.draw(st.integers(0, 150))
    first = data.draw(st.integers(0, LAYERS - 1))
    layers = (first, data.draw(st.integers(first + 1, LAYERS)))
    counts = [div_ceil(skip + tokens, size) if tokens else 0 for size, skip in zip(sizes, skips, strict=True)]
    rng = np.random.default_rng(tokens)
    src, dst = (rng.permutation(16)[:count] for count in counts)
    source = rng.integers(0, 255, (16, LAYERS, sizes[0], SLOT), dtype=np.uint8)
    want = np.full((16, LAYERS, sizes[1], SLOT), 255, np.uint8)
    got = want.copy()
    token_by_token(source, want, src, dst, tokens, *skips, layers)
    move = plan_move(src, dst, *sizes, LAYERS, tokens=tokens, source_skip=skips[0], target_skip=skips[1], layers=layers)
    runs = move.runs(LAYERS, SLOT)
    theirs, ours = source.reshape(-1), got.reshape(-1)
    for s, d, length in zip(runs.source.tolist(), runs.target.tolist(), runs.length.tolist(), strict=True):
        assert (ours[d : d + length] == 255).all()
        ours[d : d + length] = theirs[s : s + length]
    assert (got == want).all()
    assert int(runs.length.sum()) == move.num_bytes(SLOT) == tokens * (layers[1] - layers[0]) * SLOT


def test_whole_pages_of_all_layers_that_lie_side_by_side_are_one_run() -> None:
    runs = plan_move(np.array([3, 4, 9]), np.array([5, 6, 7]), 16, 16, LAYERS).runs(LAYERS, SLOT)
    assert runs.length.tolist() == [2 * LAYERS * 16 * SLOT, LAYERS * 16 * SLOT]
    assert plan_move(np.array([3]), np.array([5]), 16, 16, LAYERS, tokens=15).runs(LAYERS, SLOT).length.tolist() == [15 * SLOT] * LAYERS


@pytest.mark.parametrize(
    ("src", "dst", "options", "field"),
    [
        ([0, 1], [0], {}, "dst_page_ids"), ([0], [0, 1], {}, "dst_page_ids"), ([0], [0], {"tokens": 17}, "src_page_ids"),
        ([0, 1], [0, 1], {"tokens": 16}, "src_page_ids"), ([0], [0], {"tokens": -1}, "src_page_ids"), ([0], [0], {"layers": (1, 1)}, "layers"),
        ([0], [0], {"layers": (0, 4)}, "layers"), ([0], [0], {"layers": (-1, 2)}, "layers"), ([0], [0], {"source_skip": 16}, "source_skip"),
        ([0], [0], {"target_skip": -1}, "target_skip"), ([0, 1], [3, 3], {}, "dst_page_ids"), ([0], [0], {"target_skip": 1}, "dst_page_ids"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_the_tokens_are_refused(src: list[int], dst: list[int], options: dict, field: str) -> None:
    with pytest.raises(InvalidValue, match=f"^{field}: "):
        plan_move(np.array(src), np.array(dst), 16, 16, LAYERS, **options)


LAYOUT = LatentLayout(32, 16, 3, 64, "float16")


def test_sums_are_the_formula_s() -> None:
    """sum (U[l, s] + V[w]) X[l, s, w] modulo 2**64, in plain Python integers from splitmix64's definition."""
    rng = np.random.default_rng(1)
    layout = LatentLayout(16, 16, 2, 16, "bfloat16")
    raw = rng.integers(0, 2**63, (3, 2, 16, 8), dtype=np.int64)
    pages = torch.from_numpy(raw).view(torch.bfloat16)
    mask = 2**64 - 1

    def mix(state: int) -> int:
        z = state * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    want = 0
    for layer, slot, word in itertools.product(range(2), range(16), range(8)):
        want += ((mix(1 + layer * 16 + slot) | 1) + (mix((1 << 40) + word) & ~1)) * int(raw[1, layer, slot, word])
    got = sum_segments(pages, layout, np.array([[1, 0, 16, 0]]), (0, 2), 16)
    assert got.tolist() == [want & mask]


def test_sums_add_up_over_layers_and_over_pages_of_another_size() -> None:
    """So the receiver of four pages of 16 slots checks the sum of the page of 64 that they came from."""
    big = torch.randn((5, 3, 64, 48)).half()
    small_layout = LatentLayout(32, 16, 3, 16, "float16")
    small = torch.full((8, 3, 16, 48), float("nan"), dtype=torch.float16)
    move = plan_move(np.array([3, 1]), np.array([7, 0, 5, 2, 1, 3, 6]), 64, 16, 3, tokens=101)
    token_by_token(big.numpy(), small.numpy(), [3, 1], [7, 0, 5, 2, 1, 3, 6], 101, 0, 0, (0, 3))
    want = sum_segments(big, LAYOUT, np.array([[3, 0, 64, 0], [1, 0, 37, 0]]), (0, 3), 64)
    assert sum_target(small, small_layout, move).tolist() == want.tolist()
    parts = [sum_segments(big, LAYOUT, np.array([[3, 0, 64, 0]]), layers, 64)[0] for layers in ((0, 1), (1, 3))]
    assert np.sum(np.array(parts)) == want[0]


def test_a_flipped_bit_a_swapped_slot_and_a_swapped_layer_change_the_sum() -> None:
    page = torch.randn((1, 3, 64, 48)).half()
    segment = np.array([[0, 0, 64, 0]])
    want = sum_segments(page, LAYOUT, segment, (0, 3), 64)[0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = page.clone()
        flat = other.view(torch.uint8).view(-1)
        flat[int(rng.integers(len(flat)))] ^= 1 << int(rng.integers(8))
        assert sum_segments(other, LAYOUT, segment, (0, 3), 64)[0] != want
    assert sum_segments(page[:, [1, 0, 2]].contiguous(), LAYOUT, segment, (0, 3), 64)[0] != want
    assert sum_segments(page.flip(2).contiguous(), LAYOUT, segment, (0, 3), 64)[0] != want
    assert sum_segments(page[..., [1, 0, *range(2, 48)]].contiguous(), LAYOUT, segment, (0, 3), 64)[0] != want


@pytest.mark.parametrize(("targets", "sources"), list(itertools.product([1, 2, 3, 4, 8, 16], repeat=2)))
def test_target_ranks_spread_evenly_over_source_ranks(targets: int, sources: int) -> None:
    """In one handoff no source serves more than its share; over as many handoffs as there are sources all serve the same."""
    total: Counter[int] = Counter()
    for turn in range(sources):
        asked = Counter(source_of(rank, targets, sources, turn) for rank in range(targets))
        assert max(asked.values()) <= div_ceil(targets, sources)
        assert targets < sources or min(asked.values()) >= targets // sources
        total += asked
    assert set(total.values()) == {targets} and len(total) == sources
