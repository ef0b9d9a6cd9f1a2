"""Pool: the pages of one group of workers, each in exactly one state.

    free         on the stack, ready to be handed out
    used         in the table of at least one sequence, or held by a handoff (`refs` counts them)
    cached       in the prefix index and held by nobody
    quarantined  freed, but a worker that has not acknowledged the freeing version may still write or read it

free + used + cached + quarantined == total, always. Who decides is `decide`; here are only the books.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager.errors import InvariantBroken
from kvmanager.inflight import InFlight
from kvmanager.prefix import PrefixIndex

__all__ = ["Pool", "PoolCounts", "Quarantined"]


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Pages freed at `version`: free again once every worker that might touch them has acknowledged it."""

    version: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Pages of a pool by state."""

    free: int
    used: int
    cached: int
    quarantined: int
    total: int


class Pool:
    def __init__(self, index: int, name: str, group: str, num_pages: int, page_size: int, workers: int, layout: str) -> None:
        self.index = index
        self.name = name
        self.group = group
        self.num_pages = num_pages
        self.page_size = page_size
        self.workers_expected = workers
        self.layout = layout
        self.free: list[int] = list(range(num_pages - 1, -1, -1))  # a stack: the page used last is handed out first
        self.refs = np.zeros(num_pages, np.int32)
        self.used = 0
        self.load = 0  # known token ids of open sequences, see placement
        self.quarantine: dict[int, Quarantined] = {}  # by serial, oldest first
        self.next_serial = 1
        self.quarantined = 0
        self.prefix = PrefixIndex(page_size)
        self.inflight = InFlight()
        self.publishable: dict[int, None] = {}  # sequences with acknowledged pages that are not in the index yet

    def counts(self) -> PoolCounts:
        cached = self.num_pages - len(self.free) - self.used - self.quarantined
        return PoolCounts(len(self.free), self.used, cached, self.quarantined, self.num_pages)

    def oldest_quarantined(self) -> int:
        """Version of the oldest quarantine entry; there must be one."""
        return next(iter(self.quarantine.values())).version

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def take(self, pages: list[int]) -> None:
        """Hand out free pages, in the order in which they leave the stack; each gets its first owner."""
        if not pages:
            return
        if self.free[-1 : -len(pages) - 1 : -1] != pages:
            raise InvariantBroken(f"pool {self.name}: pages {pages[:8]}... are not on top of the free stack")
        del self.free[-len(pages) :]
        self.refs[pages] = 1
        self.used += len(pages)

    def share(self, pages: list[int]) -> None:
        """One more owner for pages that are used or cached."""
        if pages:
            self.used += int((self.refs[pages] == 0).sum())
            self.refs[pages] += 1

    def unshare(self, pages: list[int]) -> list[int]:
        """One owner less; gives the pages that have none now. The caller says whether those are cached or quarantined."""
        if not pages:
            return []
        counts = self.refs[pages] - 1
        if counts.min() < 0:
            raise InvariantBroken(f"pool {self.name}: page {pages[int(np.argmin(counts))]} dropped more often than held")
        self.refs[pages] = counts
        loose = [page for page, count in zip(pages, counts.tolist(), strict=True) if count == 0]
        self.used -= len(loose)
        return loose

    def put_in_quarantine(self, version: int, pages: list[int]) -> None:
        if pages:
            self.quarantine[self.next_serial] = Quarantined(version, tuple(pages))
            self.next_serial += 1
            self.quarantined += len(pages)

    def hold_free(self, version: int) -> None:
        """Quarantine everything that is free."""
        pages, self.free = self.free, []
        self.put_in_quarantine(version, pages)

    def release(self, serial: int) -> None:
        """Quarantined pages become free."""
        entry = self.quarantine.pop(serial)
        self.quarantined -= len(entry.pages)
        self.free.extend(entry.pages)

    def evict(self, pages: list[int]) -> None:
        """Cached pages become free."""
        for page in pages:
            if self.refs[page]:
                raise InvariantBroken(f"pool {self.name}: page {page} evicted while {int(self.refs[page])} owners hold it")
            self.prefix.evict(page)
        self.free.extend(pages)
