"""Page tables that stay on the device: which rows they have, and what a step has to send so that they are the replica's again. Numpy alone.

A sequence's page ids stand in one row of a fixed width, wherever in the batch the sequence is. A row is brought up to date when a step needs it, and
no sooner. What has changed is what the tables say (`Watch`), never a comparison of page ids. A row of decode that began a page needs nothing but the
page that its newest token is in, which is sent anyway; a sequence that is planned for the first time, or has been cut, moved or copied, is
sent from where it changed.

Rows are taken from those that were not planned for the longest time. Nothing here waits for a device: whoever sends an update does so in the order of
the stream that reads the table, so a step that is still running reads what it was planned with.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvmanager.errors import InvalidValue
from kvmanager.pages.sequences import Tables, Watch
from kvmanager.tables import BatchRows

__all__ = ["ResidentTable", "Update"]

FEW = 4  # rows that are listed one by one in less time than numpy takes for all at once
NO_IDS = np.zeros(0, np.int32)
NO_RUNS = np.zeros((0, 3), np.int32)
NO_ROWS = np.zeros(0, np.int64)


class Update(NamedTuple):
    """What a step changes in the table.

    starts      int64 [batch]     where each sequence's row begins
    last_pages  int32 [batch]     the page that the newest token of each is in, anything where the length is 0; None if runs cover all changes
    ids         int32 [any]       page ids to be put into it; maybe the tables' own
    runs        int32 [any, 3]    entry of the table, first of ids, how many: one run a row at most
    seating     which batch this is: the same numbers, the same sequences in the same rows, which have only grown
    kept        int64 [batch]     leading entries that each row of the tables has then, if that changes
    source      int32 [any]       the tables' own page ids, and int64 `source_starts` [batch]: where each sequence's begin there
    """

    starts: np.ndarray
    last_pages: np.ndarray | None
    ids: np.ndarray
    runs: np.ndarray
    seating: tuple[int, int]
    kept: np.ndarray | None
    source: np.ndarray
    source_starts: np.ndarray


class ResidentTable:
    """num_rows rows of `width` entries. entries: the table itself, where it is on the host (the torch path reads it); None where it is not."""

    def __init__(self, num_rows: int, width: int, num_pages: int, on_host: bool) -> None:
        self.num_rows, self.width, self._num_pages = num_rows, width, num_pages
        self.entries = np.zeros(num_rows * width, np.int32) if on_host else None
        self._tables: Tables | None = None
        self._watch = Watch(0)
        self._places = NO_ROWS  # of each row of the tables: its row here, -1 if it has none
        self._owners = np.full(num_rows, -1, np.int64)  # and the other way round
        self._planned = np.zeros(num_rows, np.int64)  # the seating that last had it
        self._rows: np.ndarray | None = None  # of the last batch
        self._starts = NO_ROWS
        self._source: np.ndarray | None = None
        self._source_starts = self._source_lasts = NO_ROWS
        self._seating = 0

    @property
    def num_entries(self) -> int:
        return self.num_rows * self.width

    def prepare(self, batch: BatchRows, used: np.ndarray, most_used: int, with_last: bool) -> Update:
        """What to send so that the leading used[b] entries of each sequence's row are right, most_used at most. Changes nothing that a plan reads.

        with_last: the page of each sequence's newest token is sent beside it (for decode), so that runs need not cover it. Raises InvalidValue
        for a length that the row's pages do not hold, a page id out of range, and more sequences than rows."""
        tables, rows = batch.tables, batch.rows
        if tables is not self._tables:
            self._follow(tables)
        if rows is not self._rows:
            self._seat(rows)
        pages = tables.pages
        if pages is not self._source:
            self._source, self._source_starts = pages, rows * pages.shape[1]
            self._source_lasts = self._source_starts - 1
        source = pages.reshape(-1)
        if most_used > pages.shape[1]:  # it would read another row's pages
            self._refuse_length(batch, int(np.argmax(used)))
        have = self._watch.kept.take(rows)
        gap = used - have
        most = int(np.maximum.reduce(gap)) if len(gap) else 0
        last_pages = None
        ids, runs = NO_IDS, NO_RUNS
        if with_last:
            last_pages = source.take(self._source_lasts + used, mode="clip")
            # An entry past a row's pages is -1, and as an unsigned number that is larger than any page.
            if len(gap) and np.maximum.reduce(last_pages.view(np.uint32)) >= self._num_pages:
                last_pages[used == 0] = 0
                self._check(batch, used, last_pages, np.arange(len(used)))
        if most > with_last:
            ids, runs = self._runs(batch, used, have, (gap > int(with_last)).nonzero()[0], source)
        seating, kept = (self._seating, self._watch.rewrites), used if most > 0 else None
        return Update(self._starts, last_pages, ids, runs, seating, kept, source, self._source_starts)

    def _runs(
        self, batch: BatchRows, used: np.ndarray, have: np.ndarray, behind: np.ndarray, source: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The entries from have to used of the sequences `behind`: page ids, and where they go."""
        if len(behind) <= FEW:
            return self._few_runs(batch, used, have, behind, source)
        first = have[behind]
        counts = used[behind] - first
        ends = counts.cumsum()
        begin = ends - counts
        runs = np.empty((len(behind), 3), np.int32)
        runs[:, 0], runs[:, 1], runs[:, 2] = self._starts[behind] + first, begin, counts
        ids = source.take(np.repeat(self._source_starts[behind] + first - begin, counts) + np.arange(ends[-1]))
        if ids.view(np.uint32).max() >= self._num_pages:
            self._check(batch, used, ids, np.repeat(behind, counts))
        return ids, runs

    def _few_runs(
        self, batch: BatchRows, used: np.ndarray, have: np.ndarray, behind: np.ndarray, source: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        parts, runs, begin = [], [], 0
        for row in behind.tolist():
            first, stop, start = have.item(row), used.item(row), self._source_starts.item(row)
            part = source[start + first : start + stop]
            if np.maximum.reduce(part.view(np.uint32)) >= self._num_pages:
                self._check(batch, used, part, np.full(len(part), row))
            parts.append(part)
            runs.append((self._starts.item(row) + first, begin, stop - first))
            begin += stop - first
        return parts[0] if len(parts) == 1 else np.concatenate(parts), np.array(runs, np.int32)

    def _check(self, batch: BatchRows, used: np.ndarray, ids: np.ndarray, owners: np.ndarray) -> None:
        """Refuse the first of these page ids, of the batch's rows `owners`, that is none of this memory's."""
        bad = (ids < 0) | (ids >= self._num_pages)
        if bad.any():
            at = int(np.argmax(bad))
            row = int(owners[at])
            if used[row] > batch.tables.page_counts[batch.rows[row]]:
                self._refuse_length(batch, row)
            raise InvalidValue("page_ids", f"0 to {self._num_pages - 1} in row {row}", f"{int(ids[at])} in row {row}")

    def _refuse_length(self, batch: BatchRows, row: int) -> None:
        raise InvalidValue("lengths", "tokens that the row's pages hold", f"{int(batch.lengths[row])} in row {row}")

    def commit(self, batch: BatchRows, update: Update) -> None:
        """The update is on its way: the next one goes on from there."""
        if self.entries is not None:
            for at, first, count in update.runs.tolist():
                self.entries[at : at + count] = update.ids[first : first + count]
        if update.kept is not None:
            self._watch.kept[batch.rows] = update.kept

    def _follow(self, tables: Tables) -> None:
        """Other tables: a snapshot was loaded, or this is the first step."""
        if self._tables is not None and self._watch in self._tables.watches:
            self._tables.watches.remove(self._watch)
        self._tables, self._watch, self._rows = tables, tables.watch(), None
        self._places = np.full(len(tables.ids), -1, np.int64)
        self._owners[:] = -1
        self._planned[:] = 0

    def _seat(self, rows: np.ndarray) -> None:
        """Give each sequence of another batch a row."""
        if self._rows is not None and len(rows) == len(self._rows) and (rows == self._rows).all():
            self._rows = rows
            return
        if len(rows) > self.num_rows:
            raise InvalidValue("max_batch", f"at most {self.num_rows} sequences in a step with resident tables", len(rows))
        tables = self._tables
        assert tables is not None
        if len(self._places) < len(tables.ids):
            self._places = np.concatenate([self._places, np.full(len(tables.ids) - len(self._places), -1, np.int64)])
        self._seating += 1
        places = self._places.take(rows)
        self._planned[places[places >= 0]] = self._seating
        if (new := np.unique(rows[places < 0])).size:
            free = np.argsort(self._planned, kind="stable")[: len(new)]
            before = self._owners[free]
            before = before[before >= 0]
            self._places[before] = -1
            self._places[new], self._owners[free], self._planned[free] = free, new, self._seating
            self._watch.kept[new] = 0
            places = self._places.take(rows)
        self._rows, self._starts, self._source = rows, places * self.width, None
