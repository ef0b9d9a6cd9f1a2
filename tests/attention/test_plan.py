"""The host plan against a slow, obvious model, and every way of asking for a wrong one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.plan import Limits, Plan, make_plan
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables

LAYOUT = LatentLayout(32, 16, 1, 16)
LIMITS = Limits(max_tokens=300, max_batch=12, max_pages=200)
NUM_PAGES = 1000


def tables_of(lengths: list[int], reserved: list[int] | None = None, page_size: int = 16) -> BatchTables:
    rng = np.random.default_rng(sum(lengths))
    pages = iter(rng.permutation(NUM_PAGES).tolist())
    rows = []
    for row, length in enumerate(lengths):
        spare = reserved[row] if reserved else 0
        rows.append([next(pages) for _ in range(-(-length // page_size))] + [2147480000] * spare)
    indptr = np.cumsum([0, *(len(row) for row in rows)]).astype(np.int64)
    flat = np.array([page for row in rows for page in row], np.int32)
    return BatchTables(9, page_size, np.array(lengths, np.int32), flat, indptr)


def plan_of(tables: BatchTables, query_lens: Any, graph_batch: Any = None, limits: Limits = LIMITS) -> Plan:
    return make_plan(LAYOUT, NUM_PAGES, limits, tables, query_lens, graph_batch, 1)


rows = st.one_of(
    st.tuples(st.integers(0, 60), st.just(1)),
    st.tuples(st.integers(1, 60), st.integers(2, 20)).map(lambda row: (max(row), row[1])),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows, max_size=12), st.integers(0, 2))
def test_slots_and_tables_equal_the_slow_model(batch: list[tuple[int, int]], reserved: int) -> None:
    """Token t of n new ones of a sequence of length L is position L - n + t; entries past the length stay out of the plan."""
    batch = sorted(batch, key=lambda row: row[1] > 1)
    lengths, query_lens = [row[0] for row in batch], [row[1] for row in batch]
    tables = tables_of(lengths, [reserved] * len(batch))
    plan = plan_of(tables, query_lens)
    slots = []
    for row, (length, count) in enumerate(batch):
        table = tables.pages_of(row).tolist()
        for position in range(length - count, length):
            slots.append(-1 if position < 0 else table[position // 16] * 16 + position % 16)
        used = table[: -(-length // 16)]
        assert plan.page_ids[plan.page_starts[row] : plan.page_starts[row + 1]].tolist() == used
    assert plan.slots.tolist() == slots
    assert plan.version == 9
    assert plan.num_decode == sum(count == 1 for count in query_lens)
    assert plan.num_decode + plan.num_prefill == plan.num_tokens == len(slots)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int16, np.uint32])
@pytest.mark.parametrize("long_row", [0, 2**30])
def test_long_rows_and_other_integers_give_the_same_plan(dtype: Any, long_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reserved entries are left out row by row or by one gather; a page id out of range is named, whatever its width, and one behind is not."""
    monkeypatch.setattr("kvmanager.attention.plan.LONG_ROW", long_row)
    ids = np.array([7, 3, 999, 5, 6, 8, 9, 999], dtype)
    tables = BatchTables(1, 16, np.array([20, 0, 49, 5], np.int32), ids, np.array([0, 2, 3, 7, 8]))
    plan = plan_of(tables, [1] * 4)
    assert plan.page_ids.tolist() == [7, 3, 5, 6, 8, 9, 999] and plan.page_ids.dtype == np.int32
    assert plan.page_starts.tolist() == [0, 2, 2, 6, 7] and plan.slots.tolist() == [3 * 16 + 3, -1, 9 * 16, 999 * 16 + 4]
    beyond = np.array([*ids[:2], 1000, *ids[3:]], dtype)
    assert plan_of(BatchTables(1, 16, tables.lengths, beyond, tables.page_indptr), [1] * 4).page_ids.tolist() == plan.page_ids.tolist()
    for value in (1000, -1) if dtype != np.uint32 else (1000, 2**32 - 1):
        bad = ids.copy()
        bad[4] = value
        with pytest.raises(InvalidValue, match=f"page_ids.*row 2.*{value} in row 3"):
            plan_of(BatchTables(1, 16, tables.lengths, bad, tables.page_indptr), [1] * 4)


def test_graph_batch_pads_with_rows_that_write_and_see_nothing() -> None:
    plan = plan_of(tables_of([5, 33]), [1, 1], graph_batch=5)
    assert (plan.num_decode, plan.num_tokens, plan.batch, plan.num_prefill) == (5, 5, 5, 0)
    assert plan.slots.tolist()[2:] == [-1, -1, -1] and plan.lengths.tolist() == [5, 33, 0, 0, 0]
    assert plan_of(tables_of([]), [], graph_batch=3).slots.tolist() == [-1, -1, -1]


def test_empty_step_is_a_plan() -> None:
    plan = plan_of(tables_of([]), [])
    assert (plan.num_tokens, plan.batch) == (0, 0) and len(plan.slots) == 0


@pytest.mark.parametrize(
    "lengths,query_lens,graph_batch,field",
    [
        ([5], [0], None, "query_lens"),
        ([5], [-1], None, "query_lens"),
        ([5], [6], None, "lengths"),
        ([0], [2], None, "lengths"),
        ([5, 5], [2, 1], None, "query_lens"),
        ([5, 5], [1], None, "query_lens"),
        ([5], [1.0], None, "query_lens"),
        ([5], [[1]], None, "query_lens"),
        ([5] * 13, [1] * 13, None, "max_batch"),
        ([301], [301], None, "max_tokens"),
        ([16 * 201], [1], None, "max_pages"),
        ([5, 5], [1, 1], 1, "query_lens"),
        ([5, 5], [1, 2], 4, "query_lens"),
        ([5], [1], 13, "graph_batch"),
        ([5], [1], 0, "graph_batch"),
        ([5], [1], True, "graph_batch"),
    ],
)
def test_wrong_step_is_named_with_its_limit(lengths: list[int], query_lens: Any, graph_batch: Any, field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        plan_of(tables_of(lengths), query_lens, graph_batch)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "change,field",
    [
        ({"page_size": 20}, "page_size"),
        ({"page_ids": np.array([1, NUM_PAGES], np.int32)}, "page_ids"),
        ({"page_ids": np.array([-1, 3], np.int32)}, "page_ids"),
        ({"page_ids": np.array([1.0, 3.0])}, "page_ids"),
        ({"lengths": np.array([33], np.int32)}, "lengths"),
        ({"lengths": np.array([-5], np.int32)}, "lengths"),
        ({"lengths": np.array([2**31 - 1], np.int64)}, "lengths"),
        ({"page_indptr": np.array([0, 1], np.int64)}, "page_indptr"),
        ({"page_indptr": np.array([0, 3], np.int64)}, "page_indptr"),
        ({"page_indptr": np.array([2, 2], np.int64)}, "page_indptr"),
        ({"page_indptr": np.array([0, 1, 2], np.int64)}, "page_indptr"),
    ],
)
def test_wrong_table_is_named(change: dict[str, Any], field: str) -> None:
    """An id outside the memory would be an address outside it."""
    good: dict[str, Any] = {
        "version": 1, "page_size": 16, "lengths": np.array([20], np.int32),
        "page_ids": np.array([7, 3], np.int32), "page_indptr": np.array([0, 2], np.int64),
    }  # fmt: skip
    plan_of(BatchTables(**good), [1])
    with pytest.raises(InvalidValue) as caught:
        plan_of(BatchTables(**{**good, **change}), [1])
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["max_tokens", "max_batch", "max_pages"])
@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, None])
def test_limits_are_bounded(field: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=f"^{field}: expected an integer from 1 to"):
        Limits(**{"max_tokens": 1, "max_batch": 1, "max_pages": 1, field: value})


def test_rows_that_another_rank_stores_get_no_slots() -> None:
    """Their tokens are attended from and not written; padding of a graph's batch neither."""
    layout = LatentLayout(32, 16, 1, 16)
    tables = BatchTables(1, 16, np.array([5, 20, 1], np.int32), np.array([3, 1, 2, 0], np.int32), np.array([0, 1, 3, 4], np.int64))
    limits = Limits(max_tokens=8, max_batch=8, max_pages=8)
    plan = make_plan(layout, 4, limits, tables, [1, 1, 1], 4, 1, [True, False, True])
    assert plan.slots.tolist() == [3 * 16 + 4, -1, 0, -1] and plan.lengths.tolist() == [5, 20, 1, 0]
    several = BatchTables(1, 16, np.array([5, 20, 9], np.int32), tables.page_ids, tables.page_indptr)
    assert make_plan(layout, 4, limits, several, [1, 2, 2], None, 1, [False, True, False]).slots.tolist() == [-1, 34, 35, -1, -1]
    for bad in ([True, False], [1, 0, 1], True):
        with pytest.raises(InvalidValue, match="stores"):
            make_plan(layout, 4, limits, tables, [1, 1, 1], None, 1, bad)  # type: ignore[arg-type]
