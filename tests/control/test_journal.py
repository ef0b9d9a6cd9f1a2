"""The journal: what a manager is after its process was killed, its host lost, its disk full or its file damaged."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmanager.errors import InvalidValue, JournalCorrupt, JournalFailed
from kvmanager.log.files import Files, MemoryFiles, Stopped
from kvmanager.log.journal import Journal, Segment
from kvmanager.log.recovery import replay
from kvmanager.machine.snapshot import state_digest
from kvmanager.manager import KVManager
from tests.control.journaled import CONFIG, Life, reborn


def lived(steps: int = 12, seed: int = 1, **more: object) -> Life:
    life = Life(MemoryFiles(), **more)
    life.join()
    life.live(steps, seed)
    return life


def segment_of(life: Life) -> tuple[str, bytes]:
    return life.segment, life.files.read(f"/journal/{life.segment}")


def last_record(data: bytes) -> int:
    """Offset of the last record."""
    segment = Segment("s", data)
    return [record.offset for record in segment][-1]


# --- what is in the files --------------------------------------------------------------------------------------------------------


def test_journal_holds_the_published_bytes_byte_for_byte() -> None:
    """The log is one thing: what is written is what was published, in order, each behind its version, length and checksums."""
    life = lived()
    _, data = segment_of(life)
    magic, number, size, _, version, _, _, crc = struct.unpack_from("<8sHHIQ32sII", data)
    assert (magic, number, size, version) == (b"\x8bKVLOG\r\n", 1, 64, 0)
    assert crc == zlib.crc32(data[:60])
    at, found = 64, []
    while at < len(data):
        mark, length, version, payload_crc, head_crc = struct.unpack_from("<4sIQII", data, at)
        payload = data[at + 24 : at + 24 + length]
        assert payload_crc == zlib.crc32(payload) and head_crc == zlib.crc32(data[at : at + 20])
        found.append((mark, version, payload))
        at += 24 + length
    assert [mark for mark, _, _ in found] == [b"\xb5KVs"] + [b"\xb5KVb"] * (len(found) - 1)
    assert [(version, payload) for _, version, payload in found[2:]] == life.published[1:]


def test_recovered_state_equals_the_live_one_at_every_version() -> None:
    life = lived(40, 3)
    name, data = segment_of(life)
    for record in list(Segment(name, data)):
        state, _ = replay(CONFIG, Segment(name, data[: record.offset]))
        assert state.version == record.version - 1
        assert state.version < 1 or state_digest(state) == life.digests[state.version]


def test_a_new_folder_is_made_and_a_second_manager_refused(tmp_path: Path) -> None:
    """Two writers would tear each other's records. A killed process holds no lock."""
    folder = tmp_path / "journal"
    first = KVManager(CONFIG, journal=folder)
    assert sorted(os.listdir(folder)) == [f"{0:020d}.kvj", "lock"]
    with pytest.raises(InvalidValue, match="no other manager"):
        KVManager(CONFIG, journal=folder)
    first.disconnect()
    with pytest.raises(JournalFailed):
        first.join("w", "main", "bf16")
    second = KVManager(CONFIG, journal=str(folder))
    assert second.state.epoch == first.state.epoch + 1
    second.disconnect()


def test_a_folder_whose_parent_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalFailed, match="No such file"):
        KVManager(CONFIG, journal=tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("name", "value"),
    [("fsync", "sometimes"), ("group_ms", 0), ("group_records", 1_000_000), ("segment_bytes", 0), ("segments_kept", 0)],
)
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=name):
        Journal("/journal", **{name: value})


# --- torn and damaged ------------------------------------------------------------------------------------------------------------

LIVED = lived(10, 5)
NAME, DATA = segment_of(LIVED)
START = Segment(NAME, DATA).start


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(DATA) - 1))
def test_every_truncation_recovers_to_a_prefix(size: int) -> None:
    """Behind the snapshot, any cut is a torn tail; within it, the file was never a whole segment."""
    files = LIVED.files.killed()
    files._files = {NAME: type(files._files[NAME])(bytearray(DATA), len(DATA))}
    files.cut(NAME, size)
    if size < START:
        with pytest.raises(JournalCorrupt):
            Life(files)
        return
    life = Life(files)
    assert life.kv.recovered is not None
    before = max(version for version in [0, *LIVED.digests] if version <= life.kv.recovered.segment.last)
    state, _ = replay(CONFIG, Segment(NAME, DATA[:size]))
    assert state.version == life.kv.recovered.segment.last == before
    assert before == 0 or state_digest(state) == LIVED.digests[before]
    ends = [START, *(record.offset for record in Segment(NAME, DATA))]
    assert life.kv.recovered.torn == size - max(end for end in ends if end <= size)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_every_flipped_bit_is_found(offset: int, bit: int) -> None:
    """In the last record it looks like a torn tail, and is cut; anywhere before, it is refused, with the place."""
    data = bytearray(DATA)
    data[offset] ^= 1 << bit
    last = last_record(DATA)
    if offset >= last:
        state, _ = replay(CONFIG, segment := Segment(NAME, bytes(data)))
        assert (segment.end, segment.torn) == (last, len(DATA) - last)
        assert state_digest(state) == LIVED.digests[state.version]
        return
    with pytest.raises(JournalCorrupt) as caught:
        replay(CONFIG, Segment(NAME, bytes(data)))
    assert caught.value.details["file"] == NAME
    assert caught.value.details["offset"] <= offset < caught.value.details["offset"] + 24 + 4096 or offset < START


def test_zeros_behind_the_last_record_are_a_torn_tail() -> None:
    """A lost host may leave a file longer than what was written into it."""
    segment = Segment(NAME, DATA + bytes(5000))
    assert len(list(segment)) == len(list(Segment(NAME, DATA)))
    assert (segment.end, segment.torn) == (len(DATA), 5000)


def test_records_out_of_order_are_refused() -> None:
    records = [record.offset for record in Segment(NAME, DATA)]
    twice = DATA + DATA[records[-1] :]
    with pytest.raises(JournalCorrupt, match=f"offset {len(DATA)}: expected the record of version"):
        list(Segment(NAME, twice))
    missing = DATA[: records[3]] + DATA[records[4] :]
    with pytest.raises(JournalCorrupt, match=f"offset {records[3]}"):
        list(Segment(NAME, missing))


def test_another_format_is_refused_by_name() -> None:
    head = DATA[:8] + struct.pack("<H", 2) + DATA[10:60]
    with pytest.raises(JournalCorrupt, match="expected format 1, got format 2"):
        Segment(NAME, head + struct.pack("<I", zlib.crc32(head)) + DATA[64:])
    with pytest.raises(JournalCorrupt, match="expected the magic"):
        Segment(NAME, DATA.replace(b"\r\n", b"\n", 1) + b"!")  # what a file copied as text looks like


# --- killed in the middle --------------------------------------------------------------------------------------------------------


def test_killed_at_every_operation_of_a_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each file operation of start, steps and a new segment: what was published is there after the restart."""
    stop = 0
    while True:
        files, published = MemoryFiles(), {}
        ended = False
        with files.stop_at(stop):
            try:
                life = Life(files, segment_bytes=1500)
                published = life.digests
                life.join()
                life.live(6, 2)
                life.kv.compact()
                life.live(3, 4)
                ended = True
            except Stopped:
                pass
        again = reborn(files)
        newest = max(published, default=0)
        if newest:
            assert again.kv.recovered is not None
            found = replay(CONFIG, Segment("s", files.read(f"/journal/{again.segment}")))[0].past
            assert list(found.values())[-1] >= newest  # one more may have been written and not published
        again.acknowledge()
        again.live(2, 9)
        if ended:
            break
        stop += 1
    assert stop > 40


@pytest.mark.parametrize("fsync", ["never", "group", "always"])
@pytest.mark.parametrize("kept", [0, 7, 10_000])
def test_lost_host_keeps_what_was_synced(fsync: str, kept: int) -> None:
    """`always` loses nothing that was published; the others lose whole batches at the end, never one in the middle."""
    life = Life(MemoryFiles(), fsync=fsync, group_records=5, group_ms=10_000)
    life.join()
    life.live(10, 3)
    again = Life(life.files.lost(lambda name, unsynced: kept))
    assert again.kv.recovered is not None
    last = again.kv.recovered.segment.last
    lost = life.kv.state.version - last
    assert lost == 0 if fsync == "always" or kept == 10_000 else lost < 5 if fsync == "group" else True
    if fsync == "never" and not kept:
        assert last == 1  # the beginning of a life is synced whatever the policy
    assert again.kv.state.version > life.kv.state.version, "versions are never used again"


def test_group_syncs_after_a_while_too() -> None:
    syncs: list[str] = []
    life = Life(MemoryFiles(), fsync="group", group_records=1000, group_ms=50)
    life.files.fault = lambda operation, name, size: syncs.append(name) if operation == "sync" else None
    life.join()
    assert not syncs
    life.now += 49
    life.kv.tick()
    assert not syncs
    life.now += 1
    life.kv.tick()
    assert syncs == [life.segment]
    life.now += 500
    life.kv.tick()
    assert len(syncs) == 1, "nothing is waiting"


# --- full and broken disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 1, 30])
def test_full_disk_refuses_the_command_and_changes_nothing(written: int) -> None:
    """The record is cut off again; the same request is carried out once there is room."""
    life = lived()
    before, version = state_digest(life.kv.state), life.kv.state.version
    published = len(life.published)
    life.files.fault = lambda operation, name, size: ~written if operation == "write" else None
    with pytest.raises(JournalFailed, match="No space left"):
        life.kv.step()
    assert state_digest(life.kv.state) == before and len(life.published) == published
    life.files.fault = lambda operation, name, size: None
    life.live(3, 7)
    assert life.kv.state.version > version
    again = reborn(life.files)
    assert again.kv.recovered is not None and again.kv.recovered.segment.last == life.kv.state.version and again.kv.recovered.torn == 0


def test_a_write_that_cannot_be_taken_back_stops_the_journal() -> None:
    """Nothing may follow half a record. Everything is refused until it is opened again, which cuts it."""
    life = lived()

    def fault(operation: str, name: str, size: int) -> int | None:
        if operation == "truncate":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return ~9 if operation == "write" else None

    life.files.fault = fault
    with pytest.raises(JournalFailed, match="No space left"):
        life.kv.step()
    life.files.fault = lambda operation, name, size: None
    version = life.kv.state.version
    for _ in range(2):
        with pytest.raises(JournalFailed, match="could not be taken back"):
            life.kv.step()
    assert life.kv.state.version == version
    again = reborn(life.files)
    assert again.kv.recovered is not None and (again.kv.recovered.segment.last, again.kv.recovered.torn) == (version, 9)


def test_a_failed_sync_stops_the_journal() -> None:
    """After it nobody knows what is on the disk, and asking again does not tell."""
    life = Life(MemoryFiles(), fsync="always")

    def fault(operation: str, name: str, size: int) -> int | None:
        if operation == "sync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    life.files.fault = fault
    digest = state_digest(life.kv.state)
    with pytest.raises(JournalFailed, match="Input/output error"):
        life.join()
    life.files.fault = lambda operation, name, size: None
    with pytest.raises(JournalFailed, match="sync failed"):
        life.join()
    assert state_digest(life.kv.state) == digest
    assert reborn(life.files).kv.state.workers == {}


def test_an_interrupted_write_stops_the_journal() -> None:
    """Ctrl-C between the write and its bookkeeping must not put a second record of the same version behind it."""
    life = lived()

    def fault(operation: str, name: str, size: int) -> int | None:
        raise KeyboardInterrupt

    life.files.fault = fault
    with pytest.raises(KeyboardInterrupt):
        life.kv.step()
    life.files.fault = lambda operation, name, size: None
    with pytest.raises(JournalFailed, match="interrupted"):
        life.kv.step()


def test_short_writes_are_continued() -> None:
    class Drops(MemoryFiles):
        def write(self, handle: object, data: bytes) -> int:
            return super().write(handle, data[:7])

    life = Life(Drops())
    life.join()
    life.live(5, 1)
    assert reborn(life.files).kv.recovered.segment.last == life.kv.state.version  # type: ignore[union-attr]


# --- segments --------------------------------------------------------------------------------------------------------------------


def test_a_long_segment_is_followed_by_a_snapshot_and_old_ones_go() -> None:
    life = Life(MemoryFiles(), segment_bytes=3000, segments_kept=2)
    life.join()
    seen = set()
    for turn in range(60):
        life.live(1, turn)
        life.kv.tick()
        seen.add(life.segment)
    names = [name for name in life.files.names("/journal") if name != "lock"]
    assert len(seen) > 3 and len(names) == 2 and names[-1] == life.segment
    again = reborn(life.files)
    assert again.kv.recovered is not None and again.kv.recovered.segment.last == life.kv.state.version
    state, _ = replay(CONFIG, Segment("s", life.files.read(f"/journal/{life.segment}")))
    assert state.past[1] == life.kv.state.version


def test_a_program_that_never_ticks_gets_new_segments_too() -> None:
    life = Life(MemoryFiles(), segment_bytes=1000)
    life.join()
    life.live(60, 3)
    assert life.segment != f"{0:020d}.kvj"
    assert reborn(life.files).kv.recovered.segment.last == life.kv.state.version  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_synced_costs_the_next_command_and_not_the_one_that_was_done() -> None:
    """After it either segment may be the newest for the next life, so nothing more may be written to any."""
    life = Life(MemoryFiles(), segment_bytes=1000)
    life.join()

    def fault(operation: str, name: str, size: int) -> int | None:
        if operation == "sync_folder":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    life.files.fault = fault
    with pytest.raises(JournalFailed, match="new segment"):
        for _ in range(200):
            life.kv.step()
    last = life.published[-1][0]
    assert life.kv.state.version == last
    assert reborn(life.files).kv.recovered.segment.last == last  # type: ignore[union-attr]


def test_a_segment_whose_name_was_not_synced_is_not_built_upon() -> None:
    """The simulator's find: a folder could not be synced, so the process ended; the next one went on with the new segment, its host was
    lost and the name with it, and the life after that began where an earlier one had, with the same versions for other things."""
    life = Life(MemoryFiles(), segment_bytes=1000)
    life.join()

    def fault(operation: str, name: str, size: int) -> int | None:
        if operation == "sync_folder":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    life.files.fault = fault
    with pytest.raises(JournalFailed, match="new segment"):
        for _ in range(200):
            life.kv.step()
    second = reborn(life.files)
    third = Life(second.files.lost())
    assert third.kv.recovered is not None and third.kv.recovered.segment.last >= second.kv.state.begun
    assert third.kv.state.begun > second.kv.state.version


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename"])
def test_a_snapshot_that_cannot_be_written_harms_nothing(operation: str) -> None:
    """The old segment goes on, the leftover is gone, and it is tried again later."""
    life = lived(20, 4, segment_bytes=2000)
    before = life.segment
    assert life.journal.due()

    def fault(each: str, name: str, size: int) -> int | None:
        if each == operation and (name.endswith(".tmp") or each == "rename"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return None

    life.files.fault = fault
    life.kv.tick()
    assert life.segment == before and "No space left" in life.journal.snapshot_failed and not life.journal.due()
    assert not [name for name in life.files.names("/journal") if name.endswith(".tmp")]
    life.files.fault = lambda each, name, size: None
    life.live(20, 5)
    life.kv.tick()
    assert life.segment != before and not life.journal.snapshot_failed
    assert reborn(life.files).kv.recovered.segment.last == life.kv.state.version  # type: ignore[union-attr]


def test_host_lost_around_a_new_segment() -> None:
    """Before each operation of it: either segment may be found, and both hold everything that was synced."""
    stop = 0
    while True:
        life = lived(8, 6, fsync="always")
        version = life.kv.state.version
        ended = False
        with life.files.stop_at(stop):
            try:
                life.kv.compact()
                life.kv.step()
                ended = True
            except Stopped:
                pass
        for names in (False, True):
            again = Life(life.files.lost(names=names))
            assert again.kv.recovered is not None and again.kv.recovered.segment.last in (version, version + 1)
        if ended:
            break
        stop += 1
    assert stop >= 8


def test_real_files(tmp_path: Path) -> None:
    """The operating system's files do what those in memory do."""
    journal = Journal(str(tmp_path), fsync="always", segment_bytes=2000, segments_kept=1, files=Files())
    life = Life.__new__(Life)
    life.now, life.digests, life.published = 1000, {}, []
    life.journal = journal
    life.kv = KVManager(CONFIG, clock=lambda: life.now, journal=journal)
    life.join()
    for turn in range(20):
        life.live(1, turn)
        life.kv.tick()
    digest, version = state_digest(life.kv.state), life.kv.state.version
    life.kv.disconnect()
    assert len(os.listdir(tmp_path)) == 2
    with open(tmp_path / journal.name, "ab") as file:
        file.write(b"\xb5KVb torn")
    again = Journal(str(tmp_path))
    segment = again.recover()
    assert segment is not None
    state, _ = replay(CONFIG, segment)
    assert (state.version, state_digest(state)) == (version, digest)
    assert again.resume(segment) == 9
    again.close()
    assert os.path.getsize(tmp_path / journal.name) == segment.end
    assert (tmp_path / journal.name).stat().st_mode & 0o077 == 0, "tokens of all tenants are in it"
