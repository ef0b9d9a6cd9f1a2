"""Which neighbouring rows of a decode step begin with the same pages, and where it pays to read those once for all of them. On the host, numpy.

Nothing tells the plan who shares what: pages that a prefix index or a fork handed to several sequences have the same ids in their tables, and
the same id is the same latents. Only neighbours are compared, so a step costs no more than its tables; `order_by_prefix` makes them neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvmanager.attention.options import Options
from kvmanager.attention.work import OVERHEAD_TILES, Shape
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables, div_ceil

__all__ = ["PrefixGroup", "find_groups", "find_lasting_groups", "gain", "order_by_prefix", "shares_prefixes"]

# In tiles of one block of rows, as measured on an H100 at 512 + 64.
PARTIAL_TILES = 6.0  # what a block of partial rows takes to be written and read again
PARTIALS = 3  # of a row that is in a group, more than of one that is not: its tail, and pieces of the prefix


class PrefixGroup(NamedTuple):
    """Rows first_row to first_row + rows of a step, whose first `tokens` latents are the same slots: whole tiles, less than any row's length."""

    first_row: int
    rows: int
    tokens: int


def shares_prefixes(share_prefixes: bool | None, options: Options) -> bool:
    """What a backend's `share_prefixes` comes to: None is yes, unless an option rules it out. Raises InvalidValue for True beside such an option."""
    if share_prefixes is not None and not isinstance(share_prefixes, bool):
        raise InvalidValue("share_prefixes", "True, False or None", share_prefixes)
    for field in ("batch_invariant", "sliding_window"):
        if getattr(options, field):
            if share_prefixes:
                why = "bits would depend on the batch" if field == "batch_invariant" else "a window leaves the prefix"
                raise InvalidValue("share_prefixes", f"False or None with {field}: {why}", share_prefixes)
            return False
    return share_prefixes is not False


def order_by_prefix(tables: BatchTables) -> np.ndarray:
    """A permutation int64 [batch] of a step's rows that puts rows with equal leading pages side by side; rows of padding come first.

    For engines that are free to choose the order of their decode rows. Equal tables keep their order."""
    used = -(-np.asarray(tables.lengths, np.int64) // tables.page_size)
    keys = [tables.pages_of(row)[: used[row]].tobytes() for row in range(tables.batch)]
    return np.array(sorted(range(tables.batch), key=keys.__getitem__), np.int64)


def gain(shape: Shape, rows: int, tiles: int) -> float:
    """What working on `tiles` once for `rows` rows saves, in tiles of one block of rows; below 0 it costs more than it saves.

    Together, the rows' heads are packed into full blocks. That is all: the reads that are saved come from the L2 cache anyway, since rows that
    are read apart find there what another one brought (on an H100 up to 149 MB of prefix). Each row then has more partial results."""
    together = div_ceil(rows * shape.num_heads, shape.block_rows)
    partials = PARTIALS * PARTIAL_TILES * shape.num_heads / shape.block_rows
    return float(tiles * (rows * shape.blocks_per_token - together) - rows * (partials + OVERHEAD_TILES))


def _shared_tiles(
    shape: Shape, page_size: int, page_ids: np.ndarray, page_starts: np.ndarray, lengths: np.ndarray
) -> tuple[list[int], bool]:
    """Tiles that each row and the next have in common at their beginning: whole ones, and less than all of either row. Empty: none has any.
    And whether that stays as the rows grow."""
    probe = (shape.block_tokens - 1) // page_size  # the last page of a first tile: most rows part there, if they do not share
    # Of a row without such a page this is another's page, or none: told apart below, if anything is equal at all.
    last = page_ids.take(page_starts[: len(lengths)] + probe, mode="clip")
    same = last[:-1] == last[1:]
    lasts = int(lengths.min()) > shape.block_tokens  # a row of a tile or less may come to share one
    if not same.any():
        return [], lasts
    long = lengths > shape.block_tokens
    same = same & long[:-1] & long[1:]
    if not same.any():
        return [], lasts
    tiles = [0] * (len(lengths) - 1)
    starts, counts = page_starts.tolist(), lengths.tolist()
    for row in np.flatnonzero(same).tolist():
        shortest = min(counts[row], counts[row + 1]) - 1
        pages = div_ceil(shortest, page_size)
        start, other = starts[row], starts[row + 1]
        differ = page_ids[start : start + pages] != page_ids[other : other + pages]
        at = int(differ.argmax())
        tokens = min(shortest, at * page_size) if differ[at] else shortest
        lasts &= tokens < shortest
        tiles[row] = tokens // shape.block_tokens
    return tiles, lasts


def find_groups(
    shape: Shape, page_size: int, page_ids: np.ndarray, page_starts: np.ndarray, lengths: np.ndarray
) -> tuple[PrefixGroup, ...]:
    """Groups of neighbouring rows; none overlap, and each saves something.

    page_ids [any] and page_starts [batch (+ 1)] as in a plan; lengths [batch] int64, 0 for padding. What rows have in common is a tree: all
    rows of a stretch share as much as its least alike neighbours do. A stretch is one group, or those of its parts, whichever saves more."""
    return find_lasting_groups(shape, page_size, page_ids, page_starts, lengths)[0]


def find_lasting_groups(
    shape: Shape, page_size: int, page_ids: np.ndarray, page_starts: np.ndarray, lengths: np.ndarray
) -> tuple[tuple[PrefixGroup, ...], bool]:
    """The same, and whether the groups stay these as long as the rows only grow."""
    if len(lengths) < 2 or not len(page_ids):
        return (), True
    tiles, lasts = _shared_tiles(shape, page_size, page_ids, page_starts, lengths)
    if not any(tiles):
        return (), lasts
    found: list[PrefixGroup] = []
    stack: list[tuple[int, int, float, list[PrefixGroup]]] = []  # open stretches: tiles, first row, what their parts save, and those
    for row, shared in enumerate([*tiles, 0]):
        first, inner = row, 0.0
        groups: list[PrefixGroup] = []
        while stack and stack[-1][0] >= max(shared, 1):
            within, first, saved, parts = stack.pop()
            inner, groups = inner + saved, parts + groups
            if within == shared:  # the stretch goes on
                break
            whole = gain(shape, row - first + 1, within)
            if whole > max(inner, 0.0):
                inner, groups = whole, [PrefixGroup(first, row - first + 1, within * shape.block_tokens)]
        if shared:
            stack.append((shared, first, inner, groups))
        else:
            found += groups
    return tuple(found), lasts
