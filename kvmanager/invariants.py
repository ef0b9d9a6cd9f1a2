"""The books, checked from scratch: rule 1 and what it rests on. Slow on purpose; for tests, the simulator and on request."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvmanager.errors import InvariantBroken
from kvmanager.prefix import TOKEN_BYTES
from kvmanager.state import State

__all__ = ["check_invariants"]


def check_invariants(state: State) -> None:
    """Raises InvariantBroken, naming pool and page, unless every page is in one state and every owner is counted."""
    for pool in state.pools:
        owners: Counter[int] = Counter()
        node_refs: Counter[int] = Counter()
        for sequence in state.sequences.values():
            if sequence.pool == pool.index:
                pages = state.tables.pages_of(sequence.sequence_id).tolist()
                owners.update(pages)
                on_path = [page for node in reversed(list(sequence.node.path())) for page in node.pages]
                if on_path != pages[: sequence.published]:
                    _fail(pool.name, f"sequence {sequence.sequence_id}: index path {on_path[:8]} is not its table {pages[:8]}")
                node_refs.update(id(node) for node in sequence.node.path())
                length = state.tables.length(sequence.sequence_id)
                if not (length <= len(pages) * pool.page_size):
                    _fail(pool.name, f"sequence {sequence.sequence_id}: {length} tokens do not fit {len(pages)} pages")
                if state.tables.pool_of(sequence.sequence_id) != pool.index:
                    _fail(pool.name, f"sequence {sequence.sequence_id}: table row names another pool")
        for handoff in state.handoffs.values():
            if handoff.source == pool.index:
                owners.update(handoff.source_pages)
                if handoff.source_node is not None:
                    node_refs.update(id(node) for node in handoff.source_node.path())
            if handoff.target == pool.index:
                owners.update(handoff.target_pages)
                if handoff.target_node is not None:
                    node_refs.update(id(node) for node in handoff.target_node.path())
        load = sum(len(each.tokens) // TOKEN_BYTES for each in state.sequences.values() if each.pool == pool.index)
        if load != pool.load:
            _fail(pool.name, f"load {pool.load}, known tokens {load}")
        if len(pool.inflight.first) != len(pool.inflight.flights):
            _fail(pool.name, f"in flight: {len(pool.inflight.first)} places for {len(pool.inflight.flights)} sequences")
        for sequence_id, flight in pool.inflight.flights.items():
            holder, step = state.sequences.get(sequence_id), pool.prefix.page_bytes
            if holder is None or holder.pool != pool.index or pool.inflight.first.get(flight.place) != sequence_id:
                _fail(pool.name, f"in flight: sequence {sequence_id} holds a place and is not there")
            elif flight.place != (holder.node, bytes(holder.tokens[holder.published * step : (holder.published + 1) * step])):
                _fail(pool.name, f"in flight: sequence {sequence_id} is not where its indexed pages end")
        refs = np.zeros(pool.num_pages, np.int64)
        for page, count in owners.items():
            refs[page] = count
        wrong = np.flatnonzero(refs != pool.refs)
        if len(wrong):
            page = int(wrong[0])
            _fail(pool.name, f"page {page}: refs {int(pool.refs[page])}, owners listed {int(refs[page])}")
        quarantined = [page for entry in pool.quarantine.values() for page in entry.pages.tolist()]
        free = pool.free.array().tolist()
        indexed: list[int] = []
        for _, node in pool.prefix.walk():
            indexed += node.pages
            if node.refs != node_refs[id(node)]:
                _fail(pool.name, f"index node of page {node.pages[0]}: refs {node.refs}, holders {node_refs[id(node)]}")
            if (node in pool.prefix.lru) != (node.refs == 0):
                _fail(pool.name, f"index node of page {node.pages[0]}: refs {node.refs} and in lru {node in pool.prefix.lru}")
            if len(node.tokens) != len(node.pages) * pool.prefix.page_bytes or not node.pages:
                _fail(pool.name, f"index node of page {node.pages[:1]}: {len(node.tokens)} token bytes for {len(node.pages)} pages")
            if any(pool.prefix.node_of[page] is not node for page in node.pages):
                _fail(pool.name, f"index node of page {node.pages[0]}: page map disagrees")
        used = np.flatnonzero(pool.refs).tolist()
        cached = [page for page in indexed if not pool.refs[page]]
        everything = free + used + cached + quarantined
        if sorted(everything) != list(range(pool.num_pages)):
            twice = [page for page, count in Counter(everything).items() if count > 1][:8]
            missing = sorted(set(range(pool.num_pages)) - set(everything))[:8]
            _fail(pool.name, f"pages in two states {twice}, in none {missing}")
        counts = pool.counts()
        if (counts.free, counts.used, counts.cached, counts.quarantined) != (len(free), len(used), len(cached), len(quarantined)):
            _fail(pool.name, f"counts {counts} but {len(free)}, {len(used)}, {len(cached)}, {len(quarantined)}")
        mapped = sum(node is not None for node in pool.prefix.node_of)
        if not mapped == pool.prefix.pages_indexed == len(indexed):
            _fail(pool.name, f"page map holds {mapped} pages and counts {pool.prefix.pages_indexed}, the tree {len(indexed)}")
        seen: set[int] = set()
        for node in pool.prefix.lru:  # children before parents: the oldest is a leaf
            if any(id(child) not in seen for child in node.children.values()):
                _fail(pool.name, f"lru: node of page {node.pages[0]} stands before one of its children")
            seen.add(id(node))


def _fail(pool: str, text: str) -> None:
    raise InvariantBroken(f"pool {pool}: {text}")
