"""Hunt: run many seeds, and of one that fails find the shortest command that shows it."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kvmanager.simulator.books import Broken
from kvmanager.simulator.faults import FAULTS
from kvmanager.simulator.system import System

__all__ = ["Outcome", "command_line", "live", "shorten"]

TRIES_MAX = 60  # runs spent on finding a shorter one


@dataclass
class Outcome:
    """What became of one run.

    steps     commands executed, those of healing included
    asked     how many were asked for before healing
    error     what was violated, empty if nothing was; `trace` is where
    digest    of everything that was decided, and of the state it led to
    chances   faults that were drawn for this seed, with their chances
    journal   name -> bytes of the journal's files as a failing run left them
    """

    seed: int
    asked: int
    faults: tuple[str, ...]
    steps: int = 0
    healing: bool = False
    simulated_s: float = 0.0
    error: str = ""
    trace: str = ""
    digest: str = ""
    chances: dict[str, float] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    journal: dict[str, bytes] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """For programs: plain values, the same in every process."""
        return {
            "seed": self.seed,
            "steps": self.steps,
            "simulated_s": round(self.simulated_s, 3),
            "ok": not self.error,
            "error": self.error,
            "digest": self.digest,
            "faults": {name: chance for name, chance in self.chances.items() if chance},
            "seen": dict(sorted(self.seen.items())),
            "reproduce": command_line(self) if self.error else "",
        }


def live(seed: int, steps: int, faults: tuple[str, ...] = tuple(FAULTS)) -> Outcome:
    """One run: faulty phase, healing, rest. A violation is in the outcome, not raised."""
    outcome = Outcome(seed, steps, faults)
    system = None
    try:
        system = System(seed, faults)
        system.run(steps)
        outcome.healing = True
        system.heal()
        outcome.digest = system.digest()
    except Exception as error:  # noqa: BLE001 - the books, the model, a memory or the manager itself: whoever trips first
        outcome.error = f"{type(error).__name__}: {error}" if not isinstance(error, Broken) else str(error)
        outcome.trace = traceback.format_exc()
    if system is not None:
        outcome.steps = system.watch.commands
        outcome.simulated_s = system.world.now_us / 1e6
        outcome.chances = system.world.faults.chances
        outcome.seen = system.seen()
        if outcome.error:
            outcome.journal = system.journal_files()
    return outcome


def shorten(found: Outcome, tries: int = TRIES_MAX) -> Outcome:
    """A run of the same seed that fails too, with fewer faults and fewer steps. The violation may be another one: one at a time."""
    best, left = found, tries

    def attempt(steps: int, faults: tuple[str, ...]) -> bool:
        nonlocal best, left
        if left <= 0:
            return False
        left -= 1
        tried = live(best.seed, steps, faults)
        if tried.error:
            best = _cut(tried)
        return bool(tried.error)

    best = _cut(best)
    for name in [name for name, chance in found.chances.items() if chance]:
        attempt(best.asked, tuple(each for each in best.faults if each != name))
    names = tuple(name for name in best.faults if best.chances.get(name))
    if names != best.faults:
        attempt(best.asked, names)
    # Fewer steps, and healing earlier: not monotonic, so halving finds a short one, not always the shortest.
    low, high = 0, best.asked
    while high - low > max(1, high // 50) and left > 0:
        middle = (low + high) // 2
        if attempt(middle, best.faults):
            high = best.asked
            low = min(low, high)
        else:
            low = middle
    return best


def _cut(outcome: Outcome) -> Outcome:
    """A run that failed before it healed need not be longer than the command that failed."""
    if not outcome.healing:
        outcome.asked = min(outcome.asked, outcome.steps + 1)  # one more: it may have failed while the manager was down
    return outcome


def command_line(outcome: Outcome) -> str:
    """What reproduces it."""
    faults = "all" if outcome.faults == tuple(FAULTS) else ",".join(outcome.faults) or "none"
    return f"kvmanager simulate --seed {outcome.seed} --steps {outcome.asked} --faults {faults}"
