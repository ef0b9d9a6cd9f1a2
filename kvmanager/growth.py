"""Growth: running sequences get slots for more tokens, and pages where their last one is full.

A steady decode step grows the same sequences as the step before by the same counts. `grow_same` decides it with a handful of numpy calls
for the whole batch, whatever is in it; it declines what is out of the ordinary, and `decide` then looks at each sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager import events as ev
from kvmanager.arrays import ones
from kvmanager.commands import Step
from kvmanager.draft import Draft
from kvmanager.handoff import HandoffState
from kvmanager.state import State

__all__ = ["apply_grown", "apply_grown_again", "apply_grown_further", "grow_same"]

NONE = np.zeros(0, np.int32)


def grow_same(draft: Draft, command: Step) -> bool:
    """Decide the growth if it repeats the last one and everybody gets theirs. False: nothing was decided."""
    state, tables = draft.state, draft.state.tables
    ids, counts = command.grow, command.grow_counts
    if ids is not tables.last_ids and not np.array_equal(ids, tables.last_ids):
        return False
    if counts is not tables.last_counts and not np.array_equal(counts, tables.last_counts):
        return False
    rows = tables.last_rows()
    if rows is None or draft.closed:
        return False
    growing: dict[int, None] = {}
    if state.handoffs or command.hand_off:
        growing = dict.fromkeys(ids.tolist())
        for handoff in state.handoffs.values():
            if (
                handoff.sequence_id in growing
                and handoff.state is not HandoffState.PREFILLING
                and handoff.state is not HandoffState.ABORTED
            ):
                return False
    lengths, have = tables.lengths[rows], tables.page_counts[rows]
    if draft.cut:
        draft.lay_cuts_over(ids, lengths, have)
    lengths += counts
    first = state.pools[0]
    pools = tables.pools[rows] if len(state.pools) > 1 else None
    sizes: Any = first.page_size
    longest: Any = first.num_pages * first.page_size
    if pools is not None:
        sizes = np.array([pool.page_size for pool in state.pools], np.int64)[pools]
        longest = int(np.minimum.reduce(np.array([pool.num_pages * pool.page_size for pool in state.pools])[pools]))
    if np.maximum.reduce(lengths) > min(longest, state.config.sequence_tokens_max):
        return False
    room = have * sizes
    room -= lengths
    at = (room < 0).nonzero()[0]
    if len(at):
        if counts is not ones(len(counts)):  # some may need several pages
            needed = -(room[at] // (sizes if pools is None else sizes[at]))  # -1 // 64 is -1: one page
            at = at.repeat(needed)
        pages = _take(draft, at, None if pools is None else pools[at])
        if pages is None:
            return False
        draft.events.append(ev.GrownFurther(at.astype(np.int32), pages))
    else:
        draft.events.append(ev.GrownAgain())
    if growing:
        draft.grown.update(growing)
    return True


def _take(draft: Draft, at: np.ndarray, pools: np.ndarray | None) -> np.ndarray | None:
    """One page for each of `at`, in that order; None if a pool has not got them all, or has tenants with quotas."""
    if any(pool.prefix.accounts.of for pool in draft.state.pools):
        return None
    if pools is None:
        only = draft.pool(0)
        return only.take(len(at), None) if only.can_take(len(at)) == len(at) else None
    wanted = [(int(pool), pools == pool) for pool in np.unique(pools)]
    for pool, mask in wanted:
        count = int(np.count_nonzero(mask))
        if draft.pool(pool).can_take(count) < count:
            return None
    pages = np.empty(len(at), np.int32)
    for pool, mask in wanted:
        pages[mask] = draft.pool(pool).take(int(np.count_nonzero(mask)), None)
    return pages


# --- apply -----------------------------------------------------------------------------------------------------------------------


def _hand_out(state: State, rows: np.ndarray, pages: np.ndarray) -> None:
    """pages[i] gets its first owner in the pool of table row rows[i]."""
    if len(state.pools) == 1:
        state.pools[0].take(pages, None)
    else:
        pools = state.tables.pools[rows]
        for pool in np.unique(pools).tolist():
            state.pools[pool].take(pages[pools == pool], None)
    if any(pool.prefix.accounts.of for pool in state.pools):
        for sequence_id in state.tables.ids[rows].tolist():
            account = state.sequences[sequence_id].node.account
            if account is not None:
                account.pages += 1


def apply_grown(state: State, event: ev.SequencesGrown) -> None:
    if len(event.pages):
        _hand_out(state, np.repeat(state.tables.rows(event.ids), event.page_counts), event.pages)
    state.tables.grow(event.ids, event.counts, event.page_counts, event.pages)


def apply_grown_again(state: State, event: ev.GrownAgain) -> None:
    state.tables.grow_again(NONE, NONE)


def apply_grown_further(state: State, event: ev.GrownFurther) -> None:
    rows = state.tables.last_rows()
    if rows is not None:  # otherwise the tables say what is wrong
        _hand_out(state, rows[event.at], event.pages)
    state.tables.grow_again(event.at, event.pages)
