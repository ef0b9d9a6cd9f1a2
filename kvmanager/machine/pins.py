"""Pins: prefixes that stay cached until somebody lets them go or their lease ends, within a budget. Sessions are pins by name.

A pin is an owner like a sequence: its pages count as used, and are in nobody's way but the pool's. So there are budgets, in distinct pages:
for one tenant, and for all tenants together, so that a pool can never be pinned full. What is not in the index now cannot be pinned; a
prompt that is being computed can be pinned as its pages arrive, or when its sequence is closed.

A session is the pins of one name and tenant. A new pin of a session *supersedes* those of its pins that are a prefix of it: the next turn
holds the longer prefix instead. A turn that went another way is a branch of its own, and is let go by its own id, or with the session.

Leases are in milliseconds or in versions, both noticed by `Tick`. A pin dies with its pool's memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.errors import InvariantBroken, NotCached, OverPinBudget, TooMany, Unknown
from kvmanager.machine import events as ev
from kvmanager.machine.commands import Pin
from kvmanager.machine.draft import Draft, PinsDraft
from kvmanager.machine.state import PinHeld, State, encode_namespace, tenant_of
from kvmanager.pages.eviction import PRIORITY_MIN
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import PAGE_ID, Node

__all__ = ["apply_pin_begun", "apply_pins_ended", "end_session", "expire", "list_pins", "lose", "pages_of", "pin", "pin_restored", "unpin"]

ASKED, LEASE, LOST, SUPERSEDED = range(4)  # why a pin ended


# --- called by decide ------------------------------------------------------------------------------------------------------------


def pin(draft: Draft, command: Pin, client: int, now_ms: int) -> list[int]:
    """[pin id, tokens that it holds]. Raises Unknown, NotCached, OverPinBudget, TooMany."""
    state, book = draft.state, draft.pins
    pool, namespace, nodes, last_pages = _find(draft, command)
    if not nodes:
        raise NotCached(pool.name)
    if len(state.pins) - len(book.ended) + book.begun >= state.config.pins_max:
        raise TooMany("pins", state.config.pins_max)
    wanted = [(node, node.count if node is not nodes[-1] else last_pages) for node in nodes]
    more = {node: count for node, count in wanted if count > _pinned_pages(book, node)}
    added = sum(count - _pinned_pages(book, node) for node, count in more.items())
    tenant = tenant_of(namespace)
    _check_budget(draft, book, pool, tenant, added)
    draft.pool(pool.index).keep(nodes, last_pages)
    book.fresh.update(more)
    book.change[pool.index, tenant] = book.change.get((pool.index, tenant), 0) + added
    ids = b"".join([node.ids for node in nodes[:-1]] + [nodes[-1].ids[: last_pages * PAGE_ID.itemsize]])
    pin_id = state.next_pin + book.begun
    deadline_ms = now_ms + command.lease_ms if command.lease_ms else 0
    deadline_version = draft.version + command.lease_steps if command.lease_steps else 0
    pages = np.frombuffer(ids, PAGE_ID)
    draft.events.append(ev.PinBegun(pin_id, client, pool.index, namespace, pages, command.session, deadline_ms, deadline_version))
    superseded = _superseded(state, book, pool, (tenant, command.session), wanted)
    book.begun += 1
    if superseded:
        _end(draft, superseded, SUPERSEDED)
    return [pin_id, len(pages) * pool.page_size]


def _find(draft: Draft, command: Pin) -> tuple[Pool, bytes, list[Node], int]:
    """Where the prefix is: pool, namespace, its nodes from the root on, and how many pages of the last one belong to it."""
    state = draft.state
    if command.sequence:
        sequence = state.sequences.get(command.sequence)
        if sequence is None:
            raise Unknown("sequence", command.sequence)
        nodes = list(sequence.node.path())[::-1]  # as the command found it: closed by this very step, it may be pinned still
        return state.pools[sequence.pool], sequence.namespace, nodes, nodes[-1].count if nodes else 0
    pool = state.pool(command.pool)
    namespace = encode_namespace(command.tenant, command.extra)
    tokens = draft.extras.write_in(command.tokens, command.extras).tobytes()
    found = draft.pool(pool.index).match(namespace, tokens, len(command.tokens) // pool.page_size)
    return pool, namespace, found.nodes, found.last_pages


def _pinned_pages(book: PinsDraft, node: Node) -> int:
    """Leading pages of a node that are pinned once the command is applied."""
    return node.count if node.pins > book.less.get(node, 0) else book.fresh.get(node, 0)


def _check_budget(draft: Draft, book: PinsDraft, pool: Pool, tenant: bytes, added: int) -> None:
    config = draft.state.config
    own = pool.pinned.get(tenant, 0) + book.change.get((pool.index, tenant), 0)
    limit = pool.num_pages * config.pin_percent // 100
    if own + added > limit:
        raise OverPinBudget(pool.name, tenant, own + added, limit)
    everybody = sum(pool.pinned.values()) + sum(change for (index, _), change in book.change.items() if index == pool.index)
    limit = pool.num_pages * config.pin_percent_all // 100
    if everybody + added > limit:
        raise OverPinBudget(pool.name, None, everybody + added, limit)


def _superseded(state: State, book: PinsDraft, pool: Pool, session: tuple[bytes, bytes], wanted: list[tuple[Node, int]]) -> list[int]:
    """Pins of the session that hold a prefix of what is wanted, or the same."""
    ends = {node: None for node, count in wanted if count == node.count}
    held = [state.pins[each] for each in state.sessions.get(session, {}) if each not in book.ended]
    return [each.pin_id for each in held if each.pool == pool.index and each.node in ends]


def unpin(draft: Draft, pin_id: int) -> None:
    """Raises Unknown for a pin that has ended."""
    if pin_id not in draft.state.pins or pin_id in draft.pins.ended:
        raise Unknown("pin", pin_id)
    _end(draft, [pin_id], ASKED)


def end_session(draft: Draft, tenant: bytes, session: bytes) -> None:
    """Let everything go that the session holds. Raises Unknown if it holds nothing."""
    held = [each for each in draft.state.sessions.get((tenant, session), {}) if each not in draft.pins.ended]
    if not held:
        raise Unknown("session", session.decode(errors="replace"))
    _end(draft, held, ASKED)


def expire(draft: Draft, now_ms: int) -> None:
    """Leases that have ended."""
    over = [each.pin_id for each in draft.state.pins.values() if each.expired(now_ms, draft.state.version)]
    over = [each for each in over if each not in draft.pins.ended]
    if over:
        _end(draft, over, LEASE)


def lose(draft: Draft, pool: int, tenant: bytes | None = None) -> None:
    """The memory of a pool is gone, or what a tenant has cached in it."""
    lost = [
        each.pin_id
        for each in draft.state.pins.values()
        if each.pool == pool and tenant in (None, tenant_of(each.namespace)) and each.pin_id not in draft.pins.ended
    ]
    if lost:
        _end(draft, lost, LOST)


def _end(draft: Draft, pins: list[int], reason: int) -> None:
    book = draft.pins
    for pin_id in pins:
        held = draft.state.pins[pin_id]
        book.ended[pin_id] = None
        key = held.pool, tenant_of(held.namespace)
        for node in held.node.path():
            before = _pinned_pages(book, node)
            book.less[node] = book.less.get(node, 0) + 1
            book.change[key] = book.change.get(key, 0) + _pinned_pages(book, node) - before
    draft.events.append(ev.PinsEnded(np.array(pins, np.int64), reason))


# --- called by apply -------------------------------------------------------------------------------------------------------------


def apply_pin_begun(state: State, event: ev.PinBegun) -> None:
    pool = state.pools[event.pool]
    node = pool.prefix.acquire(event.namespace, event.pages, state.version, PRIORITY_MIN)
    pool.share(event.pages)
    _note(state, event, pool, node)


def pin_restored(state: State, event: ev.PinBegun, _: Any) -> None:
    """From a snapshot, in which the nodes are held already."""
    pool = state.pools[event.pool]
    pool.prefix.enter(event.namespace)
    pool.share(event.pages)
    node = pool.prefix.node_of[event.pages[-1]]
    if node is None:
        raise InvariantBroken(f"pin {event.pin}: page {event.pages[-1]} is not in the index")
    _note(state, event, pool, node)


def _note(state: State, event: ev.PinBegun, pool: Pool, node: Node) -> None:
    tenant = tenant_of(event.namespace)
    for each in node.path():
        if not each.pins:
            pool.pinned[tenant] = pool.pinned.get(tenant, 0) + each.count
        each.pins += 1
    state.pins[event.pin] = PinHeld(
        event.pin, event.client, event.pool, event.namespace, node, event.session, event.deadline_ms, event.deadline_version
    )
    if event.session:
        state.sessions.setdefault((tenant, event.session), {})[event.pin] = None
    state.next_pin = max(state.next_pin, event.pin + 1)


def apply_pins_ended(state: State, event: ev.PinsEnded) -> None:
    for pin_id in event.pins.tolist():
        held = state.pins.pop(pin_id)
        pool, tenant = state.pools[held.pool], tenant_of(held.namespace)
        for node in held.node.path():
            node.pins -= 1
            if not node.pins:
                pool.pinned[tenant] -= node.count
        if not pool.pinned[tenant]:
            del pool.pinned[tenant]
        pool.unshare(pages_of(held))  # those without another owner are cached now
        pool.prefix.release(held.node, state.version)
        pool.prefix.leave(held.namespace)
        if held.session:
            session = state.sessions[tenant, held.session]
            del session[pin_id]
            if not session:
                del state.sessions[tenant, held.session]


def pages_of(held: PinHeld) -> np.ndarray:
    """The pages that a pin holds, in token order."""
    return np.frombuffer(b"".join([node.ids for node in held.node.path()][::-1]), PAGE_ID)


# --- queries ---------------------------------------------------------------------------------------------------------------------


def list_pins(state: State, tenant: bytes | None, now_ms: int) -> list[dict[str, Any]]:
    """All pins, or those of one tenant, oldest first."""
    return [
        {
            "pin": held.pin_id,
            "client": held.client,
            "pool": state.pools[held.pool].name,
            "tenant": tenant_of(held.namespace),
            "session": held.session,
            "tokens": len(pages_of(held)) * state.pools[held.pool].page_size,
            "pages": len(pages_of(held)),
            "lease_ms": max(held.deadline_ms - now_ms, 0) if held.deadline_ms else None,
            "lease_steps": max(held.deadline_version - state.version, 0) if held.deadline_version else None,
        }
        for held in state.pins.values()
        if tenant in (None, tenant_of(held.namespace))
    ]
