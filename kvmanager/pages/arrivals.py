"""Arrivals: the open sequences of one pool by priority, and in which order they came into it."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Arrivals"]


class Arrivals:
    """The open sequences of a pool by priority, each list in the order in which they came: opened there, or resident there since."""

    __slots__ = ("by_priority", "count")

    def __init__(self) -> None:
        self.by_priority: dict[int, dict[int, None]] = {}
        self.count = 0

    def latest_first(self) -> Iterator[tuple[int, int]]:
        """(priority, sequence): the lowest priority first, then the latest."""
        for priority in sorted(self.by_priority):
            for sequence_id in reversed(self.by_priority[priority]):
                yield priority, sequence_id

    def in_order(self) -> list[int]:
        """All of them, so that adding them in this order gives the same."""
        return [each for priority in sorted(self.by_priority) for each in self.by_priority[priority]]

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def add(self, sequence_id: int, priority: int) -> None:
        self.by_priority.setdefault(priority, {})[sequence_id] = None
        self.count += 1

    def remove(self, sequence_id: int, priority: int) -> None:
        sequences = self.by_priority[priority]
        del sequences[sequence_id]
        if not sequences:
            del self.by_priority[priority]
        self.count -= 1
