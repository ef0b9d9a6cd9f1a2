"""Eviction: in which order cached pages give way.

    1. pages that no waiting prompt would use: the lowest priority first, within a priority the least recently used first
    2. only when nothing else can go, pages that waiting prompts would use: those of the prompt farthest back in the queue first

A child always goes before its parent, by construction. Whoever holds, wants or ranks a node does the same to everything above it: so a
parent's priority is never below its child's, the first prompt that waits for it never stands behind the child's, and nodes come into
their list children first. Priority 0 for all and an empty queue is leaf-first LRU.

A page's priority is the highest that any sequence gave that used it, and stays until the page is evicted.

Each priority has a list, ordered by last use: a node enters at its end and leaves from anywhere at the same price, however many there are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmanager.pages.prefix import Node

__all__ = ["PRIORITY_MAX", "PRIORITY_MIN", "EvictionOrder", "LinkedOrder", "ListedOrder", "Ring"]

PRIORITY_MIN, PRIORITY_MAX = -8, 7


class EvictionOrder:
    """The nodes that nobody holds and nobody waits for."""

    __slots__ = ("classes",)
    classes: tuple[Iterable[Node], ...]  # of each priority, first to go first

    def __iter__(self) -> Iterator[Node]:
        """First to go first."""
        for nodes in self.classes:
            yield from nodes

    def victims(self, acked: int) -> Iterator[Node]:
        """Nodes whose last use every worker has acknowledged, first to go first."""
        for nodes in self.classes:
            for node in nodes:
                if node.last_used > acked:
                    break  # a list is ordered by last use: all that follow are newer still
                yield node


class Ring:
    """One priority's nodes in a circle that begins and ends here."""

    __slots__ = ("after", "before")

    def __init__(self) -> None:
        self.before: Node | Ring = self
        self.after: Node | Ring = self

    def __iter__(self) -> Iterator[Node]:
        node: Any = self.after
        while node is not self:
            yield node
            node = node.after


class LinkedOrder(EvictionOrder):
    """Of a whole pool: links in the nodes themselves, a fifth of what a million of them would take in dicts."""

    __slots__ = ()
    classes: tuple[Ring, ...]

    def __init__(self) -> None:
        self.classes = tuple(Ring() for _ in range(PRIORITY_MIN, PRIORITY_MAX + 1))

    def __contains__(self, node: Node) -> bool:
        return node.after is not None

    def add(self, node: Node) -> None:
        """Used just now."""
        if node.after is not None:
            return
        ring = self.classes[node.priority - PRIORITY_MIN]
        last = node.before = ring.before
        node.after = ring
        last.after = ring.before = node

    def extend(self, nodes: Iterable[Node]) -> None:
        """Used just now, one after the other; none of them is here yet."""
        rings = self.classes
        ends = [ring.before for ring in rings]
        for node in nodes:
            place = node.priority - PRIORITY_MIN
            last = node.before = ends[place]
            last.after = ends[place] = node
        for ring, end in zip(rings, ends, strict=True):
            end.after, ring.before = ring, end

    def discard(self, node: Node) -> None:
        before, after = node.before, node.after
        if before is not None and after is not None:
            before.after, after.before = after, before
            node.before = node.after = None

    def touch(self, node: Node) -> None:
        """Used once more."""
        self.discard(node)
        self.add(node)


class ListedOrder(EvictionOrder):
    """Of one tenant with a quota, beside the pool's."""

    __slots__ = ()
    classes: tuple[OrderedDict[Node, None], ...]

    def __init__(self) -> None:
        self.classes = tuple(OrderedDict() for _ in range(PRIORITY_MIN, PRIORITY_MAX + 1))

    def add(self, node: Node) -> None:
        self.classes[node.priority - PRIORITY_MIN][node] = None

    def discard(self, node: Node) -> None:
        self.classes[node.priority - PRIORITY_MIN].pop(node, None)

    def touch(self, node: Node) -> None:
        self.classes[node.priority - PRIORITY_MIN].move_to_end(node)
