"""How a plan reaches the device: one packed copy from a ring of pinned buffers into one device buffer that never moves.

Layout of the buffer, sections aligned to 16 bytes. What a captured graph reads lies at fixed places; the rest follows what is used:

    | decode programs | decode merges | decode items | slots | page ids ... | slots of a large step | prefill programs | merges | items |
    |<------------------------- fixed, whatever the step ------------------>|<------------------- packed behind -------------------------->|
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention.plan import Limits, Plan
from kvmanager.attention.shared_prefix import PrefixGroup, find_groups
from kvmanager.attention.shared_work import WORTH, apart_level, shared_decode_work, shared_items_max, shared_partials_max
from kvmanager.attention.work import ITEM_FIELDS, MERGE_FIELDS, Shape, decode_work, prefill_waves, prefill_work
from kvmanager.tables import div_ceil

__all__ = ["DevicePlan", "DeviceWork", "Staging"]

VIEWS_MAX = 256  # of the device buffer that are kept: most steps have the shapes of one before
RING_SLOTS = 4  # plans that may be on their way at once
PREFILL_PIECES_MAX = 2**16  # of a batch-invariant prefill in a step, beyond one for each block of rows: 2 MiB of work list


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


def _aligned(num_bytes: int) -> int:
    return div_ceil(num_bytes, 16) * 16


class Staging:
    """The ring of pinned buffers and the device buffer. A ring slot is refilled only after the event recorded behind its copy."""

    def __init__(
        self, limits: Limits, decode_shape: Shape, prefill_shape: Shape, page_size: int, device: torch.device, share: bool = False
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
        sizes = (
            4 * (lanes * group + 1),
            4 * MERGE_FIELDS * self._merges_max,
            4 * ITEM_FIELDS * decode_items,
            8 * limits.max_batch,
        )
        self._offsets = np.cumsum([0, *(_aligned(size) for size in sizes)]).tolist()
        row_blocks = limits.max_tokens * prefill_shape.num_heads // prefill_shape.block_rows + limits.max_batch
        programs = prefill_shape.num_programs
        self._pieces_max = row_blocks + (PREFILL_PIECES_MAX if is_fixed else programs)
        waves = 1 + self._pieces_max // max(self.partials_max - decode_pieces, 1) if is_fixed else 1
        self._capacity = (
            self._offsets[4]
            + _aligned(4 * limits.max_pages)
            + _aligned(8 * limits.max_tokens)
            + waves * _aligned(4 * (programs + 1))
            + 4 * MERGE_FIELDS * (row_blocks if is_fixed else programs)
            + 4 * ITEM_FIELDS * self._pieces_max
        )
        self.buffer = torch.zeros(self._capacity, dtype=torch.uint8, device=device)
        # All of it, whatever is used: an empty view has no address, and a graph captured with one would keep that.
        self._page_ids = self.buffer[self._offsets[4] : self._offsets[4] + 4 * limits.max_pages].view(torch.int32)
        self._pinned = [torch.zeros(self._capacity, dtype=torch.uint8, pin_memory=True) for _ in range(RING_SLOTS)]
        self._hosts = [pinned.numpy() for pinned in self._pinned]
        self._events = [torch.cuda.Event() for _ in range(RING_SLOTS)]
        self._next = 0
        self._views: dict[tuple[int, str, tuple[int, ...]], Tensor] = {}

    def send(self, plan: Plan) -> DevicePlan:
        """Pack a plan and start its copy on the current stream; whatever that stream runs next sees it."""
        rows = plan.num_decode  # one token each
        shape, starts, lengths = self._decode_shape, plan.page_starts[:rows], plan.lengths[:rows]
        groups = find_groups(shape, self._page_size, plan.page_ids, starts, lengths) if self._share else ()
        if groups:
            most = WORTH * apart_level(shape, lengths)
            work, groups = shared_decode_work(shape, starts, lengths, groups, self._limits.max_batch, most)
        else:
            work = decode_work(shape, starts, lengths)
        index, self._next = self._next, (self._next + 1) % RING_SLOTS
        event, host = self._events[index], self._hosts[index]
        event.synchronize()  # waits for a copy RING_SLOTS plans ago, not for the device
        merges = work.merges
        if plan.graph_batch is not None:
            merges = np.zeros((min(self._merges_max, self._decode_shape.blocks_per_token * plan.graph_batch), MERGE_FIELDS), np.int32)
            merges[: len(work.merges)] = work.merges
        views, cursor = [], 0
        for array, offset in zip((work.programs, merges, work.items), self._offsets, strict=False):
            view, cursor = self._put(host, offset, array)
            views.append(view)
        decode = DeviceWork(views[0], views[2], views[1])
        small = plan.num_tokens <= self._limits.max_batch
        if small:
            slots, cursor = self._put(host, self._offsets[3], plan.slots)
        _, cursor = self._put(host, self._offsets[4], plan.page_ids)
        if not small:
            slots, cursor = self._put(host, cursor, plan.slots)
        launches = []
        if plan.num_prefill:
            tail = slice(rows, plan.batch)
            first_tokens = plan.query_starts[tail] - plan.num_decode
            starts, lengths, counts = plan.page_starts[:-1][tail], plan.lengths[tail], plan.query_lens[tail]
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
        self.buffer[:cursor].copy_(self._pinned[index][:cursor], non_blocking=True)
        event.record(torch.cuda.current_stream(self.buffer.device))
        return DevicePlan(slots, self._page_ids, decode, tuple(launches), groups)

    def _put(self, host: np.ndarray, offset: int, array: np.ndarray) -> tuple[Tensor, int]:
        """Write an array at a byte offset of the host buffer; gives its device view and the offset behind it."""
        num_bytes = array.nbytes
        host[offset : offset + num_bytes].view(array.dtype)[:] = array.ravel()
        key = (offset, array.dtype.char, array.shape)
        if (view := self._views.get(key)) is None:
            if len(self._views) == VIEWS_MAX:
                self._views.clear()
            view = self.buffer[offset : offset + num_bytes].view(_TORCH_TYPES[array.dtype.char]).view(array.shape)
            self._views[key] = view
        return view, offset + _aligned(num_bytes)


_TORCH_TYPES = {np.dtype(np.int32).char: torch.int32, np.dtype(np.int64).char: torch.int64}
