"""World: simulated time, one source of randomness, and the wires between processes. Nothing here knows what the messages mean.

Everything that happens is a call at a time, drawn from one seed; equal times happen in the order in which they were arranged. So a
seed lives through the same history in every process.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvmanager.simulator.faults import Faults

__all__ = ["Network", "World"]


class World:
    """now_us only goes forward; `after` arranges a call, `run` makes them until `done`."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.rng = random.Random(seed)
        self.faults = faults
        self.now_us = 0
        self._arranged: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def after(self, delay_us: int, call: Callable[..., None], *args: Any) -> None:
        self._serial += 1
        heapq.heappush(self._arranged, (self.now_us + delay_us, self._serial, call, args))

    def run(self, done: Callable[[], bool], until_us: int) -> bool:
        """Live until `done()` or that time; whether it was done."""
        arranged = self._arranged
        while not done():
            if not arranged or arranged[0][0] > until_us:
                self.now_us = until_us
                return False
            self.now_us, _, call, args = heapq.heappop(arranged)
            call(*args)
        return True


class Network:
    """Carries bytes. A link is (from, to): in order, unless reordering is among the faults."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seen: Counter[str] = Counter()
        self._last: dict[tuple[str, str], int] = {}

    def send(self, source: str, target: str, deliver: Callable[..., None], *message: Any) -> None:
        rng, faults = self.world.rng, self.world.faults
        if faults.happens("loss", rng):
            self.seen["loss"] += 1
            return
        self._carry(source, target, deliver, message, ordered=not faults.happens("reorder", rng))
        if faults.happens("dup", rng):
            self.seen["dup"] += 1
            self._carry(source, target, deliver, message, ordered=False, late_us=int(rng.random() ** 2 * 200_000))

    def _carry(
        self, source: str, target: str, deliver: Callable[..., None], message: tuple[Any, ...], ordered: bool, late_us: int = 0
    ) -> None:
        rng, now = self.world.rng, self.world.now_us
        delay = late_us + 50 + int(rng.random() * 400)
        if not ordered:
            self.seen["reorder"] += 1
            delay += int(rng.random() * 20_000)
        if self.world.faults.happens("delay", rng):
            self.seen["delay"] += 1
            delay += int(rng.random() ** 3 * 3_000_000)
        if ordered:
            link = source, target
            delay = max(delay, self._last.get(link, 0) + 1 - now)
            self._last[link] = now + delay
        self.world.after(delay, deliver, *message)
