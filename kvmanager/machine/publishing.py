"""Publishing: pages that have been written enter the prefix index, pages that nobody can be touching any more leave quarantine."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.machine import events as ev
from kvmanager.machine.draft import Draft
from kvmanager.machine.forks import publish_kin
from kvmanager.machine.owners import note_place, note_publishable
from kvmanager.machine.state import State
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import PAGE_ID

__all__ = ["apply_evicted", "apply_index_dropped", "apply_published", "apply_released", "settle_pages"]


def settle_pages(draft: Draft) -> None:
    """Pages leave quarantine, and the index learns of pages that have been written."""
    publishable = bool(draft.written)
    for pool in draft.state.pools:
        if pool.quarantine:
            _release(draft, pool)
        if pool.publishable:
            publishable = True
    if publishable:
        _publish(draft)


def _release(draft: Draft, pool: Pool) -> None:
    acked = draft.reusable(pool.index)
    serials: list[int] = []
    pages: list[np.ndarray] = []
    for serial, entry in pool.quarantine.items():
        if entry.version > acked:
            break  # entries are in order of version
        serials.append(serial)
        pages.append(entry.pages)
    if serials:
        draft.events.append(ev.PagesReleased(pool.index, np.array(serials, np.int64)))
        draft.pool(pool.index).free.push(np.concatenate(pages))


def _publish(draft: Draft) -> None:
    """Pages that are full, acknowledged by every worker and of known tokens enter the prefix index.

    Two sequences that attach the same page at the same place in one batch cannot both be decided against a state that has neither:
    the second waits for the next command.
    """
    state = draft.state
    attached: set[tuple[Any, int, bytes]] = set()
    candidates: dict[int, None] = {}
    for pool in state.pools:
        candidates.update(pool.publishable)
    candidates.update(dict.fromkeys(draft.written))
    for sequence_id in candidates:
        if not draft.alive(sequence_id) or state.sequences[sequence_id].holds or sequence_id in draft.published:
            continue
        sequence = state.sequences[sequence_id]
        if sequence.unlisted:
            continue
        pool = state.pools[sequence.pool]
        step = pool.prefix.page_bytes
        first = sequence.published
        last = state.publishable_pages(sequence, draft.written_tokens(sequence))
        if last <= first:
            continue
        pages = state.tables.pages_of(sequence_id)[first:last]
        tokens = bytes(sequence.tokens[first * step : last * step])
        node, at = sequence.node, 0
        end: tuple[Any, int] = (node, node.count)
        while at < len(pages):
            key = tokens[at * step : (at + 1) * step]
            child = node.children.get(key) if end[1] == node.count else None
            if child is None:
                if (*end, key) in attached:
                    pages = pages[:at]
                else:
                    attached.add((*end, key))
                break
            count = min(pool.prefix.equal_pages(child, tokens, at * step), len(pages) - at)
            pages[at : at + count] = np.frombuffer(child.ids, PAGE_ID)[:count]
            draft.pool(pool.index).keep([child], count)
            node, at, end = child, at + count, (child, count)
        if len(pages):
            draft.published[sequence_id] = first + len(pages)
            draft.events.append(ev.PagesPublished(sequence_id, first, pages))
            if sequence.shared > first:
                publish_kin(draft, sequence, first, pages, first + at)


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_published(state: State, event: ev.PagesPublished) -> None:
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
    note_publishable(state, sequence)
    note_place(state, sequence)


def apply_evicted(state: State, event: ev.PagesEvicted) -> None:
    state.pools[event.pool].evict(event.pages, state.version)


def apply_released(state: State, event: ev.PagesReleased) -> None:
    for serial in event.serials.tolist():
        state.pools[event.pool].release(serial)


def apply_index_dropped(state: State, event: ev.IndexDropped) -> None:
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
