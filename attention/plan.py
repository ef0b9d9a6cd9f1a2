"""From block tables to one step's plan, on the host, with numpy. Checks everything that a kernel can't; touches no device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchRows, BatchTables, div_ceil

if TYPE_CHECKING:
    from kvmanager.attention.resident import ResidentTable, Update
    from kvmanager.attention.staging import DevicePlan

__all__ = ["Limits", "Plan", "make_plan", "make_row_plan", "with_device"]

NUM_HEADS_MAX = 1024
MAX_TOKENS_MAX = 2**20
MAX_BATCH_MAX = 2**16
MAX_PAGES_MAX = 2**28
SEQUENCE_TOKENS_MAX = 2**30
BATCHES_MAX = 1024  # sizes of batches whose constant arrays are kept
NO_IDS = np.zeros(0, np.int32)
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
    slots         int64 [num_tokens]  slot of each token, decode rows' first; -1 is padding. Computed when asked for, where the device has its own
    lengths       int64 [batch]       tokens of each sequence, this step's included; 0 is padding
    query_lens    int64 [batch]       tokens of this step
    query_starts  int64 [batch]       first token of each sequence in this step's order
    page_ids      int32 [any]         page ids that lengths cover, reserved ones left out; the tables' own array if there are none. Of a plan
                                      of rows in a resident table: that table, empty if it is on a device (DevicePlan.pages_at)
    page_starts   int64 [batch (+ 1)] sequence b has page_ids[pages_of(b)], from page_starts[b] on
    page_size     token slots a page
    graph_batch   decode rows a captured graph was made for, padding included; None for an eager plan
    """

    version: int
    serial: int
    num_tokens: int
    num_decode: int
    num_prefill: int
    given_slots: np.ndarray | None
    lengths: np.ndarray
    query_lens: np.ndarray
    query_starts: np.ndarray
    page_ids: np.ndarray
    page_starts: np.ndarray
    page_size: int
    graph_batch: int | None = None
    device: DevicePlan | None = None
    last_pages: np.ndarray | None = None

    @property
    def slots(self) -> np.ndarray:
        if self.given_slots is None:
            assert self.last_pages is not None
            last = self.lengths - 1
            slots = _padded(self.last_pages, self.batch, 0) * self.page_size + last % self.page_size
            slots[last < 0] = -1
            object.__setattr__(self, "given_slots", slots)
        assert self.given_slots is not None
        return self.given_slots

    @property
    def batch(self) -> int:
        """Sequences, padding included."""
        return len(self.lengths)

    def pages_of(self, row: int) -> slice:
        """Where the pages of a sequence stand in page_ids."""
        start = int(self.page_starts[row])
        return slice(start, start + div_ceil(int(self.lengths[row]), self.page_size))


def with_device(plan: Plan, device: DevicePlan) -> Plan:
    """The plan with its device buffers. Called before anybody has seen it."""
    object.__setattr__(plan, "device", device)
    return plan


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
    stored = _checked_stores(stores, len(lengths))
    if graph_batch is not None:
        padding = _checked_padding(limits, graph_batch, len(lengths), num_decode)
        lengths = np.concatenate([lengths, np.zeros(padding, np.int64)])
        queries = np.concatenate([queries, np.ones(padding, np.int64)])
        stored = np.concatenate([stored, np.zeros(padding, bool)])
        indptr = np.concatenate([indptr, np.full(padding, indptr[-1])])
        num_decode = graph_batch
    num_tokens, batch = int(queries.sum()), len(lengths)
    used = -(-lengths // layout.page_size)
    _check_limits(limits, batch, num_tokens, int(used.sum()))
    if (bad := used > np.diff(indptr)).any():
        raise _row_error("lengths", "tokens that the row's pages hold", lengths, bad)

    page_ids = _used_pages(np.asarray(tables.page_ids), indptr, used, num_pages)
    page_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(used)])
    return Plan(
        version=tables.version,
        serial=serial,
        num_tokens=num_tokens,
        num_decode=num_decode,
        num_prefill=num_tokens - num_decode,
        given_slots=_slots(layout.page_size, lengths, queries, num_decode, stored, page_ids, page_starts[:-1]),
        lengths=lengths,
        query_lens=queries,
        query_starts=np.cumsum(queries) - queries,
        page_ids=page_ids,
        page_starts=page_starts,
        page_size=layout.page_size,
        graph_batch=graph_batch,
    )


def _checked_stores(stores: Sequence[bool] | np.ndarray | None, batch: int) -> np.ndarray:
    stored = np.ones(batch, bool) if stores is None else np.asarray(stores)
    if stored.dtype != np.bool_ or stored.shape != (batch,):
        raise InvalidValue("stores", f"{batch} booleans, one a sequence", f"{stored.dtype} {list(stored.shape)}")
    return stored


def _checked_padding(limits: Limits, graph_batch: int, batch: int, num_decode: int) -> int:
    """How many rows a captured graph has beyond those of the step."""
    if isinstance(graph_batch, bool) or not isinstance(graph_batch, int) or not 1 <= graph_batch <= limits.max_batch:
        raise InvalidValue("graph_batch", f"an integer from 1 to {limits.max_batch}", graph_batch)
    if num_decode != batch or num_decode > graph_batch:
        raise InvalidValue("query_lens", f"at most {graph_batch} rows of 1 token under graph_batch", f"{batch} rows")
    return graph_batch - num_decode


def _check_limits(limits: Limits, batch: int, num_tokens: int, pages: int) -> None:
    for field, limit, got in (
        ("max_batch", limits.max_batch, batch),
        ("max_tokens", limits.max_tokens, num_tokens),
        ("max_pages", limits.max_pages, pages),
    ):
        if got > limit:
            raise InvalidValue(field, f"at most {limit} in a step", got)


def _slots(
    page_size: int, lengths: np.ndarray, queries: np.ndarray, num_decode: int, stored: np.ndarray, page_ids: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """The slot of each token; -1 where it is padding or not stored here."""
    if num_decode == len(lengths):  # one token a row, each row's last
        first_pages, position, kept = starts, lengths - 1, stored
    else:
        owner, offset = ragged_arange(queries)
        first_pages, position, kept = starts[owner], (lengths - queries)[owner] + offset, stored[owner]
    padded = (position < 0) | ~kept
    position = np.maximum(position, 0)
    entry = first_pages + position // page_size
    pages = page_ids[np.minimum(entry, max(len(page_ids) - 1, 0))].astype(np.int64) if len(page_ids) else np.zeros(len(entry), np.int64)
    slots = pages * page_size + position % page_size
    slots[padded] = -1
    return slots


_one_token: dict[int, tuple[np.ndarray, np.ndarray]] = {}


def _one_token_rows(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """query_lens and query_starts of so many rows of one token, not to be written to."""
    if (found := _one_token.get(batch)) is None:
        found = np.ones(batch, np.int64), np.arange(batch, dtype=np.int64)
        found[0].flags.writeable = found[1].flags.writeable = False
        if len(_one_token) == BATCHES_MAX:
            _one_token.clear()
        _one_token[batch] = found
    return found


def make_row_plan(
    layout: LatentLayout,
    limits: Limits,
    batch: BatchRows,
    query_lens: Sequence[int] | np.ndarray | int,
    graph_batch: int | None,
    serial: int,
    stores: Sequence[bool] | np.ndarray | None,
    table: ResidentTable,
) -> tuple[Plan, Update]:
    """As make_plan, of rows whose pages are in a resident table, or are to be put there: the plan, and what it needs sent.

    For a step of decode about ten numpy calls on arrays of the batch's size: nothing of it grows with the lengths."""
    size, lengths, count = layout.page_size, batch.lengths, len(batch.lengths)
    if batch.page_size != size:
        raise InvalidValue("page_size", f"that of the memory, {size}", batch.page_size)
    top = int(np.maximum.reduce(lengths.view(np.uint64))) if count else 0  # as an unsigned number, one below 0 is larger than any length
    if top > table.width * size:
        expected = f"0 to {table.width * size}, what sequence_pages of {table.width} hold"
        raise _row_error("lengths", expected, lengths, (lengths < 0) | (lengths > table.width * size))
    queries, query_starts = _one_token_rows(count)
    num_decode = num_tokens = count
    if query_lens.__class__ is not int or query_lens != 1:
        given = np.full(count, query_lens) if isinstance(query_lens, int) else np.asarray(query_lens)
        if given.shape != (count,) or (given.size and not np.issubdtype(given.dtype, np.integer)):
            raise InvalidValue("query_lens", f"{count} integers, one a sequence", f"{given.dtype} of shape {list(given.shape)}")
        given = given.astype(np.int64)
        num_decode = _check_order(lengths, given)
        if num_decode < count:
            queries, num_tokens = given, int(given.sum())
            query_starts = np.cumsum(queries) - queries
    padding = 0 if graph_batch is None else _checked_padding(limits, graph_batch, count, num_decode)
    used = (lengths + (size - 1)) >> (size.bit_length() - 1) if size & (size - 1) == 0 else (lengths + (size - 1)) // size
    most_used = div_ceil(top, size)
    pages = count * most_used
    if count + padding > limits.max_batch or num_tokens + padding > limits.max_tokens or pages > limits.max_pages:
        _check_limits(limits, count + padding, num_tokens + padding, int(used.sum()))
    is_plain = num_decode == count and stores is None
    update = table.prepare(batch, used, most_used, is_plain and table.entries is None)
    slots = None
    if update.last_pages is None:
        slots = _slots(size, lengths, queries, num_decode, _checked_stores(stores, count), update.source, update.source_starts)
    starts = update.starts
    if padding:
        assert graph_batch is not None
        num_decode = num_tokens = graph_batch
        queries, query_starts = _one_token_rows(graph_batch)
        lengths, starts = _padded(lengths, graph_batch, 0), _padded(starts, graph_batch, 0)
        slots = None if slots is None else _padded(slots, graph_batch, -1)
    plan = Plan(
        batch.version, serial, num_tokens, num_decode, num_tokens - num_decode, slots, lengths, queries, query_starts,
        NO_IDS if table.entries is None else table.entries, starts, size, graph_batch, None, update.last_pages,
    )  # fmt: skip
    return plan, update


def _padded(array: np.ndarray, count: int, value: int) -> np.ndarray:
    padded = np.full(count, value, np.int64)
    padded[: len(array)] = array
    return padded
