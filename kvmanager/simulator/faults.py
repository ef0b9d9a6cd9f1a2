"""Faults: what may go wrong in a simulated run, and how often. Drawn from the seed, some off entirely; none at all once it heals."""

from __future__ import annotations

import random

from kvmanager.errors import InvalidValue

__all__ = ["FAULTS", "Faults", "parse_faults"]

# name -> chances to draw from: for each message, each step, or each ten milliseconds of a process's life
FAULTS: dict[str, tuple[float, ...]] = {
    "loss": (0, 0.003, 0.03, 0.15),  # a message never arrives
    "dup": (0, 0.01, 0.1),  # a message arrives twice
    "delay": (0, 0.002, 0.02),  # a message takes up to three seconds: longer than a lease
    "reorder": (0, 0.02, 0.3),  # a message may be overtaken on its link
    "skip": (0, 0.01, 0.1),  # a worker leaves sequences out of a step, or a pull fails
    "stop": (0, 0.0003, 0.003),  # a worker is stopped for up to three leases, then goes on where it was
    "kill": (0, 0.0003, 0.002),  # a worker is killed at any moment, in the middle of a step too
    "leave": (0, 0.0003, 0.002),  # a client is killed, with a request under way; its successor knows nothing
    "crash": (0, 0.0003, 0.003),  # the manager is killed at an operation of its journal, or between two commands
    "torn": (0, 0.3, 1),  # of such kills: its host is lost with it, and some of what was not synced
    "rot": (0, 0.3),  # of such kills: meanwhile a bit of the journal flips
    "disk": (0, 0.0002, 0.003),  # the disk is full for a moment, or fails an operation
    "clock": (0, 0.0005, 0.005, 0.02),  # the manager's clock jumps, forward or back
}


class Faults:
    """The chances of one run. Each is drawn from (seed, name) alone, so leaving one fault out does not change the others."""

    def __init__(self, seed: int, allowed: tuple[str, ...]) -> None:
        self.chances = {name: random.Random(f"{seed} {name}").choice(FAULTS[name]) if name in allowed else 0.0 for name in FAULTS}
        self.healed = False

    def happens(self, name: str, rng: random.Random) -> bool:
        chance = self.chances[name]
        return chance > 0 and not self.healed and rng.random() < chance

    def active_now(self, name: str) -> bool:
        return self.chances[name] > 0 and not self.healed

    def active(self) -> list[str]:
        return [name for name, chance in self.chances.items() if chance]


def parse_faults(text: str) -> tuple[str, ...]:
    """Names out of "all", "none" or "loss,dup,...", in the order of FAULTS. Raises InvalidValue."""
    if text == "all":
        return tuple(FAULTS)
    asked = [name.strip() for name in text.split(",") if name.strip()] if text != "none" else []
    for name in asked:
        if name not in FAULTS:
            raise InvalidValue("--faults", f"all, none or some of {','.join(FAULTS)}", name)
    return tuple(name for name in FAULTS if name in asked)
