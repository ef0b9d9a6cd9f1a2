"""Remnants: which continuations of a place in the prefix index were evicted, and at which version. Kept for `explain` alone.

    (place, token ids of the page that followed) -> version

A place is a number that stays with a page of a run, in whatever node that run is; before the first page it is the namespace. It is given
when something after it is evicted, and gone with its page: what is noted for it can never be found again then. Only the first missing page
of a prompt is ever asked for, so one entry is kept for a run of pages that goes at once; if its first page comes back without the others,
theirs is forgotten. What is said of an eviction is true; that nothing is said does not mean that there was none.

This is no part of the state: it is in no snapshot and no digest, no decision reads it, and a manager that was restarted or restored knows
of no eviction before that. Bounded in bytes, the oldest entry goes first. A flush
of any tenant clears it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from kvmanager.pages.prefix import Node

__all__ = ["Remnants"]

Key: TypeAlias = tuple[int | bytes, bytes]
ENTRY_BYTES = 256  # of one entry beside the token ids


class Remnants:
    def __init__(self, page_bytes: int, bytes_max: int) -> None:
        self.entries_max = bytes_max // (page_bytes + ENTRY_BYTES)
        self.entries: OrderedDict[Key, int] = OrderedDict()
        self.lost_at = 0  # version in which all that the pool held was lost, the last time
        self._next_mark = 1

    def evicted_at(self, node: Node, pages: int, page: bytes) -> int:
        """Version in which `page` was evicted from its place after the first `pages` pages of the node; 0 if that is not known."""
        return self.entries.get((self._place(node, pages), page), 0)

    def evicted_root(self, namespace: bytes, page: bytes) -> int:
        """The same for the first page of a namespace of which nothing is left."""
        return self.entries.get((namespace, page), 0)

    def _place(self, node: Node, pages: int) -> int | bytes:
        if node.parent is None:
            return node.tokens
        return node.marks.get(pages, 0) if node.marks else 0

    # --- notes, by the prefix index alone ------------------------------------------------------------------------------------

    def trimmed(self, node: Node, left: int, page: bytes, version: int) -> None:
        """The node keeps its first `left` pages; `page` was the next."""
        self._supersede(node)
        if node.marks:
            node.marks = {place: mark for place, mark in node.marks.items() if place <= left}
        self._add(node, left, page, version)

    def removed(self, node: Node, parent: Node, page: bytes, version: int) -> None:
        """The node is gone; `page` was its first."""
        self._supersede(node)
        self._add(parent, parent.count, page, version)

    def split(self, upper: Node, lower: Node, pages: int) -> None:
        """The first `pages` pages of a node are another node's now."""
        if lower.marks:
            upper.marks = {place: mark for place, mark in lower.marks.items() if place <= pages}
            lower.marks = {place - pages: mark for place, mark in lower.marks.items() if place > pages}

    def clear(self) -> None:
        self.entries.clear()

    def lost(self, version: int) -> None:
        self.clear()
        self.lost_at = version

    def _supersede(self, node: Node) -> None:
        """A run that loses one page after the other needs one entry, not one for each."""
        if node.marks and self.entries and next(reversed(self.entries))[0] == node.marks.get(node.count):
            self.entries.popitem()

    def _add(self, node: Node, pages: int, page: bytes, version: int) -> None:
        if not self.entries_max:
            return
        place = self._place(node, pages)
        if not place:
            place, self._next_mark = self._next_mark, self._next_mark + 1
            node.marks = {**(node.marks or {}), pages: place}
        self.entries.pop((place, page), None)
        self.entries[place, page] = version
        if len(self.entries) > self.entries_max:
            self.entries.popitem(last=False)
