"""Journal: the log in files. Append only; every record has a length, a version and checksums; a snapshot begins each file.

A folder holds segments, named by the version of the snapshot they begin with, and a lock file. A segment is a header, one snapshot
record, then one record a batch:

    header   8s magic | u16 format | u16 header bytes | u32 zero | u64 version | 32s fingerprint of the pools | u32 zero | u32 crc
    record   4s mark (batch or snapshot) | u32 payload bytes | u64 version | u32 crc of the payload | u32 crc of these 20 bytes | payload

Little-endian; crc is CRC-32 as zlib computes it. The length has a checksum of its own, so that a flipped bit in it is not taken for the
end of the log. Knows bytes and versions; what is in a batch is the state machine's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvmanager.config import ManagerConfig, check_int
from kvmanager.errors import InvalidValue, JournalCorrupt, JournalFailed
from kvmanager.log.files import Files
from kvmanager.machine.lives import RECORDS_UNSYNCED_MAX, follows

__all__ = ["FSYNC", "Journal", "Record", "Segment", "fingerprint", "segment_names"]

MAGIC = b"\x8bKVLOG\r\n"
FORMAT = 1
BATCH, SNAPSHOT = b"\xb5KVb", b"\xb5KVs"
_HEADER = struct.Struct("<8sHHIQ32sII")
_RECORD = struct.Struct("<4sIQII")
_RECORD_HEAD = struct.Struct("<4sIQI")
_CRC = struct.Struct("<I")
FSYNC = ("never", "group", "always")
# What a lost host can take must stay below what the next life skips (lives.py): so there is a sync now and then, whatever the policy.
BYTES_UNSYNCED_MAX = 64 << 20


class Record(NamedTuple):
    """One batch in a segment: its bytes, and where its record begins."""

    version: int
    offset: int
    data: memoryview


def fingerprint(config: ManagerConfig) -> bytes:
    """SHA-256 of the pools: which journals belong to which kind of manager."""
    rows = [(pool.name, pool.group, pool.num_pages, pool.page_size, pool.workers) for pool in config.pools]
    return hashlib.sha256(repr(rows).encode()).digest()


def _encode_header(version: int, pools: bytes) -> bytes:
    head = _HEADER.pack(MAGIC, FORMAT, _HEADER.size, 0, version, pools, 0, 0)[:-4]
    return head + _CRC.pack(zlib.crc32(head))


def _encode_record(mark: bytes, version: int, data: bytes) -> bytes:
    head = _RECORD_HEAD.pack(mark, len(data), version, zlib.crc32(data))
    return b"".join((head, _CRC.pack(zlib.crc32(head)), data))


def segment_names(names: list[str]) -> list[str]:
    """Those that are segments, oldest first."""
    return sorted(name for name in names if len(name) == 24 and name.endswith(".kvj") and name[:20].isdigit())


class Segment:
    """One file of a journal, read: its snapshot, then the batches after it.

    Raises JournalCorrupt for a damaged header or snapshot, and from the iteration for damage with an intact record behind it. Damage with
    nothing intact behind it is the torn tail of a write that was never finished: the iteration ends before it, `end` is where, and `torn`
    how many bytes it has.
    """

    def __init__(self, name: str, data: bytes, folder: str = "") -> None:
        self.name = name
        self.path = f"{folder}/{name}" if folder else name  # as errors name it
        self._data = memoryview(data)
        if len(data) < _HEADER.size:
            raise JournalCorrupt(self.path, 0, f"a header of {_HEADER.size} bytes", f"{len(data)} bytes")
        magic, number, size, zero, self.version, self.fingerprint, zero2, crc = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise JournalCorrupt(self.path, 0, f"the magic {MAGIC!r}", repr(magic))
        if crc != zlib.crc32(self._data[: _HEADER.size - 4]):
            raise JournalCorrupt(self.path, 0, "a header that agrees with its checksum", "one that differs")
        if (number, size, zero, zero2) != (FORMAT, _HEADER.size, 0, 0):
            raise JournalCorrupt(self.path, 0, f"format {FORMAT}", f"format {number}, written by another version of kvmanager")
        found = self._record(_HEADER.size)
        if found is None or found[0] != SNAPSHOT or found[1] != self.version:
            raise JournalCorrupt(self.path, _HEADER.size, f"the snapshot of version {self.version}", "no intact one")
        self.snapshot = found[2]
        self.start = self.end = _HEADER.size + _RECORD.size + len(self.snapshot)
        self.torn = 0
        self.last = self.version

    def _record(self, offset: int) -> tuple[bytes, int, memoryview] | None:
        """(mark, version, payload) of the intact record at an offset, None if there is none."""
        head = self._head(offset)
        if head is None:
            return None
        mark, length, version, crc = head
        payload = self._data[offset + _RECORD.size : offset + _RECORD.size + length]
        return (mark, version, payload) if len(payload) == length and zlib.crc32(payload) == crc else None

    def _head(self, offset: int) -> tuple[bytes, int, int, int] | None:
        """(mark, length, version, crc of the payload) if the 24 bytes at an offset are the head of a record."""
        if offset + _RECORD.size > len(self._data):
            return None
        mark, length, version, crc, own = _RECORD.unpack_from(self._data, offset)
        if mark not in (BATCH, SNAPSHOT) or own != zlib.crc32(self._data[offset : offset + _RECORD.size - 4]):
            return None
        return mark, length, version, crc

    def __iter__(self) -> Iterator[Record]:
        data, at, unpack, crc32 = self._data, self.start, _RECORD.unpack_from, zlib.crc32
        size, head_size = len(data), _RECORD.size
        self.end, self.last, self.torn = at, self.version, 0
        while at + head_size <= size:
            mark, length, version, crc, own = unpack(data, at)
            stop = at + head_size + length
            if mark != BATCH or own != crc32(data[at : at + head_size - 4]) or stop > size:
                break
            payload = data[at + head_size : stop]
            if crc32(payload) != crc:
                break
            if version != self.last + 1 and not follows(self.last, version):
                raise JournalCorrupt(self.path, at, f"the record of version {self.last + 1}", f"that of {version}")
            self.end, self.last = stop, version
            yield Record(version, at, payload)
            at = stop
        self.torn = size - at
        if self.torn:
            self._check_torn(at)

    def _check_torn(self, at: int) -> None:
        """Raises JournalCorrupt if an intact record stands behind the damage at `at`."""
        head = self._head(at)
        # If its head is intact, so is its length: whatever lies within is payload.
        at_next = at + 1 if head is None else at + _RECORD.size + head[1]
        whole = self._data.obj
        while at_next < len(self._data):
            found = [place for mark in (BATCH, SNAPSHOT) if (place := whole.find(mark, at_next)) >= 0]  # type: ignore[attr-defined]
            if not found:
                return
            at_next = min(found)
            record = self._record(at_next)
            if record is not None and record[1] > self.last:
                expected = f"an intact record of version {self.last + 1}"
                raise JournalCorrupt(self.path, at, expected, f"a damaged one, with version {record[1]} intact at offset {at_next}")
            at_next += 1


class Journal:
    """The journal in a folder, for one manager at a time.

    folder         made if it is not there (its parent must be)
    fsync          "never": written before anybody can act on it, which survives the process but not the host.
                   "group": synced as well once `group_ms` have passed since the oldest batch that is not, or `group_records` are waiting.
                   "always": synced before anybody can act on it
    segment_bytes  a snapshot begins a new segment once the batches of the current one have so many bytes
    segments_kept  how many segments stay, the current one included; the older ones are for `kvmanager inspect` alone
    files          whose file system

    The order of calls: `recover`, then `resume` with what it gave or `start`, then `append`s.
    """

    def __init__(
        self,
        folder: str,
        *,
        fsync: str = "never",
        group_ms: int = 20,
        group_records: int = 256,
        segment_bytes: int = 64 << 20,
        segments_kept: int = 2,
        files: Files | None = None,
    ) -> None:
        if fsync not in FSYNC:
            raise InvalidValue("fsync", f"one of {', '.join(FSYNC)}", repr(fsync)[:80])
        check_int("group_ms", group_ms, 1, 3_600_000)
        check_int("group_records", group_records, 1, RECORDS_UNSYNCED_MAX)
        check_int("segment_bytes", segment_bytes, 1, 1 << 40)
        check_int("segments_kept", segments_kept, 1, 1 << 20)
        self.folder = folder
        self.fsync, self.group_ms, self.group_records = fsync, group_ms, group_records
        self.segment_bytes, self.segments_kept = segment_bytes, segments_kept
        self.files = files or Files()
        self.name = ""  # the segment being written
        self.version = 0  # the newest in it
        self.broken = ""  # why nothing more can be written before the journal is opened again
        self.snapshot_failed = ""  # why the last new segment could not be made
        self._lock: Any = None
        self._handle: Any = None
        self._size = 0  # of the segment being written
        self._start = 0  # where its batches begin
        self._due_size = 0
        self._unsynced_records = 0
        self._unsynced_bytes = 0
        self._unsynced_since: int | None = None

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    # --- opening -------------------------------------------------------------------------------------------------------------

    def recover(self) -> Segment | None:
        """Lock the folder and read its newest segment; None if there is none yet. Nothing is changed but leftovers of an unfinished one.

        Raises JournalCorrupt, JournalFailed, or InvalidValue if another manager has it.
        """
        try:
            self.files.make_folder(self.folder)
            try:
                self._lock = self.files.lock(self._path("lock"))
            except BlockingIOError:
                raise InvalidValue("journal", "a folder that no other manager writes to", self.folder) from None
            names = self.files.names(self.folder)
            for name in names:
                if name.endswith(".kvj.tmp"):
                    self.files.remove(self._path(name))
            segments = segment_names(names)
            return Segment(segments[-1], self.files.read(self._path(segments[-1])), self.folder) if segments else None
        except OSError as error:
            raise self._failed("open", error) from error

    def resume(self, segment: Segment) -> int:
        """Go on behind the last batch of a segment that has been iterated to its end; cuts a torn tail and gives how many bytes it had."""
        try:
            self._handle = self.files.extend(self._path(segment.name))
            if segment.torn:
                self.files.truncate(self._handle, segment.end)
                self.files.sync(self._handle)
            # The life before may have ended between giving this segment its name and syncing that: what is appended now would go with it.
            self.files.sync_folder(self.folder)
        except OSError as error:
            raise self._failed("open", error) from error
        self.name, self.version, self._size, self._start = segment.name, segment.last, segment.end, segment.start
        self._due_size = self._start + self.segment_bytes
        # Written by a process that may not have synced it: what the next life builds on must be there.
        self._unsynced_records = self._unsynced_bytes = 1
        return segment.torn

    # --- writing -------------------------------------------------------------------------------------------------------------

    def append(self, version: int, data: bytes, now_ms: int, *, sync: bool = False) -> None:
        """Write one batch; once this returns, others may act on it. `sync` as if the policy were "always".

        Raises JournalFailed if it could not be written: the journal is as it was before, or refuses everything until it is opened again.
        """
        if self.broken:
            raise JournalFailed(self.folder, self.broken)
        if version != self.version + 1 and not follows(self.version, version):  # an earlier one was written and never applied
            raise JournalFailed(self.folder, f"expected version {self.version + 1} to be written next, got {version}; open it again")
        record = _encode_record(BATCH, version, data)
        before = self._unsynced_records, self._unsynced_bytes, self._unsynced_since
        try:
            self._write(self._handle, record)
            self._unsynced_records += 1
            self._unsynced_bytes += len(record)
            if self._unsynced_since is None:
                self._unsynced_since = now_ms
            if sync or self._sync_due(now_ms):
                self._sync()
        except OSError as error:
            self._unsynced_records, self._unsynced_bytes, self._unsynced_since = before
            self._take_back(error)
            raise self._failed("write", error) from error
        except BaseException:
            self.broken = "a write was interrupted; open it again"
            raise
        self.version = version
        self._size += len(record)

    def _sync_due(self, now_ms: int) -> bool:
        if self.fsync == "always" or self._unsynced_records >= RECORDS_UNSYNCED_MAX or self._unsynced_bytes >= BYTES_UNSYNCED_MAX:
            return True
        if self.fsync == "never" or self._unsynced_since is None:
            return False
        return self._unsynced_records >= self.group_records or now_ms - self._unsynced_since >= self.group_ms

    def _sync(self) -> None:
        """Raises OSError; after that nobody knows what of the file is on the disk, and asking again does not tell."""
        try:
            self.files.sync(self._handle)
        except OSError as error:
            self.broken = f"sync failed ({error}); open it again"
            raise
        self._unsynced_records = self._unsynced_bytes = 0
        self._unsynced_since = None

    def _take_back(self, error: OSError) -> None:
        """Cut what a failed append left behind. If that fails too, nothing more is written: records must not follow half a record."""
        try:
            self.files.truncate(self._handle, self._size)
            # Synced, whatever the policy: else a lost host could bring back a batch that nobody was told of, under a version used since.
            self.files.sync(self._handle)
        except OSError as again:
            self.broken = self.broken or f"a failed write ({error}) could not be taken back ({again}); open it again"

    def _write(self, handle: Any, data: bytes) -> None:
        taken = self.files.write(handle, data)
        while taken < len(data):
            data = data[taken:]
            taken = self.files.write(handle, data)
            if not taken:
                raise OSError("the file takes no more bytes")

    def _failed(self, what: str, error: OSError) -> JournalFailed:
        return JournalFailed(self.folder, f"{what}: {error.strerror or error}")

    def tick(self, now_ms: int) -> None:
        """Sync what has waited long enough; call it every now and then. Raises JournalFailed."""
        if self._unsynced_since is not None and not self.broken and self._sync_due(now_ms):
            try:
                self._sync()
            except OSError as error:
                raise self._failed("sync", error) from error

    def sync(self) -> None:
        """Sync everything written so far. Raises JournalFailed."""
        if self.broken:
            raise JournalFailed(self.folder, self.broken)
        try:
            self._sync()
        except OSError as error:
            raise self._failed("sync", error) from error

    # --- segments ------------------------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether a snapshot should begin a new segment."""
        return self._size >= self._due_size and not self.broken

    def overdue(self) -> bool:
        """Whether nobody has seen to it for as long again: a program that never calls `tick`."""
        return self._size >= 2 * self._due_size and not self.broken

    def start(self, version: int, snapshot: bytes, pools: bytes) -> bool:
        """Begin a new segment with a snapshot, and let the oldest go; whether it was done.

        It is written under another name, synced and renamed, so that a segment is whole or not there. If there is one to go on with,
        failing is no harm: it is tried again when that has grown by another quarter. Raises JournalFailed for the very first one.
        """
        name, old = f"{version:020d}.kvj", self._handle
        path, temporary = self._path(name), self._path(f"{name}.tmp")
        head = _encode_header(version, pools) + _encode_record(SNAPSHOT, version, snapshot)
        handle = None
        try:
            with contextlib.suppress(FileNotFoundError):
                self.files.remove(temporary)
            if old is not None:
                self._sync()  # the older segment's history stays whole
            handle = self.files.create(temporary)
            self._write(handle, head)
            self.files.sync(handle)
            self.files.rename(temporary, path)
        except OSError as error:
            failed = self._failed("new segment", error)
            with contextlib.suppress(OSError):
                if handle is not None:
                    self.files.close(handle)
                self.files.remove(temporary)
            if old is None:
                raise failed from error
            self.snapshot_failed = failed.text
            self._due_size = self._size + max(1, self.segment_bytes // 4)
            return False
        try:
            self.files.sync_folder(self.folder)
        except OSError as error:
            # The next life may find either segment to be the newest: nothing may be written to any of them.
            self.broken = f"new segment: {error}; open it again"
            raise self._failed("new segment", error) from error
        if old is not None:
            with contextlib.suppress(OSError):
                self.files.close(old)
        self.name, self.version, self._handle, self._size, self._start = name, version, handle, len(head), len(head)
        self._due_size = self._start + max(self.segment_bytes, len(head))  # a large state is not written over and over
        self._unsynced_records = self._unsynced_bytes = 0
        self._unsynced_since, self.snapshot_failed = None, ""
        with contextlib.suppress(OSError):  # what cannot be removed now is removed with the next one
            for each in segment_names(self.files.names(self.folder))[: -self.segments_kept]:
                self.files.remove(self._path(each))
        return True

    def stats(self) -> dict[str, Any]:
        """For people and programs: where it is, what is not synced, and what is wrong with it ("" if nothing)."""
        return {
            "folder": self.folder,
            "segment": self.name,
            "bytes": self._size,
            "unsynced_batches": self._unsynced_records,
            "wrong": self.broken or self.snapshot_failed,
        }

    def close(self) -> None:
        """Sync, and let others have the folder."""
        with contextlib.suppress(OSError):
            if self._handle is not None and not self.broken and self._unsynced_records:
                self._sync()
        for handle in (self._handle, self._lock):
            if handle is not None:
                with contextlib.suppress(OSError):
                    self.files.close(handle)
        self._handle = self._lock = None
        self.broken = self.broken or "closed"
