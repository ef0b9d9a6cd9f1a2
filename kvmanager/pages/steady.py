"""Steady: a batch that grows again as it grew last, and the room that each of its sequences has left in its last page.

What a decode step has to know is who runs out of room now. The tables say so, at the price of gathering lengths and page counts of every
sequence in every step; here they are gathered once and carried on as long as the batch repeats itself. Follows from the tables alone, so
neither logs nor snapshots speak of it, and whatever else changes them throws it away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Steady"]


class Steady:
    """counts  int64 [n]: tokens by which each sequence grows, again and again
    room    int64 [n]: token slots that each has left, or had `times` ago if all counts are 1 (the array is taken over, and written)
    sizes   int64 [n]: page size of each, or one int for all
    pools   int32 [n]: index of each sequence's pool; None where there is but one
    left    how often this can be repeated before somebody may come to a bound of its length
    asked   the arrays of ids and counts in which a command asked for it, once they were compared
    """

    __slots__ = ("asked", "counts", "left", "pools", "room", "single", "sizes", "times")

    def __init__(self, counts: np.ndarray, room: np.ndarray, sizes: np.ndarray | int, pools: np.ndarray | None, left: int) -> None:
        self.counts = counts
        self.room = room
        self.sizes = sizes
        self.pools = pools
        self.left = left
        self.asked: tuple[Any, Any] = None, None
        self.times = 0
        self.single = bool((counts == 1).all())  # nobody needs more than one page at a time

    def short(self) -> np.ndarray:
        """int32: places in the batch that need pages to grow once more, ascending; one that needs several stands there as often."""
        if self.single:
            return (self.room <= self.times).nonzero()[0].astype(np.int32)
        at = (self.room < self.counts).nonzero()[0].astype(np.int32)
        if not len(at):
            return at
        sizes = self.sizes if isinstance(self.sizes, int) else self.sizes[at]
        return at.repeat(-((self.room[at] - self.counts[at]) // sizes))  # -1 // 64 is -1: one page

    def repeat(self, at: np.ndarray) -> None:
        """All have grown once more, and those at these places have got a page each time they stand there. Called as the tables change."""
        self.left -= 1
        if not self.single:
            self.room -= self.counts
            if len(at):
                self.room += np.bincount(at, minlength=len(self.room)) * self.sizes
            return
        self.times += 1
        if len(at):
            self.room[at] += self.sizes if isinstance(self.sizes, int) else self.sizes[at]
