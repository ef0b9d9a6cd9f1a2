"""A manager with a journal in memory, some traffic for it, and what its state was at every version."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import KVError
from kvmanager.log.files import MemoryFiles
from kvmanager.log.journal import Journal
from kvmanager.machine.commands import Open
from kvmanager.machine.snapshot import state_digest
from kvmanager.manager import KVManager

CONFIG = ManagerConfig((PoolConfig("main", 24, 16), PoolConfig("other", 12, 16)), lease_ms=60_000, sequences_max=16)


class Life:
    """One life of a manager on `files`. `digests[v]` is the state's after version v; `replies` are those of the client in this life."""

    def __init__(self, files: MemoryFiles, *, config: ManagerConfig = CONFIG, epoch: int = 1, clock: Any = None, **more: Any) -> None:
        self.now = 1000
        self.files = files
        self.digests: dict[int, str] = {}
        self.published: list[tuple[int, bytes]] = []
        self.journal = Journal("/journal", files=files, **more)
        self.kv = KVManager(config, clock=clock or (lambda: self.now), epoch=epoch, checked=True, journal=self.journal)
        self.note()
        self.kv.subscribe(lambda batch, data: self.note(data))

    def note(self, data: bytes = b"") -> None:
        self.digests[self.kv.state.version] = state_digest(self.kv.state)
        self.published.append((self.kv.state.version, data))

    @property
    def segment(self) -> str:
        return self.journal.name

    def join(self) -> None:
        for pool in self.kv.config.pools:
            self.kv.join(f"{pool.name}0", pool.name, "bf16")

    def acknowledge(self) -> None:
        """Every worker has seen and finished everything."""
        state = self.kv.state
        for worker in list(state.workers.values()):
            mine = [each for each, sequence in state.sequences.items() if sequence.pool == worker.pool]
            self.kv.ack(worker.worker_id, state.version, ids=mine, tokens=[state.tables.length(each) for each in mine], epoch=state.epoch)

    def live(self, steps: int, seed: int) -> None:
        """Random steps; refusals are part of life."""
        rng = random.Random(seed)
        for _ in range(steps):
            self.now += rng.choice((1, 5, 30))
            state = self.kv.state
            open_ids = list(state.sequences)
            chosen = [each for each in open_ids if rng.random() < 0.7]
            prompt = np.full(rng.choice((1, 16, 17, 40)), rng.choice((1, 2)), np.int32)
            reply = self.kv.step(
                opens=[Open(prompt, rng.choice(("main", "other")), chunk=40)] if rng.random() < 0.5 else [],
                grow=chosen,
                grow_counts=[rng.choice((1, 1, 9)) for _ in chosen],
                close=[each for each in open_ids if rng.random() < 0.1],
                tokens=[(each, [3]) for each in chosen if rng.random() < 0.3],
                hand_off=[(each, rng.choice(("main", "other"))) for each in chosen if rng.random() < 0.1],
            )
            assert reply.version == state.version
            if rng.random() < 0.6:
                for worker in list(state.workers.values()):
                    moves = [each.handoff_id for each in state.handoffs.values() if each.target == worker.pool]
                    try:
                        self.kv.ack(
                            worker.worker_id, state.version, pulled=[each for each in moves if rng.random() < 0.6], epoch=state.epoch
                        )
                    except KVError as error:
                        raise AssertionError(error) from error
                self.acknowledge()


def reborn(files: MemoryFiles, **more: Any) -> Life:
    """The next life on what a killed process left."""
    return Life(files.killed(), **more)
