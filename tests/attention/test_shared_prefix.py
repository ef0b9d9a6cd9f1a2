"""Who shares a prefix, against slow models; and the work lists of those who do: every row meets every latent once, within its bounds."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import check_attention, make_problem, share_pages
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.options import Options
from kvmanager.attention.shared_prefix import PrefixGroup, find_groups, find_lasting_groups, gain, order_by_prefix, shares_prefixes
from kvmanager.attention.shared_work import WORTH, apart_level, shared_decode_work, shared_items_max, shared_partials_max
from kvmanager.attention.work import Shape, WorkList, decode_work
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables

shapes = st.builds(
    Shape,
    st.sampled_from([1, 3, 16, 63, 65, 96, 128, 200]),
    st.sampled_from([16, 64]),
    st.sampled_from([16, 64, 128]),
    st.integers(1, 40),
    st.sampled_from([1, 2]),
)
PAGE = 16


@st.composite
def trees(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tables of sequences that branch off one another, as page ids, starts and lengths; some rows are padding."""
    rows: list[list[int]] = []
    lengths, fresh = [], 0
    for _ in range(draw(st.integers(1, 16))):
        kept = []
        if rows and draw(st.booleans()):
            source = rows[-1] if draw(st.integers(0, 3)) else draw(st.sampled_from(rows))
            kept = source[: draw(st.integers(0, len(source)))]
        more = draw(st.integers(0, 20))
        row = kept + list(range(fresh, fresh + more))
        fresh += more
        rows.append(row)
        lengths.append(max(len(row) * PAGE - draw(st.integers(0, PAGE - 1)), 0))
    starts = np.cumsum([0, *(len(row) for row in rows)])[:-1]
    return np.array([page for row in rows for page in row], np.int32), starts, np.array(lengths, np.int64)


def common_tokens(page_ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rows: range) -> int:
    """Token by token: how many latents all rows begin with, less than the length of any."""
    for position in range(int(lengths[rows].min())):
        pages = {int(page_ids[starts[row] + position // PAGE]) for row in rows}
        if len(pages) > 1:
            return position
    return int(lengths[rows].min()) - 1


def best_gain(shape: Shape, tree: tuple[np.ndarray, np.ndarray, np.ndarray], rows: range) -> float:
    """Of a stretch as one group, or parted wherever neighbours are least alike; nothing, if that is best."""
    if len(rows) < 2:
        return 0.0
    alike = [common_tokens(*tree, range(row, row + 2)) // shape.block_tokens for row in rows[:-1]]
    least = max(min(alike), 0)
    ends = [row + 1 for row, tiles in zip(rows, alike, strict=False) if max(tiles, 0) == least]
    parts = [range(start, end) for start, end in pairwise([rows.start, *ends, rows.stop])]
    return max(sum(best_gain(shape, tree, part) for part in parts), gain(shape, len(rows), least) if least else 0.0)


@settings(max_examples=150, deadline=None)
@given(shapes, trees())
def test_groups_share_what_they_say_and_save_the_most_that_can_be_saved(
    shape: Shape, tree: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    page_ids, starts, lengths = tree
    groups = find_groups(shape, PAGE, page_ids, starts, lengths)
    assert all(left.first_row + left.rows <= right.first_row for left, right in pairwise(groups))
    for first, rows, tokens in groups:
        assert rows >= 2 and tokens > 0 and tokens % shape.block_tokens == 0
        assert tokens <= common_tokens(*tree, range(first, first + rows))
    saved = [gain(shape, rows, tokens // shape.block_tokens) for _, rows, tokens in groups]
    assert all(one > 0 for one in saved)
    assert sum(saved) == pytest.approx(best_gain(shape, tree, range(len(lengths))))


def test_entries_behind_a_length_and_equal_tables_are_no_common_latents() -> None:
    """Two rows with one table: the last token of each is its own. Pages that follow the length are not compared at all."""
    shape = Shape(16, 64, 16, 8)
    ids = np.array([*range(40), *range(40)], np.int32)
    assert find_groups(shape, PAGE, ids, np.array([0, 40]), np.array([640, 640])) == (PrefixGroup(0, 2, 624),)
    assert find_groups(shape, PAGE, ids, np.array([0, 40]), np.array([640, 500])) == (PrefixGroup(0, 2, 496),)
    assert find_groups(shape, PAGE, ids, np.array([0, 40]), np.array([640, 0])) == ()
    assert find_groups(shape, PAGE, ids, np.array([0, 40]), np.array([640, 16])) == ()
    assert find_groups(shape, PAGE, ids[:0], np.zeros(3, np.int64), np.zeros(3, np.int64)) == ()


@settings(max_examples=100, deadline=None)
@given(trees(), st.randoms())
def test_order_by_prefix_puts_rows_that_share_side_by_side(tree: tuple[np.ndarray, np.ndarray, np.ndarray], random: Any) -> None:
    """A permutation, in which the rows with any one leading run of pages are neighbours."""
    page_ids, starts, lengths = tree
    rows = [page_ids[start : start + -(-length // PAGE)].tolist() for start, length in zip(starts, lengths, strict=True)]
    shuffled = list(range(len(rows)))
    random.shuffle(shuffled)
    flat = np.array([page for row in shuffled for page in rows[row]], np.int32)
    tables = BatchTables(1, PAGE, lengths[shuffled].astype(np.int32), flat, np.cumsum([0, *(len(rows[row]) for row in shuffled)]))
    order = order_by_prefix(tables)
    assert sorted(order.tolist()) == list(range(len(rows)))
    ordered = [tuple(rows[shuffled[row]]) for row in order]
    for row in ordered:
        for count in range(1, len(row) + 1):
            at = [index for index, other in enumerate(ordered) if other[:count] == row[:count]]
            assert at == list(range(at[0], at[0] + len(at)))


def covered(work: WorkList, shape: Shape, batch: int) -> dict[tuple[int, int], list[tuple[int, int, int, int]]]:
    """(row, head) -> (page_start, begin, end, slot row) of every item that has it, in the order of begin; each in one place at most."""
    found: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {
        (row, head): [] for row in range(batch) for head in range(shape.num_heads)
    }
    for page_start, first_token, query_len, length, row, begin, end, partial in work.items.tolist():
        assert begin % shape.block_tokens == 0 and row % shape.block_rows == 0
        for block_row in range(shape.block_rows):
            if row + block_row < query_len * shape.num_heads:
                token, head = divmod(row + block_row, shape.num_heads)
                assert end <= max(length - query_len + token + 1, 0) or query_len == 1 == length + 1, "the causal mask hides some of it"
                slot = partial * shape.block_rows + block_row if partial >= 0 else -1
                found[first_token + token, head].append((page_start, begin, end, slot))
    for parts in found.values():
        parts.sort(key=lambda part: part[1])
    return found


@settings(max_examples=150, deadline=None)
@given(shapes, trees(), st.integers(0, 30), st.data())
def test_each_latent_of_each_row_is_met_once_and_merged_in_order(
    shape: Shape, tree: tuple[np.ndarray, np.ndarray, np.ndarray], spare: int, data: st.DataObject
) -> None:
    """Groups that pay and groups that do not; scratch that holds all of them and scratch that does not."""
    page_ids, starts, lengths = tree
    if data.draw(st.booleans()):
        groups = list(find_groups(shape, PAGE, page_ids, starts, lengths))
    else:
        groups, row = [], 0
        while row < len(lengths):
            rows = data.draw(st.integers(1, len(lengths) - row))
            tiles = common_tokens(*tree, range(row, row + rows)) // shape.block_tokens
            if rows > 1 and tiles > 0:
                groups.append(PrefixGroup(row, rows, data.draw(st.integers(1, tiles)) * shape.block_tokens))
            row += rows
    max_batch = len(lengths) + spare
    work, kept = shared_decode_work(shape, starts, lengths, groups, max_batch)
    assert set(kept) <= set(groups)
    assert work.num_partials <= shared_partials_max(shape, max_batch) and len(work.items) <= shared_items_max(shape, max_batch)
    assert len(work.merges) <= shape.blocks_per_token * max_batch
    assert work.programs[0] == 0 and work.programs[-1] == len(work.items) and (np.diff(work.programs) >= 0).all()
    assert len(work.programs) == shape.lanes * shape.blocks_per_token + 1
    merges = {(merge[0], merge[2]): merge[3:] for merge in work.merges.tolist()}
    assert len(merges) == len(work.merges)
    of_group = {row: group for group in kept for row in range(group.first_row, group.first_row + group.rows)}
    taken: set[int] = set()
    for (row, head), parts in covered(work, shape, len(lengths)).items():
        assert [part[1] for part in parts] == [0, *(part[2] for part in parts[:-1])] and parts[-1][2] == lengths[row]
        own = [part for part in parts if part[1] >= (of_group[row].tokens if row in of_group else 0)]
        assert all(part[0] == starts[row] for part in own) and len(own) >= 1
        assert all(part[0] == starts[of_group[row].first_row] for part in parts[: -len(own)])
        if len(parts) == 1:
            assert parts[0][3] == -1 and (row, head // shape.block_rows * shape.block_rows) not in merges
            continue
        first, count, prefix_first, prefix_count, before = merges[row, head // shape.block_rows * shape.block_rows]
        group_row = before + head
        slots = [
            (prefix_first + group_row // shape.block_rows * prefix_count + nth) * shape.block_rows + group_row % shape.block_rows
            for nth in range(prefix_count)
        ] + [(first + nth) * shape.block_rows + head % shape.block_rows for nth in range(count)]
        assert [part[3] for part in parts] == slots
        assert not taken & set(slots)
        taken |= set(slots)
        assert all(slot < work.num_partials * shape.block_rows for slot in slots)


def loads_of(work: WorkList, shape: Shape) -> list[int]:
    return [sum(-(-(item[6] - item[5]) // shape.block_tokens) + 1 for item in work.items[a:b].tolist()) for a, b in pairwise(work.programs)]


def test_groups_that_last_stay_as_rows_grow_and_others_may_not() -> None:
    """Two rows of 3 tiles that differ after 2, two equal ones, one of less than a tile: only the first kind may be kept."""
    shape = Shape(16, 64, PAGE, 132, split_tiles_min=1, whole_tiles=3)
    first, second = np.arange(60, dtype=np.int32), np.arange(60, dtype=np.int32)
    second[40:] += 1000
    starts = np.array([0, 60])
    assert find_lasting_groups(shape, PAGE, np.concatenate([first, second]), starts, np.array([50 * PAGE, 51 * PAGE]))[1]
    assert not find_lasting_groups(shape, PAGE, np.concatenate([first, first]), starts, np.array([50 * PAGE, 51 * PAGE]))[1]
    assert not find_lasting_groups(shape, PAGE, np.concatenate([first, second]), starts, np.array([30 * PAGE, 51 * PAGE]))[1]
    assert not find_lasting_groups(shape, PAGE, np.concatenate([first, second + 5000]), starts, np.array([PAGE, 51 * PAGE]))[1]
    assert find_lasting_groups(shape, PAGE, np.concatenate([first, second + 5000]), starts, np.array([PAGE + 1, 51 * PAGE]))[1]


@pytest.mark.parametrize("heads,groups", [(16, [64]), (16, [32, 32]), (128, [64]), (40, [64]), (16, [7, 50]), (8, [200])], ids=str)
def test_programs_have_their_share_and_blocks_of_a_prefix_run_side_by_side(heads: int, groups: list[int]) -> None:
    """16,384 of 18,432 latents: no program has a sixth more than its share, and each piece of a prefix is begun on neighbouring programs."""
    shape = Shape(heads, 64, 128, 132, split_tiles_min=1, whole_tiles=3)
    batch = sum(groups)
    starts, lengths = np.arange(batch) * 288, np.full(batch, 18432)
    firsts = np.cumsum([0, *groups])[:-1].tolist()
    work, kept = shared_decode_work(
        shape, starts, lengths, [PrefixGroup(first, rows, 16384) for first, rows in zip(firsts, groups, strict=True)], 256
    )
    assert len(kept) == len(groups)
    loads = loads_of(work, shape)
    assert max(loads) <= 7 / 6 * sum(loads) / len(loads)
    program = np.repeat(np.arange(132), np.diff(work.programs))
    for first, rows in zip(firsts, groups, strict=True):
        is_prefix = (work.items[:, 1] == first) & (work.items[:, 2] == rows)
        for begin in set(work.items[is_prefix, 5].tolist()):
            at = np.flatnonzero(is_prefix & (work.items[:, 5] == begin))
            at = at[np.argsort(work.items[at, 4])]
            assert len(at) == -(-rows * heads // 64) and (np.diff(program[at]) % 132 == 1).all()


def test_reading_once_pays_for_few_heads_and_long_prefixes_only() -> None:
    few = Shape(16, 64, 128, 132)
    assert gain(few, 64, 128) > 0 and gain(few, 2, 128) > 0 and gain(few, 64, 1) < 0 and gain(few, 2, 1) < 0
    assert gain(Shape(128, 64, 128, 132), 2, 2) < 0


@pytest.mark.parametrize(
    "batch,heads,length,tokens,pays", [(64, 16, 18432, 16384, True), (8, 16, 18432, 16384, True), (2, 16, 18432, 16384, False), (64, 16, 3072, 1024, False)]
)  # fmt: skip
def test_groups_are_dropped_where_the_schedule_is_hardly_shorter(batch: int, heads: int, length: int, tokens: int, pays: bool) -> None:
    """Two rows on 132 programs want so many pieces that merging them takes what was saved; as measured: 2.4 x, 1.3 x, and 0.99 x for the last."""
    shape = Shape(heads, 64, 128, 132, split_tiles_min=1, whole_tiles=3)
    starts, lengths, group = np.arange(batch) * (length // 64), np.full(batch, length), PrefixGroup(0, batch, tokens)
    assert gain(shape, batch, tokens // 128) > 0
    most = WORTH * apart_level(shape, lengths)
    assert most == pytest.approx(0.95 * batch * (length // 128 + 1) / 132)
    work, kept = shared_decode_work(shape, starts, lengths, [group], batch, most)
    assert kept == ((group,) if pays else ())
    assert (work.items[:, 2] > 1).any() == pays
    assert shared_decode_work(shape, starts, lengths, [group], batch)[1] == (group,)


def test_rows_that_share_nothing_have_the_work_list_they_always_had() -> None:
    shape = Shape(16, 64, 128, 132, split_tiles_min=1, whole_tiles=3)
    starts, lengths = np.arange(128) * 64, np.full(128, 4096)
    assert find_groups(shape, 64, np.arange(128 * 64, dtype=np.int32), starts, lengths) == ()
    work, kept = shared_decode_work(shape, starts, lengths, (), 128)
    want = decode_work(shape, starts, lengths)
    assert kept == () and all((getattr(work, name) == getattr(want, name)).all() for name in ("programs", "items", "merges"))


def test_options_that_rule_sharing_out_are_named() -> None:
    assert shares_prefixes(None, Options()) and shares_prefixes(True, Options(logit_soft_cap=3.0)) and not shares_prefixes(False, Options())
    for options in (Options(batch_invariant=True), Options(sliding_window=5)):
        assert not shares_prefixes(None, options) and not shares_prefixes(False, options)
        with pytest.raises(InvalidValue, match="share_prefixes"):
            shares_prefixes(True, options)
    with pytest.raises(InvalidValue, match="share_prefixes"):
        shares_prefixes(1, Options())  # type: ignore[arg-type]


def test_the_backend_on_the_cpu_takes_the_option_and_gives_the_same_bits() -> None:
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float32"), [200, 210, 190], [1] * 3, 3, seed=4, written=True)
    problem = share_pages(problem, [(0, 3, 10)])
    results = []
    for share in (None, True, False):
        backend = MLABackend(problem.memory, 3, problem.scale, max_tokens=8, max_batch=8, max_pages=64, share_prefixes=share)
        results.append(backend.decode(backend.plan(problem.tables, [1] * 3), 0, problem.q[0]))
        check_attention(problem, 0, *results[-1])
        assert (results[-1][0] == results[0][0]).all() and (results[-1][1] == results[0][1]).all()
