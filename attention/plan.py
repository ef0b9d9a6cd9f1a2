"""From block tables to one step's plan, on the host, with numpy. Checks everything that a kernel can't; touches no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables

if TYPE_CHECKING:
    from kvmanager.attention.staging import DevicePlan

__all__ = ["Limits", "Plan", "make_plan"]

NUM_HEADS_MAX = 1024
MAX_TOKENS_MAX = 2**20
MAX_BATCH_MAX = 2**16
MAX_PAGES_MAX = 2**28
SEQUENCE_TOKENS_MAX = 2**30
LONG_ROW = 64  # pages of a row, on average, from which on a copy row by row is faster than one gather


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one step of a backend may hold; what its fixed buffers are sized by."""

    max_tokens: int  # tokens written in a step
    max_batch: int  # sequences in a step
    max_pages: int  # used pages of all sequences of a step together

    def __post_init__(self) -> None:
        for field, high in (("max_tokens", MAX_TOKENS_MAX), ("max_batch", MAX_BATCH_MAX), ("max_pages", MAX_PAGES_MAX)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise InvalidValue(field, f"an integer from 1 to {high}", value)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step of one backend: which token goes to which slot, and who attends to what. Decode rows come first, then prefill rows.

    version       the step's version, from the tables
    serial        which plan of its backend this is; only the newest may be run
    slots         int64 [num_tokens]  slot of each token, decode rows' first; -1 is padding
    lengths       int64 [batch]       tokens of each sequence, this step's included; 0 is padding
    query_lens    int64 [batch]       tokens of this step
    query_starts  int64 [batch]       first token of each sequence in this step's order
    page_ids      int32 [used pages]  page ids that lengths cover, reserved ones left out; the tables' own array if there are none
    page_starts   int64 [batch + 1]   sequence b has page_ids[page_starts[b]:page_starts[b + 1]]
    graph_batch   decode rows a captured graph was made for, padding included; None for an eager plan
    """

    version: int
    serial: int
    num_tokens: int
    num_decode: int
    num_prefill: int
    slots: np.ndarray
    lengths: np.ndarray
    query_lens: np.ndarray
    query_starts: np.ndarray
    page_ids: np.ndarray
    page_starts: np.ndarray
    graph_batch: int | None = None
    device: DevicePlan | None = None

    @property
    def batch(self) -> int:
        """Sequences, padding included."""
        return len(self.lengths)


def _row_error(field: str, expected: str, values: np.ndarray, bad: np.ndarray) -> InvalidValue:
    row = int(np.argmax(bad))
    return InvalidValue(field, expected, f"{int(values[row])} in row {row}")


def ragged_arange(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [n0, n1, ...]: owner (0 n0 times, 1 n1 times, ...) and offset within the owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    return owner, np.arange(len(owner), dtype=np.int64) - starts[owner]


def _checked_rows(tables: BatchTables, query_lens: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """lengths, query_lens and page_indptr as int64, their shapes and mutual order checked."""
    lengths = np.asarray(tables.lengths)
    queries = np.asarray(query_lens)
    indptr = np.asarray(tables.page_indptr)
    for field, array in (("lengths", lengths), ("query_lens", queries), ("page_indptr", indptr), ("page_ids", np.asarray(tables.page_ids))):
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise InvalidValue(field, "a one-dimensional array of integers", f"{array.dtype} of shape {array.shape}")
    batch = len(lengths)
    if len(queries) != batch:
        raise InvalidValue("query_lens", f"{batch} numbers, one a sequence", len(queries))
    if len(indptr) != batch + 1:
        raise InvalidValue("page_indptr", f"{batch + 1} numbers", len(indptr))
    lengths, queries, indptr = lengths.astype(np.int64), queries.astype(np.int64), indptr.astype(np.int64)
    if indptr[0] != 0 or indptr[-1] != len(tables.page_ids) or (np.diff(indptr) < 0).any():
        raise InvalidValue("page_indptr", f"0 rising to {len(tables.page_ids)}", f"{indptr[0]} to {indptr[-1]}")
    return lengths, queries, indptr


def _check_order(lengths: np.ndarray, queries: np.ndarray) -> int:
    """Rows of one query token first, then those of several; gives the number of the first kind."""
    if (bad := queries < 1).any():
        raise _row_error("query_lens", "at least 1", queries, bad)
    num_decode = int((queries == 1).sum())
    if (bad := queries[:num_decode] != 1).any():
        raise _row_error("query_lens", f"decode rows (1 token) first: {num_decode} of them", queries, bad)
    if (bad := (lengths < 0) | (lengths > SEQUENCE_TOKENS_MAX)).any():
        raise _row_error("lengths", f"0 to {SEQUENCE_TOKENS_MAX}", lengths, bad)
    if (bad := (lengths < queries) & ~((queries == 1) & (lengths == 0))).any():
        raise _row_error("lengths", "at least the row's query_lens, or 0 in a decode row of padding", lengths, bad)
    return num_decode


def _used_pages(page_ids: np.ndarray, indptr: np.ndarray, used: np.ndarray, num_pages: int) -> np.ndarray:
    """int32 page ids that lengths cover, those behind left out; each is checked. What is given itself where nothing has to be left out."""
    starts = indptr[:-1]
    if int(used.sum()) != len(page_ids):
        if len(page_ids) > LONG_ROW * len(used):
            rows = [page_ids[start:end] for start, end in zip(starts.tolist(), (starts + used).tolist(), strict=True)]
            page_ids = np.concatenate(rows)
        else:
            owner, offset = ragged_arange(used)
            page_ids = page_ids[starts[owner] + offset]
    is_wide = page_ids.dtype.itemsize != 4
    # As an unsigned number, one below 0 is larger than any page: one pass over them.
    if len(page_ids) and (page_ids.min() < 0 or page_ids.max() >= num_pages if is_wide else page_ids.view(np.uint32).max() >= num_pages):
        bad = (page_ids < 0) | (page_ids >= num_pages)
        row = int(np.searchsorted(np.cumsum(used), np.argmax(bad), side="right"))
        raise _row_error("page_ids", f"0 to {num_pages - 1} in row {row}", page_ids, bad)
    return page_ids.astype(np.int32, copy=False)


def make_plan(
    layout: LatentLayout,
    num_pages: int,
    limits: Limits,
    tables: BatchTables,
    query_lens: Sequence[int] | np.ndarray,
    graph_batch: int | None,
    serial: int,
    stores: Sequence[bool] | np.ndarray | None = None,
) -> Plan:
    """Check a step and lay it out. Raises InvalidValue, naming field, limit and row, before anything is used.

    stores: of each row, whether its tokens get slots; None: all do."""
    if tables.page_size != layout.page_size:
        raise InvalidValue("page_size", f"that of the memory, {layout.page_size}", tables.page_size)
    lengths, queries, indptr = _checked_rows(tables, query_lens)
    num_decode = _check_order(lengths, queries)
    stored = np.ones(len(lengths), bool) if stores is None else np.asarray(stores)
    if stored.dtype != np.bool_ or stored.shape != lengths.shape:
        raise InvalidValue("stores", f"{len(lengths)} booleans, one a sequence", f"{stored.dtype} {list(stored.shape)}")
    if graph_batch is not None:
        if isinstance(graph_batch, bool) or not isinstance(graph_batch, int) or not 1 <= graph_batch <= limits.max_batch:
            raise InvalidValue("graph_batch", f"an integer from 1 to {limits.max_batch}", graph_batch)
        if num_decode != len(lengths) or num_decode > graph_batch:
            raise InvalidValue("query_lens", f"at most {graph_batch} rows of 1 token under graph_batch", f"{len(lengths)} rows")
        padding = graph_batch - num_decode
        lengths = np.concatenate([lengths, np.zeros(padding, np.int64)])
        queries = np.concatenate([queries, np.ones(padding, np.int64)])
        stored = np.concatenate([stored, np.zeros(padding, bool)])
        indptr = np.concatenate([indptr, np.full(padding, indptr[-1])])
        num_decode = graph_batch
    num_tokens, batch = int(queries.sum()), len(lengths)
    used = -(-lengths // layout.page_size)
    for field, limit, got in (
        ("max_batch", limits.max_batch, batch),
        ("max_tokens", limits.max_tokens, num_tokens),
        ("max_pages", limits.max_pages, int(used.sum())),
    ):
        if got > limit:
            raise InvalidValue(field, f"at most {limit} in a step", got)
    if (bad := used > np.diff(indptr)).any():
        raise _row_error("lengths", "tokens that the row's pages hold", lengths, bad)

    page_ids = _used_pages(np.asarray(tables.page_ids), indptr, used, num_pages)
    page_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(used)])

    if num_decode == batch:  # one token a row, each row's last
        first_pages, position, kept = page_starts[:-1], lengths - 1, stored
    else:
        owner, offset = ragged_arange(queries)
        first_pages, position, kept = page_starts[owner], (lengths - queries)[owner] + offset, stored[owner]
    padded = (position < 0) | ~kept
    position = np.maximum(position, 0)
    entry = first_pages + position // layout.page_size
    pages = page_ids[np.minimum(entry, max(len(page_ids) - 1, 0))].astype(np.int64) if len(page_ids) else np.zeros(len(entry), np.int64)
    slots = pages * layout.page_size + position % layout.page_size
    slots[padded] = -1
    return Plan(
        version=tables.version,
        serial=serial,
        num_tokens=num_tokens,
        num_decode=num_decode,
        num_prefill=num_tokens - num_decode,
        slots=slots,
        lengths=lengths,
        query_lens=queries,
        query_starts=np.cumsum(queries) - queries,
        page_ids=page_ids,
        page_starts=page_starts,
        graph_batch=graph_batch,
    )
