"""The work list of a decode launch whose rows share prefixes (shared_prefix.py): each prefix is read for all of its rows at once.

A group of G rows that share S latents is two kinds of work, in one launch:

    prefix   G query tokens over S latents, as a prefill of S + G - 1 would be: the last row's mask ends past S, so the kernels' causal mask
             hides nothing of it. G * heads rows, in blocks; full ones where a single row's heads would leave most of a block empty
    tails    each row over what it has beyond S

Both leave partial results; the merge takes a row's from the prefix's blocks and then those of its tail. Blocks of a prefix read the same
latents, so they are cut alike and stand on neighbouring programs: one brings a tile, and the others find it in the L2 cache. The tails, and rows
that share nothing, fill up what the programs have left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvmanager.attention.shared_prefix import PrefixGroup, gain
from kvmanager.attention.work import OVERHEAD_TILES, Shape, WorkList, cut_at, decode_units, decode_work, list_pieces
from kvmanager.tables import div_ceil

__all__ = ["WORTH", "apart_level", "shared_decode_work", "shared_items_max", "shared_partials_max"]

ROOM_TILES_MIN = 4  # a lane with less left takes no tail: starting a piece and merging it would take longer
SIZES = np.array([4.0, 2.8, 2.0, 1.4, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])  # of a prefix's piece, tried as parts of a lane's share
REST_TILES = 1.25  # what a tile of all else takes, which comes from memory, in tiles of a prefix, which come from the L2 cache
BOTH_TILES = 1.5  # what a lane that has both kinds takes longer: a sequence cut once more, and merged
MERGED_AT_ONCE, MERGE_TILES = 8, 0.5  # what the merge takes at a time of a row's partials, and what that costs in tiles
WORTH = 0.95  # of the time that it takes without sharing, by the same reckoning
PARTIALS_A_PROGRAM = 8  # scratch is bounded by the card, not by how many rows may share


def _prefix_pieces_max(shape: Shape, max_batch: int) -> int:
    """Lane-wide pieces of prefixes in a launch."""
    return min(max_batch + 2 * shape.lanes, 4 * shape.lanes)


def shared_partials_max(shape: Shape, max_batch: int) -> int:
    """Partial slots that shared_decode_work needs at most for up to max_batch rows."""
    most = max_batch + 2 * shape.lanes + _prefix_pieces_max(shape, max_batch)
    return max(shape.partials_max, min(shape.blocks_per_token * most, PARTIALS_A_PROGRAM * shape.num_programs))


def shared_items_max(shape: Shape, max_batch: int) -> int:
    """Items that shared_decode_work lists at most for up to max_batch rows."""
    return shape.blocks_per_token * (max_batch + shape.lanes + _prefix_pieces_max(shape, max_batch))


def _units_of(shape: Shape, group: PrefixGroup) -> int:
    """Lane-wide blocks of rows of a group."""
    return div_ceil(div_ceil(group.rows * shape.num_heads, shape.block_rows), shape.blocks_per_token)


def _piece_counts(shape: Shape, wide: np.ndarray, tiles: np.ndarray, rest: float, pieces_max: int) -> tuple[np.ndarray, float] | None:
    """Into how many pieces each prefix is cut, so that all is done soonest, and when in tiles of a lane; None if pieces_max allows for none.

    wide [groups] lane-wide blocks and tiles [groups] of each prefix; rest: tiles of all else, which fills up what is left."""
    lanes, rest = shape.lanes, REST_TILES * rest
    share = (int((wide * tiles).sum()) + int(wide.sum()) * OVERHEAD_TILES + rest) / lanes
    size = np.maximum((share * SIZES).astype(np.int64) - OVERHEAD_TILES, 1)[:, None]
    counts = np.append(-(-tiles // size), np.ones((1, len(tiles)), np.int64), 0)  # [sizes, groups]
    number = counts @ wide
    load = (wide * tiles).sum() + OVERHEAD_TILES * number  # of the prefixes, on all lanes
    full, more = number // lanes, number % lanes
    piece = load / number
    high = (full + (more > 0)) * piece
    level = (load + rest) / lanes
    some = np.maximum(high, full * piece + rest / (lanes - more) + BOTH_TILES * (full > 0))  # where the lanes with most take nothing else
    level = np.where(level - high < ROOM_TILES_MIN, some, np.minimum(some, level + BOTH_TILES))
    level = level + MERGE_TILES * -(-(counts.max(1) + 2) // MERGED_AT_ONCE)
    level[number > pieces_max] = np.inf
    best = int(level.argmin())
    return None if np.isinf(level[best]) else (counts[best], float(level[best]))


def apart_level(shape: Shape, lengths: np.ndarray) -> float:
    """When decode_work is done, in tiles of a lane."""
    return (int((-(-lengths // shape.block_tokens)).sum()) + len(lengths) * OVERHEAD_TILES) / shape.lanes


def _room(load: np.ndarray, rest: int) -> np.ndarray:
    """Tiles of `rest` that each lane takes so that all end together, as far as they can; a lane with too little left takes nothing."""
    order = np.argsort(load, kind="stable")
    sorted_load = load[order]
    level = (np.cumsum(sorted_load) + REST_TILES * rest) / np.arange(1, len(load) + 1)
    count = max(int(np.count_nonzero(sorted_load + ROOM_TILES_MIN <= level)), 1)
    room = np.zeros(len(load))
    room[order[:count]] = (level[count - 1] - sorted_load[:count]) / REST_TILES
    return room


def shared_decode_work(
    shape: Shape,
    page_starts: np.ndarray,
    lengths: np.ndarray,
    groups: Sequence[PrefixGroup],
    max_batch: int,
    level_max: float = float("inf"),
) -> tuple[WorkList, tuple[PrefixGroup, ...]]:
    """As decode_work, with what the rows of each group share as work of its own; and the groups for which there was room.

    Those that save least are left out while the partial slots (shared_partials_max) don't hold all of them; all of them, if they would take
    longer than level_max (WORTH times apart_level: pays only where it is clear). Same arguments, same list."""
    groups = sorted(groups, key=lambda group: -gain(shape, group.rows, group.tokens // shape.block_tokens))
    slots = shared_partials_max(shape, max_batch) // shape.blocks_per_token
    while groups:
        kept = sorted(groups)
        members = sum(group.rows for group in kept)
        pieces_max = min(_prefix_pieces_max(shape, max_batch), slots - members - 2 * shape.lanes)
        work, level = _shared(shape, page_starts, lengths, kept, pieces_max, level_max)
        if work is not None:
            return work, tuple(kept)
        if level > level_max:
            break
        groups.pop()
    return decode_work(shape, page_starts, lengths), ()


def _shared(
    shape: Shape, page_starts: np.ndarray, lengths: np.ndarray, groups: list[PrefixGroup], pieces_max: int, level_max: float
) -> tuple[WorkList | None, float]:
    first, rows, tokens = np.array(groups, np.int64).T
    wide = np.array([_units_of(shape, group) for group in groups])
    tails = decode_units(shape, page_starts, lengths)
    member = np.repeat(np.arange(len(groups)), rows)  # the group of each row that is in one
    nth = np.arange(len(member)) - (np.cumsum(rows) - rows)[member]
    at = first[member] + nth
    tails[at, 6] = tokens[member] // shape.block_tokens
    tail_tiles = -(-tails[:, 5] // shape.block_tokens) - tails[:, 6]
    rest = int(tail_tiles.sum()) + OVERHEAD_TILES * len(tails)
    prefix_tiles = tokens // shape.block_tokens
    chosen = _piece_counts(shape, wide, prefix_tiles, rest, pieces_max)
    if chosen is None:
        return None, 0.0
    counts, level = chosen
    if level > level_max:
        return None, level

    owner = np.repeat(np.arange(len(groups)), wide)
    block = np.arange(len(owner)) - (np.cumsum(wide) - wide)[owner]
    units = np.empty((len(owner), 7), np.int64)
    units[:, 0], units[:, 1], units[:, 2] = page_starts[first[owner]], first[owner], rows[owner]
    units[:, 3] = tokens[owner] + rows[owner] - 1
    units[:, 4] = block * (shape.blocks_per_token * shape.block_rows)
    units[:, 5], units[:, 6] = tokens[owner], 0

    piece_unit = np.repeat(np.arange(len(owner)), counts[owner])
    piece_group = owner[piece_unit]
    piece = np.arange(len(piece_unit)) - (np.cumsum(counts[owner]) - counts[owner])[piece_unit]
    begin = prefix_tiles[piece_group] * piece // counts[piece_group]
    end = prefix_tiles[piece_group] * (piece + 1) // counts[piece_group]
    # Longest pieces first; then all blocks of one piece side by side.
    order = np.lexsort((piece_unit, piece, piece_group, -(prefix_tiles / counts)[piece_group]))
    lane = np.empty(len(piece_unit), np.int64)
    lane[order] = np.arange(len(order)) % shape.lanes

    load = np.bincount(lane, end - begin + OVERHEAD_TILES, minlength=shape.lanes)
    cut = np.cumsum(_room(load, rest)).astype(np.int64)[:-1]
    tail_unit, tail_begin, tail_end, tail_lane = cut_at(shape, tail_tiles, cut[cut < rest])
    skip = tails[tail_unit, 6]

    prefix_units = np.full(len(owner) + len(tails), -1)
    prefix_units[: len(owner)] = (np.cumsum(wide) - wide)[owner]
    prefix_units[len(owner) + at] = (np.cumsum(wide) - wide)[member]
    group_rows = np.zeros(len(prefix_units), np.int64)
    group_rows[len(owner) + at] = nth * shape.num_heads
    pieces = (
        np.concatenate([piece_unit, tail_unit + len(owner)]),
        np.concatenate([begin, tail_begin + skip]),
        np.concatenate([end, tail_end + skip]),
        np.concatenate([lane, tail_lane]),
    )
    # Every other piece of a prefix comes after its program's tails: prefixes come from the L2 cache and tails from memory, and neither idles.
    turn = np.concatenate([2 * (piece % 2), np.ones(len(tail_unit), np.int64)])
    width = shape.blocks_per_token
    work = list_pieces(shape, width, shape.lanes * width, np.concatenate([units, tails]), pieces, prefix_units, group_rows, turn)
    return work, level
