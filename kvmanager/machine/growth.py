"""Growth: running sequences get slots for more tokens, and pages where their last one is full.

A steady decode step grows the same sequences as the step before by the same counts. `grow_same` decides it with a handful of numpy calls
for the whole batch, whatever is in it; it declines what is out of the ordinary, and `decide` then looks at each sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.arrays import ones
from kvmanager.errors import InvalidValue, KVError, OutOfPages, SequenceTooLarge, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.commands import Step
from kvmanager.machine.draft import Draft
from kvmanager.machine.owners import note_place, note_publishable
from kvmanager.machine.state import State
from kvmanager.pages.accounts import Account
from kvmanager.pages.handoff import HandoffState

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


def grow(draft: Draft, command: Step, refused: list[list[Any]]) -> None:
    """One event for all; a sequence that cannot grow is refused alone."""
    state, tables = draft.state, draft.state.tables
    ids, counts = command.grow, command.grow_counts

    def refuse(index: int, error: KVError) -> None:
        refused.append(["grow", index, error.code, error.text, error.details])

    keep = tables.known(ids)
    if draft.closed:
        keep &= ~np.isin(ids, np.fromiter(draft.closed, np.int64))
    for index in np.flatnonzero(~keep).tolist():
        refuse(index, Unknown("sequence", int(ids[index])))
    sealed = [handoff for handoff in state.handoffs.values() if handoff.state not in (HandoffState.PREFILLING, HandoffState.ABORTED)]
    if sealed:
        held = {handoff.sequence_id: handoff for handoff in sealed if handoff.handoff_id not in draft.aborted}
        for index in np.flatnonzero(keep & np.isin(ids, np.fromiter(held, np.int64))).tolist():
            keep[index] = False
            state_name = held[int(ids[index])].state.name.lower()
            refuse(index, WrongState("sequence", int(ids[index]), "one that is not being handed off", state_name))
    positions = np.flatnonzero(keep)
    rows = tables.rows(ids[positions])
    lengths, have = tables.lengths[rows], tables.page_counts[rows]
    if draft.cut:
        draft.lay_cuts_over(ids[positions], lengths, have)
    lengths += counts[positions]
    sizes = np.array([pool.page_size for pool in state.pools], np.int64)[tables.pools[rows]]
    needed = -(-lengths // sizes) - have
    long = lengths > state.config.sequence_tokens_max
    page_counts = np.zeros(len(ids), np.int64)
    pages: list[int] = []
    wanted: dict[int, int] = {}  # pool -> pages
    granted: list[tuple[int, int, int]] = []
    supply: dict[int, int] = {}
    charges: dict[int, dict[Account, int]] = {}  # pool -> tenant with a quota -> pages
    for at in np.flatnonzero((needed > 0) | long).tolist():
        index, pool = int(positions[at]), state.pools[int(tables.pools[rows[at]])]
        total = int(have[at] + max(needed[at], 0))
        if long[at]:
            refuse(index, InvalidValue("step.grow", f"at most {state.config.sequence_tokens_max} tokens a sequence", int(lengths[at])))
        elif total > pool.num_pages:
            refuse(index, SequenceTooLarge(pool.name, total, pool.num_pages))
        else:
            count = int(needed[at])
            if pool.index not in supply:
                asked = int(needed[(needed > 0) & (tables.pools[rows] == pool.index)].sum())
                supply[pool.index] = draft.pool(pool.index).can_take(asked)
            account = state.sequences[int(ids[index])].node.account
            charged = charges.get(pool.index, {}).get(account, 0) + count if account is not None else 0
            if account is not None and draft.pool(pool.index).quota_left(charged, account) < charged:
                refuse(index, draft.pool(pool.index).over_quota(charged, account))
                keep[index] = False
                continue
            if wanted.get(pool.index, 0) + count <= supply[pool.index]:
                wanted[pool.index] = wanted.get(pool.index, 0) + count
                granted.append((index, pool.index, count))
                if account is not None:
                    charges.setdefault(pool.index, {})[account] = charged
                continue
            free = supply[pool.index] - wanted.get(pool.index, 0)
            refuse(index, OutOfPages(pool.name, count, free, pool.quarantined))
        keep[index] = False
    # All evictions are logged before the growth itself, and pages leave each stack in the order of the sequences.
    for owner, accounts in charges.items():
        for account, count in accounts.items():
            draft.pool(owner).make_room(count, account)
    taken = {pool: iter(draft.pool(pool).take(count, None)) for pool, count in wanted.items()}
    for index, owner, count in granted:
        page_counts[index] = count
        pages += [next(taken[owner]) for _ in range(count)]
    if not keep.any():
        return
    if keep.all():
        same = not granted and np.array_equal(ids, tables.last_ids) and np.array_equal(counts, tables.last_counts)
        draft.events.append(ev.GrownAgain() if same else ev.SequencesGrown(ids, counts, page_counts, np.array(pages, np.int32)))
    else:
        draft.events.append(ev.SequencesGrown(ids[keep], counts[keep], page_counts[keep], np.array(pages, np.int32)))
    draft.grown.update(dict.fromkeys(ids[keep].tolist()) if state.handoffs or len(command.hand_off) else {})


def append_tokens(draft: Draft, sequence_id: int, tokens: np.ndarray) -> None:
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    known = draft.known(draft.state.sequences[sequence_id])
    limit = draft.state.config.sequence_tokens_max
    if known + len(tokens) > limit:
        raise InvalidValue("step.tokens", f"at most {limit} tokens a sequence", known + len(tokens))
    draft.appended[sequence_id] = draft.appended.get(sequence_id, 0) + len(tokens)
    pool = draft.state.sequences[sequence_id].pool
    draft.load_change[pool] = draft.load_change.get(pool, 0) + len(tokens)
    draft.events.append(ev.TokensAppended(sequence_id, tokens))


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


def apply_appended(state: State, event: ev.TokensAppended) -> None:
    sequence = state.sequences[event.sequence]
    sequence.tokens += event.tokens.tobytes()
    state.pools[sequence.pool].load += len(event.tokens)
    note_publishable(state, sequence)
    note_place(state, sequence)
