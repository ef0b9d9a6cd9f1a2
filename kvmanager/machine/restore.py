"""Restore: how the events that only a snapshot is made of build a state from nothing. `snapshot` makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from kvmanager.machine import events as ev
from kvmanager.machine import lives
from kvmanager.machine.pins import pin_restored
from kvmanager.machine.state import Client, Notice, State
from kvmanager.machine.tenants import account_restored
from kvmanager.pages.handoff import Handoff, HandoffState
from kvmanager.pages.prefix import ID_BYTES, TOKEN_BYTES, Node
from kvmanager.pages.sequences import Sequence
from kvmanager.pages.token_ids import TokenIds

__all__ = ["RESTORE", "Restoring"]


class Restoring:
    """The index nodes that a snapshot numbers from 1 on, by pool; needed only while one is being applied."""

    def __init__(self) -> None:
        self.nodes: dict[int, list[Node]] = {}


def _state_restored(state: State, event: ev.StateRestored, _: Restoring) -> None:
    state.next_generation, state.next_worker, state.next_handoff = event.next_generation, event.next_worker, event.next_handoff
    state.free_slots = event.free_slots.tolist()
    state.tables.last_ids, state.tables.last_counts = event.last_ids, event.last_counts


def _pool_restored(state: State, event: ev.PoolRestored, _: Restoring) -> None:
    pool = state.pools[event.pool]
    pool.free.set(event.free)
    at = 0
    for serial, version, size in zip(event.serials.tolist(), event.versions.tolist(), event.sizes.tolist(), strict=True):
        pool.next_serial = serial
        pool.put_in_quarantine(version, event.pages[at : at + size], None)
        at += size
    pool.next_serial = event.next_serial
    pool.publishable = dict.fromkeys(event.publishable.tolist())


def _worker_restored(state: State, event: ev.WorkerRestored, _: Restoring) -> None:
    worker = state.workers[event.worker]
    worker.joined, worker.acked = event.joined, event.acked
    worker.deadline_ms, worker.fenced = event.deadline_ms, bool(event.fenced)
    if worker.acked < state.begun:
        state.unsettled[event.worker] = None


def _nodes_restored(state: State, event: ev.NodesRestored, restoring: Restoring) -> None:
    prefix = state.pools[event.pool].prefix
    root = prefix.enter(event.namespace)
    root.refs -= 1  # its sequences and handoffs, restored later, enter themselves
    known, step, ids, tokens = restoring.nodes.setdefault(event.pool, []), prefix.page_bytes, event.pages.tobytes(), event.tokens
    at, first, adopt = 0, len(known), prefix.adopt
    columns = (event.parents, event.sizes, event.refs, event.last_used, event.priorities)
    if len(event.pages) == len(event.sizes) and not event.parents.any():  # prompts of one page: the most nodes that a pool can have
        runs = [tokens[place : place + step] for place in range(0, len(tokens), step)]
        places = [ids[place : place + ID_BYTES] for place in range(0, len(ids), ID_BYTES)]
        rest = [column.tolist() for column in columns[2:]]
        nodes = [Node(root, *each) for each in zip(runs, places, *rest, strict=True)]
        prefix.adopt_all(root, nodes)
        known += nodes
    else:
        for number, size, refs, last_used, priority in zip(*(column.tolist() for column in columns), strict=True):
            parent, stop = known[number - 1] if number else root, at + size
            node = Node(parent, tokens[at * step : stop * step], ids[at * ID_BYTES : stop * ID_BYTES], refs, last_used, priority)
            adopt(parent, node)
            known.append(node)
            at = stop
    owners = np.empty(len(known) - first, object)
    owners[:] = known[first:]
    prefix.node_of[event.pages] = np.repeat(owners, event.sizes)
    prefix.pages_indexed += len(event.pages)
    state.extras.count(event.tokens, 1)


def _lru_restored(state: State, event: ev.LruRestored, restoring: Restoring) -> None:
    known = restoring.nodes.get(event.pool, [])
    state.pools[event.pool].prefix.loosen_all([known[number - 1] for number in event.nodes.tolist()])


def _find_node(state: State, restoring: Restoring, pool: int, number: int, namespace: bytes) -> Node:
    return restoring.nodes[pool][number - 1] if number else state.pools[pool].prefix.roots[namespace]


def _sequence_restored(state: State, event: ev.SequenceRestored, restoring: Restoring) -> None:
    pool = state.pools[event.pool]
    pool.prefix.enter(event.namespace)
    node = _find_node(state, restoring, event.pool, event.node, event.namespace)
    written = dict(zip(event.workers.tolist(), event.written.tolist(), strict=True))
    state.sequences[event.sequence] = Sequence(
        event.sequence,
        event.owner,
        event.pool,
        event.namespace,
        TokenIds((), event.tokens),
        node,
        event.published,
        written,
        event.handoff,
        bool(event.sealed),
        event.holds,
        event.priority,
    )
    if event.sealed:
        state.sealed[event.sequence] = None
    state.tables.open(event.sequence, event.pool, event.length, event.pages)
    pool.share(event.pages)
    pool.load += len(event.tokens) // TOKEN_BYTES
    state.extras.count(event.tokens, 1)


def _arrivals_restored(state: State, event: ev.ArrivalsRestored, _: Restoring) -> None:
    for sequence_id in event.sequences.tolist():
        state.pools[event.pool].arrivals.add(sequence_id, state.sequences[sequence_id].priority)


def _in_flight_restored(state: State, event: ev.InFlightRestored, _: Restoring) -> None:
    pool = state.pools[event.pool]
    for sequence_id, since_ms in zip(event.sequences.tolist(), event.since_ms.tolist(), strict=True):
        pool.inflight.note(state.sequences[sequence_id], pool.prefix.page_bytes, since_ms)


def _counters_restored(state: State, event: ev.CountersRestored, _: Restoring) -> None:
    pool = state.pools[event.pool]
    pool.tokens_copied, pool.pages_moved, pool.pages_spared = event.tokens_copied, event.pages_moved, event.pages_spared


def _sequence_marks_restored(state: State, event: ev.SequenceMarksRestored, _: Restoring) -> None:
    sequence = state.sequences[event.sequence]
    sequence.family, sequence.shared, sequence.reserved = event.family, event.shared, event.reserved
    sequence.cut_floor, sequence.unlisted = event.cut_floor, bool(event.unlisted)
    sequence.cuts = list(zip(event.cut_versions.tolist(), event.cut_lengths.tolist(), strict=True))
    if event.family:
        state.families.setdefault(event.family, {})[event.sequence] = None


def _handoff_restored(state: State, event: ev.HandoffRestored, restoring: Restoring) -> None:
    handoff = Handoff(
        event.handoff,
        event.sequence,
        event.namespace,
        event.owner,
        event.source,
        event.target,
        HandoffState(event.state),
        event.version,
        event.since_ms,
        event.until,
        event.load,
        event.group,
        tuple(event.tried.tolist()),
        event.length,
        event.source_pages.tolist(),
        event.source_indexed,
        None,
        event.target_shared,
        event.target_pages.tolist(),
        event.target_fresh,
        None,
        bool(event.flushed),
        bool(event.streaming),
        (event.reach_tokens, event.reach_layers),
    )
    columns = event.pullers.tolist(), event.sources.tolist(), event.failures.tolist()
    handoff.sources = dict(zip(*columns[:2], strict=True))
    handoff.failures = {worker: failed for worker, failed in zip(columns[0], columns[2], strict=True) if failed}
    handoff.pulled = dict.fromkeys(event.pulled.tolist())
    state.handoffs.begin(handoff)
    if event.sequence in state.handoffs.prefilling:
        sequence = state.sequences[event.sequence]
        if state.written(sequence) < state.tables.length(event.sequence):
            state.handoffs.owing[event.handoff] = None
    if handoff.source_pages:
        state.pools[event.source].share(handoff.source_pages)
        if event.source_node:
            handoff.source_node = restoring.nodes[event.source][event.source_node - 1]
    if event.holds:  # it may hold no page at all, and has entered the target's namespace all the same
        state.pools[event.target].share(handoff.target_pages)
        state.pools[event.target].prefix.enter(event.namespace)
        handoff.target_node = _find_node(state, restoring, event.target, event.target_node, event.namespace)
    state.handoffs.restored()


def _policy_restored(state: State, event: ev.PolicyRestored, _: Restoring) -> None:
    state.next_waiting, state.next_pin = event.next_waiting, event.next_pin


def _client_restored(state: State, event: ev.ClientRestored, _: Restoring) -> None:
    notices = [Notice(*row) for row in msgpack.unpackb(event.notices)]
    state.clients[event.client] = Client(event.client, event.number, event.version, event.reply, notices, event.seen_ms)


RESTORE: dict[type, Callable[[State, Any, Restoring], None]] = {
    ev.StateRestored: _state_restored,
    ev.PoolRestored: _pool_restored,
    ev.WorkerRestored: _worker_restored,
    ev.NodesRestored: _nodes_restored,
    ev.LruRestored: _lru_restored,
    ev.SequenceRestored: _sequence_restored,
    ev.ArrivalsRestored: _arrivals_restored,
    ev.InFlightRestored: _in_flight_restored,
    ev.CountersRestored: _counters_restored,
    ev.SequenceMarksRestored: _sequence_marks_restored,
    ev.HandoffRestored: _handoff_restored,
    ev.ClientRestored: _client_restored,
    ev.PolicyRestored: _policy_restored,
    ev.PinBegun: pin_restored,
    ev.AccountRestored: account_restored,
    ev.LivesRestored: lives.lives_restored,
}
