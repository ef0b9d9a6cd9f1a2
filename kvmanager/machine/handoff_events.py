"""What the events of handoffs do to the state. What is decided about them: `handoffs`. The books of one: `kvmanager.pages.handoff`."""

from __future__ import annotations

import numpy as np

from kvmanager.errors import InvariantBroken
from kvmanager.machine import events as ev
from kvmanager.machine.clients import notify
from kvmanager.machine.forks import leave_family
from kvmanager.machine.owners import let_go, note_owing, note_place, note_publishable
from kvmanager.machine.state import Notice, State
from kvmanager.pages.handoff import Handoff, HandoffState
from kvmanager.pages.prefix import TOKEN_BYTES
from kvmanager.tables import div_ceil

__all__ = [
    "apply_aborted",
    "apply_begun",
    "apply_ended",
    "apply_failed",
    "apply_layers_written",
    "apply_moving",
    "apply_pulled",
    "apply_reserved",
    "apply_reserving",
    "apply_resident",
    "apply_sealed",
    "apply_streaming",
]


def apply_begun(state: State, event: ev.HandoffBegun) -> None:
    sequence = state.sequences[event.sequence]
    state.handoffs.begin(
        Handoff(
            event.handoff,
            event.sequence,
            sequence.namespace,
            sequence.owner,
            sequence.pool,
            event.target,
            HandoffState.PREFILLING,
            state.version,
            state.now_ms,
            event.until,
            len(sequence.tokens) // TOKEN_BYTES,
            event.group,
            tuple(event.tried.tolist()),
        )
    )
    state.next_handoff = event.handoff + 1
    sequence.handoff = event.handoff
    note_owing(state, event.sequence)
    if event.cause:
        notify(state, sequence.owner, Notice("moving", event.sequence, event.handoff, state.pools[event.target].name, event.cause))


def _turn(state: State, handoff_id: int, to: HandoffState) -> Handoff:
    handoff = state.handoffs[handoff_id]
    state.handoffs.turn(handoff, to, state.version, state.now_ms)
    return handoff


def apply_reserved(state: State, event: ev.HandoffReserved) -> None:
    handoff = state.handoffs[event.handoff]
    target = state.pools[handoff.target]
    handoff.target_node = target.prefix.acquire(
        handoff.namespace, event.shared, state.version, state.sequences[handoff.sequence_id].priority
    )
    target.share(event.shared)
    target.take(event.fresh, handoff.target_node.account)
    handoff.target_shared = handoff.target_fresh = len(event.shared)
    handoff.target_pages = event.shared.tolist() + event.fresh.tolist()


def apply_streaming(state: State, event: ev.HandoffStreaming) -> None:
    handoff = state.handoffs[event.handoff]
    handoff.streaming = True
    handoff.sources = dict(zip(event.pullers.tolist(), event.sources.tolist(), strict=True))


def apply_layers_written(state: State, event: ev.LayersWritten) -> None:
    """How far each worker is, the target's workers read in the event; the state needs only to know whether it got further."""
    for handoff_id, *reach in zip(event.handoffs.tolist(), event.tokens.tolist(), event.layers.tolist(), strict=True):
        handoff = state.handoffs[handoff_id]
        if tuple(reach) > handoff.reach:
            handoff.reach = reach[0], reach[1]
            state.handoffs.progress(handoff_id, state.now_ms)


def apply_sealed(state: State, event: ev.HandoffSealed) -> None:
    handoff = _turn(state, event.handoff, HandoffState.SEALED)
    state.sequences[handoff.sequence_id].sealed = True
    state.sealed[handoff.sequence_id] = None
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
    node = target.prefix.acquire(handoff.namespace, event.shared, state.version, sequence.priority)
    target.share(event.shared)
    target.take(event.fresh[event.kept :], node.account)
    if handoff.target_node is not None:
        # Of what was reserved some fresh pages stay the handoff's. The others go to quarantine: if it streams, somebody may be writing them.
        indexed, first = handoff.target_shared, handoff.target_fresh + event.skipped
        unused = handoff.target_pages[:first] + handoff.target_pages[first + event.kept :]
        let_go(state, target, handoff.namespace, unused, indexed, handoff.target_node)
        target.prefix.leave(handoff.namespace)
    handoff.target_node, handoff.flushed = node, False
    handoff.target_shared = handoff.target_fresh = len(event.shared)
    handoff.target_pages = event.shared.tolist() + event.fresh.tolist()
    handoff.sources = dict(zip(event.pullers.tolist(), event.sources.tolist(), strict=True))


def apply_pulled(state: State, event: ev.HandoffPulled) -> None:
    state.handoffs[event.handoff].pulled[event.worker] = None
    state.handoffs.progress(event.handoff, state.now_ms)


def apply_failed(state: State, event: ev.HandoffFailed) -> None:
    handoff = state.handoffs[event.handoff]
    handoff.failures[event.worker] = event.attempt + 1
    handoff.sources[event.worker] = event.source


def _let_source_go(state: State, handoff: Handoff) -> None:
    let_go(state, state.pools[handoff.source], handoff.namespace, handoff.source_pages, handoff.source_indexed, handoff.source_node)
    sequence = state.sequences.get(handoff.sequence_id)
    if sequence is not None:
        sequence.holds -= 1


def apply_resident(state: State, event: ev.HandoffResident) -> None:
    handoff = state.handoffs.end(event.handoff)
    sequence = state.sequences[handoff.sequence_id]
    source, target = state.pools[handoff.source], state.pools[handoff.target]
    _let_source_go(state, handoff)
    let_go(state, source, sequence.namespace, state.tables.pages_of(handoff.sequence_id), sequence.published, sequence.node)
    source.prefix.leave(sequence.namespace)  # the target's namespace was entered at `moving`
    source.publishable.pop(sequence.sequence_id, None)
    source.inflight.forget(sequence.sequence_id)
    leave_family(state, sequence)
    # What the source's workers say counts no longer, nor what the target's said when the sequence was there before.
    sequence.cuts, sequence.cut_floor = [], state.version
    source.arrivals.remove(sequence.sequence_id, sequence.priority)
    target.arrivals.add(sequence.sequence_id, sequence.priority)
    source.load -= len(sequence.tokens) // TOKEN_BYTES
    target.load += len(sequence.tokens) // TOKEN_BYTES
    state.tables.place(sequence.sequence_id, handoff.target, handoff.length, np.array(handoff.target_pages, np.int32))
    if handoff.target_node is None:
        raise InvariantBroken(f"handoff {event.handoff}: resident without ever having moved")
    sequence.pool, sequence.node, sequence.published = handoff.target, handoff.target_node, handoff.target_shared
    if sequence.reserved and source.page_size != target.page_size:
        sequence.reserved = div_ceil(sequence.reserved * source.page_size, target.page_size)
    if handoff.flushed:
        # Its tenant's pages are found by nobody, and others may hold those that were shared: neither to be published nor to be written into.
        sequence.unlisted, sequence.shared = True, handoff.target_fresh
    sequence.written = dict.fromkeys(handoff.pulled, handoff.length)
    sequence.handoff, sequence.sealed = 0, False
    state.sealed.pop(handoff.sequence_id, None)
    note_publishable(state, sequence)
    note_place(state, sequence)
    used = div_ceil(handoff.length, target.page_size)
    spared = min(handoff.target_fresh, used)
    target.pages_moved += used - spared
    target.pages_spared += spared
    notify(
        state,
        handoff.owner,
        Notice("resident", handoff.sequence_id, event.handoff, target.name, "", used - spared, spared, target.page_bytes),
    )


def apply_aborted(state: State, event: ev.HandoffAborted) -> None:
    handoff = state.handoffs[event.handoff]
    was_moving = handoff.state is HandoffState.MOVING
    _turn(state, event.handoff, HandoffState.ABORTED)
    sequence = state.sequences.get(handoff.sequence_id)
    if sequence is not None:
        sequence.handoff, sequence.sealed = 0, False
        state.sealed.pop(handoff.sequence_id, None)
    notify(state, handoff.owner, Notice("aborted", handoff.sequence_id, event.handoff, event.reason, event.code))
    if handoff.target_node is not None:
        target = state.pools[handoff.target]
        let_go(state, target, handoff.namespace, handoff.target_pages, handoff.target_shared, handoff.target_node)
        target.prefix.leave(handoff.namespace)
        handoff.target_pages, handoff.target_shared, handoff.target_fresh, handoff.target_node = [], 0, 0, None
    if not was_moving:
        state.handoffs.end(event.handoff)  # nobody was told to read anything


def apply_ended(state: State, event: ev.HandoffEnded) -> None:
    _let_source_go(state, state.handoffs.end(event.handoff))
