"""Admission: whether, where and with which pages a prompt is opened. Called by `decide`: reads the state, writes to the draft alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager import events as ev
from kvmanager.arrays import bytes_of
from kvmanager.commands import Open
from kvmanager.draft import Draft
from kvmanager.errors import InvalidValue, KVError, PoolNotReady, PrefixPending, SequenceTooLarge, TooMany, Unknown
from kvmanager.placement import Look, in_order, look, pages_wanted, place_of
from kvmanager.pool import Pool
from kvmanager.sequences import SLOT_BITS
from kvmanager.state import encode_namespace
from kvmanager.tables import div_ceil
from kvmanager.waiting import leave_queue

__all__ = ["admit", "check_ready"]


def check_ready(draft: Draft, pool: Pool) -> None:
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
    if count > state.config.sequence_tokens_max:
        raise InvalidValue("open.tokens", f"at most {state.config.sequence_tokens_max} tokens", count)
    pools = _suitable(draft, command, count)
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
        except PoolNotReady as error:
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
            wanted = pages_wanted(item, count) - item.expected // item.pool.page_size
            if _refusal(draft, item, namespace, wanted) is None:
                return item
    refusals = []
    for item in looks:
        wanted = pages_wanted(item, min(item.cached + command.chunk, count))
        refusal = None if item.computing else _refusal(draft, item, namespace, wanted)
        if refusal is None:
            return item
        refusals.append(refusal)
    draft.examined[-1] = looks[0]
    raise refusals[0]


def _refusal(draft: Draft, item: Look, namespace: bytes, wanted: int) -> KVError | None:
    """Why the tenant cannot have `wanted` pages of the pool, beside those that the prompt shares; None if it can."""
    pages = draft.pool(item.pool.index)
    pinned = pages.pin(item.found.nodes, item.found.last_pages)
    account = pages.account(namespace)
    refusal = pages.refusal(wanted, account) if pages.can_take(wanted, account) < wanted else None
    pages.unpin(pinned)
    return refusal


def _take(draft: Draft, command: Open, client: int, namespace: bytes, tokens: np.ndarray, chosen: Look, sequence_id: int) -> list[Any]:
    count, pool, cached = len(command.tokens), chosen.pool, chosen.found.pages()
    pages = draft.pool(pool.index)
    pages.pin(chosen.found.nodes, chosen.found.last_pages)
    length = min(chosen.cached + command.chunk, count)
    fresh = pages.take(pages_wanted(chosen, length), pages.account(namespace))
    draft.opened += 1
    draft.load_change[pool.index] = draft.load_change.get(pool.index, 0) + count
    draft.extras.log(tokens, draft.events)
    rest = tokens[chosen.cached :]
    draft.events.append(ev.SequenceOpened(sequence_id, client, pool.index, namespace, rest, cached, fresh, length, command.priority))
    if command.waiting:
        leave_queue(draft, command.waiting)
    return [sequence_id, chosen.cached, length, pool.name]
