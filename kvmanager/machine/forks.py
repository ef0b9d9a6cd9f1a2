"""Forks: sequences that begin as copies of another, for parallel sampling and beam search.

A child shares the parent's full pages, in the prefix index or not, and gets a copy of the last, partly filled one (see copies). The ids
of all tokens in shared pages are known when they become shared, so nobody can later claim other ones for the same page.

A page that several sequences share before it is published enters the index for all of them at once: *kin* are published along with the
first. So whoever owns a page of the index holds its place there, forks or not, and nothing else has to know that forks exist: a page
that is let go is either in the index and stays cached, or in quarantine once its last owner is gone.
"""

from __future__ import annotations

import numpy as np

from kvmanager.errors import InvariantBroken, TooMany, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.draft import Draft
from kvmanager.machine.owners import note_place, note_publishable
from kvmanager.machine.state import State
from kvmanager.pages.prefix import TOKEN_BYTES
from kvmanager.pages.sequences import SLOT_BITS, Sequence, slot_of

__all__ = ["apply_forked", "fork", "leave_family", "publish_kin"]


def fork(draft: Draft, parent_id: int, count: int, client: int) -> list[int]:
    """`count` children of a sequence as it was before this step's growth; gives their ids.

    Raises Unknown, WrongState (handed off, empty, or ids of shared pages not known), TooMany, OutOfPages: all children or none.
    """
    state = draft.state
    if not draft.alive(parent_id):
        raise Unknown("sequence", parent_id)
    parent = state.sequences[parent_id]
    draft.refuse_handed_off(parent)
    pool = state.pools[parent.pool]
    length = draft.length(parent_id)
    full, part = divmod(length, pool.page_size)
    known = draft.known(parent)
    if length < 1:
        raise WrongState("sequence", parent_id, "at least one token", "none")
    if known < full * pool.page_size:
        raise WrongState("sequence", parent_id, f"known token ids up to {full * pool.page_size}, where its full pages end", str(known))
    if len(draft.slots) < count:
        raise TooMany("sequences", state.config.sequences_max)
    pages = draft.pool(pool.index)
    wanted = count if part else 0
    account = parent.node.account
    if pages.can_take(wanted, account) < wanted:
        raise pages.refusal(wanted, account)
    fresh = pages.take(wanted, account)
    if part:
        cut = draft.cut.get(parent_id)
        source = cut.target if cut is not None and cut.target >= 0 else int(state.tables.pages[state.tables.row(parent_id), full])
        for target in fresh.tolist():
            draft.copy(pool.index, source, target, part)
    children = [(state.next_generation + draft.opened + place) << SLOT_BITS | slot for place, slot in enumerate(draft.slots.pop(count))]
    draft.opened += count
    draft.load_change[pool.index] = draft.load_change.get(pool.index, 0) + count * min(known, length)
    draft.events.append(ev.SequenceForked(parent_id, client, length, np.array(children, np.int64), fresh))
    return children


def apply_forked(state: State, event: ev.SequenceForked) -> None:
    parent = state.sequences[event.parent]
    pool = state.pools[parent.pool]
    full = event.length // pool.page_size
    shared = state.tables.pages_of(event.parent)[:full]
    pool.take(event.fresh, parent.node.account)
    if not parent.family:  # named for its first child: a parent may leave, and found another
        parent.family = int(event.children[0])
        state.families[parent.family] = {event.parent: None}
    family = state.families[parent.family]
    parent.shared = max(parent.shared, full)
    tokens = parent.tokens.upto(event.length * TOKEN_BYTES)
    # The copy of the last page counts once the workers have made it, and they will say so.
    written = {worker: min(each, full * pool.page_size) for worker, each in parent.written.items()}
    for place, child_id in enumerate(event.children.tolist()):
        slot = slot_of(child_id)
        if state.free_slots.pop() != slot:
            raise InvariantBroken(f"fork: row {slot} is not on top of the free rows")
        state.next_generation = (child_id >> SLOT_BITS) + 1
        pool.share(shared)
        pool.prefix.enter(parent.namespace)
        pool.prefix.hold(parent.node, state.version, parent.priority)
        state.tables.open(child_id, pool.index, event.length, np.concatenate([shared, event.fresh[place : place + 1]]))
        child = Sequence(child_id, event.owner, pool.index, parent.namespace, tokens.upto(len(tokens)), parent.node, parent.published)
        child.written = dict(written)
        child.cut_floor = state.version  # nobody can have said anything about it before
        child.family, child.shared, child.priority, child.unlisted = parent.family, full, parent.priority, parent.unlisted
        family[child_id] = None
        state.sequences[child_id] = child
        pool.arrivals.add(child_id, child.priority)
        pool.load += len(tokens) // TOKEN_BYTES
        state.extras.count(tokens, 1)
        note_publishable(state, child)
        note_place(state, child)


def leave_family(state: State, sequence: Sequence) -> None:
    """The sequence is closed, or its pages are another pool's now."""
    if sequence.family:
        members = state.families[sequence.family]
        del members[sequence.sequence_id]
        if not members:
            del state.families[sequence.family]
        sequence.family = 0
    sequence.shared = 0


def publish_kin(draft: Draft, sequence: Sequence, first: int, pages: np.ndarray, attached: int) -> None:
    """`sequence` publishes `pages` from place `first` on, and those from place `attached` on are its own: log the same for all sequences
    that share any of them."""
    last = min(first + len(pages), sequence.shared)
    if attached >= last:
        return
    tables = draft.state.tables
    path = np.concatenate([tables.pages_of(sequence.sequence_id)[:first], pages])
    for kin_id in draft.state.families[sequence.family]:
        kin = draft.state.sequences[kin_id]
        if kin is sequence or not draft.alive(kin_id):
            continue
        its = tables.pages_of(kin_id)[: min(last, kin.shared)]
        same = np.flatnonzero(its[attached:] == path[attached : len(its)])
        start = draft.published_pages(kin)
        if len(same) and (end := attached + int(same[-1]) + 1) > start:
            draft.published[kin_id] = end
            draft.events.append(ev.PagesPublished(kin_id, start, path[start:end]))
