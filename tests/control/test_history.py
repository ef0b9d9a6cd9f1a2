"""What `kvmanager inspect` answers, against the states that the live manager went through."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kvmanager.cli import main
from kvmanager.errors import InvalidValue, JournalCorrupt
from kvmanager.log.files import MemoryFiles
from kvmanager.log.history import History, PageWatch, SequenceWatch
from kvmanager.log.journal import Journal
from kvmanager.machine.snapshot import state_digest
from kvmanager.manager import KVManager
from tests.control.journaled import CONFIG, Life


class Recorded(Life):
    """Remembers who held which page after every version, from the state alone."""

    def note(self, data: bytes = b"") -> None:
        super().note(data)
        if not hasattr(self, "held"):
            self.held: dict[int, dict[tuple[str, int], set[tuple[str, int]]]] = {}
        state, now = self.kv.state, {}
        for pool in state.pools:
            for page in range(pool.num_pages):
                found: set[tuple[str, int]] = set()
                for sequence in state.sequences.values():
                    if sequence.pool == pool.index and page in state.tables.pages_of(sequence.sequence_id).tolist():
                        found.add(("sequence", sequence.sequence_id))
                for handoff in state.handoffs.values():
                    for index, pages in ((handoff.source, handoff.source_pages), (handoff.target, handoff.target_pages)):
                        if index == pool.index and page in list(pages):
                            found.add(("handoff", handoff.handoff_id))
                if pool.prefix.node_of[page] is not None:
                    found.add(("index", 0))
                found |= {("quarantine", each.version) for each in pool.quarantine.values() if page in list(each.pages)}
                now[pool.name, page] = found or {("free", 0)}
        self.held[state.version] = now


@pytest.fixture(scope="module")
def lives() -> tuple[Recorded, MemoryFiles]:
    """Two lives in several segments, all kept."""
    first = Recorded(MemoryFiles(), segment_bytes=4000, segments_kept=100)
    first.join()
    for turn in range(30):
        first.live(1, turn)
        first.kv.tick()
    second = Recorded(first.files.killed(), segment_bytes=4000, segments_kept=100)
    second.acknowledge()
    for turn in range(20):
        second.live(1, 100 + turn)
        second.kv.tick()
    second.held |= first.held
    second.digests |= first.digests
    return second, second.files


def test_state_at_every_version(lives: tuple[Recorded, MemoryFiles]) -> None:
    life, files = lives
    for version, digest in life.digests.items():
        assert state_digest(History("/journal", files).replay(version)) == digest
    assert state_digest(History("/journal", files).replay()) == life.digests[life.kv.state.version]


def test_every_page_s_history_is_what_the_manager_went_through(lives: tuple[Recorded, MemoryFiles]) -> None:
    """Over segments and lives, for each page of each pool, at each version."""
    life, files = lives
    for pool in CONFIG.pools:
        for page in range(pool.num_pages):
            watch = PageWatch(pool.name, page)
            History("/journal", files).replay(None, watch)
            for version, held in life.held.items():
                then = {
                    (each.holding.kind, each.holding.ident)
                    for each in watch.intervals
                    if each.first <= version and (each.end is None or version < each.end)
                }
                assert then == held[pool.name, page], (pool.name, page, version)


def test_a_page_s_tokens_are_those_of_its_place(lives: tuple[Recorded, MemoryFiles]) -> None:
    life, files = lives
    state = life.kv.state
    for sequence in state.sequences.values():
        for index, page in enumerate(state.tables.pages_of(sequence.sequence_id).tolist()):
            watch = PageWatch(state.pools[sequence.pool].name, page)
            History("/journal", files).replay(None, watch)
            now = [each.holding for each in watch.intervals if each.end is None and each.holding.kind in ("sequence", "index")]
            assert {each.tokens for each in now} == {(index * 16, index * 16 + 16)}
            assert sequence.sequence_id in [each.ident for each in now]


def test_a_pin_is_a_holder() -> None:
    life = Life(MemoryFiles())
    life.join()
    life.kv.open(np.arange(40, dtype=np.int32), "main", chunk=40)
    life.acknowledge()
    pin = life.kv.pin(np.arange(32, dtype=np.int32), "main").pin
    watch = PageWatch("main", 0)
    History("/journal", life.files).replay(None, watch)
    assert ("pin", pin, (0, 16)) in [each.holding[:3] for each in watch.intervals if each.end is None]


def test_sequence_that_was_closed_is_shown_as_it_last_was(lives: tuple[Recorded, MemoryFiles]) -> None:
    life, files = lives
    state = History("/journal", files).replay(20)
    ids = list(state.sequences)
    assert ids
    for sequence in ids:
        watch = SequenceWatch(sequence)
        History("/journal", files).replay(None, watch)
        assert watch.opened is not None and watch.opened <= 20
        if sequence in life.kv.state.sequences:
            assert watch.closed is None
        else:
            assert watch.closed is not None and watch.last is not None
            before = History("/journal", files).replay(watch.closed - 1)
            assert [row["page"] for row in watch.last["table"]] == before.tables.pages_of(sequence).tolist()


def test_history_says_that_it_begins_in_the_middle() -> None:
    """Older segments are gone: what held the page then is shown as from before."""
    life = Life(MemoryFiles(), segments_kept=1)
    life.join()
    sequence = life.kv.open(np.arange(20, dtype=np.int32), "main", chunk=20).sequence
    page = life.kv.state.tables.pages_of(sequence).tolist()[0]
    life.kv.compact()
    watch = PageWatch("main", page)
    history = History("/journal", life.files)
    history.replay(None, watch)
    assert [(each.holding.kind, each.first, each.end) for each in watch.intervals] == [("sequence", 0, None)]
    with pytest.raises(InvalidValue, match=f"--at: expected at least {life.kv.state.version}"):
        History("/journal", life.files).replay(2)


def test_damage_and_torn_tail_are_part_of_the_answer() -> None:
    life = Life(MemoryFiles())
    life.join()
    life.live(10, 1)
    data = life.files.read(f"/journal/{life.segment}")
    life.files.cut(life.segment, len(data) - 5)
    history = History("/journal", life.files)
    assert history.replay().version == life.kv.state.version - 1 and history.torn > 0
    life.files.damage(life.segment, len(data) // 2, 4)
    history = History("/journal", life.files)
    state = history.replay()
    assert isinstance(history.damage, JournalCorrupt) and state_digest(state) == life.digests[state.version]


# --- the command -----------------------------------------------------------------------------------------------------------------


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal of a manager that is still running."""
    life = Life.__new__(Life)
    life.now, life.digests, life.published = 1000, {}, []
    life.journal = Journal(str(tmp_path / "j"))
    life.kv = KVManager(CONFIG, clock=lambda: life.now, journal=life.journal)
    life.join()
    life.kv.open(np.arange(40, dtype=np.int32), "main", tenant=b"alice", extra=b"\xff", chunk=40)
    life.acknowledge()
    return tmp_path / "j"


def read(*arguments: object) -> dict[str, Any]:
    done = inspect(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_inspect_a_running_manager_s_journal(folder: Path) -> None:
    found = read(folder)
    assert (found["epoch"], found["version"], found["torn_bytes"], found["damage"]) == (1, 6, 0, None)
    assert found["pools"]["main"]["pages"] == {"free": 21, "used": 3, "cached": 0, "quarantined": 0, "total": 24}
    assert found["open"][0]["tenant"] == "alice" and found["segments"][0]["batches"] == 6
    assert read(folder, "--at", 3)["open"] == []
    text = inspect(folder).stdout
    assert "version 6" in text and "alice" in text and re.search(r"main +21 +3 +0 +0 +24", text)


def test_inspect_a_page_and_a_sequence(folder: Path) -> None:
    sequence = read(folder)["open"][0]["sequence"]
    found = read(folder, "--sequence", sequence)
    assert found["is_open"] and found["opened_at"] == 4 and (found["tenant"], found["extra"]) == ("alice", "0xff")
    assert [row["tokens"] for row in found["table"]] == [[0, 16], [16, 32], [32, 48]]
    page = found["table"][1]["page"]
    held = read(folder, "--page", page, "--pool", "main")["held"]
    assert [(each["kind"], each["first"], each["end"]) for each in held] == [
        ("free", 1, 4),
        ("sequence", 4, None),
        ("index", 5, None),
    ]
    assert held[1]["tokens"] == held[2]["tokens"] == [16, 32] and held[1]["note"] == "alice"
    assert "prefix index" in inspect(folder, "--page", page, "--pool", "main").stdout
    assert "alice" in inspect(folder, "--sequence", sequence).stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--page", "1"], "--pool: expected one of main, other"),
        (["--page", "24", "--pool", "main"], "--page: expected 0..23"),
        (["--page", "1", "--pool", "nowhere"], "pool: nowhere is not known"),
        (["--sequence", "5"], "sequence: 5 is not known"),
        (["--sequence", "5", "--page", "1"], "--page or --sequence, not both"),
        (["--at", "7"], "--at: expected at most 6"),
    ],
)
def test_inspect_says_what_it_cannot_show(folder: Path, arguments: list[str], expected: str) -> None:
    done = inspect(folder, *arguments)
    assert done.exit_code == 2 and expected in done.output


def test_inspect_of_something_else_is_refused(tmp_path: Path) -> None:
    assert "a folder with segments" in inspect(tmp_path).output
    assert "a folder that can be read" in inspect(tmp_path / "none").output
    (tmp_path / f"{0:020d}.kvj").write_bytes(b"x" * 100)
    done = inspect(tmp_path)
    assert done.exit_code == 2 and "expected the magic" in done.output


def test_inspect_of_a_damaged_journal_shows_what_lies_before_and_exits_1(folder: Path) -> None:
    [name] = [name for name in os.listdir(folder) if name.endswith(".kvj")]
    data = bytearray((folder / name).read_bytes())
    with open(folder / name, "ab") as file:
        file.write(b"torn")
    assert read(folder)["torn_bytes"] == 4
    assert "torn tail: 4 bytes" in inspect(folder).stdout
    data[-400] ^= 1
    (folder / name).write_bytes(bytes(data))
    done = inspect(folder, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["version"] < 6 and found["damage"]["offset"] > 0 and found["damage"]["file"] == name
    assert "DAMAGED" in inspect(folder).stdout
