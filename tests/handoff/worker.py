"""A worker process without a model: it writes recognisable numbers into pages that lie in a file, and pulls pages out of others' files.

Slot p of sequence s holds `stamp(s, p, layer)` in each of LAYERS layers. Before it writes a step it reads everything that the sequence has, and ends
with EXIT_FOREIGN if one slot holds something else: so no test has to look for what a page reused too early does to somebody who has nothing to do with it.

A gate is a file `<name>.<point>` in the folder: whoever comes to the point says so (`.reached`) and waits until the file is gone. Points:
write, wrote.<n> (that layer, told to those who pull it already), written (not acknowledged yet), layers.<n> (before a pull that begins with that
layer), pull.<n> (before the nth page), pulled (copied, not reported yet).

`<name>.early.<n>` says that layer n on was pulled before the handoff moved.

A file `<name>.ahead` with a handoff and its sequence asks for their next token to be computed while they are on their way; `<name>.ran.<n>` says that
layer n of it has been, `<name>.took` that it became a step, `<name>.dropped` that it was thrown away. With a file `by_layers` in the folder, what moves
comes layer by layer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import zlib
from dataclasses import dataclass
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


LAYERS = 3


def stamp(sequence: int, positions: np.ndarray, layer: int = 0) -> np.ndarray:
    """int64, never 0."""
    return layer * 10**13 + (sequence % 1_000_003 + 1) * 1_000_000 + positions


@dataclass
class Ahead:
    """A step that is run for a sequence that is not here yet; `right`: what it has read was the sequence's own."""

    handoff: int
    sequence: int
    pages: np.ndarray
    length: int
    layer: int = 0
    right: bool = True


class Worker:
    def __init__(self, folder: Path, manager: str, pool: str, name: str, lease_ms: int) -> None:
        self.folder, self.name = folder, name
        self.client = KVClient(manager, timeout_ms=30_000, resend_ms=100)
        shape = self.client.stats()["pools"][pool]
        self.page_size, pages = shape["page_size"], shape["pages"]["total"]
        path = folder / f"{name}.{os.getpid()}.pages"
        self.memory = np.memmap(path, np.int64, "w+", shape=(pages, LAYERS, self.page_size))
        self.replica = Replica(pool)
        if (folder / "by_layers").exists():
            self.replica.pull_by_layers(LAYERS, 1)
        self.ahead: Ahead | None = None
        self.results: dict[int, bool] = {}
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
            self.go_ahead()
            while self.replica.step and self.replica.ready(self.replica.step):
                self.run()
            self.acknowledge()

    def acknowledge(self) -> None:
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
        took = self.take(version, due)
        for layer in range(LAYERS):
            for sequence in due:
                length, start = tables.length(sequence), self.done.get(sequence, 0)
                pages, positions = tables.pages_of(sequence), np.arange(start, length)
                self.read(pages, sequence, length if sequence in took else start, layer, f"step {version}")
                if sequence not in took:
                    self.memory[pages[positions // self.page_size], layer, positions % self.page_size] = stamp(sequence, positions, layer)
            if layer + 1 < LAYERS and (streaming := self.replica.streaming()):
                self.replica.layers_written(version, streaming, layer + 1)
                self.acknowledge()
                self.gate(f"wrote.{layer}")
        self.done.update((sequence, tables.length(sequence)) for sequence in due)
        self.gate("written")
        self.replica.finish(version, own)

    def take(self, version: int, due: list[int]) -> list[int]:
        """Those whose step has been run ahead. It ends if what that read was not the sequence's own."""
        took = []
        for sequence in due:
            result = self.results.pop(sequence, None)
            if result is not None and self.replica.ran_ahead(version, sequence):
                (self.folder / f"{self.name}.took").touch()
                if not result:
                    print(f"{self.name}: step {version}: what was run ahead for {sequence} has read something else", file=sys.stderr)
                    os._exit(EXIT_FOREIGN)
                took.append(sequence)
        return took

    def read(self, pages: np.ndarray, sequence: int, length: int, layer: int, what: str) -> None:
        """All that the sequence has in a layer. It ends if that is not its own."""
        flat = self.memory[pages, layer].reshape(-1)[:length]
        if not np.array_equal(flat, stamp(sequence, np.arange(length), layer)):
            print(f"{self.name}: {what}: layer {layer} of sequence {sequence}, {length} tokens, holds {flat}", file=sys.stderr)
            os._exit(EXIT_FOREIGN)

    def go_ahead(self) -> None:
        """One layer of a step that nobody has ordered yet, if it is there."""
        asked = self.folder / f"{self.name}.ahead"
        if self.ahead is None and asked.exists():
            handoff, sequence = json.loads(asked.read_text())
            tables = self.replica.begin_ahead(handoff)
            if tables is not None:
                asked.unlink()
                self.ahead = Ahead(handoff, sequence, tables.pages_of(0), int(tables.lengths[0]) - 1)
        ahead = self.ahead
        if ahead is None:
            return
        if ahead.layer == LAYERS or self.replica.spoiled(ahead.handoff):
            self.ahead = None
            if self.replica.end_ahead(ahead.handoff):
                self.results[ahead.sequence] = ahead.right
            else:
                (self.folder / f"{self.name}.dropped").touch()
        elif self.replica.layers_there(ahead.handoff) > ahead.layer:
            flat = self.memory[ahead.pages, ahead.layer].reshape(-1)
            ahead.right &= np.array_equal(flat[: ahead.length], stamp(ahead.sequence, np.arange(ahead.length), ahead.layer))
            place, slot = divmod(ahead.length, self.page_size)
            self.memory[ahead.pages[place], ahead.layer, slot] = stamp(ahead.sequence, np.array(ahead.length), ahead.layer)
            (self.folder / f"{self.name}.ran.{ahead.layer}").touch()
            ahead.layer += 1

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
        first, end = pull.layers(LAYERS)
        source = np.memmap(path, np.int64, "r", shape=(pages, LAYERS, size))
        slots = source[pull.source_pages, first:end].transpose(1, 0, 2).reshape(end - first, -1)
        if size != self.page_size:  # else whole pages, whatever is behind the tokens
            slots = slots[:, pull.source_skip :][:, : pull.tokens]
        self.gate(f"layers.{first}")
        for place, page in enumerate(pull.target_pages.tolist()):
            self.gate(f"pull.{place}")
            if stop.is_set():
                return ""
            part = slots[:, place * self.page_size :][:, : self.page_size]
            there = np.s_[page, first:end, : part.shape[1]]
            self.memory[there] = part
            spoil = self.folder / f"{self.name}.spoil"
            if spoil.exists() and int(spoil.read_text()) > pull.attempt:
                self.memory[page, first, 0] ^= 1 << 40
            expected, got = zlib.crc32(part.tobytes()), zlib.crc32(self.memory[there].tobytes())
            if expected != got:
                return f"page {page}: expected checksum {expected:08x}, got {got:08x}"
        self.gate("pulled")
        if pull.early:
            (self.folder / f"{self.name}.early.{first}").touch()
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
