"""A manager with a journal, and worker processes that can be stopped and killed at any point of a handoff. No model, no torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmanager import KVClient, Open, PoolConfig
from kvmanager.config import ManagerConfig
from kvmanager.errors import OutOfPages
from kvmanager.machine.batch import decode_batch
from kvmanager.machine.snapshot import load_snapshot
from kvmanager.machine.state import Notice, State
from tests.handoff.worker import EXIT_FENCED, EXIT_FOREIGN, LAYERS, stamp

PAGE = 16
LEASE_MS, TIMEOUT_MS, WAIT_MS = 1500, 600, 20_000
BOUND_S = 5.0  # from the moment a fault is known until its request has been told what comes of it
PATIENCE_S = 30.0
ROOT = Path(__file__).parents[2]


class Fleet:
    """kv is the scheduler's client. Every pool has a bystander: a sequence that decodes on and on, in every step that is sent."""

    def __init__(self, folder: Path, pools: dict[str, int], sizes: dict[str, int] | None = None, **bounds: int) -> None:
        self.folder = folder
        bounds = {
            "lease_ms": LEASE_MS,
            "handoff_timeout_ms": TIMEOUT_MS,
            "handoff_wait_ms": WAIT_MS,
            "handoff_prefill_ms": WAIT_MS,
            **bounds,
        }
        made = [
            PoolConfig(name, pages, (sizes or {}).get(name, PAGE), group="prefill" if name.startswith("P") else "decode")
            for name, pages in pools.items()
        ]
        self.config = ManagerConfig(pools=tuple(made), **bounds)
        lines = [f"{name} = {value}" for name, value in bounds.items()]
        for pool in made:
            lines += ["[[pools]]", f'name = "{pool.name}"', f"num_pages = {pool.num_pages}", f"page_size = {pool.page_size}"]
            lines += [f'group = "{pool.group}"']
        (folder / "config.toml").write_text("\n".join(lines))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.expected_ends: dict[str, None] = {}
        self.notices: list[tuple[float, Notice]] = []
        self.bystanders: dict[str, int] = {}
        self._next_token = 1
        self.turns = 0
        self.start_manager()
        self.kv = KVClient(f"ipc://{folder}/manager", timeout_ms=30_000, resend_ms=50)
        self.kv.hello()
        for name in pools:
            self.start_worker(name)
        for name in pools:
            self.until(lambda name=name: (folder / f"{name}0.joined").exists(), f"{name}0 joins")
        for name in pools:
            self.bystanders[name] = self.open(name, 5)

    # --- processes ---

    def _start(self, name: str, *arguments: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments], env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start_manager(self) -> None:
        at = f"ipc://{self.folder}"
        arguments = ["--config", f"{self.folder}/config.toml", "--address", f"{at}/manager", "--publish", f"{at}/log"]
        self._start("manager", "-m", "kvmanager.cli", "serve", *arguments, "--journal", f"{self.folder}/journal")

    def start_worker(self, pool: str) -> None:
        (self.folder / f"{pool}0.joined").unlink(missing_ok=True)
        arguments = [str(self.folder), f"ipc://{self.folder}/manager", pool, f"{pool}0", str(LEASE_MS)]
        self._start(f"{pool}0", "-m", "tests.handoff.worker", *arguments)

    def kill_manager(self) -> None:
        """SIGKILL, and the next one on its journal."""
        process = self.processes["manager"]
        process.kill()
        process.wait()
        self.start_manager()

    def signal(self, name: str, how: signal.Signals) -> None:
        self.processes[name].send_signal(how)

    def kill(self, *names: str) -> float:
        """SIGKILL; reaped, so known dead, and reported. Gives when it was known."""
        for name in names:
            self.expected_ends[name] = None
            self.processes[name].kill()
        for name in names:
            self.processes[name].wait()
            self.bystanders.pop(name[:-1], None)
        known = time.monotonic()
        for name in names:
            worker, epoch, _ = self.joined(name)
            self.kv.worker_gone(worker, epoch=epoch)
        return known

    def reap(self, name: str, code: int = EXIT_FENCED) -> None:
        """A worker that ends itself is reported as gone."""
        self.expected_ends[name] = None
        self.until(lambda: self.processes[name].poll() is not None, f"{name} ends")
        assert self.processes[name].returncode == code, self.log(name)
        worker, epoch, _ = self.joined(name)
        self.kv.worker_gone(worker, epoch=epoch)

    def joined(self, name: str) -> tuple[int, int, str]:
        worker, epoch, path = json.loads((self.folder / f"{name}.joined").read_text())
        return worker, epoch, path

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]

    def run_ahead(self, name: str, handoff: int, sequence: int) -> None:
        asked = self.folder / f"{name}.ahead.new"
        asked.write_text(json.dumps([handoff, sequence]))
        asked.rename(self.folder / f"{name}.ahead")

    def said(self, name: str, what: str) -> bool:
        return (self.folder / f"{name}.{what}").exists()

    # --- gates ---

    def shut(self, name: str, point: str) -> None:
        (self.folder / f"{name}.{point}").touch()

    def reached(self, name: str, point: str) -> None:
        self.until((self.folder / f"{name}.{point}.reached").exists, f"{name} reaches {point}")

    def open_gate(self, name: str, point: str) -> None:
        (self.folder / f"{name}.{point}").unlink()

    # --- a scheduler ---

    def turn(self) -> None:
        """One step for the bystanders, and whatever news there is. Whoever has ended without being asked to fails the test."""
        for name, process in self.processes.items():
            if process.poll() is not None and name not in self.expected_ends:
                raise AssertionError(f"{name} has ended with {process.returncode}:\n{self.log(name)}")
        reply = self.kv.step(grow=list(self.bystanders.values()))
        self.notices += [(time.monotonic(), notice) for notice in reply.notices]
        lost = [notice.sequence for notice in reply.notices if notice.kind == "lost"]
        self.bystanders = {pool: each for pool, each in self.bystanders.items() if each not in lost}
        for refused in reply.refused:
            assert refused.error.code in ("unknown", "out_of_pages", "wrong_state"), refused
        self.turns += 1
        if self.turns % (3 * PAGE) == 0:
            self._renew()

    def kv_length(self, sequence: int) -> int:
        tables = self.state.tables
        return tables.length(sequence) if sequence in self.state.sequences else 0

    def _renew(self) -> None:
        """Bystanders begin again: pools are small."""
        for pool, sequence in list(self.bystanders.items()):
            self.kv.close(sequence)
            self._next_token += 1
            reply = self.kv.step(opens=[Open([self._next_token] * 5, pool, chunk=5, wait=False)])
            self.notices += [(time.monotonic(), notice) for notice in reply.notices]
            del self.bystanders[pool]
            if reply.opened[0] is not None:  # else the pool is full just now
                self.bystanders[pool] = reply.opened[0].sequence

    def until(self, done: Callable[[], Any], what: str, turning: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s; {self.notices}; " + "".join(
                f"\n{name}: {self.log(name)}" for name in self.processes
            )
            if turning and self.bystanders:
                self.turn()
            time.sleep(0.02)

    def open(self, pool: str, length: int, chunk: int = 1 << 20) -> int:
        """A prompt that nobody else has."""
        self._next_token += 1
        opened = self.kv.open([self._next_token] * length, pool, chunk=chunk, wait=False)
        return opened.sequence

    def grow(self, sequence: int) -> int:
        """A token more, as soon as there is a page for it: after a restart all of them are held until everybody has heard of it."""
        versions: list[int] = []

        def grown() -> bool:
            try:
                versions.append(self.kv.grow(sequence))
            except OutOfPages:
                return False
            return True

        self.until(grown, f"a page for {sequence}")
        return versions[0]

    def news(self, sequence: int, *kinds: str) -> list[Notice]:
        return [notice for _, notice in self.notices if notice.sequence == sequence and (not kinds or notice.kind in kinds)]

    def hear(self, sequence: int, kind: str, since: float | None = None) -> Notice:
        """The next piece of news of that kind, in bounded time."""
        before = len(self.news(sequence, kind))
        if before and since is None:
            return self.news(sequence, kind)[-1]
        self.until(lambda: self.news(sequence, kind), f"{kind} of {sequence}")
        at, notice = next((at, each) for at, each in self.notices if each.sequence == sequence and each.kind == kind)
        assert since is None or at - since < BOUND_S, f"{kind} came {at - since:.2f} s after the fault was known"
        return notice

    @property
    def state(self) -> State:
        return load_snapshot(self.config, decode_batch(self.kv.snapshot()))

    def handoff_state(self, handoff: int) -> str:
        found = self.state.handoffs.get(handoff)
        return found.state.name.lower() if found else "over"

    def is_at(self, handoff: int, state: str) -> None:
        self.until(lambda: self.handoff_state(handoff) == state, f"handoff {handoff} is {state}")

    # --- what must hold ---

    def check(self, sequence: int, pool: str) -> None:
        """It is in that pool, can be decoded on there, and every slot of it is its own."""
        self.until(lambda: sequence in self.state.sequences and self.place(sequence) == pool, f"{sequence} is in {pool}")
        for _ in range(PAGE + 1):
            version = self.grow(sequence)
        length, (worker, _, _) = self.kv_length(sequence), self.joined(f"{pool}0")
        self.until(lambda: self.state.workers[worker].acked >= version, f"{sequence} is written")
        state = self.state
        size = self.config.pools[state.sequences[sequence].pool].page_size
        memory = np.memmap(self.joined(f"{pool}0")[2], np.int64, "r").reshape(-1, LAYERS, size)
        for layer in range(LAYERS):
            slots = memory[state.tables.pages_of(sequence), layer].reshape(-1)[:length]
            assert np.array_equal(slots, stamp(sequence, np.arange(length), layer))

    def place(self, sequence: int) -> str:
        state = self.state
        return state.pools[state.sequences[sequence].pool].name

    def at_rest(self) -> None:
        """Rule 1: everything comes home. And nobody read what was not his: the workers would have said so."""
        self.bystanders.clear()
        self.kv.step(close=list(self.state.sequences))

        def home() -> bool:
            self.kv.step()
            pools = self.kv.stats()["pools"].values()
            return not self.state.handoffs and all(
                each["pages"]["free"] + each["pages"]["cached"] == each["pages"]["total"] for each in pools
            )

        self.until(home, "every page comes home", turning=False)
        for name, process in self.processes.items():
            assert process.poll() != EXIT_FOREIGN, self.log(name)
            assert process.poll() is None or name in self.expected_ends, self.log(name)

    def stop(self) -> None:
        self.kv.disconnect()
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()


@pytest.fixture
def make_fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """make_fleet(P=pages, D=pages, ...): a manager and a worker for each pool; those beginning with P prefill."""
    started: list[Fleet] = []

    def make(sizes: dict[str, int] | None = None, bounds: dict[str, int] | None = None, by_layers: bool = False, **pools: int) -> Fleet:
        if by_layers:
            (tmp_path / "by_layers").touch()
        started.append(Fleet(tmp_path, pools, sizes, **(bounds or {})))
        return started[-1]

    yield make
    for fleet in started:
        fleet.stop()
