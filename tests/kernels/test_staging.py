"""How plans reach the device, with a stream that runs nothing until it is asked to: under the interpreter, all of it but CUDA's own copy."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention import staging
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.plan import Limits, Plan, make_plan, make_row_plan
from kvmanager.attention.resident import ResidentTable
from kvmanager.attention.staging import DevicePlan, Staging
from kvmanager.attention.work import Shape
from kvmanager.kernels.step_plan import Sent
from kvmanager.pages.sequences import Tables
from kvmanager.tables import BatchRows, BatchTables

SHAPE = Shape(16, 64, 128, 6, split_tiles_min=1, whole_tiles=3)
NUM_PAGES = 4000


class Stream:
    """What was launched and has not run yet, in order."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], Any]] = deque()
        self.sent: list[int] = []

    def run(self) -> None:
        while self.waiting:
            self.waiting.popleft()()


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    found = Stream()

    class Ring:
        def __init__(self, buffer: torch.Tensor, capacity: int) -> None:
            self.buffer, self.hosts = buffer, [np.zeros(capacity, np.uint8) for _ in range(staging.RING_SLOTS)]
            self.index, self.sent_bytes, self.copying = 0, 0, [0] * staging.RING_SLOTS

        def begin(self) -> np.ndarray:
            self.index = (self.index + 1) % staging.RING_SLOTS
            while self.copying[self.index]:  # the event behind its copy
                found.waiting.popleft()()
            self.hosts[self.index][:] = 0xEE
            return self.hosts[self.index]

        def send(self, begin: int, end: int) -> None:
            index = self.index

            def copy() -> None:
                self.buffer[begin:end] = torch.from_numpy(self.hosts[index][begin:end])
                self.copying[index] -= 1

            self.copying[index] += 1
            self.sent_bytes = end - begin
            found.sent.append(self.sent_bytes)
            found.waiting.append(copy)

        def replay(self, begin: int, end: int, sent: Sent, finish: Callable[[Sent, bool], None]) -> None:
            self.send(begin, end)
            finish(sent, True)

    finish = staging.finish
    monkeypatch.setattr(staging, "Ring", Ring)
    monkeypatch.setattr(staging, "finish", lambda *arguments: found.waiting.append(lambda: finish(*arguments)))
    return found


class Step:
    """A backend's plans without a backend: tables of one pool of sequences, arrays or rows."""

    def __init__(self, limits: Limits, width: int, **options: Any) -> None:
        self.limits, self.layout, self.tables = limits, LatentLayout(512, 64, 1, 64), Tables()
        self.table = ResidentTable(2 * limits.max_batch, width, NUM_PAGES, on_host=False)
        shape = options.pop("shape", SHAPE)
        self.staging = Staging(limits, shape, shape, 64, torch.device("cpu"), table=self.table, **options)

    def open(self, slot: int, length: int, generation: int = 1, first: int | None = None, spare: int = 0) -> None:
        count = -(-length // 64) + spare
        pages = np.arange(count) + (slot * 100 + generation * 37 if first is None else first)
        self.tables.open(generation << 20 | slot, 0, length, (pages % NUM_PAGES).astype(np.int32))

    def rows(self, slots: list[int]) -> BatchRows:
        rows = np.array(slots, np.int64)
        return BatchRows(1, 64, self.tables.lengths.take(rows), rows, self.tables)

    def plan(self, given: BatchRows | BatchTables, query_lens: Any = 1, graph_batch: int | None = None) -> tuple[Plan, DevicePlan]:
        if isinstance(given, BatchRows):
            plan, update = make_row_plan(self.layout, self.limits, given, query_lens, graph_batch, 1, None, self.table)
            device = self.staging.send_rows(plan, update)
            self.table.commit(given, update)
            return plan, device
        if isinstance(query_lens, int):
            query_lens = [query_lens] * given.batch
        plan = make_plan(self.layout, NUM_PAGES, self.limits, given, query_lens, graph_batch, 1)
        return plan, self.staging.send(plan)


def what_a_launch_reads(plan: Plan, device: DevicePlan) -> dict[str, Any]:
    """Items in the order of programs with the page ids that they name, merges that count, and slots: all that kernels take from a plan."""
    found: dict[str, Any] = {"slots": device.slots.tolist()}
    for name, works in (("decode", [device.decode]), ("prefill", device.prefill)):
        found[name] = []
        for work in works:
            programs, items = work.programs.tolist(), work.items.tolist()
            read = []
            for start, first, queries, length, row, begin, end, partial in items[: programs[-1]]:
                pages = device.page_ids[start + begin // 64 : start + -(-end // 64)].tolist()
                read.append((first, queries, length, row, begin, end, partial, pages))
            found[name].append((programs, read, [merge for merge in work.merges.tolist() if merge[4]]))
    return found


def test_rows_and_arrays_give_kernels_the_same_to_read(stream: Stream) -> None:
    """Decode, padding, prefill in one step, one buffer for both: a graph that was captured with either serves the other."""
    step = Step(Limits(300, 8, 600), 80)
    for slot, length in enumerate([700, 4999, 64, 1, 129, 2500]):
        step.open(slot, length)
    for slots, query_lens, graph_batch in (
        ([0, 1, 2], 1, 8), ([5, 3, 1, 0], 1, None), ([4, 1, 5], [1, 3, 200], None), ([1, 5], [2, 290], None), ([], 1, 4), ([2, 3, 4, 5, 0, 1], 1, 6),
    ):  # fmt: skip
        batch = step.rows(slots)
        results = []
        for given in (batch, batch.gathered(), batch):
            plan, device = step.plan(given, query_lens, graph_batch)
            stream.run()
            results.append(what_a_launch_reads(plan, device))
            assert device.page_ids.data_ptr() == step.staging.buffer.data_ptr() + step.staging._pages_at
        assert results[0] == results[1] == results[2]
        if graph_batch is not None:
            assert device.decode.merges.shape == step.plan(batch.gathered(), query_lens, graph_batch)[1].decode.merges.shape


@pytest.mark.parametrize(
    "options", [{"shape": Shape(16, 64, 128, 6, piece_tiles=4)}, {"shape": Shape(16, 64, 128, 6, window=300)}, {"share": True}], ids=str
)
def test_pieces_windows_and_prefixes_are_as_in_a_plan_of_arrays(stream: Stream, options: dict[str, Any]) -> None:
    """Batch invariance, windows, shared prefixes, the latter two with lists of the host's: equal to the plan of arrays, and one copy."""
    step = Step(Limits(300, 8, 2000), 200, **options)
    for slot in range(6):
        step.open(slot, 9000 + 100 * slot, first=7)  # the same pages: groups, where they are looked for
    batch = step.rows([0, 1, 2, 3, 4, 5])
    want = step.plan(batch.gathered(), 1, 8)
    stream.run()
    wanted = in_any_order(what_a_launch_reads(*want))
    for _ in range(2):
        before = len(stream.sent)
        plan, device = step.plan(batch, 1, 8)
        stream.run()
        assert in_any_order(what_a_launch_reads(plan, device)) == wanted and len(stream.sent) == before + 1
        assert device.groups == want[1].groups and bool(device.groups) == ("share" in options)


def in_any_order(read: dict[str, Any]) -> dict[str, Any]:
    """Which program has which piece is left out."""
    return {**read, "decode": [(sorted(items), merges) for _, items, merges in read["decode"]]}


def test_groups_are_looked_for_again_when_rows_change_or_are_rewritten(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share nothing are looked at once; then only after something of them was replaced, or with other rows."""
    step = Step(Limits(64, 8, 2000), 200, share=True)
    for slot in range(4):
        step.open(slot, 9000, first=slot * 200)
    looked: list[int] = []
    find = staging.find_lasting_groups
    monkeypatch.setattr(staging, "find_lasting_groups", lambda *arguments: looked.append(1) or find(*arguments))  # type: ignore[func-returns-value]
    for _ in range(3):
        assert step.plan(step.rows([0, 1, 2, 3]))[1].groups == ()
        step.tables.lengths[:4] += 1
    assert len(looked) == 1
    for slot in range(1, 4):
        step.tables.swap(1 << 20 | slot, 0, step.tables.pages_of(1 << 20)[:130])
    for _ in range(3):  # what they share ends before the shortest of them does: it stays
        assert len(step.plan(step.rows([0, 1, 2, 3]))[1].groups) == 1 and len(looked) == 2
        step.tables.lengths[:4] += 1
    assert step.plan(step.rows([0]))[1].groups == () and len(step.plan(step.rows([1, 0, 2, 3]))[1].groups) == 1
    stream.run()


def test_a_step_reads_what_it_was_planned_with_while_later_ones_are_planned(stream: Stream) -> None:
    """Nothing of step v has run when v + 1 to v + 6 are planned, its rows cut, reused and rewritten: each reads its own tables, in order."""
    step = Step(Limits(64, 4, 300), 40)
    for slot in range(4):
        step.open(slot, 1000 + slot)
    wanted, got = [], []
    for version in range(7):
        batch = step.rows([0, 1, 2, 3])
        wanted.append([batch.gathered().pages_of(row)[: -(-int(length) // 64)].tolist() for row, length in enumerate(batch.lengths)])
        plan, device = step.plan(batch, 1, 4)

        def read(plan: Plan = plan, device: DevicePlan = device) -> None:
            rows: dict[int, list[int]] = {}
            for first, _, _, _, begin, _, _, pages in sorted(
                what_a_launch_reads(plan, device)["decode"][0][1], key=lambda item: (item[0], item[4])
            ):
                rows.setdefault(first, []).extend(pages)
                assert begin % 64 == 0
            got.append([rows[row] for row in range(4)])

        stream.waiting.append(read)
        if version == 2:
            assert not got, "nothing has run: the plans are ahead of the device"
        step.tables.close((version + 1) << 20 | 0)
        step.open(0, 500 + 200 * version, version + 2)
        step.tables.truncate(
            np.array([1 << 20 | 1]), np.array([64 * (9 - version) + 3]), np.array([10 - version]), np.array([3000 + version])
        )
        step.tables.grow(np.array([1 << 20 | 2]), np.array([64]), np.array([1]), np.array([2000 + version], np.int32))
    stream.run()
    assert got == wanted and len({str(rows) for rows in wanted}) == 7


@pytest.mark.parametrize("heads", [16, 128])
def test_bytes_of_a_decode_step(stream: Stream, monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """256 sequences of 131,072: lengths, page starts and last pages, one copy of 3 KB a step, however many heads and whoever begins a page; 2 MB
    once. A sequence that is opened: 16 KB of room for changes more."""
    monkeypatch.setattr(staging, "finish", lambda *arguments: None)  # 256 programs under the interpreter
    step = Step(Limits(256, 256, 256 * 2056), 2056, shape=Shape(heads, 64, 128, 132, split_tiles_min=1, whole_tiles=3), share=True)
    for slot in range(256):
        step.open(slot, 131072 - slot % 64, first=slot * 2100, spare=3)
    assert step.staging._places is not None
    for at in range(70):
        step.plan(step.rows(list(range(256))), 1, 256)
        assert len(stream.sent) == at + 1
        step.tables.lengths[:256] += 1
    assert 2**21 < stream.sent[0] < 2**21 + 16384
    assert stream.sent[1:] == [3072] * 69
    step.tables.close(1 << 20 | 9)
    step.open(9, 131072, 2)
    step.plan(step.rows(list(range(256))), 1, 256)
    assert stream.sent[-1] == 3072 + 4 * (staging.GRAPH_IDS + 3 * staging.GRAPH_RUNS)
    for slot in range(20, 30):
        step.tables.place(1 << 20 | slot, 0, 131072, np.arange(2048, dtype=np.int32) + slot)
    step.plan(step.rows(list(range(256))), 1, 256)
    assert 3072 + 10 * (8192 + 12) <= stream.sent[-1] <= 3072 + 10 * (8192 + 12) + staging.COPY_GRAIN
    step.plan(step.rows(list(range(256))).gathered(), 1, 256)
    assert stream.sent[-1] > 2**21, "of arrays, all page ids go over each time"
