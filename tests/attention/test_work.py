"""Work lists: whatever the batch, every row meets every latent it may see exactly once, and the partial results stay within their bound."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.attention.work import SPLIT_TILES_MIN, Shape, WorkList, decode_work, prefill_waves, prefill_work
from kvmanager.errors import InvalidValue

shapes = st.builds(
    Shape, st.sampled_from([1, 3, 16, 63, 65, 128, 200]), st.sampled_from([16, 64]), st.sampled_from([16, 64]), st.integers(1, 40)
)
lengths_of = st.lists(st.one_of(st.integers(0, 70), st.integers(0, 5000)), min_size=1, max_size=20)


def check(work: WorkList, shape: Shape, expected: dict[tuple[int, int], tuple[int, int]]) -> None:
    """expected: (first_token, row) of each block of rows -> (page_start, positions seen)."""
    programs, items = work.programs, work.items
    assert programs[0] == 0 and programs[-1] == len(items) and (np.diff(programs) >= 0).all()
    assert work.num_partials <= shape.partials_max
    seen: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for page_start, first_token, _, _, row, begin, end, partial in items.tolist():
        assert begin % shape.block_tokens == 0 and expected[first_token, row][0] == page_start
        seen.setdefault((first_token, row), []).append((begin, end, partial))
    assert seen.keys() == expected.keys()
    merges = {(merge[0], merge[2]): (merge[3], merge[4]) for merge in work.merges.tolist()}
    assert len(merges) == len(work.merges)
    used: list[int] = []
    for key, parts in seen.items():
        parts.sort()
        assert [begin for begin, _, _ in parts] == [0, *(end for _, end, _ in parts[:-1])] and parts[-1][1] == expected[key][1]
        if len(parts) == 1:
            assert parts[0][2] == -1 and key not in merges
            continue
        first, count = merges[key]
        assert [partial for _, _, partial in parts] == list(range(first, first + count))
        assert all(end - begin >= SPLIT_TILES_MIN * shape.block_tokens for begin, end, _ in parts[:-1])
        used.extend(range(first, first + count))
    assert sorted(used) == list(range(work.num_partials))


@settings(max_examples=200, deadline=None)
@given(shapes, lengths_of)
def test_decode_covers_every_latent_once(shape: Shape, lengths: list[int]) -> None:
    starts = np.cumsum([0, *lengths])[:-1]
    work = decode_work(shape, starts, np.array(lengths))
    blocks = range(0, shape.blocks_per_token * shape.block_rows, shape.block_rows)
    check(work, shape, {(row, block): (starts[row], length) for row, length in enumerate(lengths) for block in blocks})
    group = shape.blocks_per_token
    loads = [sum(-(-(item[6] - item[5]) // shape.block_tokens) + 1 for item in work.items[a:b].tolist()) for a, b in zip(work.programs, work.programs[1:], strict=False)]  # fmt: skip
    total = sum(-(-length // shape.block_tokens) + 1 for length in lengths)
    assert max(loads) <= -(-total // shape.lanes) + 2 * SPLIT_TILES_MIN + len(lengths) // shape.lanes + 3, (
        "no program has much more than its share"
    )
    assert len(work.programs) == shape.lanes * group + 1


@settings(max_examples=200, deadline=None)
@given(shapes, st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 70)), min_size=1, max_size=6), st.booleans())
def test_prefill_covers_what_each_block_of_rows_may_see(shape: Shape, batch: list[tuple[int, int]], causal: bool) -> None:
    lengths = np.array([max(row) for row in batch])
    counts = np.array([row[1] for row in batch])
    starts, tokens = np.cumsum([0, *lengths])[:-1], np.cumsum([0, *counts])[:-1]
    work = prefill_work(shape, starts, lengths, counts, tokens, causal)
    expected = {}
    for length, count, start, token in zip(lengths.tolist(), counts.tolist(), starts.tolist(), tokens.tolist(), strict=True):
        for row in range(0, count * shape.num_heads, shape.block_rows):
            last = min(row + shape.block_rows, count * shape.num_heads) - 1
            expected[token, row] = (start, length - count + last // shape.num_heads + 1 if causal else length)
    check(work, shape, expected)


def test_one_long_sequence_fills_the_card() -> None:
    """Batch 1, 64k tokens: all programs work, none on less than two tiles."""
    work = decode_work(Shape(16, 16, 64, 264), np.zeros(1, np.int64), np.array([65536]))
    assert (np.diff(work.programs) > 0).sum() > 200


def test_full_batch_keeps_the_head_blocks_of_a_sequence_side_by_side() -> None:
    """Neighbouring programs read the same latents at the same time, so the second read hits the L2 cache."""
    work = decode_work(Shape(128, 64, 64, 132), np.arange(128) * 64, np.full(128, 4096))
    assert len(work.programs) == 133
    for even in range(0, 132, 2):
        left, right = (work.items[work.programs[at] : work.programs[at + 1]] for at in (even, even + 1))
        assert (left[:, [0, 1, 5, 6]] == right[:, [0, 1, 5, 6]]).all() and (right[:, 4] - left[:, 4] == 64).all()


def test_nothing_is_cut_when_whole_sequences_fill_the_lanes_as_well() -> None:
    """128 equal sequences on 66 lanes: two a lane, and no merge; one sequence more than that is cut again."""
    shape = Shape(128, 64, 128, 132, split_tiles_min=1, whole_tiles=3)
    whole = decode_work(shape, np.arange(128) * 64, np.full(128, 4096))
    assert whole.num_partials == 0 and not len(whole.merges) and np.diff(whole.programs).max() == 2
    assert decode_work(shape, np.arange(140) * 64, np.full(140, 4096)).num_partials > 0


def pieces_of(work: WorkList) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """(page_start, row) -> what was cut, in order."""
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for item in sorted(work.items.tolist(), key=lambda item: item[5]):
        found.setdefault((item[0], item[4]), []).append((item[3], item[5], item[6]))
    return found


@settings(max_examples=200, deadline=None)
@given(shapes, lengths_of, st.integers(1, 5))
def test_fixed_pieces_depend_on_the_sequence_alone_and_cover_it(shape: Shape, lengths: list[int], piece_tiles: int) -> None:
    """Cut at multiples of piece_tiles, partials in order, no program with more than its share and a piece."""
    shape = replace(shape, piece_tiles=piece_tiles)
    starts, step = np.cumsum([0, *(length + 1 for length in lengths)])[:-1], piece_tiles * shape.block_tokens
    work = decode_work(shape, starts, np.array(lengths))
    found = pieces_of(work)
    for start, length in zip(starts.tolist(), lengths, strict=True):
        alone = pieces_of(decode_work(shape, np.array([start]), np.array([length])))
        for row in range(0, shape.blocks_per_token * shape.block_rows, shape.block_rows):
            assert found[start, row] == alone[start, row]
            assert found[start, row] == [(length, at, min(at + step, length)) for at in range(0, max(length, 1), step)]
    listed = {(merge[0], merge[2]): (merge[3], merge[4]) for merge in work.merges.tolist()}
    for item in work.items.tolist():
        if item[3] > step:
            assert item[7] == listed[item[1], item[4]][0] + item[5] // step
        else:
            assert item[7] == -1
    loads = [sum(-(-(item[6] - item[5]) // shape.block_tokens) + 1 for item in work.items[a:b].tolist()) for a, b in zip(work.programs, work.programs[1:], strict=False)]  # fmt: skip
    assert max(loads) <= sum(loads) / len(loads) + piece_tiles + 1


@settings(max_examples=100, deadline=None)
@given(
    shapes, st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 70)), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 400)
)
def test_waves_hold_what_one_launch_would_and_stay_within_the_partial_slots(
    shape: Shape, batch: list[tuple[int, int]], piece_tiles: int, slots: int
) -> None:
    shape = replace(shape, piece_tiles=piece_tiles)
    lengths, counts = np.array([max(row) for row in batch]), np.array([row[1] for row in batch])
    arrays = (np.cumsum([0, *lengths])[:-1], lengths, counts, np.cumsum([0, *counts])[:-1])
    whole = prefill_work(shape, *arrays)
    slots += int(max((merge[4] for merge in whole.merges.tolist()), default=1))
    waves = prefill_waves(shape, *arrays, partials_max=slots, pieces_max=len(whole.items))
    assert all(wave.num_partials <= slots and len(wave.programs) == shape.num_programs + 1 for wave in waves)
    joined = sorted(tuple(item[:7]) for wave in waves for item in wave.items.tolist())
    assert joined == sorted(tuple(item[:7]) for item in whole.items.tolist())
    with pytest.raises(InvalidValue, match="query_lens"):
        prefill_waves(shape, *arrays, partials_max=slots, pieces_max=len(whole.items) - 1)


@settings(max_examples=100, deadline=None)
@given(shapes, lengths_of, st.integers(1, 300), st.sampled_from([0, 1, 3]))
def test_tiles_before_a_window_are_not_listed(shape: Shape, lengths: list[int], window: int, piece_tiles: int) -> None:
    """All that the window covers is listed once; before it, no more than a tile."""
    shape = replace(shape, piece_tiles=piece_tiles, window=window)
    starts = np.cumsum([0, *(length + 1 for length in lengths)])[:-1]
    found = pieces_of(decode_work(shape, starts, np.array(lengths)))
    for start, length in zip(starts.tolist(), lengths, strict=True):
        parts = found[start, 0]
        first = max(length - window, 0)
        assert parts[0][1] == first // shape.block_tokens * shape.block_tokens and parts[-1][2] == length
        assert all(left[2] == right[1] for left, right in pairwise(parts))
