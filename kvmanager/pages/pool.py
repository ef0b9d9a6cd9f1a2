"""Pool: the pages of one group of workers, each in exactly one state.

    free         on the stack, ready to be handed out
    used         in the table of at least one sequence, or held by a handoff (`refs` counts them)
    cached       in the prefix index and held by nobody
    quarantined  freed, but a worker that has not acknowledged the freeing version may still write or read it

free + used + cached + quarantined == total, always. Who decides is `decide`; here are only the books.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from kvmanager.errors import InvariantBroken
from kvmanager.pages.accounts import Account
from kvmanager.pages.arrivals import Arrivals
from kvmanager.pages.extras import Extras
from kvmanager.pages.inflight import InFlight
from kvmanager.pages.prefix import PrefixIndex

__all__ = ["PageStack", "Pages", "Pool", "PoolCounts", "Quarantined"]

# Page ids, int32 [n]; lists are taken too, but pages come and go by the hundred, and an array is checked and counted in one go.
Pages: TypeAlias = np.ndarray | list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Quarantined:
    """Pages freed at `version`: free again once every worker that might touch them has acknowledged it."""

    version: int
    pages: np.ndarray


class PageStack:
    """The free pages of a pool: the page used last is handed out first."""

    __slots__ = ("_pages", "_top")

    def __init__(self, num_pages: int) -> None:
        self._pages = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._top = num_pages

    def __len__(self) -> int:
        return self._top

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PageStack) and np.array_equal(self.array(), other.array())

    __hash__ = None  # type: ignore[assignment]

    def look(self, count: int, below: int) -> np.ndarray:
        """`count` pages in the order in which they leave the stack, the first `below` places from its bottom (a view)."""
        return self._pages[below - count : below][::-1]

    def drop(self, count: int) -> None:
        self._top -= count

    def push(self, pages: Pages) -> None:
        """The last of `pages` is on top then."""
        top = self._top + len(pages)
        self._pages[self._top : top] = pages
        self._top = top

    def set(self, pages: np.ndarray) -> None:
        """These pages, from the bottom up, and no others."""
        self._top = 0
        self.push(pages)

    def array(self) -> np.ndarray:
        """All free pages from the bottom up (a copy)."""
        return self._pages[: self._top].copy()


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Pages of a pool by state."""

    free: int
    used: int
    cached: int
    quarantined: int
    total: int


class Pool:
    def __init__(
        self,
        index: int,
        name: str,
        group: str,
        num_pages: int,
        page_size: int,
        workers: int,
        layout: str,
        extras: Extras,
        remnants_bytes_max: int,
    ) -> None:
        self.index = index
        self.name = name
        self.group = group
        self.num_pages = num_pages
        self.page_size = page_size
        self.workers_expected = workers
        self.layout = layout
        self.free = PageStack(num_pages)
        self.refs = np.zeros(num_pages, np.int32)
        self.used = 0
        self.tokens_copied = 0  # that prompts did not compute because part of a page was copied
        self.pages_moved = 0  # into it, by handoffs
        self.pages_spared = 0  # that handoffs did not move, because they were here already
        self.page_bytes = 0  # of each, in a worker's memory, if one has said
        self.draining = 0  # the client that asked to empty it, 0 if nobody did
        self.drained = False
        self.load = 0  # known token ids of open sequences, see placement
        self.quarantine: dict[int, Quarantined] = {}  # by serial, oldest first
        self.next_serial = 1
        self.quarantined = 0
        self.prefix = PrefixIndex(page_size, num_pages, extras, remnants_bytes_max)
        self.inflight = InFlight()
        self.pinned: dict[bytes, int] = {}  # tenant -> distinct pages that its pins hold
        self.arrivals = Arrivals()
        self.publishable: dict[int, None] = {}  # sequences with acknowledged pages that are not in the index yet

    @property
    def cached(self) -> int:
        return self.num_pages - len(self.free) - self.used - self.quarantined

    def counts(self) -> PoolCounts:
        return PoolCounts(len(self.free), self.used, self.cached, self.quarantined, self.num_pages)

    def oldest_quarantined(self) -> int:
        """Version of the oldest quarantine entry; there must be one."""
        return next(iter(self.quarantine.values())).version

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def take(self, pages: Pages, account: Account | None) -> None:
        """Hand out free pages to a tenant, in the order in which they leave the stack; each gets its first owner."""
        count = len(pages)
        if not count:
            return
        pages = np.asarray(pages, np.int32)
        if count > len(self.free) or self.free.look(count, len(self.free)).tobytes() != pages.tobytes():
            raise InvariantBroken(f"pool {self.name}: pages {list(pages[:8])}... are not on top of the free stack")
        self.free.drop(count)
        self.refs[pages] = 1
        self.used += count
        if account is not None:
            account.pages += count

    def share(self, pages: Pages) -> None:
        """One more owner for pages that are used or cached."""
        if len(pages):
            counts = self.refs[pages]
            self.used += len(counts) - int(np.count_nonzero(counts))
            self.refs[pages] = counts + 1

    def unshare(self, pages: Pages) -> np.ndarray:
        """One owner less; gives the pages that have none now. The caller says whether those are cached or quarantined."""
        pages = np.asarray(pages, np.int32)
        if not len(pages):
            return pages
        counts = self.refs[pages]
        counts -= 1
        least = int(np.minimum.reduce(counts))
        if least < 0:
            raise InvariantBroken(f"pool {self.name}: page {pages[int(np.argmin(counts))]} dropped more often than held")
        self.refs[pages] = counts
        loose = pages[counts == 0] if least == 0 else pages[:0]
        self.used -= len(loose)
        return loose

    def put_in_quarantine(self, version: int, pages: Pages, account: Account | None) -> None:
        """Pages that were this tenant's are nobody's now."""
        if len(pages):
            self.quarantine[self.next_serial] = Quarantined(version, np.array(pages, np.int32))
            self.next_serial += 1
            self.quarantined += len(pages)
            if account is not None:
                account.pages -= len(pages)
                self.prefix.accounts.settle(account)

    def hold_free(self, version: int) -> None:
        """Quarantine everything that is free, and what is in quarantine for as long: by a lost end of the log it may have been handed out."""
        held = [*(entry.pages for entry in self.quarantine.values()), self.free.array()]
        self.quarantine, self.quarantined = {}, 0
        self.put_in_quarantine(version, np.concatenate(held), None)
        self.free.drop(len(self.free))

    def release(self, serial: int) -> None:
        """Quarantined pages become free."""
        entry = self.quarantine.pop(serial)
        self.quarantined -= len(entry.pages)
        self.free.push(entry.pages)

    def evict(self, pages: np.ndarray, version: int) -> None:
        """Cached pages become free."""
        if np.count_nonzero(self.refs[pages]):
            page = int(pages[int(np.argmax(self.refs[pages]))])
            raise InvariantBroken(f"pool {self.name}: page {page} evicted while {int(self.refs[page])} owners hold it")
        self.prefix.evict(pages, version)
        self.free.push(pages)
