"""One launch that finishes a step's plan on the device: page ids that changed go into the resident table, each decode row gets its slot, and the
decode work list is cut.

What the host sends lies in one buffer of int32 words, `first` being its first one:

    | page ids | runs [num_runs, 3] | lengths [num_rows] | page starts [num_rows] | last pages [num_rows] |
    runs       of the page ids: where in the table, where in `page ids`, how many
    last page  that the row's newest token is in: it goes into the table too, so that a sequence that began a page needs no run

The work list is attention/work.py's `decode_work`, number for number: units end to end on a line, cut into equal shares, or at the units' ends that
are nearest. Each program finds its own piece of the line from prefix sums over all rows, so none waits for another: no atomics, no second pass.

Floor: an empty launch. Bytes and arithmetic are a few kilobytes and a few thousand additions a program.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["ROWS_MAX", "ListPlaces", "Sent", "finish"]

ROWS_MAX = 4096  # a program holds a prefix sum over all rows
BLOCK_IDS = 1024
BLOCK_SLOTS = 128  # rows of a program that finds slots


class ListPlaces(NamedTuple):
    """A decode launch's lists: where they are, in words of the buffer, and what they are cut for (attention/work.py, Shape). Fixed for a backend."""

    programs: int
    merges: int
    items: int
    lanes: int
    group: int  # programs of a lane: blocks of rows of a query token
    block_rows: int
    block_tokens: int
    split_tiles_min: int
    whole_tiles: int
    rows_max: int  # ROWS_MAX at most
    page_size: int


class Sent(NamedTuple):
    """How what was sent lies in the buffer, in words."""

    first: int
    num_ids: int
    num_runs: int
    num_rows: int  # decode rows, padding of length 0 included; 0: none have been sent


def finish(words: Tensor, page_ids: Tensor, slots: Tensor, places: ListPlaces, sent: Sent, base: int, num_merges: int, lists: bool) -> None:
    """Put the runs' page ids and the last pages into the table, and each row's slot into `slots`; make the decode lists, if `lists`.

    words       [any]  int32, device: the buffer that holds what was sent, and the lists
    page_ids    [any]  int32, device: the resident table begins at entry `base` of it; page starts count from entry 0. Runs do not overlap, and all
                       is inside: the host has seen to that
    slots       [any]  int64, device: of each row, -1 for padding
    num_merges  rows of merges there are; those not used get count 0

    One launch, no allocation, no host sync. Same input, same bits."""
    programs = places.lanes * places.group if lists else 0
    grid = programs + sent.num_runs + triton.cdiv(sent.num_rows, BLOCK_SLOTS)
    if grid == 0:
        return
    block_units = max(triton.next_power_of_2(places.rows_max), 16)
    _finish_kernel[(grid,)](
        words,
        page_ids,
        slots,
        *sent,
        base,
        num_merges,
        programs,
        places.programs,
        places.merges,
        places.items,
        PAGE_SIZE=places.page_size,
        LANES=places.lanes,
        GROUP=places.group,
        BLOCK_ROWS=places.block_rows,
        BLOCK_TOKENS=places.block_tokens,
        SPLIT_MIN=places.split_tiles_min,
        WHOLE=places.whole_tiles,
        BLOCK_UNITS=block_units,
        UNIT_BITS=block_units.bit_length() - 1,
        BLOCK_LANES=triton.next_power_of_2(places.lanes + 1),
        BLOCK_IDS=BLOCK_IDS,
        BLOCK_SLOTS=BLOCK_SLOTS,
        num_warps=4,
    )


@triton.jit
def _at(vector, index, place):
    """vector[place], of a vector held by all threads."""
    return tl.sum(tl.where(index == place, vector, 0), 0)


@triton.jit(
    do_not_specialize=[
        "first", "num_ids", "num_runs", "num_rows", "base", "num_merges", "num_programs", "programs_word", "merges_word", "items_word",
    ]
)  # fmt: skip
def _finish_kernel(
    words_ptr,
    page_ids_ptr,
    slots_ptr,
    first,
    num_ids,
    num_runs,
    num_rows,
    base,
    num_merges,
    num_programs,
    programs_word,
    merges_word,
    items_word,
    PAGE_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_MIN: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    program = tl.program_id(0)
    ids_ptr = words_ptr + tl.cast(first, tl.int64)
    runs_ptr = ids_ptr + num_ids
    lengths_ptr = runs_ptr + num_runs * 3
    starts_ptr = lengths_ptr + num_rows
    if program >= num_programs + num_runs:
        row = (program - num_programs - num_runs) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
        is_row = row < num_rows
        last = tl.load(lengths_ptr + row, mask=is_row, other=0) - 1
        page = tl.load(starts_ptr + num_rows + row, mask=is_row, other=0)
        entry = tl.load(starts_ptr + row, mask=is_row, other=0).to(tl.int64) + last // PAGE_SIZE
        has_token = is_row & (last >= 0)
        tl.store(page_ids_ptr + entry, page, mask=has_token)
        tl.store(slots_ptr + row, tl.where(has_token, page.to(tl.int64) * PAGE_SIZE + last % PAGE_SIZE, -1), mask=is_row)
    elif program >= num_programs:
        run_ptr = runs_ptr + (program - num_programs) * 3
        to_ptr = page_ids_ptr + base + tl.load(run_ptr).to(tl.int64)
        from_ptr = ids_ptr + tl.load(run_ptr + 1)
        count = tl.load(run_ptr + 2)
        for at in range(0, count, BLOCK_IDS):
            place = at + tl.arange(0, BLOCK_IDS)
            tl.store(to_ptr + place, tl.load(from_ptr + place, mask=place < count, other=0), mask=place < count)
    else:
        lane, member = program // GROUP, program % GROUP
        unit = tl.arange(0, BLOCK_UNITS)
        is_unit = unit < num_rows
        length = tl.load(lengths_ptr + unit, mask=is_unit, other=0)
        cost = tl.where(is_unit, (length + BLOCK_TOKENS - 1) // BLOCK_TOKENS + 1, 0)
        ends = tl.cumsum(cost, 0)
        starts = ends - cost
        total = tl.sum(cost, 0)
        used = tl.maximum(tl.minimum(total // SPLIT_MIN, LANES), 1)

        # Where each lane begins: lane 0 at 0, those that are not used at the end.
        nth = tl.arange(0, BLOCK_LANES)
        is_cut = (nth > 0) & (nth < used)
        cut = tl.where(is_cut, nth.to(tl.int64) * total // used, 0).to(tl.int32)
        at_unit = tl.zeros([BLOCK_LANES], tl.int32)
        for bit in tl.static_range(UNIT_BITS):  # how many units end at the cut or before it
            more = at_unit + (BLOCK_UNITS >> (bit + 1))
            at_unit = tl.where(tl.gather(ends, more - 1, 0) <= cut, more, at_unit)
        start = tl.gather(starts, at_unit, 0)
        end = tl.gather(ends, at_unit, 0)
        tile = cut - start - 1
        tile = tl.where(tile < SPLIT_MIN, 0, tile)
        at_end = end - start - 1 - tile < SPLIT_MIN
        place = tl.where(at_end, end, start + tile)
        inside = is_cut & (tile > 0) & (tile < end - start - 1) & (at_end == 0)
        if WHOLE > 0:
            nearest = tl.where(is_cut, tl.where(cut - start <= end - cut, start, end), tl.where(nth == 0, 0, total))
            after = tl.gather(nearest, tl.minimum(nth + 1, BLOCK_LANES - 1), 0)
            most = tl.max(after - nearest, 0)
            is_whole = most <= (total + used - 1) // used + WHOLE
            place = tl.where(is_whole, nearest, place)
            inside = inside & (is_whole == 0)
        place = tl.where(is_cut, place, tl.where(nth == 0, 0, total))
        inside_count = inside.to(tl.int32)
        # A unit that is cut is counted at its first cut: the one before lies before it, or too near to its beginning.
        before = tl.where(is_cut, (nth - 1).to(tl.int64) * total // used, 0).to(tl.int32)
        is_first = (inside & (before - start - 1 < SPLIT_MIN)).to(tl.int32)

        begin_at, end_at = _at(place, nth, lane), _at(place, nth, lane + 1)
        has_head, has_tail = _at(inside_count, nth, lane), _at(inside_count, nth, lane + 1)
        head_unit, tail_unit = _at(at_unit, nth, lane), _at(at_unit, nth, lane + 1)
        begin_unit = tl.sum((is_unit & (starts < begin_at)).to(tl.int32), 0)
        end_unit = tl.sum((is_unit & (starts < end_at)).to(tl.int32), 0)
        own = end_unit - begin_unit + has_head
        first_item = (begin_unit + tl.sum(tl.where(nth < lane, inside_count, 0), 0)) * GROUP + member * own
        tl.store(words_ptr + programs_word + program, first_item)
        if program == num_programs - 1:
            tl.store(words_ptr + programs_word + num_programs, (num_rows + tl.sum(inside_count, 0)) * GROUP)

        row0 = member * BLOCK_ROWS
        head_pieces = tl.sum(tl.where(at_unit == head_unit, inside_count, 0), 0) + 1
        tail_pieces = tl.sum(tl.where(at_unit == tail_unit, inside_count, 0), 0) + 1
        head_partial = tl.sum(tl.where(at_unit < head_unit, inside_count + is_first, 0), 0) * GROUP + member * head_pieces
        tail_partial = tl.sum(tl.where(at_unit < tail_unit, inside_count + is_first, 0), 0) * GROUP + member * tail_pieces
        field = tl.arange(0, 8)
        items_ptr = words_ptr + items_word
        if has_head > 0:  # the rest of a unit that begins in an earlier lane, or what of it is this lane's
            head_start, head_length = _at(starts, unit, head_unit), _at(length, unit, head_unit)
            stop = tl.where((has_tail > 0) & (tail_unit == head_unit), (end_at - head_start) * BLOCK_TOKENS, head_length)
            nth_piece = tl.sum(tl.where((at_unit == head_unit) & (nth <= lane), inside_count, 0), 0)
            value = tl.where(
                field == 0, tl.load(starts_ptr + head_unit), tl.where(field == 1, head_unit, tl.where(field == 2, 1, head_length))
            )
            value = tl.where(field == 4, row0, tl.where(field == 5, (begin_at - head_start) * BLOCK_TOKENS, value))
            value = tl.where(field == 6, tl.minimum(stop, head_length), tl.where(field == 7, head_partial + nth_piece, value))
            tl.store(items_ptr + first_item * 8 + field, value)
        is_own = (unit >= begin_unit) & (unit < end_unit)
        is_tail = (has_tail > 0) & (unit == tail_unit)
        item_ptr = items_ptr + (first_item + has_head + unit - begin_unit) * 8
        tl.store(item_ptr, tl.load(starts_ptr + unit, mask=is_own, other=0), mask=is_own)
        tl.store(item_ptr + 1, unit, mask=is_own)
        tl.store(item_ptr + 2, tl.full([BLOCK_UNITS], 1, tl.int32), mask=is_own)
        tl.store(item_ptr + 3, length, mask=is_own)
        tl.store(item_ptr + 4, tl.zeros([BLOCK_UNITS], tl.int32) + row0, mask=is_own)
        tl.store(item_ptr + 5, tl.zeros([BLOCK_UNITS], tl.int32), mask=is_own)
        tl.store(item_ptr + 6, tl.where(is_tail, tl.minimum((end_at - starts) * BLOCK_TOKENS, length), length), mask=is_own)
        tl.store(item_ptr + 7, tl.where(is_tail, tail_partial, -1), mask=is_own)

        merges_ptr = words_ptr + merges_word
        split = tl.sum(is_first, 0)  # units that are cut
        if _at(is_first, nth, lane) > 0:
            merge = tl.sum(tl.where(nth < lane, is_first, 0), 0) * GROUP + member
            value = tl.where(field == 0, head_unit, tl.where(field == 1, 1, tl.where(field == 2, row0, 0)))
            value = tl.where(field == 3, head_partial, tl.where(field == 4, head_pieces, value))
            tl.store(merges_ptr + merge * 8 + field, value)
        for at in range(split * GROUP + program, num_merges, num_programs):
            tl.store(merges_ptr + at * 8 + field, tl.zeros([8], tl.int32))
