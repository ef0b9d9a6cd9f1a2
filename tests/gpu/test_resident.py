"""Page tables that stay on the device: steps planned from a replica's rows against steps planned from arrays, bit for bit, eager and in one graph."""

from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.attention import shared_prefix, staging
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.attention.work import Shape, decode_work
from kvmanager.kernels.step_plan import ListPlaces, Sent, finish
from kvmanager.pages.sequences import Tables
from kvmanager.tables import BatchRows, BatchTables

NUM_PAGES = 1500


class World:
    """Tables of sequences that are opened, grown, cut, moved and closed."""

    def __init__(self, seed: int, page_size: int, longest: int) -> None:
        self.rng, self.tables, self.page_size, self.longest = np.random.default_rng(seed), Tables(), page_size, longest
        self.open_ids: list[int] = []
        self.generation = 0

    def pages(self, count: int) -> np.ndarray:
        return self.rng.permutation(NUM_PAGES)[:count].astype(np.int32)

    def open(self) -> None:
        slot = next(slot for slot in range(100) if slot >= len(self.tables.ids) or not self.tables.ids[slot])
        self.generation += 1
        length = int(self.rng.integers(1, self.longest))
        self.tables.open(self.generation << 20 | slot, 0, length, self.pages(-(-length // self.page_size) + 1))
        self.open_ids.append(self.generation << 20 | slot)

    def change(self) -> None:
        rng, tables = self.rng, self.tables
        kind = rng.integers(8) if len(self.open_ids) > 12 else 0
        if kind == 0 and len(self.open_ids) < 20:
            self.open()
            return
        sequence = self.open_ids[int(rng.integers(len(self.open_ids)))]
        length, count = tables.length(sequence), int(tables.page_counts[tables.row(sequence)])
        if kind == 1:
            tables.close(sequence)
            self.open_ids.remove(sequence)
        elif kind == 2 and length > 2:
            kept = length // 2
            tables.truncate(
                np.array([sequence]), np.array([kept]), np.array([-(-kept // self.page_size)]), np.array([int(self.pages(1)[0])])
            )
        elif kind == 3:
            tables.place(sequence, 0, length, self.pages(-(-length // self.page_size)))
        elif length < self.longest:
            more = int(rng.integers(1, 40))
            fresh = max(-(-(length + more) // self.page_size) - count, 0)
            tables.grow(np.array([sequence]), np.array([more]), np.array([fresh]), self.pages(fresh))

    def batch(self, count: int) -> BatchRows:
        chosen = self.rng.permutation(len(self.open_ids))[:count]
        rows = self.tables.rows(np.array([self.open_ids[at] for at in chosen], np.int64))
        return BatchRows(1, self.page_size, self.tables.lengths.take(rows), rows, self.tables)


def eight_open(seed: int) -> tuple[World, PageMemory]:
    """Eight sequences of up to 3,000 tokens at page 64, and pages that hold something."""
    world, memory = World(seed, 64, 3000), PageMemory(LatentLayout(512, 64, 1, 64), NUM_PAGES, "cuda")
    memory.pages.normal_(std=0.1)
    for _ in range(8):
        world.open()
    return world, memory


def empty(page_size: int) -> BatchTables:
    return BatchTables(0, page_size, np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(1, np.int64))


CASES = [
    (LatentLayout(512, 64, 2, 64), 128, {}), (LatentLayout(512, 64, 2, 64), 16, {}), (LatentLayout(256, 32, 2, 16, "float16"), 40, {}),
    (LatentLayout(512, 64, 2, 64, "fp8_ds_mla"), 16, {}), (LatentLayout(80, 48, 2, 48), 9, {}), (LatentLayout(512, 64, 2, 64), 16, {"sliding_window": 300}),
    (LatentLayout(512, 64, 2, 64), 16, {"batch_invariant": True, "invariant_tokens": 512}), (LatentLayout(512, 64, 2, 64), 16, {"share_prefixes": False}),
]  # fmt: skip


@pytest.mark.parametrize("layout,heads,options", CASES, ids=lambda value: str(value)[:60])
def test_rows_give_the_bits_of_arrays_in_one_graph_and_eager(layout: LatentLayout, heads: int, options: dict[str, Any]) -> None:
    """A graph captured with an empty plan of arrays; 40 steps of changing sequences, replayed with rows, with arrays, and run eagerly."""
    world, graph_batch = World(heads, layout.page_size, 3000), 12
    generator = torch.Generator(device="cuda").manual_seed(heads)
    memory = PageMemory(layout, NUM_PAGES, "cuda")
    width = -(-3100 // layout.page_size) + 2
    backend = MLABackend(memory, heads, 0.05, 700, 12, 12 * width, sequence_pages=width, resident_rows=14, **options)
    value = getattr(torch, layout.value_dtype)
    latent = torch.zeros((2, graph_batch, layout.entry), dtype=value, device="cuda")
    q = torch.zeros((2, graph_batch, heads, layout.entry), dtype=value, device="cuda")

    def step(plan: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results = []
        for layer in range(2):
            backend.write(plan, layer, latent[layer])
            results.append(backend.decode(plan, layer, q[layer]))
        return results

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        memory.pages.copy_(
            torch.randn(memory.pages.shape, device="cuda").mul_(0.1).to(memory.pages.dtype) if not layout.is_fp8 else memory.pages
        )
        step(backend.plan(empty(layout.page_size), 1, graph_batch=graph_batch))
        plan = backend.plan(empty(layout.page_size), 1, graph_batch=graph_batch)
        with torch.cuda.graph(graph, stream=stream):
            captured = step(plan)
        for _ in range(14):
            world.open()
        for number in range(40):
            for _ in range(int(world.rng.integers(0, 6))):
                world.change()
            batch = world.batch(int(world.rng.integers(1, graph_batch + 1)))
            latent.normal_(std=0.3, generator=generator)
            q.normal_(generator=generator)
            results = []
            for given in (batch, batch.gathered(), batch):
                plan = backend.plan(given, 1, graph_batch=graph_batch)
                assert plan.device is not None and plan.device.slots.tolist() == plan.slots.tolist()
                graph.replay()
                results.append([part.clone() for pair in captured for part in pair])
            results.append([part for pair in step(plan) for part in pair])
            for other in results[1:]:
                assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True)), number
            assert torch.isfinite(results[0][0]).all() and not results[0][0][batch.batch :].any()
        assert backend._cuda is not None
        entries = backend._cuda._staging.entries.cpu().numpy()
        for row in range(batch.batch):
            pages = plan.pages_of(row)
            assert entries[pages].tolist() == batch.gathered().pages_of(row)[: pages.stop - pages.start].tolist()
    torch.cuda.current_stream().wait_stream(stream)


def test_prefill_rows_beside_decode_rows_give_the_bits_of_arrays() -> None:
    world, memory = eight_open(3)
    for sequence in world.open_ids:
        world.tables.grow(np.array([sequence]), np.array([600]), np.array([11]), world.pages(11))
    backend = MLABackend(memory, 16, 0.05, 4096, 8, 8 * 70, sequence_pages=70)
    for query_lens in ([1, 1, 1, 500, 3, 64, 2], [400], [1, 1, 600]):
        batch = world.batch(len(query_lens))
        q = torch.randn((sum(query_lens), 16, 576), dtype=torch.bfloat16, device="cuda")
        decode = sum(each == 1 for each in query_lens)
        results = []
        for given in (batch, batch.gathered()):
            plan = backend.plan(given, query_lens)
            parts = [*backend.prefill(plan, 0, q[decode:])]
            results.append((plan.slots.tolist(), parts))
            if decode:
                backend.decode(plan, 0, q[:decode])
        assert results[0][0] == results[1][0] and all(torch.equal(*pair) for pair in zip(results[0][1], results[1][1], strict=True))


def test_groups_are_found_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prefix, "gain", lambda shape, rows, tiles: float(rows * tiles))
    monkeypatch.setattr(staging, "WORTH", float("inf"))
    memory = PageMemory(LatentLayout(512, 64, 1, 64), NUM_PAGES, "cuda")
    memory.pages.normal_(std=0.1)
    tables, common = Tables(), np.arange(40, dtype=np.int32)
    for row in range(8):
        own = np.arange(10, dtype=np.int32) + 100 * (row + 1)
        tables.open(
            1 << 20 | row, 0, 2900 + row, np.concatenate([common, own]) if row < 6 else np.arange(50, dtype=np.int32) + 100 * (row + 1)
        )
    backend = MLABackend(memory, 16, 0.05, 8, 8, 8 * 60, sequence_pages=60)
    q = torch.randn((8, 16, 576), dtype=torch.bfloat16, device="cuda")
    rows = np.arange(8)
    for _ in range(3):
        batch = BatchRows(1, 64, tables.lengths.take(rows), rows, tables)
        results = []
        for given in (batch, batch.gathered()):
            plan = backend.plan(given, 1, graph_batch=8)
            assert plan.device is not None and [group[:2] for group in plan.device.groups] == [(0, 6)]
            results.append(backend.decode(plan, 0, q))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
        tables.lengths[:8] += 1


def test_next_step_is_planned_while_this_one_runs() -> None:
    """Step v waits on the device; v + 1, which rewrites its rows, is planned meanwhile without a wait, and v reads what it was planned with."""
    world, memory = eight_open(4)
    backend = MLABackend(memory, 16, 0.05, 8, 8, 8 * 60, sequence_pages=60)
    q = torch.randn((8, 16, 576), dtype=torch.bfloat16, device="cuda")
    rows = world.tables.rows(np.array(world.open_ids))

    def batch() -> BatchRows:
        return BatchRows(1, 64, world.tables.lengths.take(rows), rows, world.tables)

    for number in range(10):  # all that is kept is made, for each buffer of the ring
        for sequence in world.open_ids if number < 5 else ():
            world.tables.place(sequence, 0, int(world.rng.integers(1, 3000)), world.pages(48))
        backend.decode(backend.plan(batch(), 1, graph_batch=8), 0, q)
    wanted, got, ahead = [], [], 0
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            wanted.append(batch().gathered())
            plan = backend.plan(batch(), 1, graph_batch=8)
            torch.cuda._sleep(20_000_000)
            got.append(backend.decode(plan, 0, q))
            done = torch.cuda.Event()
            done.record()
            for sequence in world.open_ids:
                world.tables.place(sequence, 0, int(world.rng.integers(1, 3000)), world.pages(48))
            backend.plan(batch(), 1, graph_batch=8)
            ahead += not done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ahead >= 3, "the first plans at least: a ring of four goes no further ahead"
    for tables, (out, lse) in zip(wanted, got, strict=True):
        want = backend.decode(backend.plan(tables, 1, graph_batch=8), 0, q)
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("heads", [16, 128])
def test_a_decode_step_sends_less_than_64_kilobytes(heads: int) -> None:
    """256 sequences of 131,072, of which 4 begin a page at each step; the copy is 3 KB, and lists, slots and table are those of the host. A
    sequence that is opened: 16 KB more, its 8 KB of page ids in them."""
    batch, width = 256, 2064
    memory = PageMemory(LatentLayout(128, 32, 1, 64), 4000, "cuda")
    backend = MLABackend(memory, heads, 0.1, batch, batch, batch * width, sequence_pages=width, resident_rows=batch)
    tables, rng = Tables(), np.random.default_rng(1)
    for row in range(batch):
        tables.open(1 << 20 | row, 0, 131072 + row % 64, rng.integers(0, 4000, 2052).astype(np.int32))
    rows, sent = np.arange(batch), []
    for _ in range(40):
        given = BatchRows(1, 64, tables.lengths.take(rows), rows, tables)
        plan = backend.plan(given, 1, graph_batch=batch)
        sent.append(backend.plan_bytes)
        tables.lengths[:batch] += 1
    assert sent[0] > 2**21 and sent[1:] == [3072] * 39 and plan.device is not None and backend._cuda is not None
    shape = backend._cuda._shapes[0]
    want = decode_work(shape, plan.page_starts + plan.device.page_base, plan.lengths)
    assert plan.device.decode.programs.tolist() == want.programs.tolist()
    assert plan.device.decode.items[: len(want.items)].tolist() == want.items.tolist()
    assert plan.device.decode.merges[: len(want.merges)].tolist() == want.merges.tolist()
    assert not plan.device.decode.merges[len(want.merges) :, 4].any()
    ids = plan.device.page_ids.cpu().numpy()
    for row in (0, 1, 77, 255):
        pages, base = plan.pages_of(row), plan.device.page_base
        assert ids[base + pages.start : base + pages.stop].tolist() == tables.pages[row, : pages.stop - pages.start].tolist()
    assert plan.device.slots.tolist() == plan.slots.tolist() == backend.plan(given.gathered(), 1, graph_batch=batch).slots.tolist()
    assert backend.plan_bytes > 2**21
    tables.close(1 << 20 | 9)
    tables.open(2 << 20 | 9, 0, 131072, np.arange(2048, dtype=np.int32))
    for wanted in (3072 + 4 * (4096 + 3 * 8), 3072):
        plan = backend.plan(BatchRows(1, 64, tables.lengths.take(rows), rows, tables), 1, graph_batch=batch)
        assert backend.plan_bytes == wanted < 65536 and plan.device is not None
        start = plan.device.page_base + int(plan.page_starts[9])
        assert plan.device.page_ids[start : start + 2048].tolist() == list(range(2048))


@pytest.mark.parametrize("rows_max", [200, 4096])
@pytest.mark.parametrize(
    "shape",
    [Shape(16, 64, 128, 132, split_tiles_min=1, whole_tiles=3), Shape(128, 64, 128, 132, split_tiles_min=1, whole_tiles=3), Shape(16, 16, 32, 264), Shape(96, 32, 64, 132, whole_tiles=3)],
    ids=str,
)  # fmt: skip
def test_lists_made_on_the_device_are_the_hosts(shape: Shape, rows_max: int) -> None:
    """Number for number: 1 to all rows, ragged, equal, empty, long."""
    rng, group, lanes = np.random.default_rng(rows_max), shape.blocks_per_token, shape.lanes
    sizes = [3 * rows_max + 64, lanes * group + 1, 8 * group * rows_max, 8 * group * (rows_max + lanes)]
    at = np.cumsum([0, *sizes]).tolist()
    places = ListPlaces(
        at[1], at[2], at[3], lanes, group, shape.block_rows, shape.block_tokens, shape.split_tiles_min, shape.whole_tiles, rows_max, 64
    )  # fmt: skip
    page_ids = torch.zeros(2100 * rows_max, dtype=torch.int32, device="cuda")
    slots = torch.zeros(rows_max, dtype=torch.int64, device="cuda")
    batches = [np.full(rows, length) for rows in (1, 2, 7, 128, 140, 200, rows_max) for length in (0, 1, 128, 700, 4096, 131072)]
    batches += [rng.integers(0, most, rows) for rows in (1, 3, 50, 200, rows_max) for most in (40, 900, 20000, 131072)]
    for lengths in batches:
        rows = len(lengths)
        starts, last = (2100 * rng.permutation(rows)).astype(np.int32), rng.integers(0, 2**28, rows).astype(np.int32)
        words = torch.full((at[4],), -7, dtype=torch.int32, device="cuda")
        words[at[1] - 3 * rows : at[1]] = torch.from_numpy(np.concatenate([lengths.astype(np.int32), starts, last])).cuda()
        finish(words, page_ids, slots, places, Sent(at[1] - 3 * rows, 0, 0, rows), 0, group * rows, True)
        want = decode_work(shape, starts, lengths)
        got = words.cpu().numpy()
        assert (got[at[1] : at[2]] == want.programs).all(), (rows, lengths[:5])
        assert (got[at[3] :].reshape(-1, 8)[: len(want.items)] == want.items).all() and (got[at[3] + 8 * len(want.items) :] == -7).all()
        merges = got[at[2] : at[3]].reshape(-1, 8)
        assert (merges[: len(want.merges)] == want.merges).all() and not merges[len(want.merges) : group * rows].any()
        assert (merges[group * rows :] == -7).all()
        wanted = np.where(lengths > 0, last.astype(np.int64) * 64 + (lengths - 1) % 64, -1)
        assert (slots[:rows].cpu().numpy() == wanted).all()
        some = lengths > 0
        assert (page_ids.cpu().numpy()[(starts + (lengths - 1) // 64)[some]] == last[some]).all()
