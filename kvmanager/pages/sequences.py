"""Sequences: `Tables` is what manager and replicas share (block tables, lengths), `Sequence` what only the manager needs.

`Tables` keeps columns, not objects, so that a decode step of hundreds of sequences is a few numpy calls. A sequence id is
`generation << 20 | slot`: the slot is its row, the generation makes an id that was closed never valid again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from kvmanager.errors import InvariantBroken, Unknown
from kvmanager.pages.prefix import Node
from kvmanager.pages.steady import Steady
from kvmanager.pages.token_ids import TokenIds
from kvmanager.tables import BatchTables

__all__ = ["SLOT_BITS", "SLOT_MASK", "Sequence", "Tables", "Watch", "slot_of"]

SLOT_BITS = 20
SLOT_MASK = (1 << SLOT_BITS) - 1
FEW = 8  # so many rows are written one by one in less time than numpy takes to be called half a dozen times
NO_ROWS = np.zeros(0, np.int64)


_counted = np.arange(4096)


def _counting(count: int) -> np.ndarray:
    """0, 1, 2, ... (read only)"""
    global _counted
    if count > len(_counted):
        _counted = np.arange(1 << (count - 1).bit_length())
    return _counted[:count]


def slot_of(sequence_id: int) -> int:
    """Table row of a sequence id."""
    return sequence_id & SLOT_MASK


@dataclass(slots=True)
class Sequence:
    """The manager's view of one open sequence, beside its row in `Tables`.

    tokens      known token ids, little-endian int32, from token 0 on; may be shorter or longer than the length
    published   leading pages that belong to the prefix index (shared or shareable)
    node        where in the index those pages end
    written     tokens that each worker of the pool has acknowledged as written
    handoff     the active handoff, 0 if none; sealed sequences do not grow
    holds       handoffs that still hold the source pages: their ids must not be swapped
    priority    of its pages, once they are cached (see eviction)
    unlisted    what its tenant had cached was flushed: its pages do not enter the prefix index any more
    shared      leading pages that a fork may own as well (see forks); at least those that it does
    family      the sequences forked from each other that this one belongs to, 0 if none
    reserved    leading pages that stay in the table however short the sequence is cut
    cuts        (version, tokens that stayed) of truncations that some worker may not have seen yet, oldest first (see truncation)
    cut_floor   what a worker says about older versions counts for nothing
    """

    sequence_id: int
    owner: int
    pool: int
    namespace: bytes
    tokens: TokenIds
    node: Node
    published: int = 0
    written: dict[int, int] = field(default_factory=dict)
    handoff: int = 0
    sealed: bool = False
    holds: int = 0
    priority: int = 0
    unlisted: bool = False
    shared: int = 0
    family: int = 0
    reserved: int = 0
    cuts: list[tuple[int, int]] = field(default_factory=list)
    cut_floor: int = 0


class Watch:
    """How much of each row somebody's copy of the tables holds, so that only what changed is copied again.

    kept      int64 [rows]  leading entries of the row that the copy has. Whoever copies raises it; a change of an entry that is there lowers it,
                            and one that is appended is past it anyway
    rewrites  counts how often it was lowered: as long as that stays, rows have only grown
    """

    def __init__(self, rows: int) -> None:
        self.kept = np.zeros(rows, np.int64)
        self.rewrites = 0

    def lower(self, row: int, entries: int) -> None:
        """Entries of the row from this one on have changed, or are about to."""
        if self.kept[row] > entries:
            self.kept[row] = entries
            self.rewrites += 1

    def reserve(self, rows: int) -> None:
        self.kept = np.concatenate([self.kept, np.zeros(rows - len(self.kept), np.int64)])


class Tables:
    """Block tables and lengths of all open sequences, changed only by applying events."""

    def __init__(self) -> None:
        self.ids = np.zeros(64, np.int64)  # 0: the row is free
        self.pools = np.zeros(64, np.int32)
        self._lengths = np.zeros(64, np.int64)
        self.page_counts = np.zeros(64, np.int64)
        self.pages = np.full((64, 8), -1, np.int32)
        self.last_ids = np.zeros(0, np.int64)  # of the last grow: a step that repeats it needs no ids on the wire
        self.last_counts = np.zeros(0, np.int64)
        self._last_rows: np.ndarray | None = None  # of last_ids, as long as none of them has been closed
        self._repeats = 0  # of the last grow, which are not in `_lengths` yet
        self.steady: Steady | None = None  # kept by whoever decides about growth, as long as it follows from the columns here
        self.watches: list[Watch] = []
        self.placements = 0  # counts openings, closings and moves: as long as it stays, so do rows and pools of known ids

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64. A batch that grows as it grew last is only counted: whoever asks has it written here first."""
        if self._repeats:
            self._write_repeats()
        return self._lengths

    def _write_repeats(self) -> None:
        rows = self.last_rows()
        if rows is None:
            raise InvariantBroken("tables: a sequence of the last grow was closed before its growth was written")
        self._lengths[rows] += self.last_counts * self._repeats
        self._repeats = 0

    def last_rows(self) -> np.ndarray | None:
        """Rows of the sequences of the last grow; None if one of them is not open any more."""
        if self._last_rows is None and self.known(self.last_ids).all():
            self._last_rows = self.last_ids & SLOT_MASK
        return self._last_rows

    def rows(self, sequence_ids: np.ndarray) -> np.ndarray:
        """Rows of int64 ids; raises Unknown for the first that is not open."""
        known = self.known(sequence_ids)
        if not known.all():
            raise Unknown("sequence", int(sequence_ids[int(np.argmin(known))]))
        return sequence_ids & SLOT_MASK

    def known(self, sequence_ids: np.ndarray) -> np.ndarray:
        """bool [n]: which ids are open."""
        rows = sequence_ids & SLOT_MASK
        inside = rows < len(self.ids)
        return inside & (self.ids[np.where(inside, rows, 0)] == sequence_ids) & (sequence_ids > 0)

    def row(self, sequence_id: int) -> int:
        slot = sequence_id & SLOT_MASK
        if sequence_id <= 0 or slot >= len(self.ids) or self.ids[slot] != sequence_id:
            raise Unknown("sequence", sequence_id)
        return slot

    def length(self, sequence_id: int) -> int:
        return int(self.lengths[self.row(sequence_id)])

    def pool_of(self, sequence_id: int) -> int:
        """Index of the pool that the sequence is in."""
        return int(self.pools[self.row(sequence_id)])

    def pages_of(self, sequence_id: int) -> np.ndarray:
        """The block table: int32 page ids in token order (a copy)."""
        row = self.row(sequence_id)
        return self.pages[row, : self.page_counts[row]].copy()

    def open_ids(self) -> np.ndarray:
        """Ids of all open sequences, ascending by row."""
        return self.ids[self.ids > 0]

    def batch(self, sequence_ids: np.ndarray, version: int, page_size: int) -> BatchTables:
        """Tables of one batch in the order of `sequence_ids` (int64); see BatchTables for shapes."""
        return self.batch_of(self.rows(sequence_ids), version, page_size)

    def batch_of(self, rows: np.ndarray, version: int, page_size: int) -> BatchTables:
        """The same for table rows, int64."""
        counts = self.page_counts[rows]
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(counts, out=indptr[1:])
        # Where each page id stands in the table, row after row: one gather, whatever the lengths.
        places = (rows * self.pages.shape[1] - indptr[:-1]).repeat(counts)
        places += _counting(len(places))
        # All places are inside by construction; "wrap" spares numpy the pass that would look.
        pages = self.pages.ravel().take(places, mode="wrap")
        return BatchTables(version, page_size, self.lengths[rows].astype(np.int32), pages, indptr)

    def watch(self) -> Watch:
        """Have it told from now on which entries of which rows change, beginning with none copied."""
        self.watches.append(Watch(len(self.ids)))
        return self.watches[-1]

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def _reserve(self, slots: int, width: int) -> None:
        have_slots, have_width = self.pages.shape
        if slots <= have_slots and width <= have_width:
            return
        new_slots = max(have_slots, 1 << (slots - 1).bit_length())
        new_width = max(have_width, 1 << (width - 1).bit_length())
        pages = np.full((new_slots, new_width), -1, np.int32)
        pages[:have_slots, :have_width] = self.pages
        self.pages = pages
        if new_slots > have_slots:
            grow = new_slots - have_slots
            self.ids = np.concatenate([self.ids, np.zeros(grow, np.int64)])
            self.pools = np.concatenate([self.pools, np.zeros(grow, np.int32)])
            self._lengths = np.concatenate([self._lengths, np.zeros(grow, np.int64)])
            self.page_counts = np.concatenate([self.page_counts, np.zeros(grow, np.int64)])
            for watch in self.watches:
                watch.reserve(new_slots)

    def open(self, sequence_id: int, pool: int, length: int, pages: np.ndarray) -> None:
        slot = slot_of(sequence_id)
        self._reserve(slot + 1, max(1, len(pages)))
        if self.ids[slot]:
            raise InvariantBroken(f"sequence {sequence_id}: row {slot} already holds {int(self.ids[slot])}")
        self.ids[slot] = sequence_id
        self._put(slot, pool, length, pages)

    def place(self, sequence_id: int, pool: int, length: int, pages: np.ndarray) -> None:
        """Give an open sequence another table: a handoff makes it resident elsewhere."""
        self.steady = None
        row = self.row(sequence_id)
        self.pages[row, : self.page_counts[row]] = -1
        self._put(row, pool, length, pages)

    def _put(self, row: int, pool: int, length: int, pages: np.ndarray) -> None:
        """Fill a row, of which no page is left."""
        self.placements += 1
        self._reserve(row + 1, max(1, len(pages)))
        for watch in self.watches:
            watch.lower(row, 0)
        self.pools[row] = pool
        self.lengths[row] = length
        self.page_counts[row] = len(pages)
        self.pages[row, : len(pages)] = pages

    def grow(self, sequence_ids: np.ndarray, counts: np.ndarray, page_counts: np.ndarray, pages: np.ndarray) -> None:
        """Lengths += counts; `page_counts[i]` of `pages` are appended to sequence i's table."""
        rows = self.rows(sequence_ids)
        lengths = self.lengths[rows]  # with what is still to be written of the growth before
        self.last_ids, self.last_counts, self._last_rows, self.steady = sequence_ids, counts, rows, None
        self._lengths[rows] = lengths + counts
        if len(pages):
            self._append(np.repeat(rows, page_counts), pages)

    def grow_again(self, at: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """The same sequences by the same counts as the last grow; pages[i] is appended to the at[i]th of them, `at` ascending.

        Gives the rows that the pages are appended to.
        """
        rows = self.last_rows()
        if rows is None:
            raise InvariantBroken("grow again: a sequence of the last grow is not open any more")
        self._repeats += 1
        if self.steady is not None:
            self.steady.repeat(at)
        if not len(pages):
            return NO_ROWS
        rows = rows[at]
        self._append(rows, pages)
        return rows

    def _append(self, rows: np.ndarray, pages: np.ndarray) -> None:
        """One page more for each of `rows`; a row may stand there several times, one after the other."""
        if len(rows) <= FEW:
            for row, page in zip(rows.tolist(), pages.tolist(), strict=True):
                place = self.page_counts.item(row)
                if place >= self.pages.shape[1]:
                    self._reserve(0, place + 1)
                self.pages[row, place] = page
                self.page_counts[row] = place + 1
            return
        have = self.page_counts[rows]
        again = rows[1:] == rows[:-1]
        if np.count_nonzero(again):
            for place in np.flatnonzero(again).tolist():
                have[place + 1] = have[place] + 1
        after = have + 1
        widest = int(np.maximum.reduce(after))
        if widest > self.pages.shape[1]:
            self._reserve(0, widest)
        self.pages[rows, have] = pages
        self.page_counts[rows] = after  # of a row that stands there several times, the last counts

    def truncate(self, sequence_ids: np.ndarray, lengths: np.ndarray, page_counts: np.ndarray, targets: np.ndarray) -> None:
        """New lengths; tables keep their first `page_counts[i]` pages, the last of which becomes targets[i] unless that is -1."""
        rows = self.rows(sequence_ids)
        self.steady = None
        for index in np.flatnonzero(page_counts < self.page_counts[rows]):
            row = rows[index]
            self.pages[row, page_counts[index] : self.page_counts[row]] = -1
        for watch in self.watches:
            for row, count, target in zip(rows.tolist(), page_counts.tolist(), targets.tolist(), strict=True):
                watch.lower(row, count - (target >= 0))
        self.lengths[rows] = lengths
        self.page_counts[rows] = page_counts
        for index in np.flatnonzero(targets >= 0):
            self.pages[rows[index], page_counts[index] - 1] = targets[index]

    def swap(self, sequence_id: int, first: int, pages: np.ndarray) -> None:
        """Replace table entries [first, first + len(pages)): published pages may be another sequence's equal ones."""
        row = self.row(sequence_id)
        if self.watches and (changed := np.flatnonzero(self.pages[row, first : first + len(pages)] != pages)).size:
            for watch in self.watches:
                watch.lower(row, first + int(changed[0]))
        self.pages[row, first : first + len(pages)] = pages

    def close(self, sequence_id: int) -> None:
        row = self.row(sequence_id)
        lengths = self.lengths
        self._last_rows = self.steady = None
        self.placements += 1
        for watch in self.watches:
            watch.lower(row, 0)
        self.pages[row, : self.page_counts[row]] = -1
        self.ids[row] = self.pools[row] = lengths[row] = self.page_counts[row] = 0

    def digest(self) -> bytes:
        """SHA-256 over all rows in slot order: equal in manager and replica at equal versions."""
        rows = np.flatnonzero(self.ids)
        sha = hashlib.sha256()
        for column in (self.ids, self.pools.astype(np.int64), self.lengths, self.page_counts):
            sha.update(column[rows].astype("<i8").tobytes())
        counts = self.page_counts[rows]
        width = int(counts.max()) if len(counts) else 0
        sha.update(self.pages[rows, :width][np.arange(width) < counts[:, None]].astype("<i4").tobytes())
        for column in (self.last_ids, self.last_counts):
            sha.update(column.astype("<i8").tobytes())
        return sha.digest()
