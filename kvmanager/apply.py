"""apply: the only writer of `State`. It makes no choices: what happens was decided, or is restored from a snapshot.

It never fails on a decided batch; `InvariantBroken` here means a bug or bytes that are no log of this manager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from kvmanager import clients, lives
from kvmanager import events as ev
from kvmanager.copies import apply_copied
from kvmanager.errors import InvariantBroken
from kvmanager.forks import apply_forked, leave_family
from kvmanager.growth import apply_grown, apply_grown_again, apply_grown_further
from kvmanager.handoff import Handoff, HandoffState
from kvmanager.neighbours import Neighbours
from kvmanager.owners import let_go as _let_go
from kvmanager.owners import note_place as _note_place
from kvmanager.owners import note_publishable as _note_publishable
from kvmanager.pins import apply_pin_begun, apply_pins_ended, pin_restored
from kvmanager.pool import Pool
from kvmanager.prefix import ID_BYTES, TOKEN_BYTES, Node
from kvmanager.sequences import SLOT_BITS, Sequence, slot_of
from kvmanager.state import Client, Notice, State, Worker
from kvmanager.tenants import account_restored, apply_flushed, apply_quota
from kvmanager.token_ids import TokenIds
from kvmanager.truncation import apply_truncated
from kvmanager.waiting import apply_dequeued, apply_enqueued, leave

__all__ = ["apply"]


class Restoring:
    """The index nodes that a snapshot numbers from 1 on, by pool; needed only while one is being applied."""

    def __init__(self) -> None:
        self.nodes: dict[int, list[Node]] = {}


def apply(state: State, batch: ev.EventBatch, restoring: Restoring | None = None) -> None:
    """Change `state` by one batch. Batches come in version order; a snapshot's batch sets the version it was taken at."""
    in_order = batch.epoch == state.epoch and batch.version == state.version + 1
    if restoring is None and not in_order and not lives.begins_after(state, batch):
        raise InvariantBroken(f"apply: expected {state.epoch}:{state.version + 1}, got {batch.epoch}:{batch.version}")
    state.epoch, state.version = batch.epoch, batch.version
    state.now_ms = max(state.now_ms, batch.now_ms)  # a clock that jumps back must not shorten a lease
    for event in batch.events:
        if restoring is not None and type(event) in _RESTORE:
            _RESTORE[type(event)](state, event, restoring)
        else:
            _APPLY[type(event)](state, event)
    state.extras.sweep()


# --- pools and workers -----------------------------------------------------------------------------------------------------------


def _extras_named(state: State, event: ev.ExtrasNamed) -> None:
    state.extras.apply_named(event)


def _pool_added(state: State, event: ev.PoolAdded) -> None:
    pool = Pool(*event, extras=state.extras, remnants_bytes_max=state.config.remnants_bytes_max)
    if event.pool < len(state.config.pools) and state.config.pools[event.pool].partial_match:
        pool.prefix.neighbours = Neighbours()
    state.pools.append(pool)
    state.groups.setdefault(event.group, []).append(pool)
    state.pool_workers.append([])


def _worker_joined(state: State, event: ev.WorkerJoined) -> None:
    state.workers[event.worker] = Worker(
        event.worker,
        event.name,
        event.pool,
        event.layout,
        event.memory,
        event.lease_ms,
        acked=state.version,  # it has never seen anything older
        deadline_ms=state.now_ms + event.lease_ms,
    )
    state.next_worker = event.worker + 1
    state.pool_workers[event.pool].append(event.worker)
    state.pools[event.pool].layout = event.layout


def _worker_acked(state: State, event: ev.WorkerAcked) -> None:
    worker = state.workers[event.worker]
    worker.acked = max(worker.acked, event.version)
    worker.deadline_ms = state.now_ms + worker.lease_ms


def _sequences_written(state: State, event: ev.SequencesWritten) -> None:
    for sequence_id, tokens in zip(event.ids.tolist(), event.tokens.tolist(), strict=True):
        sequence = state.sequences[sequence_id]
        sequence.written[event.worker] = max(tokens, sequence.written.get(event.worker, 0))
        _note_publishable(state, sequence)


def _worker_fenced(state: State, event: ev.WorkerFenced) -> None:
    state.workers[event.worker].fenced = True


def _worker_dead(state: State, event: ev.WorkerDead) -> None:
    state.pool_workers[state.workers.pop(event.worker).pool].remove(event.worker)


# --- sequences -------------------------------------------------------------------------------------------------------------------


def _sequence_opened(state: State, event: ev.SequenceOpened) -> None:
    pool = state.pools[event.pool]
    cached = event.cached
    node = pool.prefix.acquire(event.namespace, cached, state.version, event.priority)
    pool.share(cached)
    pool.take(event.fresh, node.account)
    slot = slot_of(event.sequence)
    if state.free_slots.pop() != slot:
        raise InvariantBroken(f"open: row {slot} is not on top of the free rows")
    state.next_generation = (event.sequence >> SLOT_BITS) + 1
    state.tables.open(event.sequence, event.pool, event.length, np.concatenate([cached, event.fresh]))
    tokens = TokenIds([each.tokens for each in node.path()][::-1], event.tokens.tobytes())
    sequence = Sequence(
        event.sequence, event.owner, event.pool, event.namespace, tokens, node, published=len(cached), priority=event.priority
    )
    # What the index holds has been written by every worker of the pool: that is how it came in.
    sequence.written = dict.fromkeys(state.live_workers(event.pool), len(cached) * pool.page_size)
    sequence.reserved = event.reserved
    state.sequences[event.sequence] = sequence
    pool.arrivals.add(event.sequence, event.priority)
    state.extras.count(tokens, 1)
    pool.load += len(cached) * pool.page_size + len(event.tokens)
    pool.tokens_copied += event.copied
    _note_place(state, sequence)


def _tokens_appended(state: State, event: ev.TokensAppended) -> None:
    sequence = state.sequences[event.sequence]
    sequence.tokens += event.tokens.tobytes()
    state.pools[sequence.pool].load += len(event.tokens)
    _note_publishable(state, sequence)
    _note_place(state, sequence)


def _pages_published(state: State, event: ev.PagesPublished) -> None:
    sequence = state.sequences[event.sequence]
    pool = state.pools[sequence.pool]
    pages = event.pages
    last = event.first + len(pages)
    before = state.tables.pages_of(event.sequence)[event.first : last]
    start, stop = event.first * pool.prefix.page_bytes, last * pool.prefix.page_bytes
    tokens = bytes(sequence.tokens[start:stop])
    sequence.node = pool.prefix.publish(sequence.node, tokens, pages, state.version, sequence.priority)
    sequence.published = last
    swapped = before != pages
    if swapped.any():
        # The same tokens were computed twice at once. One copy is enough; a step in flight may still read the other.
        pool.share(pages[swapped])
        pool.put_in_quarantine(state.version, pool.unshare(before[swapped]), sequence.node.account)
        state.tables.swap(event.sequence, event.first, event.pages)
    _note_publishable(state, sequence)
    _note_place(state, sequence)


def _sequence_closed(state: State, event: ev.SequenceClosed) -> None:
    sequence = state.sequences.pop(event.sequence)
    pool = state.pools[sequence.pool]
    _let_go(state, pool, sequence.namespace, state.tables.pages_of(event.sequence), sequence.published, sequence.node)
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
        _tell(state, sequence.owner, Notice("lost", event.sequence, 0, f"memory of pool {pool.name} is gone", "lost"))


def _pages_evicted(state: State, event: ev.PagesEvicted) -> None:
    state.pools[event.pool].evict(event.pages, state.version)


def _pages_released(state: State, event: ev.PagesReleased) -> None:
    for serial in event.serials.tolist():
        state.pools[event.pool].release(serial)


def _index_dropped(state: State, event: ev.IndexDropped) -> None:
    pool = state.pools[event.pool]
    for handoff in state.handoffs.values():  # aborted ones, whose puller may still be reading: they keep pages, not index nodes
        if handoff.source == event.pool and handoff.source_node is not None:
            pool.prefix.release(handoff.source_node, state.version)
            handoff.source_node, handoff.source_indexed = None, 0
    for tenant in sorted(pool.prefix.namespaces):
        account = pool.prefix.accounts.of.get(tenant)
        pages = pool.prefix.forget(tenant)
        pool.put_in_quarantine(state.version, pages[pool.refs[pages] == 0], account)
    pool.prefix.remnants.lost(state.version)


# --- handoff ---------------------------------------------------------------------------------------------------------------------


def _handoff_begun(state: State, event: ev.HandoffBegun) -> None:
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


def _handoff_sealed(state: State, event: ev.HandoffSealed) -> None:
    handoff = _turn(state, event.handoff, HandoffState.SEALED)
    state.sequences[handoff.sequence_id].sealed = True
    handoff.length = state.tables.length(handoff.sequence_id)


def _handoff_reserving(state: State, event: ev.HandoffReserving) -> None:
    _turn(state, event.handoff, HandoffState.RESERVING)


def _handoff_moving(state: State, event: ev.HandoffMoving) -> None:
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


def _handoff_pulled(state: State, event: ev.HandoffPulled) -> None:
    state.handoffs[event.handoff].pulled[event.worker] = None


def _let_source_go(state: State, handoff: Handoff) -> None:
    _let_go(state, state.pools[handoff.source], handoff.namespace, handoff.source_pages, handoff.source_indexed, handoff.source_node)
    sequence = state.sequences.get(handoff.sequence_id)
    if sequence is not None:
        sequence.holds -= 1


def _handoff_resident(state: State, event: ev.HandoffResident) -> None:
    handoff = state.handoffs.pop(event.handoff)
    sequence = state.sequences[handoff.sequence_id]
    source, target = state.pools[handoff.source], state.pools[handoff.target]
    _let_source_go(state, handoff)
    _let_go(state, source, sequence.namespace, state.tables.pages_of(handoff.sequence_id), sequence.published, sequence.node)
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
    _note_publishable(state, sequence)
    _note_place(state, sequence)
    _tell(state, handoff.owner, Notice("resident", handoff.sequence_id, event.handoff, target.name))


def _handoff_aborted(state: State, event: ev.HandoffAborted) -> None:
    handoff = state.handoffs[event.handoff]
    was_moving = handoff.state is HandoffState.MOVING
    _turn(state, event.handoff, HandoffState.ABORTED)
    sequence = state.sequences.get(handoff.sequence_id)
    if sequence is not None:
        sequence.handoff, sequence.sealed = 0, False
    _tell(state, handoff.owner, Notice("aborted", handoff.sequence_id, event.handoff, event.reason, event.code))
    if was_moving:
        target = state.pools[handoff.target]
        _let_go(state, target, handoff.namespace, handoff.target_pages, handoff.target_shared, handoff.target_node)
        target.prefix.leave(handoff.namespace)
        handoff.target_pages, handoff.target_shared, handoff.target_node = [], 0, None
    else:
        del state.handoffs[event.handoff]  # nobody was told to read anything


def _handoff_ended(state: State, event: ev.HandoffEnded) -> None:
    _let_source_go(state, state.handoffs.pop(event.handoff))


# --- clients ---------------------------------------------------------------------------------------------------------------------


def _tell(state: State, client_id: int, notice: Notice) -> None:
    client = state.clients.get(client_id)
    if client is not None:
        clients.tell(client, notice)


def _client_answered(state: State, event: ev.ClientAnswered) -> None:
    client = state.clients.pop(event.client, None) or Client(event.client)
    state.clients[event.client] = client  # last in the dict: the first is the one idle longest
    client.number, client.version, client.reply = event.number, state.version, event.reply
    client.seen_ms = state.now_ms
    del client.notices[: event.notices]


def _client_forgotten(state: State, event: ev.ClientForgotten) -> None:
    for waiting_id in [prompt.waiting_id for prompt in state.waiting.values() if prompt.client == event.client]:
        leave(state, waiting_id)
    del state.clients[event.client]


# --- snapshots -------------------------------------------------------------------------------------------------------------------


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
    worker.acked, worker.deadline_ms, worker.fenced = event.acked, event.deadline_ms, bool(event.fenced)


def _nodes_restored(state: State, event: ev.NodesRestored, restoring: Restoring) -> None:
    prefix = state.pools[event.pool].prefix
    root = prefix.enter(event.namespace)
    root.refs -= 1  # its sequences and handoffs, restored later, enter themselves
    known, step, ids, tokens = restoring.nodes.setdefault(event.pool, []), prefix.page_bytes, event.pages.tobytes(), event.tokens
    at, first = 0, len(known)
    columns = (event.parents, event.sizes, event.refs, event.last_used, event.priorities)
    for number, size, refs, last_used, priority in zip(*(column.tolist() for column in columns), strict=True):
        parent, stop = known[number - 1] if number else root, at + size
        node = Node(parent, tokens[at * step : stop * step], ids[at * ID_BYTES : stop * ID_BYTES])
        node.refs, node.last_used, node.priority = refs, last_used, priority
        prefix.adopt(parent, node)
        known.append(node)
        at = stop
    owners = np.empty(len(known) - first, object)
    owners[:] = known[first:]
    prefix.node_of[event.pages] = np.repeat(owners, event.sizes)
    prefix.pages_indexed += len(event.pages)
    state.extras.count(event.tokens, 1)


def _lru_restored(state: State, event: ev.LruRestored, restoring: Restoring) -> None:
    prefix, known = state.pools[event.pool].prefix, restoring.nodes.get(event.pool, [])
    for number in event.nodes.tolist():
        prefix.loosen(known[number - 1])


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
    state.pools[event.pool].tokens_copied = event.tokens_copied


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
        event.length,
        event.source_pages.tolist(),
        event.source_indexed,
        None,
        event.target_shared,
        event.target_pages.tolist(),
        None,
        dict.fromkeys(event.pulled.tolist()),
    )
    state.handoffs[event.handoff] = handoff
    if handoff.source_pages:
        state.pools[event.source].share(handoff.source_pages)
        if event.source_node:
            handoff.source_node = restoring.nodes[event.source][event.source_node - 1]
    if handoff.state is HandoffState.MOVING:  # it may move no page at all, and has entered the target's namespace all the same
        state.pools[event.target].share(handoff.target_pages)
        state.pools[event.target].prefix.enter(event.namespace)
        handoff.target_node = _find_node(state, restoring, event.target, event.target_node, event.namespace)


def _policy_restored(state: State, event: ev.PolicyRestored, _: Restoring) -> None:
    state.next_waiting, state.next_pin = event.next_waiting, event.next_pin


def _client_restored(state: State, event: ev.ClientRestored, _: Restoring) -> None:
    notices = [Notice(*row) for row in msgpack.unpackb(event.notices)]
    state.clients[event.client] = Client(event.client, event.number, event.version, event.reply, notices, event.seen_ms)


_APPLY: dict[type, Callable[[State, Any], None]] = {
    ev.PoolAdded: _pool_added,
    ev.WorkerJoined: _worker_joined,
    ev.WorkerAcked: _worker_acked,
    ev.SequencesWritten: _sequences_written,
    ev.WorkerFenced: _worker_fenced,
    ev.WorkerDead: _worker_dead,
    ev.SequenceOpened: _sequence_opened,
    ev.SequencesGrown: apply_grown,
    ev.GrownAgain: apply_grown_again,
    ev.GrownFurther: apply_grown_further,
    ev.TokensAppended: _tokens_appended,
    ev.PagesPublished: _pages_published,
    ev.SequenceClosed: _sequence_closed,
    ev.PagesEvicted: _pages_evicted,
    ev.PagesReleased: _pages_released,
    ev.IndexDropped: _index_dropped,
    ev.HandoffBegun: _handoff_begun,
    ev.HandoffSealed: _handoff_sealed,
    ev.HandoffReserving: _handoff_reserving,
    ev.HandoffMoving: _handoff_moving,
    ev.HandoffPulled: _handoff_pulled,
    ev.HandoffResident: _handoff_resident,
    ev.HandoffAborted: _handoff_aborted,
    ev.HandoffEnded: _handoff_ended,
    ev.SequencesTruncated: apply_truncated,
    ev.SequenceForked: apply_forked,
    ev.PagesCopied: apply_copied,
    ev.ClientAnswered: _client_answered,
    ev.ClientForgotten: _client_forgotten,
    ev.PromptEnqueued: apply_enqueued,
    ev.PromptsDequeued: apply_dequeued,
    ev.QuotaSet: apply_quota,
    ev.TenantFlushed: apply_flushed,
    ev.PinBegun: apply_pin_begun,
    ev.PinsEnded: apply_pins_ended,
    ev.ExtrasNamed: _extras_named,
    ev.EpochBegun: lives.epoch_begun,
}

_RESTORE: dict[type, Callable[[State, Any, Restoring], None]] = {
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
