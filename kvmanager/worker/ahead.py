"""Ahead: a decode step that a worker runs for a sequence which is still on its way to it, layer by layer as its pages come.

    pages of layer 0 are there ─▶ write and attend layer 0 ─▶ ... ─▶ last layer ─▶ kept ─▶ the step of the log that it is, or nothing
                                                                      │
    the pull fails, the handoff is aborted, a snapshot is loaded ─────┴─▶ void: thrown away

Nobody else knows of it. It writes one slot behind the sequence's tokens, in a page that is the handoff's, and while it runs its replica
acknowledges nothing newer than what it knew when it began: pages that an abort lets go of leave quarantine after it. What it has computed
counts when the log has a step that is just that one - the sequence is the pool's by then, in the very pages, with one token more -
and is told to nobody before. No pages or tables here: `replica` knows those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["AHEAD_MAX", "Ahead", "Aheads"]

AHEAD_MAX = 64  # that one worker runs, or keeps the results of


@dataclass(slots=True)
class Ahead:
    """length   tokens of the sequence with the one that is computed
    pages    int32, its pages as far as that
    held     nothing of this version or newer is acknowledged while it runs
    void     why its result is worth nothing, "" if it may be worth something
    resident   the sequence is the pool's
    """

    handoff: int
    sequence: int
    length: int
    pages: np.ndarray
    held: int
    running: bool = True
    void: str = ""
    resident: bool = False


class Aheads:
    """Those that run, and those that wait for their step, oldest first."""

    def __init__(self) -> None:
        self._of: dict[int, Ahead] = {}  # by handoff
        self._kept: dict[int, Ahead] = {}  # by sequence, of those whose sequence is resident

    def __len__(self) -> int:
        return len(self._of)

    def begin(self, ahead: Ahead) -> None:
        self._of[ahead.handoff] = ahead

    def get(self, handoff: int) -> Ahead | None:
        return self._of.get(handoff)

    def held(self) -> list[int]:
        return [each.held for each in self._of.values() if each.running]

    def running(self, sequences: list[int]) -> bool:
        """Whether something is still run for one of them, void or not: it would write over what their step writes."""
        return any(each.running and each.sequence in sequences for each in self._of.values())

    def end(self, handoff: int) -> bool:
        """It runs no more; whether its result may be worth something."""
        ahead = self._of[handoff]
        ahead.running = False
        if ahead.void:
            self._drop(ahead)
        return not ahead.void

    def spoil(self, handoff: int, why: str) -> None:
        if (ahead := self._of.get(handoff)) is not None:
            self._spoil(ahead, why)

    def spoil_of(self, sequence: int, why: str) -> None:
        """Something has become of a sequence that is the pool's, other than the step that was run ahead."""
        if (ahead := self._kept.get(sequence)) is not None:
            self._spoil(ahead, why)

    def _spoil(self, ahead: Ahead, why: str) -> None:
        ahead.void = ahead.void or why
        if not ahead.running:
            self._drop(ahead)

    def _drop(self, ahead: Ahead) -> None:
        del self._of[ahead.handoff]
        if self._kept.get(ahead.sequence) is ahead:
            del self._kept[ahead.sequence]

    def resident(self, handoff: int) -> None:
        if (ahead := self._of.get(handoff)) is not None and not ahead.void:
            ahead.resident = True
            self._kept[ahead.sequence] = ahead

    def result_of(self, sequence: int) -> Ahead | None:
        """The one whose result waits for the sequence's next step."""
        ahead = self._kept.get(sequence)
        return ahead if ahead is not None and not ahead.running and not ahead.void else None

    def reload(self, same: bool) -> None:
        """A snapshot skips what has happened meanwhile, and stops nothing that is under way."""
        for ahead in list(self._of.values()):
            if not same:
                ahead.held = 1
            self._spoil(ahead, "a snapshot was loaded")
