"""Neighbours: the children of index nodes in the order of their token ids, for pools that match below a page.

A prompt that ends its match between two pages may still agree with the beginning of one of them. Which child agrees furthest is asked of
the sorted keys: of all that begin alike, the longest agreement is with one of the two between which the prompt would stand. So finding it
costs a binary search, whether a node has three children or a hundred thousand, and nothing is scanned.

Kept beside the tree and by it; what is here follows from the tree alone, so neither logs nor snapshots speak of it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmanager.pages.prefix import Node

__all__ = ["Neighbours", "agreement"]


class Neighbours:
    __slots__ = ("keys",)

    def __init__(self) -> None:
        self.keys: dict[Node, list[bytes]] = {}

    def add(self, parent: Node, key: bytes) -> None:
        keys = self.keys.get(parent)
        if keys is None:
            self.keys[parent] = [key]
        else:
            insort(keys, key)

    def remove(self, parent: Node, key: bytes) -> None:
        keys = self.keys[parent]
        del keys[bisect_left(keys, key)]
        if not keys:
            del self.keys[parent]

    def drop(self, parents: list[Node]) -> None:
        """These nodes have no children any more, or are gone."""
        for parent in parents:
            self.keys.pop(parent, None)

    def near(self, parent: Node, tokens: bytes) -> list[bytes]:
        """The at most two keys that can agree furthest with `tokens`, which are at most a page's."""
        keys = self.keys.get(parent, [])
        place = bisect_left(keys, tokens)
        return keys[max(0, place - 1) : place + 1]


def agreement(one: bytes, other: bytes) -> int:
    """Leading token ids (little-endian int32) in which both agree."""
    count = min(len(one), len(other)) // 4
    unequal = np.frombuffer(one, "<i4", count) != np.frombuffer(other, "<i4", count)
    return int(np.argmax(unequal)) if unequal.any() else count
