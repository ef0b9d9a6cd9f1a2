"""`kvmanager serve --journal` killed with SIGKILL in the middle of traffic: real processes, real sockets, real files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmanager.errors import JournalFailed, ManagerUnreachable, OutOfPages, PrefixPending
from kvmanager.log.files import MemoryFiles
from kvmanager.log.journal import Journal
from kvmanager.machine.batch import decode_batch
from kvmanager.machine.commands import Open
from kvmanager.machine.invariants import check_invariants
from kvmanager.machine.snapshot import load_snapshot
from kvmanager.manager import KVManager
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from kvmanager.worker.follower import Follower
from kvmanager.worker.replica import Replica
from tests.cli.test_cli import COMMAND, ROOT, Serving, at
from tests.control.journaled import CONFIG

PAGE = 16


class Manager:
    """A `kvmanager serve` that is killed and started again at the same addresses."""

    def __init__(self, tmp_path: Path, *more: str) -> None:
        pools = ["--pool", "name=main,num_pages=64,page_size=16", "--lease-ms", "60000"]
        self.arguments = [*pools, "--journal", str(tmp_path / "journal"), *more, *at(tmp_path)]
        self.folder, self.starts = tmp_path, 0
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [*COMMAND, "serve", *self.arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment,
        )
        self.serving = Serving(process)
        self.starts += 1

    def replace(self, after_s: float) -> None:
        """SIGKILL in a moment, then the next one."""
        time.sleep(after_s)
        self.kill()
        self.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.serving.process.send_signal(number)
        self.serving.process.communicate()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    found = Manager(tmp_path)
    yield found
    found.kill()


class Worker(threading.Thread):
    """Page memory that holds token ids. Every step checks that it reads its own sequence's tokens, then writes the new ones."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.memory = np.full((64, PAGE), -1, np.int64)
        self.runs: deque[tuple[int, list[tuple[int, int, int]]]] = deque()  # version, (sequence, first token, length before)
        self.done: dict[int, bool] = {}
        self.failed: BaseException | None = None
        self.stopping = False
        self.client = KVClient(address, timeout_ms=60_000, resend_ms=100)
        self.follower = Follower(self.client, Replica("main"))
        self.worker = self.client.join("w0", "main", "bf16")

    def run(self) -> None:
        try:
            with closing(self.follower):
                while not self.stopping:
                    self.follower.poll(5)
                    while self.runs and self.follower.replica.ready(self.runs[0][0]):
                        self.step(*self.runs.popleft())
                    content = self.follower.replica.ack()
                    if content is not None:
                        self.client.ack(self.worker, **content._asdict())
        except BaseException as error:  # noqa: BLE001 - told to the test's own thread
            self.failed = error
        self.client.disconnect()

    def step(self, version: int, items: list[tuple[int, int, int]]) -> None:
        replica = self.follower.replica
        tables = replica.batch(version, [sequence for sequence, _, _ in items])
        for row, (sequence, first, before) in enumerate(items):
            length, pages = int(tables.lengths[row]), tables.pages_of(row)
            expected = first + np.arange(length)
            slots = self.memory[pages].reshape(-1)
            assert (slots[:before] == expected[:before]).all(), f"sequence {sequence} at version {version} reads another's tokens"
            slots[before:length] = expected[before:]
            self.memory[pages] = slots.reshape(-1, PAGE)
        replica.finish(version, [sequence for sequence, _, _ in items])
        self.done[version] = True


def decode(manager: Manager, *, kills: int, steps: int, seed: int) -> tuple[dict[str, Any], Follower]:
    """A scheduler's life: open, grow, close in steps that a worker runs, while the manager is killed at random moments."""
    rng = random.Random(seed)
    worker = Worker(manager.serving.address)
    worker.start()
    open_sequences: dict[int, tuple[int, int]] = {}  # sequence -> first token, length
    restarts: list[threading.Thread] = []
    kill_at = sorted(rng.sample(range(2, steps, 4), kills))
    with KVClient(manager.serving.address, timeout_ms=60_000, resend_ms=100) as client:
        for number in range(steps):
            if number in kill_at:
                restarts.append(threading.Thread(target=manager.replace, args=(rng.random() * 0.003,)))
                restarts[-1].start()  # now, while the step is on its way, or being carried out, or answered
            chosen = [each for each in open_sequences if rng.random() < 0.8]
            closing_ids = [each for each in open_sequences if each not in chosen and rng.random() < 0.5]
            firsts = [rng.choice((0, 1000)) for _ in range(rng.choice((0, 1, 2)))]
            opens = [Open(np.arange(first, first + 40, dtype=np.int32), "main", chunk=64) for first in firsts]
            reply = client.step(grow=chosen, close=closing_ids, opens=opens)
            items = []
            for index, sequence in enumerate(chosen):
                if reply.error("grow", index) is None:
                    first, length = open_sequences[sequence]
                    items.append((sequence, first, length))
                    open_sequences[sequence] = (first, length + 1)
            for each in closing_ids:
                del open_sequences[each]
            for index, (first, opened) in enumerate(zip(firsts, reply.opened, strict=True)):
                if opened is None:
                    assert isinstance(reply.error("open", index), (OutOfPages, PrefixPending)), reply.refused
                    continue
                items.append((opened.sequence, first, opened.cached_tokens))
                open_sequences[opened.sequence] = (first, opened.length)
            if items:
                worker.runs.append((reply.version, items))
                while reply.version not in worker.done and worker.failed is None:
                    worker.join(0.001)
            assert worker.failed is None, repr(worker.failed)
        client.step(close=list(open_sequences))
        for _ in range(400):
            pages = client.stats()["pools"]["main"]["pages"]
            if pages["quarantined"] == 0:
                break
            worker.join(0.01)
        state = load_snapshot(CONFIG, decode_batch(client.snapshot()))
        check_invariants(state)
    for restart in restarts:
        restart.join()
    worker.stopping = True
    worker.join(10)
    assert worker.failed is None, repr(worker.failed)
    assert worker.follower.replica.tables.digest() == state.tables.digest()
    return pages, worker.follower


def test_workers_and_clients_carry_on_over_kills_of_the_manager(manager: Manager) -> None:
    """Nobody starts over: requests in flight are answered once, steps run once, the prefix index is still there, the books add up."""
    pages, follower = decode(manager, kills=3, steps=120, seed=7)
    assert manager.starts == 4
    assert follower.resyncs == 0 and follower.catch_ups >= 3
    assert pages["used"] == pages["quarantined"] == 0 and pages["cached"] >= 4
    assert pages["free"] + pages["cached"] == 64


def test_second_serve_on_the_same_journal_is_refused(manager: Manager, tmp_path: Path) -> None:
    """Another address, the same journal: one line and exit code 2."""
    other = [argument.replace("/req", "/req2").replace("/pub", "/pub2") for argument in manager.arguments]
    done = subprocess.run([*COMMAND, "serve", *other], check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        f"kvmanager: journal: expected a folder that no other manager writes to, got {tmp_path / 'journal'}"
    ]


def test_serve_says_what_it_recovered_and_refuses_what_it_cannot_use(manager: Manager, tmp_path: Path) -> None:
    with KVClient(manager.serving.address) as client:
        client.join("w0", "main", "bf16")
    manager.kill()
    [segment] = (tmp_path / "journal").glob("*.kvj")
    with open(segment, "ab") as file:
        file.write(b"torn")
    manager.start()
    assert manager.serving.said[1].startswith(f"journal {tmp_path}/journal: version 2, 2 batches behind the snapshot of 0, in ")
    assert manager.serving.said[1].endswith("; cut 4 bytes of an unfinished record")
    manager.kill(signal.SIGTERM)
    data = bytearray(segment.read_bytes())
    data[-200] ^= 1
    damaged = bytes(data)
    segment.write_bytes(damaged)
    done = subprocess.run([*COMMAND, "serve", *manager.arguments], check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2 and f"{segment}, offset " in done.stderr and len(done.stderr.splitlines()) == 1
    assert segment.read_bytes() == damaged, "nothing is changed in what is refused"


def test_a_full_disk_is_waited_for_and_a_broken_journal_ends_the_server(tmp_path: Path) -> None:
    """A client asks again, as if nobody had answered: a moment without room costs nobody anything but that moment."""
    files = MemoryFiles()
    kv = KVManager(CONFIG, journal=Journal("/journal", files=files))
    server = Server(kv, address=f"ipc://{tmp_path}/req", publish=f"ipc://{tmp_path}/pub").start()
    try:
        with KVClient(server.address, timeout_ms=5_000, resend_ms=50) as client:
            refusals: list[int] = []

            def full(operation: str, name: str, size: int) -> int | None:
                if operation == "write" and len(refusals) < 3:
                    refusals.append(size)
                    return ~5
                return None

            files.fault = full
            assert client.join("w0", "main", "bf16") == 1
            assert len(refusals) == 3 and client.stats()["journal"]["wrong"] == ""

            def broken(operation: str, name: str, size: int) -> int | None:
                if operation in ("write", "truncate"):
                    raise OSError(28, "No space left on device")
                return None

            files.fault = broken
            client.timeout_ms = 300
            with pytest.raises((JournalFailed, ManagerUnreachable)):
                client.touch()
            assert server._thread is not None
            server._thread.join(5)
            assert not server._thread.is_alive()
    finally:
        server.close()
        kv.disconnect()
