"""Admission: whether, where and with which pages a prompt is opened. Called by `decide`: reads the state, writes to the draft alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.arrays import bytes_of
from kvmanager.errors import (
    InvalidValue,
    InvariantBroken,
    KVError,
    PoolDrains,
    PoolNotReady,
    PrefixPending,
    SequenceTooLarge,
    TooMany,
    Unknown,
)
from kvmanager.machine import events as ev
from kvmanager.machine.commands import Open
from kvmanager.machine.draft import Draft, PoolDraft
from kvmanager.machine.owners import note_place
from kvmanager.machine.placement import Look, forgo_partial, in_order, look, pages_now, pages_wanted, place_of
from kvmanager.machine.state import State, encode_namespace
from kvmanager.machine.waiting import leave_queue
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import Node
from kvmanager.pages.sequences import SLOT_BITS, Sequence, slot_of
from kvmanager.pages.token_ids import TokenIds
from kvmanager.tables import div_ceil

__all__ = ["admit", "check_ready"]


def check_ready(draft: Draft, pool: Pool) -> None:
    if draft.draining.get(pool.index, bool(pool.draining)):
        raise PoolDrains(pool.name)
    live = draft.live_workers(pool.index)
    fenced = len(draft.state.pool_workers[pool.index]) - len(live)
    if len(live) < pool.workers_expected or fenced:
        raise PoolNotReady(pool.name, pool.workers_expected, len(live), fenced)


def admit(draft: Draft, command: Open, client: int, now_ms: int) -> list[Any]:
    """Open a prompt in its pool, or in the best pool of its group: [sequence id, cached tokens, length, pool name].

    If no pool of a group can, the refusal is the one that is soonest over: out of pages, then not ready, then too large. A prompt whose
    next page is being computed in the pool that it would go to is refused with PrefixPending, and takes nothing.
    """
    state = draft.state
    draft.examined.append(None)
    count = len(command.tokens)
    if count + command.reserve > state.config.sequence_tokens_max:
        raise InvalidValue("open.tokens", f"at most {state.config.sequence_tokens_max} tokens", count + command.reserve)
    pools = _suitable(draft, command, count + command.reserve)
    if not len(draft.slots):
        raise TooMany("sequences", state.config.sequences_max)
    tokens = draft.extras.write_in(command.tokens, command.extras)
    namespace, data = encode_namespace(command.tenant, command.extra), bytes_of(tokens)
    looks = in_order(draft, [look(draft, pool, namespace, data, command, now_ms) for pool in pools])
    chosen = draft.examined[-1] = _choose(draft, command, namespace, looks)
    if chosen.computing:
        raise PrefixPending(chosen.pool.name, chosen.computing, chosen.expected)
    sequence_id = (state.next_generation + draft.opened) << SLOT_BITS | draft.slots.pop(1)[0]
    draft.flying.setdefault(place_of(chosen, namespace, data), (sequence_id, data))
    return _take(draft, command, client, namespace, tokens, chosen, sequence_id)


def _suitable(draft: Draft, command: Open, count: int) -> list[Pool]:
    """The pools that are asked for, are ready, and are large enough at all. Raises why if there is none."""
    state = draft.state
    if command.pool:
        asked = [state.pool(command.pool)]
    else:
        asked = state.groups.get(command.group, [])
        if not asked:
            raise Unknown("group", command.group)
    suitable: list[Pool] = []
    not_ready: KVError | None = None
    too_large: SequenceTooLarge | None = None
    for pool in asked:
        needed = div_ceil(count, pool.page_size)
        try:
            check_ready(draft, pool)
        except (PoolDrains, PoolNotReady) as error:
            not_ready = not_ready or error
            continue
        if needed > pool.num_pages:
            if too_large is None or pool.num_pages > too_large.details["total"]:
                too_large = SequenceTooLarge(pool.name, needed, pool.num_pages)
            continue
        suitable.append(pool)
    refusal = not_ready or too_large
    if not suitable and refusal is not None:
        raise refusal
    return suitable


def _choose(draft: Draft, command: Open, namespace: bytes, looks: list[Look]) -> Look:
    """The first pool with room for the whole prompt, or else for what it takes now: nothing if it waits. Raises OutOfPages, OverQuota."""
    count = len(command.tokens)
    if len(looks) > 1:
        for item in looks:
            wanted = pages_wanted(item, count + command.reserve) - item.expected // item.pool.page_size
            if _refusal(draft, item, namespace, wanted) is None:
                return item
    refusals = []
    for item in looks:
        refusal = None if item.computing else _refusal(draft, item, namespace, pages_now(item, command))
        if refusal is not None and forgo_partial(item):
            refusal = _refusal(draft, item, namespace, pages_now(item, command))
        if refusal is None:
            return item
        refusals.append(refusal)
    draft.examined[-1] = looks[0]
    raise refusals[0]


def _refusal(draft: Draft, item: Look, namespace: bytes, wanted: int) -> KVError | None:
    """Why the tenant cannot have `wanted` pages of the pool, beside those that the prompt shares; None if it can."""
    pages = draft.pool(item.pool.index)
    account = pages.account(namespace)
    if account is None and wanted <= len(pages.free):
        return None  # nothing has to be evicted
    pinned = _pin(pages, item)
    refusal = pages.refusal(wanted, account) if pages.can_take(wanted, account) < wanted else None
    pages.unpin(pinned)
    return refusal


def _pin(pages: PoolDraft, item: Look) -> list[tuple[Node, int]]:
    """Neither what the prompt shares nor what it copies is to be evicted for it."""
    pinned = pages.pin(item.found.nodes, item.found.last_pages)
    if item.partial is not None:
        pinned = pages.pin([item.partial.node], item.partial.place + 1) + pinned
    return pinned


def _take(draft: Draft, command: Open, client: int, namespace: bytes, tokens: np.ndarray, chosen: Look, sequence_id: int) -> list[Any]:
    count, pool, cached = len(command.tokens), chosen.pool, chosen.found.pages()
    pages = draft.pool(pool.index)
    pages.keep(chosen.found.nodes, chosen.found.last_pages)  # neither what it shares nor what it copies is to be evicted
    if chosen.partial is not None:
        pages.keep([chosen.partial.node], chosen.partial.place + 1)
    length = min(chosen.cached + command.chunk, count)
    fresh = pages.take(pages_now(chosen, command), pages.account(namespace))
    copied = 0
    if chosen.partial is not None:
        copied = chosen.partial.tokens
        draft.copy(pool.index, chosen.partial.page, int(fresh[0]), copied)
    reserved = div_ceil(count + command.reserve, pool.page_size) if command.reserve else 0
    draft.opened += 1
    draft.load_change[pool.index] = draft.load_change.get(pool.index, 0) + count
    draft.name_extras(tokens)
    rest = tokens[len(cached) * pool.page_size :]  # the index has the rest; a page that is copied is not the sequence's in it
    draft.events.append(
        ev.SequenceOpened(sequence_id, client, pool.index, namespace, rest, cached, fresh, length, command.priority, copied, reserved)
    )
    if command.waiting:
        leave_queue(draft, command.waiting)
    return [sequence_id, chosen.cached, length, pool.name]


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_opened(state: State, event: ev.SequenceOpened) -> None:
    pool = state.pools[event.pool]
    cached = event.cached
    node = pool.prefix.acquire(event.namespace, cached, state.version, event.priority)
    pool.share(cached)
    pool.take(event.fresh, node.account)
    slot = slot_of(event.sequence)
    if state.free_slots.pop() != slot:
        raise InvariantBroken(f"open: row {slot} is not on top of the free rows")
    state.next_generation = (event.sequence >> SLOT_BITS) + 1
    pages = np.concatenate([cached, event.fresh]) if len(cached) else event.fresh
    state.tables.open(event.sequence, event.pool, event.length, pages)
    tokens = TokenIds(node.runs(), event.tokens.tobytes())
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
    note_place(state, sequence)
