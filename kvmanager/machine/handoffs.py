"""Handoffs: what the manager decides about them and what their events do. The states and books of one: `kvmanager.pages.handoff`."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue, InvariantBroken, LayoutMismatch, SequenceTooLarge, TooMany, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine import lives
from kvmanager.machine.admission import check_ready
from kvmanager.machine.clients import notify
from kvmanager.machine.draft import Draft
from kvmanager.machine.forks import leave_family
from kvmanager.machine.owners import let_go, note_place, note_publishable
from kvmanager.machine.state import Notice, State
from kvmanager.pages.handoff import Handoff, HandoffState
from kvmanager.pages.prefix import TOKEN_BYTES

__all__ = [
    "abort",
    "abort_asked",
    "apply_aborted",
    "apply_begun",
    "apply_ended",
    "apply_moving",
    "apply_pulled",
    "apply_reserving",
    "apply_resident",
    "apply_sealed",
    "hand_off",
    "list_handoffs",
    "pulled",
    "settle_handoffs",
]


def hand_off(draft: Draft, sequence_id: int, target_name: str) -> int:
    state = draft.state
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    sequence = state.sequences[sequence_id]
    begun = draft.begun
    active = sequence.handoff if sequence.handoff not in draft.aborted else 0
    if active or any(event.sequence == sequence_id for event in begun):
        raise WrongState("sequence", sequence_id, "one without an active handoff", f"handoff {active}")
    target, source = state.pool(target_name), state.pools[sequence.pool]
    if target is source:
        raise InvalidValue("step.hand_off", f"a pool other than {source.name}, where the sequence is", target.name)
    if target.page_size != source.page_size:
        raise InvalidValue("step.hand_off", f"a pool of page_size {source.page_size}", f"{target.name} with {target.page_size}")
    if source.layout and target.layout and source.layout != target.layout:
        raise LayoutMismatch(f"handoff from pool {source.name} to {target.name}", source.layout, target.layout)
    pages = int(state.tables.page_counts[state.tables.row(sequence_id)])
    if pages > target.num_pages:
        raise SequenceTooLarge(target.name, pages, target.num_pages)
    check_ready(draft, target)
    if len(state.handoffs) + len(begun) >= state.config.handoffs_max:
        raise TooMany("handoffs", state.config.handoffs_max)
    handoff_id = state.next_handoff + len(begun)
    event = ev.HandoffBegun(handoff_id, sequence_id, target.index)
    begun.append(event)
    draft.events.append(event)
    return handoff_id


def abort_asked(draft: Draft, handoff_id: int) -> None:
    handoff = draft.state.handoff(handoff_id)
    if handoff.state is HandoffState.ABORTED or handoff_id in draft.aborted:
        raise WrongState("handoff", handoff_id, "one that is not over", "aborted")
    abort(draft, handoff_id, "asked", "asked for by the client")


def abort(draft: Draft, handoff_id: int, code: str, reason: str) -> None:
    draft.aborted[handoff_id] = None
    draft.events.append(ev.HandoffAborted(handoff_id, code, reason))


def pulled(draft: Draft, handoff_id: int, worker: int, pool: int) -> None:
    """A worker reports its pull. A report for a handoff that is over, or was never this worker's, changes nothing."""
    handoff = draft.state.handoffs.get(handoff_id)
    if handoff is None or handoff.state is not HandoffState.MOVING or handoff.target != pool or worker in handoff.pulled:
        return
    draft.events.append(ev.HandoffPulled(handoff_id, worker))
    everywhere = all(each in handoff.pulled or each == worker for each in draft.live_workers(pool))
    if everywhere and lives.is_current(draft, handoff.source):
        draft.events.append(ev.HandoffResident(handoff_id))


def settle_handoffs(draft: Draft) -> None:
    """Handoffs go on as far as they can; aborted ones end once nobody can be reading for them."""
    state = draft.state
    if not state.handoffs and not draft.begun:
        return
    for handoff in state.handoffs.values():
        if handoff.state is HandoffState.ABORTED and draft.acked(handoff.target) >= handoff.version:
            draft.events.append(ev.HandoffEnded(handoff.handoff_id))
    lives.settle_pulled(draft)
    waiting = (HandoffState.PREFILLING, HandoffState.SEALED, HandoffState.RESERVING)
    for handoff in state.handoffs.values():
        if handoff.state in waiting and handoff.handoff_id not in draft.aborted:
            _advance(draft, handoff.handoff_id, handoff.sequence_id, handoff.target, handoff.state)
    for event in draft.begun:
        _advance(draft, event.handoff, event.sequence, event.target, HandoffState.PREFILLING)


def _advance(draft: Draft, handoff_id: int, sequence_id: int, target: int, at: HandoffState) -> None:
    """Carry a handoff as far as it goes now: prefilling to sealed to reserving to moving."""
    state = draft.state
    sequence = state.sequences[sequence_id]
    if sequence_id in draft.cut:
        return  # the next acknowledgement tells how much of it is written
    if at is HandoffState.PREFILLING:
        if sequence_id in draft.grown or draft.written_tokens(sequence) < state.tables.length(sequence_id):
            return
        draft.events.append(ev.HandoffSealed(handoff_id))
    if not lives.is_current(draft, sequence.pool):
        return
    if draft.published_pages(sequence) < sequence.shared and not sequence.unlisted:
        return  # a fork may publish these pages for both, and a handoff's pages have to stay as they are: it will be soon
    length = state.tables.length(sequence_id)
    pool = state.pools[target]
    total = int(state.tables.page_counts[state.tables.row(sequence_id)])
    if total > pool.num_pages:
        error = SequenceTooLarge(pool.name, total, pool.num_pages)  # it grew after the handoff was asked for
        abort(draft, handoff_id, error.code, error.text)
        return
    pages = draft.pool(target)
    tokens = bytes(sequence.tokens[: length * TOKEN_BYTES])
    found = pages.match(sequence.namespace, tokens, length // pool.page_size)
    shared = found.pages()
    pinned = pages.pin(found.nodes, found.last_pages)
    account = pages.account(sequence.namespace)
    if pages.can_take(total - len(shared), account) < total - len(shared):
        pages.unpin(pinned)
        if at is not HandoffState.RESERVING:
            draft.events.append(ev.HandoffReserving(handoff_id))
        return
    fresh = pages.take(total - len(shared), account)
    draft.events.append(ev.HandoffMoving(handoff_id, shared, fresh))


def list_handoffs(state: State, limit: int) -> list[dict[str, Any]]:
    """The oldest handoffs that are not over, for people and programs. Ages are in versions since the last change of state."""
    return [
        {
            "handoff": handoff.handoff_id,
            "sequence": handoff.sequence_id,
            "state": handoff.state.name.lower(),
            "source": state.pools[handoff.source].name,
            "target": state.pools[handoff.target].name,
            "tokens": handoff.length,
            "pages": len(handoff.target_pages),
            "pages_shared": handoff.target_shared,
            "pulled": len(handoff.pulled),
            "age": state.version - handoff.version,
        }
        for handoff in islice(state.handoffs.values(), limit)
    ]


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_begun(state: State, event: ev.HandoffBegun) -> None:
    sequence = state.sequences[event.sequence]
    state.handoffs[event.handoff] = Handoff(
        event.handoff,
        event.sequence,
        sequence.namespace,
        sequence.owner,
        sequence.pool,
        event.target,
        HandoffState.PREFILLING,
        state.version,
    )
    state.next_handoff = event.handoff + 1
    sequence.handoff = event.handoff


def _turn(state: State, handoff_id: int, to: HandoffState) -> Handoff:
    handoff = state.handoffs[handoff_id]
    handoff.state, handoff.version = to, state.version
    return handoff


def apply_sealed(state: State, event: ev.HandoffSealed) -> None:
    handoff = _turn(state, event.handoff, HandoffState.SEALED)
    state.sequences[handoff.sequence_id].sealed = True
    handoff.length = state.tables.length(handoff.sequence_id)


def apply_reserving(state: State, event: ev.HandoffReserving) -> None:
    _turn(state, event.handoff, HandoffState.RESERVING)


def apply_moving(state: State, event: ev.HandoffMoving) -> None:
    handoff = _turn(state, event.handoff, HandoffState.MOVING)
    sequence = state.sequences[handoff.sequence_id]
    source, target = state.pools[handoff.source], state.pools[handoff.target]
    # Both sides get an owner of their own: whatever happens to the sequence, these pages stay where they are.
    handoff.source_pages = state.tables.pages_of(handoff.sequence_id).tolist()
    handoff.source_indexed, handoff.source_node = sequence.published, sequence.node
    source.share(handoff.source_pages)
    source.prefix.hold(sequence.node, state.version, sequence.priority)
    sequence.holds += 1
    handoff.target_node = target.prefix.acquire(handoff.namespace, event.shared, state.version, sequence.priority)
    target.share(event.shared)
    target.take(event.fresh, handoff.target_node.account)
    handoff.target_shared, handoff.target_pages = len(event.shared), event.shared.tolist() + event.fresh.tolist()


def apply_pulled(state: State, event: ev.HandoffPulled) -> None:
    state.handoffs[event.handoff].pulled[event.worker] = None


def _let_source_go(state: State, handoff: Handoff) -> None:
    let_go(state, state.pools[handoff.source], handoff.namespace, handoff.source_pages, handoff.source_indexed, handoff.source_node)
    sequence = state.sequences.get(handoff.sequence_id)
    if sequence is not None:
        sequence.holds -= 1


def apply_resident(state: State, event: ev.HandoffResident) -> None:
    handoff = state.handoffs.pop(event.handoff)
    sequence = state.sequences[handoff.sequence_id]
    source, target = state.pools[handoff.source], state.pools[handoff.target]
    _let_source_go(state, handoff)
    let_go(state, source, sequence.namespace, state.tables.pages_of(handoff.sequence_id), sequence.published, sequence.node)
    source.prefix.leave(sequence.namespace)  # the target's namespace was entered at `moving`
    source.publishable.pop(sequence.sequence_id, None)
    source.inflight.forget(sequence.sequence_id)
    leave_family(state, sequence)
    sequence.cuts = []  # what the source's workers say counts no longer
    source.arrivals.remove(sequence.sequence_id, sequence.priority)
    target.arrivals.add(sequence.sequence_id, sequence.priority)
    source.load -= len(sequence.tokens) // TOKEN_BYTES
    target.load += len(sequence.tokens) // TOKEN_BYTES
    state.tables.place(sequence.sequence_id, handoff.target, handoff.length, np.array(handoff.target_pages, np.int32))
    if handoff.target_node is None:
        raise InvariantBroken(f"handoff {event.handoff}: resident without ever having moved")
    sequence.pool, sequence.node, sequence.published = handoff.target, handoff.target_node, handoff.target_shared
    sequence.written = dict.fromkeys(handoff.pulled, handoff.length)
    sequence.handoff, sequence.sealed = 0, False
    if handoff.target_flushed:
        sequence.shared, sequence.unlisted = handoff.target_flushed, True
    note_publishable(state, sequence)
    note_place(state, sequence)
    notify(state, handoff.owner, Notice("resident", handoff.sequence_id, event.handoff, target.name))


def apply_aborted(state: State, event: ev.HandoffAborted) -> None:
    handoff = state.handoffs[event.handoff]
    was_moving = handoff.state is HandoffState.MOVING
    _turn(state, event.handoff, HandoffState.ABORTED)
    sequence = state.sequences.get(handoff.sequence_id)
    if sequence is not None:
        sequence.handoff, sequence.sealed = 0, False
    notify(state, handoff.owner, Notice("aborted", handoff.sequence_id, event.handoff, event.reason, event.code))
    if was_moving:
        target = state.pools[handoff.target]
        let_go(state, target, handoff.namespace, handoff.target_pages, handoff.target_shared, handoff.target_node)
        target.prefix.leave(handoff.namespace)
        handoff.target_pages, handoff.target_shared, handoff.target_flushed, handoff.target_node = [], 0, 0, None
    else:
        del state.handoffs[event.handoff]  # nobody was told to read anything


def apply_ended(state: State, event: ev.HandoffEnded) -> None:
    _let_source_go(state, state.handoffs.pop(event.handoff))
