"""Owners: what happens to pages, and to a sequence's claim to publish them, when an owner lets go. Called by `apply` and its helpers."""

from __future__ import annotations

from kvmanager.machine.state import State, tenant_of
from kvmanager.pages.pool import Pages, Pool
from kvmanager.pages.prefix import Node
from kvmanager.pages.sequences import Sequence

__all__ = ["let_go", "note_owing", "note_place", "note_publishable"]


def let_go(state: State, pool: Pool, namespace: bytes, pages: Pages, indexed: int, node: Node | None) -> None:
    """One owner of `pages` less, the first `indexed` of which lead in the namespace's index and end at `node`."""
    pool.unshare(pages[:indexed])  # those without an owner are cached now
    if len(pages) > indexed:
        accounts = pool.prefix.accounts.of
        # By name: a handoff may hold a root that has left the index since, and its account with it.
        account = accounts.get(tenant_of(namespace)) if accounts else None
        pool.put_in_quarantine(state.version, pool.unshare(pages[indexed:]), account)
    if node is not None:
        pool.prefix.release(node, state.version)


def note_publishable(state: State, sequence: Sequence) -> None:
    """Keep the pool's list of sequences that have something to publish."""
    publishable = state.pools[sequence.pool].publishable
    if not sequence.unlisted and state.publishable_pages(sequence, state.written(sequence)) > sequence.published:
        publishable[sequence.sequence_id] = None
    else:
        publishable.pop(sequence.sequence_id, None)


def note_place(state: State, sequence: Sequence) -> None:
    """Its indexed pages end elsewhere, or more of its tokens are known: others may wait for another page of it now."""
    pool = state.pools[sequence.pool]
    if not sequence.unlisted:
        pool.inflight.note(sequence, pool.prefix.page_bytes, state.now_ms)


def note_owing(state: State, sequence_id: int) -> None:
    """What the sequence's workers have to write, or have written, has changed: whether its handoff, if it is prefilling, waits for them."""
    number = state.handoffs.prefilling.get(sequence_id)
    if number is not None:
        owes = state.written(state.sequences[sequence_id]) < state.tables.length(sequence_id)
        state.handoffs.owe(number, owes, state.now_ms)
