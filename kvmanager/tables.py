"""What a worker plans from: the block tables and lengths of one batch, as numpy arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmanager.pages.sequences import Tables

__all__ = ["BatchRows", "BatchTables", "div_ceil"]


def div_ceil(value: int, divisor: int) -> int:
    """value / divisor rounded up, for non-negative ints."""
    return -(-value // divisor)


@dataclass(frozen=True, slots=True)
class BatchTables:
    """Block tables of the sequences of one step, in the order the caller named them.

    version      the step's version: what these tables include
    page_size    token slots a page
    lengths      int32 [batch]                 tokens of each sequence, those that this step writes included
    page_ids     int32 [page_indptr[-1]]       page ids of all sequences, one after the other, in token order
    page_indptr  int64 [batch + 1]             sequence b owns page_ids[page_indptr[b]:page_indptr[b + 1]]

    A sequence has at least ceil(lengths[b] / page_size) pages and may have more (reserved, not yet used).
    """

    version: int
    page_size: int
    lengths: np.ndarray
    page_ids: np.ndarray
    page_indptr: np.ndarray

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def pages_of(self, row: int) -> np.ndarray:
        """Page ids of the sequence in row `row`, int32."""
        return self.page_ids[self.page_indptr[row] : self.page_indptr[row + 1]]


@dataclass(frozen=True, slots=True)
class BatchRows:
    """The sequences of one step as rows of the replica's own tables: nothing is copied, so it is good until the replica applies the next step.

    version    the step's version: what the tables include
    page_size  token slots a page
    lengths    int64 [batch]   as in BatchTables; this object's own
    rows       int64 [batch]   rows of `tables`; the same array as in the step before if the batch is the same
    tables     of all sequences
    """

    version: int
    page_size: int
    lengths: np.ndarray
    rows: np.ndarray
    tables: Tables

    @property
    def batch(self) -> int:
        return len(self.rows)

    def gathered(self) -> BatchTables:
        """The same as arrays of its own."""
        return replace(self.tables.batch_of(self.rows, self.version, self.page_size), lengths=self.lengths.astype(np.int32))
