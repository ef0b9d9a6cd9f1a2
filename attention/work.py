"""Which program attends to what: the work list of one launch, built on the host with numpy.

A unit is a stretch of work that shares its latents: `group` blocks of rows that read the same latents at the same time, so that neighbouring
programs find them in the L2 cache. Programs stand in lanes of `group`; the units lie end to end on a line that is cut into one equal piece a
lane. A lane has at most two units that it shares with others, so the partial results are bounded by the lanes, not by batch times splits.

Where a line is cut depends on the whole batch, and so do the last bits of the results. Shapes with `piece_tiles` (batch invariance) are cut at
multiples of it in the sequence and nowhere else; only which lane runs a piece depends on the batch, and that changes no bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvmanager.attention.plan import ragged_arange
from kvmanager.errors import InvalidValue
from kvmanager.tables import div_ceil

__all__ = [
    "ITEM_FIELDS",
    "MERGE_FIELDS",
    "Shape",
    "WorkList",
    "cut_at",
    "decode_units",
    "decode_work",
    "list_pieces",
    "prefill_waves",
    "prefill_work",
]

ITEM_FIELDS = 8  # page_start, first_token, query_len, length, row, begin, end, partial slot or -1
MERGE_FIELDS = (
    8  # first_token, query_len, row, first partial, partial count; of a shared prefix: first partial, count, rows of its group before
)
OVERHEAD_TILES = 1  # what starting and ending an item costs, in tiles of latents
_COUNTED = 2**30  # more than the pieces of any launch
SPLIT_TILES_MIN = 2  # no split is shorter: merging it would cost more than it saves


@dataclass(frozen=True, slots=True)
class Shape:
    """What a work list is cut for: the kernel's tile, the heads, how many programs run at once, and what cutting costs."""

    num_heads: int
    block_rows: int
    block_tokens: int
    num_programs: int
    split_tiles_min: int = SPLIT_TILES_MIN
    whole_tiles: int = 0  # nothing is cut if that makes no lane longer than its share by more than this: a merge costs about as much
    piece_tiles: int = 0  # cut at multiples of so many tiles of the sequence, and nowhere else; 0: where the lanes end
    window: int = 0  # latents that a query token sees, the last ones; 0: all

    @property
    def blocks_per_token(self) -> int:
        """Blocks of rows that one query token of a sequence needs."""
        return div_ceil(self.num_heads, self.block_rows)

    @property
    def lanes(self) -> int:
        """Groups of programs that work on the same latents, in decode."""
        return max(1, self.num_programs // self.blocks_per_token)

    @property
    def partials_max(self) -> int:
        """Partial slots that any work list of this shape needs at most, if its sequences are cut where the lanes end."""
        return 2 * max(self.lanes * self.blocks_per_token, self.num_programs)


@dataclass(frozen=True, slots=True, eq=False)
class WorkList:
    """programs int32 [num_programs + 1], items int32 [num_items, 8], merges int32 [num_merges, 8]; num_partials partial slots are used."""

    programs: np.ndarray
    items: np.ndarray
    merges: np.ndarray
    num_partials: int


def _whole(ends: np.ndarray, cost: np.ndarray, cut: np.ndarray, most: int) -> np.ndarray | None:
    """The lane of each unit if none is cut: lane n begins at the unit's end that is nearest to the place cut[n - 1]. None if a lane has more
    than `most` then. ends: where each unit, which takes `cost`, ends on the line."""
    unit = ends.searchsorted(cut, side="right")
    end = ends[unit]
    start = end - cost[unit]
    place = np.where(cut - start <= end - cut, start, end)
    if np.diff(place, prepend=0, append=ends[-1]).max() > most:
        return None
    return place.searchsorted(ends - cost, side="right")


def _cut(shape: Shape, tiles: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut units of `tiles` tiles each into pieces: unit, first tile, end tile and lane of each piece, in order."""
    cost = tiles + OVERHEAD_TILES
    ends = np.cumsum(cost)
    length = int(ends[-1])
    used = max(1, min(lanes, length // shape.split_tiles_min))
    cut = np.arange(1, used, dtype=np.int64) * length // used  # shares differ by one tile at most
    if shape.whole_tiles and (whole := _whole(ends, cost, cut, div_ceil(length, used) + shape.whole_tiles)) is not None:
        return np.arange(len(tiles)), np.zeros(len(tiles), np.int64), tiles, whole
    return cut_at(shape, tiles, cut)


def cut_at(shape: Shape, tiles: np.ndarray, cut: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """As _cut, near the places `cut` of the line where units of tiles + OVERHEAD_TILES lie end to end: lane n begins at cut[n - 1]."""
    cost = tiles + OVERHEAD_TILES
    ends = np.cumsum(cost)
    unit = np.searchsorted(ends, cut, side="right")
    tile = cut - (ends - cost)[unit] - OVERHEAD_TILES
    tile[tile < shape.split_tiles_min] = 0
    starts = (
        ends - cost - np.arange(len(tiles)) * (OVERHEAD_TILES - 1)
    )  # of units, when each takes tiles + 1: one of no tiles has a place too
    at_end = tiles[unit] - tile < shape.split_tiles_min
    place = np.where(at_end, starts[unit] + tiles[unit] + 1, starts[unit] + tile)  # a cut near a unit's end is at the next one's start

    pieces = np.sort(np.concatenate([starts, place[place < starts[-1] + tiles[-1] + 1]]))
    pieces = pieces[np.append(True, pieces[1:] != pieces[:-1])]
    piece_unit = np.searchsorted(starts, pieces, side="right") - 1
    piece_begin = pieces - starts[piece_unit]
    piece_end = np.minimum(np.append(pieces[1:] - starts[piece_unit[:-1]], tiles[-1]), tiles[piece_unit])
    return piece_unit, piece_begin, piece_end, np.searchsorted(place, pieces, side="right")


def _pieces_of(shape: Shape, skip: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """How many pieces each unit has if cut at multiples of piece_tiles: one at least."""
    return np.maximum(-(-tiles // shape.piece_tiles) - skip // shape.piece_tiles, 1)


def _cut_evenly(shape: Shape, skip: np.ndarray, tiles: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """As _cut, but at multiples of piece_tiles. Longest first, each round of pieces goes to the lanes in order of what they have."""
    unit, nth = ragged_arange(_pieces_of(shape, skip, tiles))
    begin = (skip // shape.piece_tiles)[unit] * shape.piece_tiles + nth * shape.piece_tiles
    end = np.minimum(begin + shape.piece_tiles, tiles[unit])
    begin = np.minimum(np.maximum(begin, skip[unit]), end)
    cost = end - begin + OVERHEAD_TILES
    whole, order = np.flatnonzero(end - begin == shape.piece_tiles), np.flatnonzero(end - begin < shape.piece_tiles)
    lane = np.empty(len(unit), np.int64)
    lane[whole] = np.arange(len(whole)) % lanes  # the longest, and all alike
    load = np.bincount(lane[whole], minlength=lanes) * (shape.piece_tiles + OVERHEAD_TILES)
    order = order[np.argsort(-cost[order], kind="stable")]
    for first in range(0, len(order), lanes):
        some = order[first : first + lanes]
        least = np.argsort(load, kind="stable")[: len(some)]
        lane[some] = least
        load[least] += cost[some]
    return unit, begin, end, lane


def _skipped(shape: Shape, first_seen: np.ndarray) -> np.ndarray:
    """Tiles of each unit that lie before all that its first row sees."""
    if not shape.window:
        return np.zeros(len(first_seen), np.int64)
    return np.maximum(first_seen - shape.window, 0) // shape.block_tokens


def _work(shape: Shape, group: int, lanes: int, num_programs: int, units: np.ndarray) -> WorkList:
    """units int64 [n, 7]: page_start, first_token, query_len, length, first row, positions seen by its last row, tiles to skip."""
    if not len(units):
        return WorkList(
            np.zeros(num_programs + 1, np.int32), np.zeros((0, ITEM_FIELDS), np.int32), np.zeros((0, MERGE_FIELDS), np.int32), 0
        )
    tiles = -(-units[:, 5] // shape.block_tokens)
    skip = np.minimum(units[:, 6], tiles)
    if shape.piece_tiles:
        unit, begin, end, lane = _cut_evenly(shape, skip, tiles, lanes)
    else:
        unit, begin, end, lane = _cut(shape, tiles - skip, lanes)
        begin, end = begin + skip[unit], end + skip[unit]
    return list_pieces(shape, group, num_programs, units, (unit, begin, end, lane))


def list_pieces(
    shape: Shape,
    group: int,
    num_programs: int,
    units: np.ndarray,
    cut: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    prefix_units: np.ndarray | None = None,
    group_rows: np.ndarray | None = None,
    turn: np.ndarray | None = None,
) -> WorkList:
    """The lists of units that are cut into pieces: unit, first tile, end tile and lane of each, in order of units.

    prefix_units [n]  the first unit of what a unit shares, -1 if nothing. Units of a prefix stand side by side, before those that share it, and
                      have as many pieces each. Either kind is partial, and a prefix is merged with those that share it, not by itself
    group_rows [n]    rows of the prefix's group that come before a unit's own; None: no unit has a prefix
    turn [pieces]     0 to 2: which pieces of a program come first; those of equal turn in the order given"""
    unit, begin, end, lane = cut
    pieces = np.bincount(unit, minlength=len(units))
    first_piece = np.cumsum(pieces) - pieces
    split = own = pieces > 1
    if prefix_units is not None:
        split = split | (prefix_units >= 0)
        own = split & (units[:, 2] == 1)  # a prefix has two query tokens at least
    needed = np.where(split, pieces * group, 0)
    first_partial = np.cumsum(needed) - needed

    wide = np.empty((len(unit), ITEM_FIELDS), np.int32)  # a row for each piece, as the first of its group has it
    wide[:, :5] = units[:, :5].astype(np.int32)[unit]
    wide[:, 5] = begin * shape.block_tokens
    wide[:, 6] = np.minimum(end * shape.block_tokens, units[:, 5][unit])
    wide[:, 7] = np.where(split, first_partial - first_piece, -1 - _COUNTED)[unit]
    wide[:, 7] += np.arange(len(unit), dtype=np.int32)
    np.maximum(wide[:, 7], -1, out=wide[:, 7])

    programs = np.zeros(num_programs + 1, np.int32)
    member = np.arange(group)
    if prefix_units is None and group == 1 and not shape.piece_tiles:  # pieces are in order of their lanes
        flat = wide
        np.cumsum(np.bincount(lane, minlength=num_programs), out=programs[1:])
    else:
        program = (lane[:, None] * group + member).ravel()
        place = program if turn is None else program * 3 + np.repeat(turn, group)
        order = np.argsort(place.astype(np.uint16 if 3 * num_programs < 2**16 else np.int64), kind="stable")  # 16 bits: in linear time
        flat = wide[order // group]
        if group > 1:
            nth = order % group
            flat[:, 4] += (nth * shape.block_rows).astype(np.int32)
            flat[:, 7] += np.where(split, pieces, 0)[unit[order // group]] * nth
        if prefix_units is not None:  # the last blocks of a prefix may have no rows: then its program has an item less
            kept = flat[:, 4] < flat[:, 2] * shape.num_heads
            flat, program = flat[kept], program[order][kept]
        np.cumsum(np.bincount(program, minlength=num_programs), out=programs[1:])

    merged = np.flatnonzero(own)
    merges = np.zeros((len(merged), group, MERGE_FIELDS), np.int32)
    merges[:, :, 0:2] = units[merged, None, 1:3]
    merges[:, :, 2] = units[merged, 4, None] + member * shape.block_rows
    merges[:, :, 3] = first_partial[merged, None] + member * pieces[merged, None]
    merges[:, :, 4] = pieces[merged, None]
    if prefix_units is not None and group_rows is not None:
        prefix = prefix_units[merged]
        has = prefix >= 0
        merges[has, :, 5] = first_partial[prefix[has], None]
        merges[has, :, 6] = pieces[prefix[has], None]
        merges[has, :, 7] = group_rows[merged[has], None]
    return WorkList(programs, flat, merges.reshape(-1, MERGE_FIELDS), int(needed.sum()))


def decode_units(shape: Shape, page_starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A unit for each sequence of one query token, as _work takes them."""
    batch = len(lengths)
    units = np.zeros((batch, 7), np.int64)
    units[:, 0] = page_starts
    units[:, 1] = np.arange(batch)
    units[:, 2] = 1
    units[:, 3] = units[:, 5] = lengths
    units[:, 6] = _skipped(shape, units[:, 5])
    return units


def decode_work(shape: Shape, page_starts: np.ndarray, lengths: np.ndarray) -> WorkList:
    """One query token a sequence: token b of the launch belongs to sequence b. All its heads read the same latents."""
    units = decode_units(shape, page_starts, lengths)
    group = shape.blocks_per_token
    return _work(shape, group, shape.lanes, shape.lanes * group, units)


def _blocks(
    shape: Shape, page_starts: np.ndarray, lengths: np.ndarray, query_lens: np.ndarray, first_tokens: np.ndarray, causal: bool
) -> np.ndarray:
    """The units of several query tokens a sequence: each block of rows is one of its own."""
    rows = query_lens * shape.num_heads
    blocks = -(-rows // shape.block_rows)
    owner = np.repeat(np.arange(len(blocks)), blocks)
    nth = np.arange(len(owner)) - (np.cumsum(blocks) - blocks)[owner]
    row = nth * shape.block_rows
    units = np.empty((len(owner), 7), np.int64)
    units[:, 0], units[:, 1], units[:, 2], units[:, 3] = page_starts[owner], first_tokens[owner], query_lens[owner], lengths[owner]
    units[:, 4] = row
    last_token = (np.minimum(row + shape.block_rows, rows[owner]) - 1) // shape.num_heads
    units[:, 5] = np.maximum(lengths[owner] - query_lens[owner] + last_token + 1, 0) if causal else lengths[owner]
    units[:, 6] = _skipped(shape, lengths[owner] - query_lens[owner] + row // shape.num_heads + 1)
    return units


def prefill_work(
    shape: Shape, page_starts: np.ndarray, lengths: np.ndarray, query_lens: np.ndarray, first_tokens: np.ndarray, causal: bool = True
) -> WorkList:
    """query_lens[b] query tokens of sequence b, from token first_tokens[b] of the launch on. Each block of rows is a unit of its own."""
    units = _blocks(shape, page_starts, lengths, query_lens, first_tokens, causal)
    return _work(shape, 1, shape.num_programs, shape.num_programs, units)


def prefill_waves(
    shape: Shape,
    page_starts: np.ndarray,
    lengths: np.ndarray,
    query_lens: np.ndarray,
    first_tokens: np.ndarray,
    partials_max: int,
    pieces_max: int,
) -> list[WorkList]:
    """prefill_work of a shape with piece_tiles, as launches one after the other, none of which needs more than partials_max slots.

    Raises InvalidValue if the step has more pieces than pieces_max."""
    units = _blocks(shape, page_starts, lengths, query_lens, first_tokens, True)
    tiles = -(-units[:, 5] // shape.block_tokens)
    pieces = _pieces_of(shape, np.minimum(units[:, 6], tiles), tiles)
    if (total := int(pieces.sum())) > pieces_max:
        wide = f"at most {pieces_max} pieces of {shape.piece_tiles * shape.block_tokens} latents in a step under batch_invariant"
        raise InvalidValue("query_lens", f"{wide} (a prefill in several steps gives the same bits)", f"{total} pieces")
    most = int(pieces.max(initial=1))
    wave = (np.cumsum(pieces) - pieces) // max(partials_max - most, 1)
    starts = np.flatnonzero(np.diff(wave, prepend=-1))
    return [_work(shape, 1, shape.num_programs, shape.num_programs, part) for part in np.split(units, starts[1:]) if len(part)]
