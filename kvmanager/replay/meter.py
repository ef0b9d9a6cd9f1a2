"""Meter: a manager's public calls with a stopwatch beside them, and what a run adds up.

What is timed is the manager alone - check, decide, encode, decode, apply, reply - and neither the making of prompts nor the simulated workers.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.commands import Enqueue, Open
from kvmanager.machine.events import PagesEvicted
from kvmanager.manager import KVManager
from kvmanager.replay.traces import TOKENS_MAX
from kvmanager.surface import StepReply

__all__ = ["ITEMS_MAX", "SAMPLES_MAX", "Counts", "Meter", "Series"]

SAMPLES_MAX = 1024
ITEMS_MAX = 1 << 20  # sequences, and prompts in the queue: what the manager's own limits allow


@dataclass(slots=True)
class Counts:
    """What a run has added up so far. Pages and tokens are those of prompts, each prompt counted once, when it is first opened.

    pages_whole, pages_hit      whole pages of prompts, and those of them found in the cache
    tokens_prompt, tokens_hit   all tokens of prompts, and those found in the cache
    too_large                   requests refused because they exceed their pool
    preemptions                 sequences closed to make room, their requests begun anew
    tokens_again                tokens computed a second time because of that
    waits                       steps in which a request in line waited for a prefix that another was computing, summed over requests
    """

    requests: int = 0
    pages_whole: int = 0
    pages_hit: int = 0
    tokens_prompt: int = 0
    tokens_hit: int = 0
    tokens_output: int = 0
    too_large: int = 0
    preemptions: int = 0
    tokens_again: int = 0
    waits: int = 0
    evictions: int = 0
    used_peak: int = 0
    held_peak: int = 0  # used, cached or in quarantine: everything but free


@dataclass(slots=True)
class Series:
    """Pool use over time in bounded memory: when it is full, every second sample goes, and half as many come in from then on."""

    at: list[float] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    stride: int = 1
    skipped: int = 0

    def add(self, at: float, used: int, cached: int) -> None:
        self.skipped += 1
        if self.skipped < self.stride:
            return
        self.skipped = 0
        if len(self.at) == SAMPLES_MAX:
            for column in (self.at, self.used, self.cached):
                del column[::2]
            self.stride *= 2
        self.at.append(at)
        self.used.append(used)
        self.cached.append(cached)


class Meter:
    """A manager to replay against: `step` and `ack` are its own, with their durations kept.

    sequences, queue   sequences open at once, and prompts that wait; the manager's bounds are set to hold them
    """

    def __init__(
        self, pools: Sequence[PoolConfig], clock: Callable[[], int], *, sequences: int, queue: int, placement: str = "prefix"
    ) -> None:
        config = ManagerConfig(
            tuple(pools),
            sequences_max=sequences,
            sequence_tokens_max=2 * TOKENS_MAX + 1,  # the longest prompt, its output, and the token that makes a whole page usable
            batch_max=max(sequences, queue, 1),
            waiting_max=queue,
            waiting_tokens_max=1 << 32,  # a trace's own lengths bound it
            placement=placement,
        )
        self.manager = KVManager(config, clock=clock)
        self.manager.subscribe(self._on_batch)
        self.counts = Counts()
        self.series = Series()
        self.step_us = array("d")
        self.ack_us = array("d")
        self.pages_total = sum(pool.num_pages for pool in config.pools)

    def join(self, pool: str) -> int:
        return self.manager.join(f"worker of {pool}", pool, "replay")

    def step(self, *, opens: Sequence[dict[str, Any]] = (), enqueue: Sequence[dict[str, Any]] = (), **items: Any) -> StepReply:
        """As the manager's, with the arguments of each Open and Enqueue: checking a prompt's tokens is part of what a step costs."""
        start = time.perf_counter()
        reply = self.manager.step(opens=[Open(**each) for each in opens], enqueue=[Enqueue(**each) for each in enqueue], **items)
        self.step_us.append((time.perf_counter() - start) * 1e6)
        return reply

    def ack(self, worker: int, version: int, ids: Sequence[int], tokens: Sequence[int]) -> None:
        start = time.perf_counter()
        self.manager.ack(worker, version, ids=ids, tokens=tokens)
        self.ack_us.append((time.perf_counter() - start) * 1e6)

    def sample(self, at: float) -> None:
        """Note how full the pools are now."""
        used = cached = free = 0
        for pool in self.manager.stats()["pools"].values():
            pages = pool["pages"]
            used, cached, free = used + pages["used"], cached + pages["cached"], free + pages["free"]
        self.counts.used_peak = max(self.counts.used_peak, used)
        self.counts.held_peak = max(self.counts.held_peak, self.pages_total - free)
        self.series.add(at, used, cached)

    def _on_batch(self, batch: EventBatch, data: bytes) -> None:
        for event in batch.events:
            if isinstance(event, PagesEvicted):
                self.counts.evictions += len(event.pages)
