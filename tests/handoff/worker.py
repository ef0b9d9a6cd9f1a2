"""A worker process without a model: it writes recognisable numbers into pages that lie in a file, and pulls pages out of others' files.

Slot p of sequence s holds `stamp(s, p)`. Before it writes a step it reads everything that the sequence has, and ends with EXIT_FOREIGN if
one slot holds something else: so no test has to look for what a page reused too early does to somebody who has nothing to do with it.

A gate is a file `<name>.<point>` in the folder: whoever comes to the point says so (`.reached`) and waits until the file is gone. Points:
write, written (not acknowledged yet), pull.<n> (before the nth page), pulled (copied, not reported yet).
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zlib
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgpack
import numpy as np
import zmq

from kvmanager import Follower, KVClient, Replica
from kvmanager.errors import Fenced, StaleEpoch
from kvmanager.worker.replica import Pull

EXIT_FENCED, EXIT_FOREIGN = 3, 9


def stamp(sequence: int, positions: np.ndarray) -> np.ndarray:
    """int64, never 0."""
    return (sequence % 1_000_003 + 1) * 1_000_000 + positions


class Worker:
    def __init__(self, folder: Path, manager: str, pool: str, name: str, lease_ms: int) -> None:
        self.folder, self.name = folder, name
        self.client = KVClient(manager, timeout_ms=30_000, resend_ms=100)
        shape = self.client.stats()["pools"][pool]
        self.page_size, pages = shape["page_size"], shape["pages"]["total"]
        path = folder / f"{name}.{os.getpid()}.pages"
        self.memory = np.memmap(path, np.int64, "w+", shape=(pages, self.page_size))
        self.replica = Replica(pool)
        self.follower = Follower(self.client, self.replica)
        memory = msgpack.packb([str(path), pages, self.page_size])
        self.worker = self.client.join(name, pool, f"stamps/{self.page_size}", memory=memory, lease_ms=lease_ms)
        self.replica.joined(self.worker)
        self.renew_s, self.acked_at = lease_ms / 4000, time.monotonic()
        self.done: dict[int, int] = {}
        self.under_way: dict[int, threading.Event] = {}  # pulls; set to have one end early
        self.ended: SimpleQueue[tuple[Pull, str]] = SimpleQueue()
        joined = folder / f"{name}.joined.new"
        joined.write_text(json.dumps([self.worker, self.client.epoch_of(self.worker), str(path)]))
        joined.rename(folder / f"{name}.joined")

    def gate(self, point: str) -> None:
        file = self.folder / f"{self.name}.{point}"
        if file.exists():
            (self.folder / f"{self.name}.{point}.reached").touch()
            while file.exists():
                time.sleep(0.002)

    def serve(self) -> None:
        while True:
            self.follower.socket.poll(10, zmq.POLLIN)
            self.follower.poll(0)
            self.pull()
            while self.replica.step:
                self.run()
            content = self.replica.ack()
            if content is None and time.monotonic() - self.acked_at > self.renew_s:
                content = self.replica.renewal()
            if content is not None:
                self.client.ack(self.worker, **content._asdict())
                self.acked_at = time.monotonic()

    def run(self) -> None:
        """The step that is due, for whoever has something to write in it."""
        version, tables = self.replica.step, self.replica.tables
        own = [each for each in tables.open_ids().tolist() if tables.pool_of(each) == self.replica.pool]
        due = [each for each in own if tables.length(each) > self.done.get(each, 0)]
        self.gate("write")
        for sequence in due:
            length, start = tables.length(sequence), self.done.get(sequence, 0)
            flat = self.memory[tables.pages_of(sequence)].reshape(-1)
            if not np.array_equal(flat[:start], stamp(sequence, np.arange(start))):
                print(f"{self.name}: step {version}: sequence {sequence} of {start} tokens holds {flat[:start]}", file=sys.stderr)
                os._exit(EXIT_FOREIGN)
            positions = np.arange(start, length)
            pages = tables.pages_of(sequence)
            self.memory[pages[positions // self.page_size], positions % self.page_size] = stamp(sequence, positions)
            self.done[sequence] = length
        self.gate("written")
        self.replica.finish(version, own)

    def pull(self) -> None:
        wanted = {pull.handoff: pull for pull in self.replica.pulls()}
        for handoff, pull in wanted.items():
            if handoff not in self.under_way:
                self.replica.begin_pull(handoff)
                self.under_way[handoff] = threading.Event()
                threading.Thread(target=self.copy, args=(pull, self.under_way[handoff]), daemon=True).start()
        for handoff, stop in self.under_way.items():
            if handoff not in wanted:
                stop.set()
        while not self.ended.empty():
            pull, error = self.ended.get()
            del self.under_way[pull.handoff]
            if error:
                self.replica.pull_failed(pull.handoff, error)
            else:
                there = pull.shared_pages * self.page_size + pull.tokens  # so far, if it is streamed
                self.done[pull.sequence] = max(there, self.done.get(pull.sequence, 0))
                self.replica.pulled(pull.handoff)

    def copy(self, pull: Pull, stop: threading.Event) -> None:
        """In a thread of its own: a transfer that hangs hangs alone."""
        try:
            self.ended.put((pull, self.copied(pull, stop)))
        except Exception as error:  # noqa: BLE001 - whatever went wrong with it is told to the manager
            self.ended.put((pull, f"{type(error).__name__}: {error}"))

    def copied(self, pull: Pull, stop: threading.Event) -> str:
        path, pages, size = msgpack.unpackb(pull.peer.memory)
        source = np.memmap(path, np.int64, "r", shape=(pages, size))
        slots = source[pull.source_pages].reshape(-1)[pull.source_skip :][: pull.tokens]
        for place, page in enumerate(pull.target_pages.tolist()):
            self.gate(f"pull.{place}")
            if stop.is_set():
                return ""
            part = slots[place * self.page_size :][: self.page_size]
            self.memory[page, : len(part)] = part
            spoil = self.folder / f"{self.name}.spoil"
            if spoil.exists() and int(spoil.read_text()) > pull.attempt:
                self.memory[page, 0] ^= 1 << 40
            expected, got = zlib.crc32(part.tobytes()), zlib.crc32(self.memory[page, : len(part)].tobytes())
            if expected != got:
                return f"page {page}: expected checksum {expected:08x}, got {got:08x}"
        self.gate("pulled")
        return ""


def main(arguments: list[str]) -> Any:
    folder, manager, pool, name, lease_ms = arguments
    try:
        Worker(Path(folder), manager, pool, name, int(lease_ms)).serve()
    except (Fenced, StaleEpoch) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_FENCED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
