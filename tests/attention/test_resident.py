"""Resident page tables: what is sent, put where it belongs, is what the replica's tables say, whatever happened to the sequences; and no more is sent."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import check_attention, make_problem
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.plan import Limits, Plan, make_plan, make_row_plan
from kvmanager.attention.resident import ResidentTable, Update
from kvmanager.errors import InvalidValue
from kvmanager.pages.sequences import Tables
from kvmanager.tables import BatchRows

LAYOUT = LatentLayout(32, 16, 1, 16)
NUM_PAGES, WIDTH = 1000, 12
LIMITS = Limits(max_tokens=200, max_batch=6, max_pages=60)


class Device:
    """What a device does with the updates: puts them in order, one after the other, and nothing else."""

    def __init__(self, num_rows: int = 6, on_host: bool = False) -> None:
        self.table = ResidentTable(num_rows, WIDTH, NUM_PAGES, on_host)
        self.entries = np.full(num_rows * WIDTH, -9, np.int32)

    def plan(self, batch: BatchRows, query_lens: list[int] | int = 1, graph_batch: int | None = None) -> tuple[Plan, Update]:
        plan, update = make_row_plan(LAYOUT, LIMITS, batch, query_lens, graph_batch, 1, None, self.table)
        for at, first, count in update.runs.tolist():
            self.entries[at : at + count] = update.ids[first : first + count]
        if update.last_pages is not None:
            for start, length, page in zip(update.starts.tolist(), batch.lengths.tolist(), update.last_pages.tolist(), strict=True):
                if length:
                    self.entries[start + (length - 1) // 16] = page
        self.table.commit(batch, update)
        if self.table.entries is not None:
            assert (self.entries[self.table.entries > 0] == self.table.entries[self.table.entries > 0]).all()
        return plan, update


class World:
    """Sequences as a manager would have them, and the tables that its events make."""

    def __init__(self, seed: int) -> None:
        self.rng, self.tables, self.generation = np.random.default_rng(seed), Tables(), 0
        self.open: list[int] = []

    def pages(self, count: int) -> np.ndarray:
        return self.rng.integers(0, NUM_PAGES, count).astype(np.int32)

    def act(self, kind: str) -> None:
        rng, tables = self.rng, self.tables
        if kind == "open" or not self.open:
            free = next(slot for slot in range(100) if slot >= len(tables.ids) or not tables.ids[slot])
            self.generation += 1
            sequence, length = self.generation << 20 | free, int(rng.integers(1, 16 * 8))
            tables.open(sequence, 0, length, self.pages(-(-length // 16) + int(rng.integers(0, 3))))
            self.open.append(sequence)
            return
        sequence = self.open[int(rng.integers(len(self.open)))]
        ids, row = np.array([sequence]), tables.row(sequence)
        length, count = tables.length(sequence), int(tables.page_counts[row])
        if kind == "close":
            tables.close(sequence)
            self.open.remove(sequence)
        elif kind == "grow" and length < 16 * (WIDTH - 2):
            more = int(rng.integers(1, 20))
            fresh = max(-(-(length + more) // 16) - count, 0)
            tables.grow(ids, np.array([more]), np.array([fresh]), self.pages(fresh))
        elif kind == "truncate":
            kept = int(rng.integers(0, length + 1))
            target = int(rng.integers(NUM_PAGES)) if kept % 16 and rng.integers(2) else -1
            tables.truncate(ids, np.array([kept]), np.array([-(-kept // 16)]), np.array([target]))
        elif kind == "swap":
            first = int(rng.integers(0, count)) if count else 0
            pages = tables.pages_of(sequence)[first : first + 2]
            tables.swap(sequence, first, np.where(rng.integers(0, 2, len(pages)) > 0, self.pages(len(pages)), pages).astype(np.int32))
        elif kind == "place":
            tables.place(sequence, 0, length, self.pages(-(-length // 16)))

    def batch(self, count: int) -> BatchRows:
        chosen = self.rng.permutation(len(self.open))[:count]
        rows = self.tables.rows(np.array([self.open[at] for at in chosen], np.int64))
        return BatchRows(1, 16, self.tables.lengths.take(rows), rows, self.tables)


@pytest.fixture(params=[4, 0], ids=["few", "at once"], autouse=True)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to list runs."""
    monkeypatch.setattr("kvmanager.attention.resident.FEW", request.param)


ACTIONS = ["open", "grow", "grow", "grow", "truncate", "swap", "place", "close"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**20), st.integers(6, 12), st.integers(3, 40), st.booleans())
def test_table_is_the_replicas_whatever_happened(seed: int, num_rows: int, steps: int, on_host: bool) -> None:
    """Opened, grown, cut, copied on write, swapped, moved, closed, rows reused and rows taken from others; and slots are make_plan's."""
    world = World(seed)
    device = Device(num_rows, on_host)
    for _ in range(steps):
        for _ in range(int(world.rng.integers(0, 6))):
            world.act(ACTIONS[int(world.rng.integers(len(ACTIONS)))])
        batch = world.batch(int(world.rng.integers(1, 7)))
        graph_batch = 6 if world.rng.integers(2) else None
        plan, _ = device.plan(batch, 1, graph_batch)
        want = make_plan(LAYOUT, NUM_PAGES, LIMITS, batch.gathered(), [1] * batch.batch, graph_batch, 1)
        for name in ("slots", "lengths", "query_lens", "query_starts"):
            assert getattr(plan, name).tolist() == getattr(want, name).tolist(), name
        for name in ("version", "num_tokens", "num_decode", "num_prefill", "graph_batch"):
            assert getattr(plan, name) == getattr(want, name)
        for row in range(plan.batch):
            pages = want.page_ids[want.pages_of(row)].tolist()
            assert device.entries[plan.pages_of(row)].tolist() == pages
            assert not on_host or plan.page_ids[plan.pages_of(row)].tolist() == pages
        starts = plan.page_starts[: batch.batch].tolist()
        assert len({*starts}) == len(starts) and all(start % WIDTH == 0 for start in starts)


def decoding(batch: int, length: int, spare: int) -> tuple[Tables, np.ndarray]:
    tables, rng = Tables(), np.random.default_rng(1)
    ids = np.arange(1, batch + 1) << 20 | np.arange(batch)
    for at, sequence in enumerate(ids.tolist()):
        own = length + at % 64  # so that each step some begin a page
        tables.open(sequence, 0, own, rng.integers(0, NUM_PAGES, -(-own // 64) + spare).astype(np.int32))
    return tables, tables.rows(ids)


def test_a_decode_step_sends_the_pages_that_it_begins_and_a_new_sequence_its_table_once() -> None:
    """256 sequences of 131,072: nothing but the last page of each, which says where their tokens go; 8 KB for one that is opened, once."""
    layout, limits = LatentLayout(512, 64, 1, 64), Limits(256, 256, 256 * 2200)
    tables, rows = decoding(256, 131072, 4)
    table, sent = ResidentTable(512, 2200, NUM_PAGES, on_host=False), []

    def step(rows: np.ndarray) -> int:
        batch = BatchRows(1, 64, tables.lengths.take(rows), rows, tables)
        plan, update = make_row_plan(layout, limits, batch, 1, 256, 1, None, table)
        table.commit(batch, update)
        assert plan.num_decode == 256 and update.last_pages is not None and len(update.last_pages) == len(rows)
        return update.ids.nbytes + update.runs.nbytes

    first = step(rows)
    assert first == sum(4 * -(-(131072 + at % 64) // 64) + 12 for at in range(256))
    for _ in range(128):
        tables.lengths[rows] += 1
        sent.append(step(rows))
    assert sent == [0] * 128
    tables.lengths[rows] += 1
    tables.close(int(tables.ids[rows[7]]))
    tables.open(300 << 20 | 7, 0, 131072, np.arange(2048, dtype=np.int32) % NUM_PAGES)
    assert step(rows.copy()) == 4 * 2048 + 12
    some = rows[:100].copy()
    for batch in (some, rows, some, rows):  # those that wait keep their rows
        assert step(batch) == 0


@pytest.mark.parametrize("on_host", [True, False])
def test_refused_plan_changes_nothing(on_host: bool) -> None:
    """A page id out of range, a length beyond the row's pages or the table's width, too many sequences; the plan after it is right."""
    world = World(5)
    for _ in range(6):
        world.act("open")
    device = Device(on_host=on_host)
    device.plan(world.batch(4))
    entries, rows = device.entries.copy(), np.array([5], np.int64)
    lengths = world.tables.lengths.take(rows)
    good = int(world.tables.pages[5, 0])
    for value in (NUM_PAGES, -1, 2147480000):
        world.tables.pages[5, 0] = value
        with pytest.raises(InvalidValue, match=f"page_ids.*row 0.*{value}"):
            device.plan(BatchRows(1, 16, lengths, rows, world.tables))
    world.tables.pages[5, 0] = good
    for field, wrong, query_lens in (
        ("lengths", int(world.tables.page_counts[5]) * 16 + 1, 1), ("lengths", WIDTH * 16 + 1, 1), ("lengths", -1, 1), ("lengths", 2, 3),
        ("query_lens", 9, 0), ("query_lens", 9, [1, 1]), ("query_lens", 9, True),
    ):  # fmt: skip
        with pytest.raises(InvalidValue) as caught:
            device.plan(BatchRows(1, 16, np.array([wrong]), rows, world.tables), query_lens)  # type: ignore[arg-type]
        assert caught.value.field == field
    with pytest.raises(InvalidValue, match="page_size"):
        device.plan(BatchRows(1, 32, lengths, rows, world.tables))
    with pytest.raises(InvalidValue, match="max_batch"):
        device.plan(BatchRows(1, 16, np.repeat(lengths, 7), np.repeat(rows, 7), world.tables))
    assert (device.entries == entries).all()
    plan, _ = device.plan(BatchRows(1, 16, lengths, rows, world.tables))
    assert (
        device.entries[plan.pages_of(0)].tolist() == world.tables.pages_of(int(world.tables.ids[5]))[: -(-int(lengths[0]) // 16)].tolist()
    )


def test_other_tables_begin_anew() -> None:
    """A snapshot gives the replica new tables: nothing of the old ones is taken for theirs, and they are watched no longer."""
    old, new = World(1), World(2)
    device = Device()
    for world in (old, new, old):
        for _ in range(3):
            world.act("open")
        batch = world.batch(3)
        plan, _ = device.plan(batch)
        for row in range(3):
            used = -(-int(batch.lengths[row]) // 16)
            assert device.entries[plan.pages_of(row)].tolist() == batch.gathered().pages_of(row)[:used].tolist()
    assert len(old.tables.watches) == 1 and not new.tables.watches


def problem_rows(lengths: list[int], query_lens: list[int]) -> tuple:
    problem = make_problem(LatentLayout(32, 16, 1, 16, "float32"), lengths, query_lens, 3, seed=4, written=True)
    tables = Tables()
    for row in range(len(lengths)):
        tables.open(1 << 20 | row, 0, lengths[row], problem.tables.pages_of(row))
    rows = np.arange(len(lengths))
    return problem, BatchRows(problem.tables.version, 16, tables.lengths.take(rows), rows, tables)


def test_backend_computes_the_same_from_rows_as_from_arrays() -> None:
    """Decode rows, padding, prefill rows in one plan; without sequence_pages too."""
    lengths, query_lens = [33, 0, 90, 7, 60, 20], [1, 1, 1, 2, 30, 20]
    problem, batch = problem_rows(lengths, query_lens)
    results = []
    for options in ({"sequence_pages": 6}, {"sequence_pages": 9, "resident_rows": 8}, {}):
        backend = MLABackend(problem.memory, 3, problem.scale, max_tokens=64, max_batch=8, max_pages=64, **options)
        plan = backend.plan(batch, query_lens)
        parts = [run(plan, 0, problem.q[0][part]) for run, part in ((backend.decode, slice(3)), (backend.prefill, slice(3, None)))]
        out, lse = torch.cat([parts[0][0], parts[1][0]]), torch.cat([parts[0][1], parts[1][1]])
        check_attention(problem, 0, out, lse)
        results.append((plan.slots.tolist(), out, lse))
        assert backend.plan_bytes == 0
    for slots, out, lse in results[1:]:
        assert slots == results[0][0] and torch.equal(out, results[0][1]) and torch.equal(lse, results[0][2])


def test_a_step_reads_the_table_it_was_planned_with_while_the_replica_goes_on() -> None:
    """Between plan and decode the sequence is cut, moved and its row used by another: what the plan reads stays, until the next plan."""
    problem, batch = problem_rows([33, 90, 60], [1, 1, 1])
    backend = MLABackend(problem.memory, 3, problem.scale, max_tokens=8, max_batch=8, max_pages=64, sequence_pages=6)
    plan = backend.plan(batch, 1, graph_batch=4)
    q = torch.cat([problem.q[0], problem.q[0][:1]])
    want = backend.decode(plan, 0, q)
    tables = batch.tables
    tables.truncate(np.array([1 << 20]), np.array([5]), np.array([1]), np.array([0]))
    tables.place(1 << 20 | 1, 0, 17, np.array([1, 2], np.int32))
    tables.close(1 << 20 | 2)
    tables.open(2 << 20 | 2, 0, 40, np.array([3, 4, 5], np.int32))
    got = backend.decode(plan, 0, q)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    after = backend.plan(BatchRows(2, 16, tables.lengths.take(batch.rows), batch.rows, tables), 1)
    plain = backend.plan(BatchRows(2, 16, tables.lengths.take(batch.rows), batch.rows, tables).gathered(), 1)
    for row in range(3):
        assert after.page_ids[after.pages_of(row)].tolist() == plain.page_ids[plain.pages_of(row)].tolist()


@pytest.mark.parametrize(
    "options,field",
    [
        ({"sequence_pages": 0}, "sequence_pages"), ({"sequence_pages": 2**24 + 1}, "sequence_pages"), ({"sequence_pages": True}, "sequence_pages"),
        ({"sequence_pages": 4, "resident_rows": 7}, "resident_rows"), ({"sequence_pages": 4, "resident_rows": 2**29}, "resident_rows"),
        ({"resident_rows": 8}, "resident_rows"), ({"sequence_pages": 1.5}, "sequence_pages"),
    ],
)  # fmt: skip
def test_wrong_sizes_are_named(options: dict, field: str) -> None:
    problem, _ = problem_rows([3], [1])
    with pytest.raises(InvalidValue) as caught:
        MLABackend(problem.memory, 3, problem.scale, max_tokens=8, max_batch=8, max_pages=64, **options)
    assert caught.value.field == field
