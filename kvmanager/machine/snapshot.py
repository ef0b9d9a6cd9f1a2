"""Snapshot: the batch of events that builds a state from nothing, loaded by the same `apply`; and the digest made of it."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any

import msgpack
import numpy as np

from kvmanager.config import ManagerConfig
from kvmanager.machine import events as ev
from kvmanager.machine import lives
from kvmanager.machine.apply import Restoring, apply
from kvmanager.machine.batch import EventBatch, encode_batch
from kvmanager.machine.pins import pages_of
from kvmanager.machine.state import State
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import ID_BYTES, NO_PAGES, PAGE_ID, Node

__all__ = ["load_snapshot", "no_collections", "snapshot", "state_digest", "tables_snapshot"]

NODES_BYTES = 16 << 20  # token ids in one event of a snapshot, about


def snapshot(state: State, *, with_index: bool = True) -> EventBatch:
    """Everything in `state`, in an order that depends on content alone: equal states give equal bytes."""
    events: list[Any] = []
    numbers: list[dict[Node, int]] = []
    for pool in state.pools:
        events.append(ev.PoolAdded(pool.index, pool.name, pool.group, pool.num_pages, pool.page_size, pool.workers_expected, pool.layout))
    for worker in state.workers.values():
        how = worker.layout, worker.memory, worker.lease_ms, worker.client
        events.append(ev.WorkerJoined(worker.worker_id, worker.name, worker.pool, *how))
        events.append(ev.WorkerRestored(worker.worker_id, worker.acked, worker.deadline_ms, int(worker.fenced), worker.joined))
    for worker in state.workers.values():  # after all of them: links name two
        events += [ev.LinkChosen(worker.worker_id, peer, *link) for peer, link in worker.links.items()]
    events += [ev.PageBytesTold(pool.index, pool.page_bytes) for pool in state.pools if pool.page_bytes]
    if with_index:
        events.append(ev.ExtrasNamed(*state.extras.named()))  # first: what follows counts as its users
    for pool in state.pools:
        accounts = pool.prefix.accounts
        if accounts.everybody >= 0:
            events.append(ev.QuotaSet(pool.index, b"", 1, accounts.everybody))
        for tenant in sorted(accounts.of):
            account = accounts.of[tenant]
            events.append(ev.AccountRestored(pool.index, tenant, account.quota, int(account.own), account.pages))
        numbered: dict[Node, int] = {}
        if with_index:
            events += _index_events(pool, numbered)
        numbers.append(numbered)
        events.append(ev.LruRestored(pool.index, np.array([numbered[node] for node in pool.prefix.order] if with_index else [], np.int64)))
        counters = pool.tokens_copied, pool.pages_moved, pool.pages_spared
        if any(counters):
            events.append(ev.CountersRestored(pool.index, *counters))
        if pool.draining:
            events.append(ev.PoolDraining(pool.index, pool.draining))
        if pool.drained:
            events.append(ev.PoolDrained(pool.index))
        entries = pool.quarantine
        events.append(
            ev.PoolRestored(
                pool.index,
                pool.free.array(),
                pool.next_serial,
                np.array(list(entries), np.int64),
                np.array([entry.version for entry in entries.values()], np.int64),
                np.array([len(entry.pages) for entry in entries.values()], np.int64),
                np.concatenate([NO_PAGES, *(entry.pages for entry in entries.values())]),
                np.array(list(pool.publishable), np.int64),
            )
        )
    for sequence_id in sorted(state.sequences):
        sequence = state.sequences[sequence_id]
        events.append(
            ev.SequenceRestored(
                sequence_id,
                sequence.owner,
                sequence.pool,
                sequence.namespace,
                bytes(sequence.tokens),
                state.tables.length(sequence_id),
                state.tables.pages_of(sequence_id),
                sequence.published,
                numbers[sequence.pool].get(sequence.node, 0),
                np.array(sorted(sequence.written), np.int64),
                np.array([sequence.written[worker] for worker in sorted(sequence.written)], np.int64),
                sequence.handoff,
                int(sequence.sealed),
                sequence.holds,
                sequence.priority,
            )
        )
        if sequence.family or sequence.shared or sequence.reserved or sequence.cut_floor or sequence.cuts or sequence.unlisted:
            events.append(
                ev.SequenceMarksRestored(
                    sequence_id,
                    sequence.family,
                    sequence.shared,
                    sequence.reserved,
                    sequence.cut_floor,
                    int(sequence.unlisted),
                    np.array([version for version, _ in sequence.cuts], np.int64),
                    np.array([length for _, length in sequence.cuts], np.int64),
                )
            )
    for pool in state.pools:
        flights = sorted(pool.inflight.flights.items())
        since = np.array([flight.since_ms for _, flight in flights], np.int64)
        events.append(ev.ArrivalsRestored(pool.index, np.array(pool.arrivals.in_order(), np.int64)))
        events.append(ev.InFlightRestored(pool.index, np.array([each for each, _ in flights], np.int64), since))
    for handoff in state.handoffs.values():
        source_node, target_node = handoff.source_node, handoff.target_node
        events.append(
            ev.HandoffRestored(
                handoff.handoff_id,
                handoff.sequence_id,
                handoff.namespace,
                handoff.owner,
                handoff.source,
                handoff.target,
                int(handoff.state),
                handoff.version,
                handoff.since_ms,
                handoff.until,
                handoff.load,
                handoff.group,
                np.array(handoff.tried, np.int32),
                handoff.length,
                np.array(handoff.source_pages, np.int32),
                handoff.source_indexed,
                numbers[handoff.source].get(source_node, 0) if source_node is not None else 0,
                int(target_node is not None),
                handoff.target_shared,
                np.array(handoff.target_pages, np.int32),
                handoff.target_fresh,
                numbers[handoff.target].get(target_node, 0) if target_node is not None else 0,
                int(handoff.flushed),
                int(handoff.streaming),
                *handoff.reach,
                np.array(list(handoff.sources), np.int64),
                np.array(list(handoff.sources.values()), np.int64),
                np.array([handoff.failures.get(worker, 0) for worker in handoff.sources], np.int64),
                np.array(list(handoff.pulled), np.int64),
            )
        )
    for prompt in state.waiting.values() if with_index else ():
        events.append(
            ev.PromptEnqueued(
                prompt.waiting_id,
                prompt.client,
                np.array(prompt.pools, np.int32),
                prompt.namespace,
                np.frombuffer(prompt.tokens, "<i4"),
                0,
            )
        )
    for held in state.pins.values() if with_index else ():
        deadlines = held.deadline_ms, held.deadline_version
        events.append(ev.PinBegun(held.pin_id, held.client, held.pool, held.namespace, pages_of(held), held.session, *deadlines))
    events.append(ev.PolicyRestored(state.next_waiting, state.next_pin))
    for client in state.clients.values():
        notices = msgpack.packb([list(notice) for notice in client.notices])
        events.append(ev.ClientRestored(client.client_id, client.number, client.version, client.reply, notices, client.seen_ms))
    events += lives.restore_events(state)
    events.append(
        ev.StateRestored(
            state.next_generation,
            state.next_worker,
            state.next_handoff,
            np.array(state.free_slots, np.int64),
            state.tables.last_ids,
            state.tables.last_counts,
        )
    )
    return EventBatch(state.epoch, state.version, state.now_ms, events)


def _index_events(pool: Pool, numbered: dict[Node, int]) -> Iterator[ev.NodesRestored]:
    """The pool's index in columns; numbers its nodes."""
    for namespace, group in groupby(pool.prefix.walk(), itemgetter(0)):
        nodes: list[Node] = []
        size = 0
        for _, node in group:
            nodes.append(node)
            numbered[node] = len(numbered) + 1
            size += len(node.tokens)
            if size >= NODES_BYTES:
                yield _nodes_event(pool, namespace, nodes, numbered)
                nodes, size = [], 0
        if nodes:
            yield _nodes_event(pool, namespace, nodes, numbered)


def _nodes_event(pool: Pool, namespace: bytes, nodes: list[Node], numbered: dict[Node, int]) -> ev.NodesRestored:
    root = pool.prefix.roots[namespace]
    return ev.NodesRestored(
        pool.index,
        namespace,
        np.array([0 if node.parent is None or node.parent is root else numbered[node.parent] for node in nodes], np.int64),
        np.array([len(node.ids) // ID_BYTES for node in nodes], np.int32),
        np.frombuffer(b"".join([node.ids for node in nodes]), PAGE_ID),
        b"".join([node.tokens for node in nodes]),
        np.array([node.refs for node in nodes], np.int32),
        np.array([node.last_used for node in nodes], np.int64),
        np.array([node.priority for node in nodes], np.int32),
    )


_SEEN_BY_REPLICAS = (
    ev.PoolAdded,
    ev.WorkerJoined,
    ev.WorkerRestored,
    ev.SequenceRestored,
    ev.HandoffRestored,
    ev.StateRestored,
    ev.LivesRestored,
)


def tables_snapshot(state: State) -> EventBatch:
    """What a replica needs of a snapshot: tables, workers, handoffs. Neither the prefix index, which may be large, nor token ids."""
    full = snapshot(state, with_index=False)
    events = [
        event._replace(tokens=b"") if isinstance(event, ev.SequenceRestored) else event
        for event in full.events
        if isinstance(event, _SEEN_BY_REPLICAS)
    ]
    return full._replace(events=events)


def load_snapshot(config: ManagerConfig, batch: EventBatch) -> State:
    """The state that a snapshot describes."""
    state = State(config)
    with no_collections():
        apply(state, batch, Restoring())
    return state


@contextmanager
def no_collections() -> Iterator[None]:
    """Python's collector would look through a million new index nodes again and again, and find nothing."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def state_digest(state: State) -> str:
    """SHA-256 (hex) of the snapshot's bytes: equal if and only if two states are."""
    return hashlib.sha256(encode_batch(snapshot(state))).hexdigest()
