"""Closing: a sequence ends, and its pages stay cached for others, or are forgotten."""

from __future__ import annotations

from kvmanager.errors import Unknown
from kvmanager.machine import events as ev
from kvmanager.machine.clients import notify
from kvmanager.machine.draft import Draft
from kvmanager.machine.forks import leave_family
from kvmanager.machine.handoffs import abort
from kvmanager.machine.owners import let_go
from kvmanager.machine.state import Notice, State
from kvmanager.pages.prefix import TOKEN_BYTES
from kvmanager.pages.sequences import slot_of

__all__ = ["apply_closed", "close", "forget"]


def close(draft: Draft, sequence_id: int, reason: int = 0) -> None:
    _end(draft, sequence_id)
    draft.slots.push([slot_of(sequence_id)])
    draft.events.append(ev.SequenceClosed(sequence_id, reason))


def forget(draft: Draft, sequence_id: int) -> None:
    """Closed at the end of the batch: until then its pages are in the index, and whoever takes hold of them keeps them there."""
    _end(draft, sequence_id)
    draft.closed_last.append(sequence_id)


def _end(draft: Draft, sequence_id: int) -> None:
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    sequence = draft.state.sequences[sequence_id]
    if sequence.handoff and sequence.handoff not in draft.aborted:
        abort(draft, sequence.handoff, "closed", "the sequence was closed")
    draft.closed[sequence_id] = None
    draft.load_change[sequence.pool] = draft.load_change.get(sequence.pool, 0) - len(sequence.tokens) // TOKEN_BYTES


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_closed(state: State, event: ev.SequenceClosed) -> None:
    sequence = state.sequences.pop(event.sequence)
    pool = state.pools[sequence.pool]
    let_go(state, pool, sequence.namespace, state.tables.pages_of(event.sequence), sequence.published, sequence.node)
    if event.reason == 3:
        pool.put_in_quarantine(state.version, pool.prefix.forget_end(sequence.node, state.version), None)
    pool.prefix.leave(sequence.namespace)
    pool.load -= len(sequence.tokens) // TOKEN_BYTES
    state.extras.count(sequence.tokens, -1)
    pool.publishable.pop(event.sequence, None)
    pool.inflight.forget(event.sequence)
    leave_family(state, sequence)
    pool.arrivals.remove(event.sequence, sequence.priority)
    state.tables.close(event.sequence)
    state.free_slots.append(slot_of(event.sequence))
    if event.reason == 1:
        notify(state, sequence.owner, Notice("lost", event.sequence, 0, f"memory of pool {pool.name} is gone", "lost"))
