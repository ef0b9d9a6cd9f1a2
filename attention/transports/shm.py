"""Host memory of another process on this host, by POSIX shared memory: the reader maps the owner's segment read-only and copies.

Copying is done by threads of the reader, so a frozen or dead peer cannot hold a pull up: its pages stay mapped. A cancelled pull ends within
the stretch that its threads are copying at that moment.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing import resource_tracker

import numpy as np
import torch

from kvmanager.attention.checksum import sum_segments, sum_target
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.base import Announcement, OwnPages, Pull
from kvmanager.attention.transports.convert import convert_pages, new_staging
from kvmanager.attention.transports.fields import text_field
from kvmanager.attention.transports.move import Move
from kvmanager.errors import ChecksumMismatch, InvalidValue, KVError, PullFailed, WrongState

__all__ = ["CopyThreads", "ShmTransport", "drop_segment", "new_segment"]

STRETCH_BYTES = 4 << 20  # copied between two looks at whether to go on: about half a millisecond
_SHM_DIR = "/dev/shm"
_SHM_NAME = re.compile(r"kvmanager-[0-9a-f]{32}")  # the name comes from a peer: it must not be able to name anything else


def new_segment(num_bytes: int) -> tuple[str, mmap.mmap]:
    """A fresh POSIX shared memory segment, mode 0600, and its name. All of it is reserved now: running out raises here, not as a SIGBUS later."""
    name = f"kvmanager-{secrets.token_hex(16)}"
    path = f"{_SHM_DIR}/{name}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidValue("device", f"a host whose {_SHM_DIR} can be written", error.strerror) from None
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        mapped = mmap.mmap(fd, num_bytes)
    except OSError as error:
        os.unlink(path)
        raise InvalidValue("num_pages", f"{num_bytes} bytes to fit in {_SHM_DIR}", error.strerror) from None
    finally:
        os.close(fd)
    resource_tracker.register(f"/{name}", "shared_memory")  # its tracker process removes the segment if this process is killed
    return name, mapped


def drop_segment(name: str, owner_pid: int) -> None:
    """Remove the segment's name; mappings of it stay good."""
    if os.getpid() != owner_pid:  # a forked child inherits the finalizer, not the segment
        return
    try:
        os.unlink(f"{_SHM_DIR}/{name}")
    except FileNotFoundError:
        return
    resource_tracker.unregister(f"/{name}", "shared_memory")


def _open_segment(name: str, num_bytes: int) -> mmap.mmap:
    """Map a peer's segment read-only. Plain open and mmap: SharedMemory would register it here, and this process's exit would unlink it."""
    try:
        fd = os.open(f"{_SHM_DIR}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidValue("name", "the shared memory of a live peer", f"{name} ({error.strerror})") from None
    try:
        size = os.fstat(fd).st_size
        if size != num_bytes:
            raise InvalidValue("bytes", f"the segment's {size}", num_bytes)
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


class CopyThreads:
    """At most `limit` threads that run short tasks in the order given, and that exist only while there are any."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._tasks: deque[Callable[[], None]] = deque()
        self._running = 0

    def run(self, tasks: list[Callable[[], None]]) -> None:
        with self._lock:
            self._tasks.extend(tasks)
            more = min(self.limit, len(self._tasks)) - self._running
            self._running += max(0, more)
        for _ in range(more):
            threading.Thread(target=self._work, name="kvmanager-copy", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._tasks:
                    self._running -= 1
                    return
                task = self._tasks.popleft()
            task()


class _ShmPull(Pull):
    """Stretches of segments, each copied by whichever thread comes to it; the last one to end settles the pull."""

    def __init__(
        self,
        source: _ShmSource,
        move: Move,
        expected: np.ndarray | None,
        on_settled: Callable[[Pull], None],
        stretches: list[slice],
    ) -> None:
        super().__init__("shm", move, on_settled)
        self._source, self._expected = source, expected
        self._sums = np.zeros(len(move.source_pages), np.uint64)
        self._left = len(stretches)
        self._count = threading.Lock()
        self._failed: KVError | None = None

    def _copy(self, stretch: slice) -> None:
        try:
            if not self.cancelled and self._failed is None:
                sums = self._source.copy(self.move, stretch, self._expected is not None)
                if sums is not None:
                    with self._count:
                        self._sums += sums
        except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell
            self._failed = error if isinstance(error, KVError) else PullFailed("shm", f"{type(error).__name__}: {error}")
        with self._count:
            self._left -= 1
            last = self._left == 0
        if last:
            self._end()

    def _end(self) -> None:
        error = self._failed
        if error is None and not self.cancelled and self._expected is not None:
            wrong = np.flatnonzero(self._sums != self._expected)
            if len(wrong):
                row = int(wrong[0])
                error = ChecksumMismatch("shm", int(self.move.source_pages[row]), int(self._expected[row]), int(self._sums[row]))
        self._settle(error)


class _ShmSource:
    def __init__(self, own: OwnPages, mapped: mmap.mmap, num_pages: int, layout: LatentLayout, threads: CopyThreads) -> None:
        self.own = own
        self._threads = threads
        self._layout = layout
        self._bytes = np.frombuffer(mapped, np.uint8).reshape(num_pages, layout.num_layers, layout.page_size * layout.slot_bytes)
        self._pulls: dict[int, Pull] = {}

    def begin(self, move: Move, expected: np.ndarray | None, on_settled: Callable[[Pull], None]) -> Pull:
        slot_bytes = self._layout.slot_bytes
        ends = np.cumsum(move.segments[:, 4]) * (move.num_layers * slot_bytes) // STRETCH_BYTES
        cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(ends)]
        stretches = [slice(low, high) for low, high in itertools.pairwise(cuts) if low < high]
        pull = _ShmPull(self, move, expected, self._forget_then(on_settled), stretches)
        if not stretches:
            pull._settle()
            return pull
        self._pulls[id(pull)] = pull
        self._threads.run([lambda stretch=stretch: pull._copy(stretch) for stretch in stretches])  # type: ignore[misc]
        return pull

    def _forget_then(self, on_settled: Callable[[Pull], None]) -> Callable[[Pull], None]:
        def settled(pull: Pull) -> None:
            self._pulls.pop(id(pull), None)
            on_settled(pull)

        return settled

    def copy(self, move: Move, stretch: slice, summed: bool) -> np.ndarray | None:
        """Copy some segments, and give the sums of what came, uint64 [rows of the move], if they are wanted."""
        if self._layout.format != self.own.layout.format:
            return self._convert(move, stretch, summed)
        self._copy(move, stretch)
        return sum_target(self.own.pages, self.own.layout, move, stretch) if summed else None

    def _convert(self, move: Move, stretch: slice, summed: bool) -> np.ndarray | None:
        """The same into pages of another format, by way of one page of the source's."""
        layout, size, layers = self._layout, self._layout.slot_bytes, (move.first_layer, move.end_layer)
        staged = new_staging(layout, 1, torch.device("cpu"))
        rows = staged.view(torch.uint8).numpy().reshape(layout.num_layers, -1)
        sums = np.zeros(len(move.source_pages), np.uint64)
        for row, segment in zip(move.row[stretch].tolist(), move.segments[stretch], strict=True):
            page, slot, target, target_slot, slots = segment.tolist()
            place = slice(*layers), slice(slot * size, (slot + slots) * size)
            rows[place] = self._bytes[page][place]
            if summed:
                came = sum_segments(staged, layout, np.array([[0, slot, slots, slot]]), layers, layout.page_size)
                np.add.at(sums, [row], came)
            place_in = np.array([[0, slot, target, target_slot, slots]])
            convert_pages(staged, layout.page_size, self.own.pages, self.own.layout, place_in, layers)
        return sums if summed else None

    def _copy(self, move: Move, stretch: slice) -> None:
        """Numpy lets go of the interpreter meanwhile, and copies whole pages as one run."""
        size = self.own.layout.slot_bytes
        first, end = move.first_layer, move.end_layer
        theirs, ours = self._bytes, self.own.rows
        assert ours is not None
        for page, slot, target, target_slot, slots in move.segments[stretch].tolist():
            run = slots * size
            source_at, target_at = slot * size, target_slot * size
            ours[target, first:end, target_at : target_at + run] = theirs[page, first:end, source_at : source_at + run]

    def gone(self) -> None:
        """Nothing to do: copying reads memory that stays mapped, and ends by itself."""

    def close(self) -> None:
        for pull in list(self._pulls.values()):
            pull.cancel()
            pull.wait(60)
            if not pull.settled:
                raise WrongState("pull", "shm", "settled", pull.state.value)
        self.__dict__.pop("_bytes", None)


class ShmTransport:
    """Its memory lies in `segment`, which is all the registration there is."""

    name = "shm"

    def __init__(self, own: OwnPages, segment: str, threads: CopyThreads) -> None:
        self._own, self._segment, self._threads = own, segment, threads

    def announce(self) -> Announcement:
        return {"name": self._segment}

    def open(self, announced: Announcement, num_pages: int, num_bytes: int, layout: LatentLayout) -> _ShmSource:
        name = text_field(announced, "name")
        if not _SHM_NAME.fullmatch(name):
            raise InvalidValue("name", "kvmanager- and 32 hex digits", name[:64])
        return _ShmSource(self._own, _open_segment(name, num_bytes), num_pages, layout, self._threads)

    def close(self) -> None:
        """The memory removes its segment itself."""
