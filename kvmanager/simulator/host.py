"""Host: the manager's process and its machine in the simulated system. It does what `server` does, on simulated sockets, clock and disk.

The process may be killed at any operation of its journal: before a write, in the middle of one, after it and before anybody has heard of
it. Its machine may be lost, and of what was not synced then only some is there. What comes back is a new manager on the same files.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgpack

from kvmanager.config import ManagerConfig
from kvmanager.errors import JournalCorrupt, JournalFailed, KVError
from kvmanager.log.files import MemoryFiles, Stopped
from kvmanager.log.journal import Journal, Segment, segment_names
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.command_wire import command_from_wire
from kvmanager.machine.commands import Command, Tick
from kvmanager.machine.queries import is_query
from kvmanager.manager import KVManager
from kvmanager.service import wire
from kvmanager.simulator.books import Broken, demand
from kvmanager.simulator.watch import Watch
from kvmanager.simulator.world import Network, World

__all__ = ["Host"]

TICK_US = 50_000
HEARTBEAT_US = 200_000


class Host:
    """watch        sees every batch before anybody else
    subscribers  name of the link -> where publications go
    saw          called after `watch` with every batch and the client it came from
    """

    def __init__(self, world: World, network: Network, config: ManagerConfig, watch: Watch, saw: Callable[[EventBatch, int], None]) -> None:
        self.world, self.network, self.config, self.watch, self.saw = world, network, config, watch, saw
        rng = world.rng
        self.fsync = rng.choice(("never", "group", "group", "always"))
        self.segment_bytes, self.segments_kept = rng.choice((3_000, 20_000, 1 << 20)), rng.choice((1, 2, 3))
        self.skew_ms = 1000
        self.subscribers: dict[str, Callable[[bytes, bytes], None]] = {}
        self.seen: Counter[str] = Counter()
        self.files = MemoryFiles()
        self.manager: KVManager | None = None
        self._doing: tuple[Command, int] = Tick(), KVManager.CLIENT
        self._quiet_since = 0
        self.start()
        self._tick()

    def clock(self) -> int:
        return self.world.now_us // 1000 + self.skew_ms

    # --- life ---

    def start(self) -> None:
        """A new process on the files that there are. If that is killed too, another one follows."""
        journal = Journal(
            "/journal",
            fsync=self.fsync,
            group_ms=5,
            group_records=20,
            segment_bytes=self.segment_bytes,
            segments_kept=self.segments_kept,
            files=self.files,
        )
        self.files.fault = self._fault
        try:
            manager = KVManager(self.config, clock=self.clock, journal=journal)
        except Stopped:
            self._die()
            return
        except JournalFailed:
            self._die(lost=False)
            return
        self.manager = manager
        if manager.recovered is None:
            self.watch.begin(manager)
        else:
            for batch in self.watch.resume(manager, *self._doing):
                self.saw(batch, self._doing[1])
            self.seen["restart"] += 1
        manager.subscribe(self._on_batch)

    def _fault(self, operation: str, name: str, size: int) -> int | None:
        """What becomes of one operation on the disk; see MemoryFiles."""
        rng, happens = self.world.rng, self.world.faults.happens
        if self.watch.manager is None:
            return None  # the very first start
        if happens("crash", rng):
            self.seen[f"killed at {operation}"] += 1
            if operation == "write":
                return rng.choice((0, rng.randrange(size + 1), size))
            raise Stopped
        if operation in ("write", "sync", "create", "rename", "sync_folder") and happens("disk", rng):
            self.seen[f"failed {operation}"] += 1
            if operation == "write":
                return ~rng.randrange(size + 1)
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return None

    def _die(self, lost: bool | None = None) -> None:
        """The process is gone. If `lost`, its machine too, with some of what was not synced."""
        rng = self.world.rng
        self.manager = None
        self.files.fault = lambda operation, name, size: None
        if lost is None:
            lost = self.world.faults.happens("torn", rng)
        if lost:
            self.seen["host lost"] += 1
            self.files = self.files.lost(
                lambda name, unsynced: rng.choice((0, rng.randrange(unsynced + 1), unsynced)), names=rng.random() < 0.5
            )
            self.watch.lost(synced=self.fsync == "always")
            # Another machine has another clock.
            self.skew_ms = rng.choice((self.skew_ms, 1000 - self.world.now_us // 1000, 10_000_000))
        else:
            self.files = self.files.killed()
        if self.world.faults.happens("rot", rng):
            self._rot()
        self.world.after(rng.choice((1_000, 30_000, 300_000, 300_000, 2_500_000)), self.start)

    def _rot(self) -> None:
        """A bit of the newest segment flips. In its middle that must be refused; at its very end it looks like a torn tail."""
        rng, files = self.world.rng, self.files
        names = segment_names(files.names("/journal"))
        if not names:
            return
        size = len(files.read(names[-1]))
        at, mask = rng.randrange(size), 1 << rng.randrange(8)
        files.damage(names[-1], at, mask)
        try:
            for _ in Segment(names[-1], files.read(names[-1])):
                pass
        except JournalCorrupt:
            self.seen["rot refused"] += 1
        files.damage(names[-1], at, mask)  # somebody brings the intact file back

    def crash(self) -> None:
        """Killed between two instructions, with nothing in the middle of being written."""
        self.seen["killed"] += 1
        self._die()

    def _tick(self) -> None:
        rng = self.world.rng
        self.world.after(TICK_US, self._tick)
        if self.manager is None:
            return
        if self.world.faults.happens("clock", rng):
            self.skew_ms += rng.choice((-3_000, -500, 300, 900, 1500, 1500, 20_000))
        if self.world.faults.happens("crash", rng):
            self.crash()
            return
        self._doing = Tick(), KVManager.CLIENT
        try:
            self.manager.tick()
        except Stopped:
            self._die()
            return
        except JournalFailed:
            self._check_journal()
            return
        if self.world.now_us - self._quiet_since >= HEARTBEAT_US:
            self._heartbeat()

    def _check_journal(self) -> None:
        """A journal that can take no more until it is opened again: the process ends itself."""
        if self.manager is not None and self.manager.journal is not None and self.manager.journal.broken:
            self.seen["journal broken"] += 1
            self._die(lost=False)

    def journal_files(self) -> dict[str, bytes]:
        """The journal's files as they are."""
        files = self.files.killed()
        return {name: files.read(name) for name in segment_names(files.names("/journal"))}

    # --- requests ---

    def serve(self, data: bytes, link: str, answer: Callable[[bytes], None]) -> None:
        if self.manager is None:
            return
        client, number, message = wire.decode_request(data)
        try:
            reply = wire.encode_ok(number, self._answer(self.manager, client, number, message))
        except KVError as error:
            self.seen[f"refused {error.code}"] += 1
            reply = wire.encode_error(number, error)
            self._check_journal()
        except Stopped:
            self._die()
            return
        if self.manager is not None and self.world.faults.happens("crash", self.world.rng):
            self.crash()
            return
        self.network.send("manager", link, answer, reply)

    def _answer(self, manager: KVManager, client: int, number: int, message: dict[str, Any]) -> bytes:
        if message["t"] == "hello":
            self._heartbeat()
            return msgpack.packb({"epoch": manager.state.epoch})
        if is_query(message) or message["t"] == "batches":
            answer = manager.query(message)
            self.watch.asked(message, answer)
            return msgpack.packb(answer)
        command = command_from_wire(message)
        self._doing = command, client
        version = manager.state.version
        try:
            return manager.execute(command, client, number)
        except KVError as error:
            demand(manager.state.version == version, f"a command was refused with {error.code} and made a version")
            raise

    # --- publications ---

    def _on_batch(self, batch: EventBatch, data: bytes) -> None:
        command, client = self._doing
        self.watch.saw(batch, data, command, client)
        self.saw(batch, client)
        self._publish(wire.BATCH_TOPIC, data)

    def _heartbeat(self) -> None:
        if self.manager is None:
            raise Broken("a heartbeat without a manager")
        state = self.manager.state
        self._publish(wire.HEARTBEAT_TOPIC, wire.encode_heartbeat(state.epoch, state.version, state.tables.digest()))

    def _publish(self, topic: bytes, data: bytes) -> None:
        for link, deliver in self.subscribers.items():
            self.network.send("log", link, deliver, topic, data)
        self._quiet_since = self.world.now_us
