"""The control plane's tests run against both surfaces: the embedded manager and a client that speaks to a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvmanager.config import ManagerConfig
from kvmanager.machine.batch import decode_batch
from kvmanager.machine.commands import Tick
from kvmanager.machine.snapshot import load_snapshot
from kvmanager.machine.state import State
from kvmanager.manager import KVManager
from kvmanager.pages.pool import PoolCounts
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from kvmanager.surface import Opened, Surface

MakeManager = Callable[..., Surface]


class Clock:
    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


class Rig:
    """A scheduler and its workers in a test's hands: `kv` is the surface under test, the rest are short words for it."""

    def __init__(self, kv: Surface, config: ManagerConfig, clock: Clock) -> None:
        self.kv, self.config, self.clock = kv, config, clock
        self.workers: dict[str, list[int]] = {}
        for pool in config.pools:
            self.workers[pool.name] = [kv.join(f"{pool.name}{rank}", pool.name, pool.layout or "bf16") for rank in range(pool.workers)]

    @property
    def state(self) -> State:
        """The manager's state, read through its snapshot: the same way for both surfaces."""
        return load_snapshot(self.config, decode_batch(self.kv.snapshot()))

    @property
    def version(self) -> int:
        return self.state.version

    def counts(self, pool: str) -> PoolCounts:
        return self.state.pool(pool).counts()

    def table(self, sequence: int) -> list[int]:
        return self.state.tables.pages_of(sequence).tolist()

    def length(self, sequence: int) -> int:
        return self.state.tables.length(sequence)

    def handoff_state(self, handoff: int) -> str:
        found = self.state.handoffs.get(handoff)
        return found.state.name.lower() if found else "over"

    def write(self, *sequences: int, only: int | None = None) -> None:
        """Workers (or one of them) finish everything decided so far; `sequences` are written to their ends."""
        state = self.state
        for pool in state.pools:
            mine = [each for each in sequences if state.sequences[each].pool == pool.index]
            for worker in self.workers[pool.name]:
                if only in (None, worker):
                    self.kv.ack(worker, state.version, ids=mine, tokens=[state.tables.length(each) for each in mine])

    def ack(self, pool: str, **more: object) -> None:
        """All workers of one pool have seen and finished everything up to now."""
        version = self.version
        for worker in self.workers[pool]:
            self.kv.ack(worker, version, **more)

    def prefilled(self, tokens: object, pool: str, **more: object) -> Opened:
        """A sequence whose whole prompt has been written and acknowledged."""
        opened = self.kv.open(tokens, pool, chunk=1 << 20, **more)
        self.write(opened.sequence)
        return opened

    def tick(self, jump: int = 0) -> None:
        self.clock.now += jump
        self.kv._run(Tick())

    def die(self, worker: int) -> list[int]:
        lost = self.kv.worker_gone(worker)
        for workers in self.workers.values():
            if worker in workers:
                workers.remove(worker)
        return lost


def tokens(count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.int32)


@pytest.fixture(params=["embedded", "client"])
def make_manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeManager]:
    """make_manager(config, clock=None): a manager embedded, or served over ipc:// to a client."""
    started: list[tuple[Server, KVClient]] = []

    def make(config: ManagerConfig, clock: Callable[[], int] | None = None) -> Surface:
        manager = KVManager(config, clock=clock, checked=True)
        if request.param == "embedded":
            return manager
        at = f"ipc://{tmp_path}/{len(started)}"
        server = Server(manager, address=f"{at}.req", publish=f"{at}.pub")
        server.start()
        client = KVClient(server.address, timeout_ms=10_000)
        started.append((server, client))
        return client

    yield make
    for server, client in started:
        client.disconnect()
        server.close()


@pytest.fixture
def make_rig(make_manager: MakeManager) -> Callable[..., Rig]:
    """make_rig(config): a manager with all its workers joined, on a clock that the test moves."""

    def make(config: ManagerConfig) -> Rig:
        clock = Clock()
        return Rig(make_manager(config, clock), config, clock)

    return make
