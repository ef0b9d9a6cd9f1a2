"""How a plan reaches the device: one packed copy from a ring of pinned buffers into one device buffer that never moves.

Layout of the buffer, sections aligned to 16 bytes. What a captured graph reads lies at fixed places; the rest follows what is used:

    | changes | slots | decode programs | decode merges | decode items | page ids ... | slots of a large step | prefill lists ... | resident table |
              |<------------------ fixed, whatever the step ----------------->|<------------ packed behind ------------>|   never copied
    changes   of the resident table, packed against the slots: page ids, runs; lengths, page starts and last pages of the decode rows

A plan of arrays sends from its slots on, page ids and all. A decode step of rows in the resident table sends `changes` alone: one small launch behind
the copy (kernels/step_plan.py) puts the page ids in place, finds the slots and makes the decode lists. Lists that it can't make (prefixes that are
shared, batch invariance, windows) and those of prefill come from the host, in the same copy.

Copy and launch of a captured graph's step are a small graph of their own, one for each buffer of the ring: half the time on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention.plan import Limits, Plan
from kvmanager.attention.resident import ResidentTable, Update
from kvmanager.attention.shared_prefix import PrefixGroup, find_groups, find_lasting_groups
from kvmanager.attention.shared_work import WORTH, apart_level, shared_decode_work, shared_items_max, shared_partials_max
from kvmanager.attention.work import ITEM_FIELDS, MERGE_FIELDS, Shape, decode_work, prefill_waves, prefill_work
from kvmanager.kernels.step_plan import ROWS_MAX, ListPlaces, Sent, finish
from kvmanager.tables import div_ceil

__all__ = ["DevicePlan", "DeviceWork", "Ring", "Staging"]

VIEWS_MAX = 256  # of the device buffer that are kept: most steps have the shapes of one before
RING_SLOTS = 4  # plans that may be on their way at once
COPY_GRAIN = 512  # where a copy of changes may begin: so that most copies are as long as one before
RUN_FIELDS = 3  # of a change of the resident table: entry, first id, count
GRAPH_IDS, GRAPH_RUNS = 4096, 8  # changes of the table that the graph of a step has room for: two sequences of 131,072 at page 64
GRAPHS_MAX = 512
PREFILL_PIECES_MAX = 2**16  # of a batch-invariant prefill in a step, beyond one for each block of rows: 2 MiB of work list


def _current_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# Without an object made of it: a tenth of the time.
_raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _current_raw_stream)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """A work list on the device; `merges` has rows beyond those used (count 0) when the launch's shape must not change."""

    programs: Tensor
    items: Tensor
    merges: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DevicePlan:
    """Views of the backend's device buffer: good until the next plan. groups: decode rows whose common prefix is read once."""

    slots: Tensor
    page_ids: Tensor
    decode: DeviceWork
    prefill: tuple[DeviceWork, ...]  # launches, one after the other
    groups: tuple[PrefixGroup, ...] = ()
    page_base: int = 0  # what page_starts of the plan count from, in page_ids

    def pages_at(self, where: slice) -> Tensor:
        """Page ids of a sequence, on the device, by `pages_of` of the plan."""
        return self.page_ids[self.page_base + where.start : self.page_base + where.stop]


class _Packed(NamedTuple):
    """What was packed, as the device will see it; `end` bytes of the buffer."""

    slots: Tensor
    decode: DeviceWork
    prefill: tuple[DeviceWork, ...]
    groups: tuple[PrefixGroup, ...]
    end: int


def _aligned(num_bytes: int) -> int:
    return div_ceil(num_bytes, 16) * 16


class Ring:
    """Pinned buffers that plans are packed in, in turn. One is refilled only after the event recorded behind its copy."""

    def __init__(self, buffer: Tensor, capacity: int) -> None:
        self._buffer = buffer
        self._pinned = [torch.zeros(capacity, dtype=torch.uint8, pin_memory=True) for _ in range(RING_SLOTS)]
        self._hosts = [pinned.numpy() for pinned in self._pinned]
        self._events = [torch.cuda.Event() for _ in range(RING_SLOTS)]
        self._index = 0
        self._stream = torch.cuda.current_stream(buffer.device)  # of the last plan
        self._copies: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._graphs: dict[tuple[int, Sent], torch.cuda.CUDAGraph] = {}
        self._capturing: torch.cuda.Stream | None = None
        self.sent_bytes = 0  # by the last plan

    def begin(self) -> np.ndarray:
        """The next buffer, as bytes."""
        self._index = (self._index + 1) % RING_SLOTS
        self._events[self._index].synchronize()  # waits for a copy RING_SLOTS plans ago, not for the device
        return self._hosts[self._index]

    def send(self, begin: int, end: int) -> None:
        """Start the copy of bytes begin to end of it to the same place of the device buffer, on the current stream."""
        self._follow_stream()
        self._copy(begin, end)
        self._events[self._index].record(self._stream)

    def replay(self, begin: int, end: int, sent: Sent, finish: Callable[[Sent, bool], None]) -> None:
        """The copy and the launch behind it, as one graph; made at the first step of such sizes, from which on there is no other launch."""
        self._follow_stream()
        key = self._index, sent
        if (graph := self._graphs.get(key)) is None:
            if len(self._graphs) == GRAPHS_MAX:
                self._graphs.clear()
            self._copy(begin, end)
            finish(sent, True)  # compiled and loaded now, if it was not: that can't be captured
            self._events[self._index].record(self._stream)
            self._graphs[key] = self._capture(begin, end, sent, finish)
            return
        self.sent_bytes = end - begin
        graph.replay()
        self._events[self._index].record(self._stream)

    def _capture(self, begin: int, end: int, sent: Sent, finish: Callable[[Sent, bool], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._capturing = self._capturing or torch.cuda.Stream(self._buffer.device)
        # Not torch.cuda.graph: that waits for the device.
        with torch.cuda.stream(self._capturing):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._copy(begin, end)
                finish(sent, True)
            finally:
                graph.capture_end()
        return graph

    def _copy(self, begin: int, end: int) -> None:
        self.sent_bytes = end - begin
        key = self._index, begin, end
        if (copy := self._copies.get(key)) is None:
            if len(self._copies) == VIEWS_MAX:
                self._copies.clear()
            copy = self._copies[key] = self._buffer[begin:end], self._pinned[self._index][begin:end]
        copy[0].copy_(copy[1], non_blocking=True)

    def _follow_stream(self) -> None:
        """Go on on the current stream, behind what the last plan's stream was given: that reads what is written over now."""
        if _raw_stream(self._buffer.device.index) != self._stream.cuda_stream:
            stream = torch.cuda.current_stream(self._buffer.device)
            stream.wait_stream(self._stream)
            self._stream = stream


class Staging:
    """The device buffer, and what is packed for it."""

    def __init__(
        self,
        limits: Limits,
        decode_shape: Shape,
        prefill_shape: Shape,
        page_size: int,
        device: torch.device,
        share: bool = False,
        table: ResidentTable | None = None,
    ) -> None:
        self._limits, self._decode_shape, self._prefill_shape = limits, decode_shape, prefill_shape
        self._page_size, self._share = page_size, share
        group, lanes = decode_shape.blocks_per_token, decode_shape.lanes
        is_fixed = bool(decode_shape.piece_tiles)
        decode_pieces = limits.max_batch + lanes
        self._merges_max = group * min(lanes, limits.max_batch)
        if is_fixed:
            decode_pieces = limits.max_batch + limits.max_pages * page_size // (decode_shape.piece_tiles * decode_shape.block_tokens)
            self._merges_max = group * limits.max_batch
            self.partials_max = group * decode_pieces + prefill_shape.num_programs  # the latter: so that waves of prefill are few
        else:
            self.partials_max = max(decode_shape.partials_max, prefill_shape.partials_max)
        decode_items = group * decode_pieces
        if share:
            self._merges_max = group * limits.max_batch
            self.partials_max = max(self.partials_max, shared_partials_max(decode_shape, limits.max_batch))
            decode_items = shared_items_max(decode_shape, limits.max_batch)
        self._items_max = decode_items
        room = max(limits.max_pages + RUN_FIELDS * limits.max_batch, GRAPH_IDS + RUN_FIELDS * GRAPH_RUNS)
        changes = 4 * (room + 3 * limits.max_batch) if table is not None else 0
        sizes = (
            changes,
            8 * limits.max_batch,
            4 * (lanes * group + 1),
            4 * MERGE_FIELDS * self._merges_max,
            4 * ITEM_FIELDS * decode_items,
        )
        self._slots_at, *self._lists_at, self._pages_at = np.cumsum([_aligned(size) for size in sizes]).tolist()
        row_blocks = limits.max_tokens * prefill_shape.num_heads // prefill_shape.block_rows + limits.max_batch
        programs = prefill_shape.num_programs
        self._pieces_max = row_blocks + (PREFILL_PIECES_MAX if is_fixed else programs)
        waves = 1 + self._pieces_max // max(self.partials_max - decode_pieces, 1) if is_fixed else 1
        capacity = _aligned(
            self._pages_at
            + _aligned(4 * limits.max_pages)
            + _aligned(8 * limits.max_tokens)
            + waves * _aligned(4 * (programs + 1))
            + 4 * MERGE_FIELDS * (row_blocks if is_fixed else programs)
            + 4 * ITEM_FIELDS * self._pieces_max
        )
        entries = table.num_entries if table is not None else 0
        self.buffer = torch.zeros(capacity + 4 * entries, dtype=torch.uint8, device=device)
        # All of it, whatever is used: an empty view has no address, and a graph captured with one would keep that. The resident table is in it
        # too, so a graph reads page ids by one address, whichever kind of plan it is replayed with.
        self._page_ids = self.buffer[self._pages_at :].view(torch.int32)
        self._ring = Ring(self.buffer, capacity)
        self._views: dict[tuple[int, str, tuple[int, ...]], Tensor] = {}
        self._page_base = (capacity - self._pages_at) // 4
        self.entries = self.buffer[capacity:].view(torch.int32)
        self._words = self.buffer[:capacity].view(torch.int32)
        self._places = self._list_places() if table is not None else None
        self._no_lists = ListPlaces(0, 0, 0, 1, 1, 1, 1, 1, 0, 1, page_size)
        self._slots = self.buffer[self._slots_at : self._slots_at + 8 * limits.max_batch].view(torch.int64)
        self._row_plans: dict[int, DevicePlan] = {}
        self._lasting: tuple[tuple[int, tuple[int, int]], tuple[PrefixGroup, ...]] | None = (
            None  # of which rows it is known what they share
        )
        self._seated: tuple[int, int, np.ndarray] | None = None

    @property
    def sent_bytes(self) -> int:
        """By the last plan, in its one copy."""
        return self._ring.sent_bytes

    def _list_places(self) -> ListPlaces | None:
        """Where the device makes the decode lists; None if they are of a kind that it doesn't make."""
        shape, limits = self._decode_shape, self._limits
        tiles = limits.max_pages * self._page_size // shape.block_tokens + 2 * limits.max_batch
        if shape.piece_tiles or shape.window or limits.max_batch > ROWS_MAX or tiles >= 2**31:
            return None
        words = [at // 4 for at in self._lists_at]
        return ListPlaces(
            words[0], words[1], words[2], shape.lanes, shape.blocks_per_token, shape.block_rows, shape.block_tokens,
            shape.split_tiles_min, shape.whole_tiles, limits.max_batch, self._page_size,
        )  # fmt: skip

    def send(self, plan: Plan) -> DevicePlan:
        """Pack a plan of arrays and start its copy on the current stream; whatever that stream runs next sees it."""
        rows = plan.num_decode
        shape, size = self._decode_shape, self._page_size
        groups = find_groups(shape, size, plan.page_ids, plan.page_starts[:rows], plan.lengths[:rows]) if self._share else ()
        host = self._ring.begin()
        packed = self._pack_lists(plan, host, groups, 0, True)
        self._ring.send(self._slots_at, packed.end)
        return DevicePlan(packed.slots, self._page_ids, packed.decode, packed.prefill, packed.groups)

    def send_rows(self, plan: Plan, update: Update) -> DevicePlan:
        """The same for a plan of rows in the resident table, and the launch that brings the table up to date."""
        rows, num_ids, num_runs = plan.num_decode, len(update.ids), len(update.runs)
        groups = self._groups_of_rows(plan, update) if self._share else ()
        is_plain = update.last_pages is not None
        lists = is_plain and self._places is not None and not groups and rows > 0
        host = self._ring.begin()
        words, at = host.view(np.int32), self._slots_at // 4
        if is_plain:
            self._put_rows(words[at - 3 * rows : at], plan, update)
            at -= 3 * rows
        sent = Sent(at, 0, 0, rows if is_plain else 0)
        is_graph = lists and plan.graph_batch is not None and num_ids <= GRAPH_IDS and num_runs <= GRAPH_RUNS
        if num_runs:
            room_ids, room_runs = (GRAPH_IDS, GRAPH_RUNS) if is_graph else (num_ids, num_runs)
            sent = Sent(at - RUN_FIELDS * room_runs - room_ids, room_ids, room_runs, sent.num_rows)
            runs = words[at - RUN_FIELDS * room_runs : at]
            runs[RUN_FIELDS * num_runs :] = 0
            runs[: RUN_FIELDS * num_runs] = update.runs.ravel()
            words[sent.first : sent.first + num_ids] = update.ids
        if lists:
            if (device := self._row_plans.get(rows)) is None:
                device = self._row_plans[rows] = self._listed_on_device(rows)
            end = self._slots_at
        else:
            packed = self._pack_lists(plan, host, groups, self._page_base, False, not is_plain)
            slots = self._view(self._slots_at, np.int64, (rows,)) if is_plain else packed.slots
            device = DevicePlan(slots, self._page_ids, packed.decode, packed.prefill, packed.groups, self._page_base)
            end = packed.end
        if is_graph:
            self._ring.replay(4 * sent.first, end, sent, self._finish)
        else:
            self._ring.send(4 * sent.first // COPY_GRAIN * COPY_GRAIN, end)
            self._finish(sent, lists)
        return device

    def _finish(self, sent: Sent, lists: bool) -> None:
        merges = self._merge_rows(sent.num_rows) if lists else 0
        finish(self._words, self._page_ids, self._slots, self._places or self._no_lists, sent, self._page_base, merges, lists)

    def _put_rows(self, words: np.ndarray, plan: Plan, update: Update) -> None:
        """Lengths, page starts and last pages of the decode rows, those of padding 0."""
        rows, count = plan.num_decode, len(update.starts)
        words[:rows] = plan.lengths
        words[rows : 2 * rows] = self._starts_of(plan, update)
        words[2 * rows : 2 * rows + count] = update.last_pages

    def _listed_on_device(self, rows: int) -> DevicePlan:
        """What every plan of so many decode rows has, whose lists the device makes."""
        shape = self._decode_shape
        programs = self._view(self._lists_at[0], np.int32, (shape.lanes * shape.blocks_per_token + 1,))
        merges = self._view(self._lists_at[1], np.int32, (self._merge_rows(rows), MERGE_FIELDS))
        items = self._view(self._lists_at[2], np.int32, (self._items_max, ITEM_FIELDS))
        work = DeviceWork(programs, items, merges)
        return DevicePlan(self._view(self._slots_at, np.int64, (rows,)), self._page_ids, work, (), (), self._page_base)

    def _merge_rows(self, rows: int) -> int:
        """Merges that a launch of so many decode rows goes through, those not used included."""
        return min(self._merges_max, self._decode_shape.blocks_per_token * rows)

    def _starts_of(self, plan: Plan, update: Update) -> np.ndarray:
        """page_starts as the device counts them, int32: the same array as long as the batch is the same."""
        seated = self._seated
        if seated is None or seated[0] != update.seating[0] or seated[1] != plan.num_decode:
            starts = (plan.page_starts + self._page_base).astype(np.int32)
            seated = self._seated = update.seating[0], plan.num_decode, starts
        return seated[2]

    def _groups_of_rows(self, plan: Plan, update: Update) -> tuple[PrefixGroup, ...]:
        """As find_groups. Rows that were looked at, and have only grown since, are not looked at again if what they share stays."""
        key = plan.num_decode, update.seating
        if self._lasting is not None and self._lasting[0] == key:
            return self._lasting[1]
        lengths = plan.lengths[: min(plan.num_decode, len(update.starts))]
        groups, lasts = find_lasting_groups(self._decode_shape, self._page_size, update.source, update.source_starts, lengths)
        self._lasting = (key, groups) if lasts else None
        return groups

    def _pack_lists(
        self, plan: Plan, host: np.ndarray, groups: tuple[PrefixGroup, ...], base: int, with_pages: bool, with_slots: bool = True
    ) -> _Packed:
        """Make a plan's lists, and pack them, its slots and its page ids."""
        rows = plan.num_decode  # one token each
        shape, starts, lengths = self._decode_shape, plan.page_starts[:rows] + base, plan.lengths[:rows]
        if groups:
            most = WORTH * apart_level(shape, lengths)
            work, groups = shared_decode_work(shape, starts, lengths, groups, self._limits.max_batch, most)
        else:
            work = decode_work(shape, starts, lengths)
        merges = work.merges
        if plan.graph_batch is not None:
            merges = np.zeros((self._merge_rows(plan.graph_batch), MERGE_FIELDS), np.int32)
            merges[: len(work.merges)] = work.merges
        views, cursor = [], 0
        for array, offset in zip((work.programs, merges, work.items), self._lists_at, strict=True):
            view, cursor = self._put(host, offset, array)
            views.append(view)
        decode = DeviceWork(views[0], views[2], views[1])
        small, slots = plan.num_tokens <= self._limits.max_batch, self._slots
        if small and with_slots:
            slots, _ = self._put(host, self._slots_at, plan.slots)
        if with_pages:
            _, cursor = self._put(host, self._pages_at, plan.page_ids)
        elif not small or plan.num_prefill:
            cursor = self._pages_at
        if not small:
            slots, cursor = self._put(host, cursor, plan.slots)
        launches = []
        if plan.num_prefill:
            tail = slice(rows, plan.batch)
            first_tokens = plan.query_starts[tail] - plan.num_decode
            starts, lengths, counts = plan.page_starts[tail] + base, plan.lengths[tail], plan.query_lens[tail]
            shape = self._prefill_shape
            if shape.piece_tiles:
                several = prefill_waves(shape, starts, lengths, counts, first_tokens, self.partials_max, self._pieces_max)
            else:
                several = [prefill_work(shape, starts, lengths, counts, first_tokens)]
            for work in several:
                views = []
                for array in (work.programs, work.items, work.merges):
                    view, cursor = self._put(host, cursor, array)
                    views.append(view)
                launches.append(DeviceWork(*views))
        return _Packed(slots, decode, tuple(launches), groups, cursor)

    def _put(self, host: np.ndarray, offset: int, array: np.ndarray) -> tuple[Tensor, int]:
        """Write an array at a byte offset of the host buffer; gives its device view and the offset behind it."""
        num_bytes = array.nbytes
        host[offset : offset + num_bytes].view(array.dtype)[:] = array.ravel()
        return self._view(offset, array.dtype, array.shape), offset + _aligned(num_bytes)

    def _view(self, offset: int, dtype: type | np.dtype, shape: tuple[int, ...]) -> Tensor:
        """A part of the device buffer."""
        char = np.dtype(dtype).char
        key = (offset, char, shape)
        if (view := self._views.get(key)) is None:
            if len(self._views) == VIEWS_MAX:
                self._views.clear()
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            view = self.buffer[offset : offset + num_bytes].view(_TORCH_TYPES[char]).view(shape)
            self._views[key] = view
        return view


_TORCH_TYPES = {np.dtype(np.int32).char: torch.int32, np.dtype(np.int64).char: torch.int64}
