"""Growth: running sequences get slots for more tokens, and pages where their last one is full.

A steady decode step grows the same sequences as the step before by the same counts. `grow_all` decides it, and any other growth in which
everybody gets theirs, with a handful of numpy calls for the whole batch; it declines what is out of the ordinary, and `grow` then looks at
each sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue, KVError, OutOfPages, SequenceTooLarge, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.commands import Step
from kvmanager.machine.draft import Draft
from kvmanager.machine.owners import note_owing, note_place, note_publishable
from kvmanager.machine.state import State
from kvmanager.pages.accounts import Account
from kvmanager.pages.sequences import SLOT_MASK, Tables
from kvmanager.pages.steady import Steady

__all__ = ["append_tokens", "apply_appended", "apply_grown", "apply_grown_again", "apply_grown_further", "grow", "grow_all"]

NONE = np.zeros(0, np.int32)


def grow_all(draft: Draft, command: Step) -> bool:
    """Decide the growth if everybody gets what is asked for, with a few numpy calls for the whole batch. False: nothing was decided."""
    state, tables = draft.state, draft.state.tables
    ids, counts = command.grow, command.grow_counts
    if draft.closed:
        return False
    again = _repeats(tables, ids, counts)
    if again:
        rows = tables.last_rows()
        if rows is None:
            return False
    else:
        if not tables.known(ids).all():
            return False
        rows = ids & SLOT_MASK
    growing: dict[int, None] = {}
    if state.sealed or command.hand_off:
        growing = dict.fromkeys(ids.tolist())
        if not growing.keys().isdisjoint(state.sealed):
            return False
    steady = _steady(state) if again and not draft.has_cuts() else _look(state, rows, counts, draft)
    if steady.left <= 0:
        return False
    at, pages = steady.short(), NONE
    if len(at):
        taken = _take(draft, ids, at, None if steady.pools is None else steady.pools[at])
        if taken is None:
            return False
        pages = taken
    if not again:
        draft.events.append(ev.SequencesGrown(ids, counts, np.bincount(at, minlength=len(ids)), pages))
    elif len(at):
        draft.events.append(ev.GrownFurther(at, pages))
    else:
        draft.events.append(ev.GrownAgain())
    if growing:
        draft.grown.update(growing)
    return True


def _repeats(tables: Tables, ids: np.ndarray, counts: np.ndarray) -> bool:
    """Whether these are the sequences and counts of the last growth. Arrays that were once found to be are known again at a glance."""
    steady = tables.steady
    if steady is not None and steady.asked[0] is ids and steady.asked[1] is counts:
        return True
    same = np.array_equal(ids, tables.last_ids) and np.array_equal(counts, tables.last_counts)
    if same and steady is not None:
        steady.asked = ids, counts
    return same


def _steady(state: State) -> Steady:
    """The room of the sequences of the last growth, which are all open: looked up once, then kept beside the tables."""
    tables = state.tables
    if tables.steady is None or tables.steady.left <= 0:
        tables.steady = _look(state, tables.last_ids & SLOT_MASK, tables.last_counts, None)
    return tables.steady


def _look(state: State, rows: np.ndarray, counts: np.ndarray, draft: Draft | None) -> Steady:
    """The room of sequences as the tables have it, with what this step's truncations (of the draft) leave laid over it."""
    tables = state.tables
    lengths, have = tables.lengths[rows], tables.page_counts[rows]
    if draft is not None and draft.has_cuts():
        draft.lay_cuts_over(tables.ids[rows], lengths, have)
    first = state.pools[0]
    pools: np.ndarray | None = None
    sizes = state.page_sizes(rows)
    longest: Any = min(first.num_pages * first.page_size, state.config.sequence_tokens_max)
    if len(state.pools) > 1:
        pools = tables.pools[rows]
        longest = np.array([pool.num_pages * pool.page_size for pool in state.pools], np.int64)[pools]
        longest = np.minimum(longest, state.config.sequence_tokens_max)
    room = have * sizes - lengths
    left = int(np.minimum.reduce((longest - lengths) // counts))
    return Steady(counts, room, sizes, pools, left)


def _take(draft: Draft, ids: np.ndarray, at: np.ndarray, pools: np.ndarray | None) -> np.ndarray | None:
    """One page for each of `at`, in that order; None if a pool has not got them all, or a tenant's quota leaves it none without eviction."""
    charges = _charges(draft, ids, at)
    if charges is None:
        return None
    if pools is None:
        only = draft.pool(0)
        if only.can_take(len(at)) < len(at):
            return None
        pages = only.take(len(at), None)
    else:
        wanted = [(int(pool), pools == pool) for pool in np.unique(pools)]
        for pool, mask in wanted:
            count = int(np.count_nonzero(mask))
            if draft.pool(pool).can_take(count) < count:
                return None
        pages = np.empty(len(at), np.int32)
        for pool, mask in wanted:
            pages[mask] = draft.pool(pool).take(int(np.count_nonzero(mask)), None)
    for account, (owner, count) in charges.items():
        draft.pool(owner).make_room(count, account)
    return pages


def _charges(draft: Draft, ids: np.ndarray, at: np.ndarray) -> dict[Account, tuple[int, int]] | None:
    """Pages that tenants with a quota would get: account -> (pool, pages). None if one would have to give up pages for them, or has too many."""
    state = draft.state
    charges: dict[Account, tuple[int, int]] = {}
    for pool in state.pools:
        if pool.prefix.accounts.of:
            break
    else:
        return charges
    for sequence_id in ids[at].tolist():
        sequence = state.sequences[sequence_id]
        account = sequence.node.account
        if account is not None:
            charges[account] = sequence.pool, charges.get(account, (0, 0))[1] + 1
    for account, (owner, count) in charges.items():
        if account.pages + draft.pool(owner).charged.get(account, 0) + count > account.quota:
            return None
    return charges


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
    for index, sequence_id in enumerate(ids.tolist()) if state.sealed else ():
        if keep[index] and sequence_id in state.sealed:
            handoff = state.handoffs[state.sequences[sequence_id].handoff]
            if handoff.handoff_id not in draft.aborted:
                keep[index] = False
                refuse(index, WrongState("sequence", sequence_id, "one that is not being handed off", handoff.state.name.lower()))
    positions = np.flatnonzero(keep)
    rows = tables.rows(ids[positions])
    lengths, have = tables.lengths[rows], tables.page_counts[rows]
    if draft.has_cuts():
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
    if draft.begun:
        draft.grown.update(dict.fromkeys(ids[keep].tolist()))


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
        for index in np.unique(pools).tolist():
            state.pools[index].take(pages[pools == index], None)
    for pool in state.pools:
        if pool.prefix.accounts.of:
            break
    else:
        return
    for sequence_id in state.tables.ids[rows].tolist():
        account = state.sequences[sequence_id].node.account
        if account is not None:
            account.pages += 1


def apply_grown(state: State, event: ev.SequencesGrown) -> None:
    if len(event.pages):
        _hand_out(state, np.repeat(state.tables.rows(event.ids), event.page_counts), event.pages)
    state.tables.grow(event.ids, event.counts, event.page_counts, event.pages)
    _note_owing(state, event.ids)


def apply_grown_again(state: State, event: ev.GrownAgain) -> None:
    state.tables.grow_again(NONE, NONE)
    _note_owing(state, state.tables.last_ids)


def apply_grown_further(state: State, event: ev.GrownFurther) -> None:
    _hand_out(state, state.tables.grow_again(event.at, event.pages), event.pages)
    _note_owing(state, state.tables.last_ids)


def _note_owing(state: State, ids: np.ndarray) -> None:
    """Nothing to look for while no handoff waits for tokens; else what the batch has in common with those that do."""
    if prefilling := state.handoffs.prefilling:
        for sequence_id in ids.tolist():
            if sequence_id in prefilling:
                note_owing(state, sequence_id)


def apply_appended(state: State, event: ev.TokensAppended) -> None:
    sequence = state.sequences[event.sequence]
    pool = state.pools[sequence.pool]
    pages = len(sequence.tokens) // pool.prefix.page_bytes
    sequence.tokens += event.tokens.tobytes()
    pool.load += len(event.tokens)
    if len(sequence.tokens) // pool.prefix.page_bytes != pages:  # otherwise it has neither more to publish nor another next page
        note_publishable(state, sequence)
        note_place(state, sequence)
