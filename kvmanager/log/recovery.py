"""Recovery: a state from a journal; and the end of the log in memory, from which a replica that missed something catches up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from kvmanager.config import ManagerConfig, check_int
from kvmanager.errors import BadMessage, InvariantBroken, JournalCorrupt, ReplicaGap, StaleEpoch
from kvmanager.log.journal import Journal, Segment
from kvmanager.machine.apply import apply
from kvmanager.machine.batch import decode_batch
from kvmanager.machine.lives import check_ack
from kvmanager.machine.snapshot import load_snapshot, no_collections
from kvmanager.machine.state import State

__all__ = ["LogTail", "Recovered", "batches_since", "recover", "replay"]


class LogTail:
    """The newest batches, as many as fit `bytes_max`. A batch larger than that empties it: whoever needs it takes a snapshot."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._batches: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._before = 0  # the version before the oldest one here

    def begin(self, version: int) -> None:
        """Nothing up to `version` is here."""
        self._batches.clear()
        self._bytes, self._before = 0, version

    def append(self, version: int, data: bytes) -> None:
        self._batches.append((version, data))
        self._bytes += len(data)
        while self._bytes > self.bytes_max:
            self._before, gone = self._batches.popleft()
            self._bytes -= len(gone)

    def since(self, version: int, bytes_max: int) -> list[bytes] | None:
        """Batches after `version`, oldest first, at least one if there is any, then as many as fit. None if some are not here any more."""
        if version < self._before:
            return None
        found: list[bytes] = []
        at = len(self._batches)
        while at and self._batches[at - 1][0] > version:  # from the end: whoever asks has missed little
            at -= 1
        for index in range(at, len(self._batches)):
            data = self._batches[index][1]
            bytes_max -= len(data)
            if found and bytes_max < 0:
                break
            found.append(data)
        return found


class Recovered(NamedTuple):
    """state: as of the last intact batch. tail: the end of the log. records: how many were applied. torn: bytes of an unfinished one."""

    state: State
    tail: LogTail
    segment: Segment
    records: int
    torn: int
    seconds: float

    def summary(self) -> str:
        """For people: what came back."""
        cut = f"; cut {self.torn} bytes of an unfinished record" if self.torn else ""
        last = self.segment.last
        return f"version {last}, {self.records} batches behind the snapshot of {self.segment.version}, in {self.seconds:.2f} s{cut}"


def replay(config: ManagerConfig, segment: Segment, tail: LogTail | None = None) -> tuple[State, int]:
    """The state at the end of a segment, and how many batches led to it. Raises JournalCorrupt."""
    at = segment.start
    try:
        records = 0
        with no_collections():
            state = load_snapshot(config, decode_batch(segment.snapshot))
            if tail is not None:
                tail.begin(state.version)
            for record in segment:
                at, data = record.offset, bytes(record.data)
                apply(state, decode_batch(data))
                if tail is not None:
                    tail.append(record.version, data)
                records += 1
    except (BadMessage, InvariantBroken) as error:  # its checksum is right: it was written so
        raise JournalCorrupt(segment.path, at, "a batch that can be applied", f"{type(error).__name__}: {error}"[:500]) from error
    return state, records


def recover(config: ManagerConfig, journal: Journal) -> Recovered | None:
    """What the journal holds; it is ready to be appended to then. None if it is new. Raises JournalCorrupt, JournalFailed, InvalidValue."""
    began = time.perf_counter()
    segment = journal.recover()
    if segment is None:
        return None
    tail = LogTail(config.log_bytes_max)
    state, records = replay(config, segment, tail)
    torn = journal.resume(segment)
    return Recovered(state, tail, segment, records, torn, time.perf_counter() - began)


def batches_since(state: State, tail: LogTail, message: Mapping[str, Any]) -> list[bytes]:
    """The answer to a reader that has applied `version` of the life `epoch`: what it is missing, a part at a time.

    Raises ReplicaGap if that is not in memory any more, StaleEpoch if the reader has seen what this log does not hold.
    """
    epoch = check_int("batches.epoch", message.get("epoch"), 1, 2**63 - 1)
    version = check_int("batches.version", message.get("version"), 0, 2**63 - 1)
    check_ack(state, epoch, version)
    if version > state.version:
        raise StaleEpoch(f"batches: expected at most version {state.version} of epoch {state.epoch}, got {version}", epoch=state.epoch)
    found = tail.since(version, state.config.message_bytes_max // 2)
    if found is None:
        raise ReplicaGap(f"batches: expected a version whose successor is still in memory, got {version}", version=version)
    return found
