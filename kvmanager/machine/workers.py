"""Workers: who computes in which pool, what they acknowledge, and what is lost with one of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue, LayoutMismatch, TooMany, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine import lives, pins
from kvmanager.machine.commands import LINKS_MAX, Ack, Join, WorkerGone
from kvmanager.machine.draft import Draft
from kvmanager.machine.handoffs import abort, give_up, pull_failed, pulled
from kvmanager.machine.owners import note_owing, note_publishable
from kvmanager.machine.state import State, Worker
from kvmanager.machine.truncation import believed
from kvmanager.pages.handoff import HandoffState

__all__ = [
    "ack",
    "apply_acked",
    "apply_dead",
    "apply_fenced",
    "apply_joined",
    "apply_link_chosen",
    "apply_page_bytes",
    "apply_written",
    "gone",
    "join",
    "links_of",
    "list_workers",
    "lose_pool",
]


def join(draft: Draft, command: Join, now_ms: int, client: int) -> dict[str, Any]:
    state = draft.state
    pool = state.pool(command.pool)
    unheard = _unheard(state, pool.index, command, client)
    if unheard is not None and not unheard.fenced:
        return {"worker": unheard.worker_id, "lease_ms": unheard.lease_ms, "epoch": state.epoch}
    if unheard is not None:  # its lease ended before its process heard of it, and that process is asking anew
        draft.dead[unheard.worker_id] = None
        draft.events.append(ev.WorkerDead(unheard.worker_id))
    if len(state.workers) >= state.config.workers_max:
        raise TooMany("workers", state.config.workers_max)
    if len(state.live_workers(pool.index)) >= pool.workers_expected:
        raise WrongState("pool", pool.name, f"at most {pool.workers_expected} live workers", "one more")
    if pool.layout and command.layout != pool.layout:
        raise LayoutMismatch(f"pool {pool.name}", pool.layout, command.layout)
    if pool.page_bytes and command.page_bytes not in (0, pool.page_bytes):
        raise InvalidValue("join.page_bytes", f"{pool.page_bytes}, as other workers of pool {pool.name} say", command.page_bytes)
    if pool.prefix.pages_indexed or pool.arrivals.count:
        # Fresh memory beside pages that hold something: this worker would read garbage.
        raise WrongState("pool", pool.name, "an empty pool for a worker with fresh memory", "cached pages or open sequences")
    lease_ms = command.lease_ms or state.config.lease_ms
    draft.events.append(ev.WorkerJoined(state.next_worker, command.name, pool.index, command.layout, command.memory, lease_ms, client))
    if command.page_bytes != pool.page_bytes and command.page_bytes:
        draft.events.append(ev.PageBytesTold(pool.index, command.page_bytes))
    return {"worker": state.next_worker, "lease_ms": lease_ms, "epoch": state.epoch}


def _unheard(state: State, pool: int, command: Join, client: int) -> Worker | None:
    """The worker that an earlier request of this client made, if that was given up and carried out all the same: nobody has heard of it,
    so nobody else could work for it, or say that it is dead."""
    if not command.seen:
        return None
    for worker_id in state.pool_workers[pool]:
        worker = state.workers[worker_id]
        asked = worker.client, worker.name, worker.layout, worker.memory
        if worker.joined > command.seen and asked == (client, command.name, command.layout, command.memory):
            return worker
    return None


def ack(draft: Draft, command: Ack, now_ms: int, client: int) -> dict[str, Any]:
    state = draft.state
    lives.check_ack(state, command.epoch, max(command.version, command.as_of))
    worker = state.worker(command.worker)
    if command.version > state.version:
        raise InvalidValue("ack.version", f"at most {state.version}, the newest there is", command.version)
    if command.as_of and not command.version <= command.as_of <= state.version:
        raise InvalidValue("ack.as_of", f"{command.version}..{state.version}", command.as_of)
    draft.events.append(ev.WorkerAcked(command.worker, command.version))
    draft.acks[command.worker] = command.version
    ids, lengths = [], []
    for sequence_id, tokens in zip(command.ids.tolist(), command.tokens.tolist(), strict=True):
        sequence = state.sequences.get(sequence_id)
        if sequence is None or sequence.pool != worker.pool:
            continue  # closed or moved since: the worker could not know
        tokens = believed(sequence, tokens, command.as_of or command.version)
        length = state.tables.length(sequence_id)
        if tokens > length:
            raise InvalidValue("ack.tokens", f"at most the {length} tokens of sequence {sequence_id}", tokens)
        ids.append(sequence_id)
        lengths.append(tokens)
        draft.written.setdefault(sequence_id, {})[command.worker] = tokens
    if ids:
        draft.events.append(ev.SequencesWritten(command.worker, np.array(ids, np.int64), np.array(lengths, np.int64)))
    _layers_written(draft, command, worker)
    for handoff_id in dict.fromkeys(command.pulled.tolist()):
        pulled(draft, handoff_id, command.worker, worker.pool)
    for peer, (transport, why) in {link[0]: link[1:] for link in command.links}.items():
        if peer in state.workers and peer not in draft.dead and worker.links.get(peer) != (transport, why):
            draft.events.append(ev.LinkChosen(command.worker, peer, transport, why))
    for handoff_id, attempt, reason in command.failed:
        pull_failed(draft, handoff_id, attempt, command.worker, reason)
    return {}


def _layers_written(draft: Draft, command: Ack, worker: Worker) -> None:
    """How far a step has come that the worker is still running. What comes late, twice or for a handoff that is over changes nothing."""
    state, told = draft.state, []
    for handoff_id, tokens, layers in command.layers:
        handoff = state.handoffs.get(handoff_id)
        if handoff is None or not handoff.streaming or handoff.state is not HandoffState.PREFILLING:
            continue
        sequence = state.sequences[handoff.sequence_id]
        if command.worker not in handoff.sources.values() or tokens > state.tables.length(handoff.sequence_id):
            continue
        if believed(sequence, tokens, command.as_of or command.version) == tokens > sequence.written.get(command.worker, 0):
            told.append((handoff_id, tokens, layers))
    if told:
        draft.events.append(ev.LayersWritten(command.worker, *(np.array(column, np.int64) for column in zip(*told, strict=True))))


def gone(draft: Draft, command: WorkerGone, now_ms: int, client: int) -> dict[str, Any]:
    lives.check_epoch(draft.state, command.epoch)
    worker = draft.state.workers.get(command.worker)
    if worker is None:
        raise Unknown("worker", command.worker)
    lost = [] if worker.fenced else lose_pool(draft, worker.pool, f"worker {worker.name} is dead")
    draft.dead[command.worker] = None
    draft.events.append(ev.WorkerDead(command.worker))
    return {"lost": lost}


def lose_pool(draft: Draft, pool: int, reason: str) -> list[int]:
    """The memory of a pool is gone, or a worker that is not to be trusted holds it: nothing in it may be found again."""
    state = draft.state
    for handoff in state.handoffs.values():
        over = handoff.state is HandoffState.ABORTED or handoff.handoff_id in draft.aborted  # both pools may be lost at once
        if pool in (handoff.source, handoff.target) and not over:
            if pool == handoff.source:
                abort(draft, handoff.handoff_id, "lost", reason)
            else:
                give_up(draft, handoff, "lost", reason)
    lost = [sequence.sequence_id for sequence in state.sequences.values() if sequence.pool == pool and draft.alive(sequence.sequence_id)]
    for sequence_id in lost:
        draft.closed[sequence_id] = None
        draft.events.append(ev.SequenceClosed(sequence_id, 1))
    pins.lose(draft, pool)
    if state.pools[pool].prefix.pages_indexed:
        draft.events.append(ev.IndexDropped(pool))
    return lost


def list_workers(state: State, now_ms: int) -> list[dict[str, Any]]:
    """All workers for people and programs: what they have acknowledged, how far behind that is, and what is left of their leases."""
    return [
        {
            "worker": worker.worker_id,
            "name": worker.name,
            "pool": state.pools[worker.pool].name,
            "acked": worker.acked,
            "behind": state.version - worker.acked,
            "lease_left_ms": 0 if worker.fenced else max(worker.deadline_ms - now_ms, 0),
            "fenced": worker.fenced,
            "links": links_of(state, worker),
        }
        for worker in state.workers.values()
    ]


def links_of(state: State, worker: Worker) -> list[dict[str, Any]]:
    """How the worker reaches others' pages, and why so."""
    return [
        {"worker": peer, "name": state.workers[peer].name, "transport": transport, "reason": reason}
        for peer, (transport, reason) in worker.links.items()
    ]


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_joined(state: State, event: ev.WorkerJoined) -> None:
    state.workers[event.worker] = Worker(
        event.worker,
        event.name,
        event.pool,
        event.layout,
        event.memory,
        event.lease_ms,
        event.client,
        joined=state.version,
        acked=state.version,  # it has never seen anything older
        deadline_ms=state.now_ms + event.lease_ms,
    )
    state.next_worker = event.worker + 1
    state.pool_workers[event.pool].append(event.worker)
    state.pools[event.pool].layout = event.layout


def apply_acked(state: State, event: ev.WorkerAcked) -> None:
    worker = state.workers[event.worker]
    worker.acked = max(worker.acked, event.version)
    worker.deadline_ms = state.now_ms + worker.lease_ms
    if event.version >= state.begun:
        state.unsettled.pop(event.worker, None)


def apply_written(state: State, event: ev.SequencesWritten) -> None:
    for sequence_id, tokens in zip(event.ids.tolist(), event.tokens.tolist(), strict=True):
        sequence = state.sequences[sequence_id]
        before = sequence.written.get(event.worker, 0)
        sequence.written[event.worker] = max(tokens, before)
        if sequence.handoff and tokens > before:  # said again it is no news
            state.handoffs.progress(sequence.handoff, state.now_ms)
            note_owing(state, sequence_id)
        note_publishable(state, sequence)


def apply_fenced(state: State, event: ev.WorkerFenced) -> None:
    state.workers[event.worker].fenced = True


def apply_dead(state: State, event: ev.WorkerDead) -> None:
    index = state.workers.pop(event.worker).pool
    for other in state.workers.values():
        other.links.pop(event.worker, None)
    state.pool_workers[index].remove(event.worker)
    if not state.pool_workers[index]:
        state.pools[index].draining, state.pools[index].drained = 0, False
    state.unsettled.pop(event.worker, None)


def apply_link_chosen(state: State, event: ev.LinkChosen) -> None:
    links = state.workers[event.worker].links
    links.pop(event.peer, None)
    links[event.peer] = event.transport, event.reason
    if len(links) > LINKS_MAX:
        del links[next(iter(links))]


def apply_page_bytes(state: State, event: ev.PageBytesTold) -> None:
    state.pools[event.pool].page_bytes = event.page_bytes
