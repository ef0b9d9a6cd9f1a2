"""The books, checked from scratch: rule 1 and what it rests on. Slow on purpose; for tests, the simulator and on request."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvmanager.errors import InvariantBroken
from kvmanager.machine.pins import pages_of
from kvmanager.machine.state import State, tenant_of
from kvmanager.machine.tenants import pages_of_tenant
from kvmanager.pages.handoff import HandoffState
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import TOKEN_BYTES

__all__ = ["check_invariants"]


def check_invariants(state: State) -> None:
    """Raises InvariantBroken, naming pool and page, unless every page is in one state and every owner is counted."""
    for pool in state.pools:
        owners: Counter[int] = Counter()
        node_refs: Counter[int] = Counter()
        own: Counter[int] = Counter()  # what a sequence may write into: nobody else's
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
                unpublished = pages[sequence.published :]
                if found := [page for page in unpublished if pool.prefix.node_of[page] is not None]:
                    _fail(pool.name, f"sequence {sequence.sequence_id}: page {found[0]} is in the index, and not held there by an owner")
                own.update(pages[max(sequence.published, sequence.shared) :])
                if state.tables.pool_of(sequence.sequence_id) != pool.index:
                    _fail(pool.name, f"sequence {sequence.sequence_id}: table row names another pool")
        if written_by_two := [page for page, count in own.items() if count > 1]:
            _fail(pool.name, f"page {written_by_two[0]}: several sequences may write into it")
        for handoff in state.handoffs.values():
            if handoff.source == pool.index:
                if found := [page for page in handoff.source_pages[handoff.source_indexed :] if pool.prefix.node_of[page] is not None]:
                    _fail(pool.name, f"handoff {handoff.handoff_id}: page {found[0]} is in the index, and not held there by an owner")
                owners.update(handoff.source_pages)
                if handoff.source_node is not None:
                    node_refs.update(id(node) for node in handoff.source_node.path())
            if handoff.target == pool.index:
                if handoff.streaming and handoff.target_node is None and handoff.state is not HandoffState.ABORTED:
                    _fail(pool.name, f"handoff {handoff.handoff_id}: streams, and nothing is reserved for it")
                owners.update(handoff.target_pages)
                if handoff.target_node is not None:
                    node_refs.update(id(node) for node in handoff.target_node.path())
                waits = handoff.state is HandoffState.PREFILLING
                owes = waits and state.written(state.sequences[handoff.sequence_id]) < state.tables.length(handoff.sequence_id)
                if (handoff.handoff_id in state.handoffs.owing) != owes:
                    _fail(pool.name, f"handoff {handoff.handoff_id}: its source has something to write: {owes}, listed so: {not owes}")
        if len(state.handoffs.prefilling) != sum(each.state is HandoffState.PREFILLING for each in state.handoffs.values()):
            _fail(pool.name, f"handoffs prefilling {state.handoffs.prefilling}")
        load = sum(len(each.tokens) // TOKEN_BYTES for each in state.sequences.values() if each.pool == pool.index)
        if load != pool.load:
            _fail(pool.name, f"load {pool.load}, known tokens {load}")
        here = sorted((each.priority, each.sequence_id) for each in state.sequences.values() if each.pool == pool.index)
        if sorted(pool.arrivals.latest_first()) != here or pool.arrivals.count != len(here):
            _fail(pool.name, f"arrivals {list(pool.arrivals.latest_first())[:8]}, open here {here[:8]}")
        if len(pool.inflight.first) != len(pool.inflight.flights):
            _fail(pool.name, f"in flight: {len(pool.inflight.first)} places for {len(pool.inflight.flights)} sequences")
        for sequence_id, flight in pool.inflight.flights.items():
            holder, step = state.sequences.get(sequence_id), pool.prefix.page_bytes
            if holder is None or holder.pool != pool.index or pool.inflight.first.get(flight.place) != sequence_id:
                _fail(pool.name, f"in flight: sequence {sequence_id} holds a place and is not there")
            elif flight.place != (holder.node, bytes(holder.tokens[holder.published * step : (holder.published + 1) * step])):
                _fail(pool.name, f"in flight: sequence {sequence_id} is not where its indexed pages end")
        pins: Counter[int] = Counter()
        pinned: dict[bytes, dict[int, None]] = {}
        for held in state.pins.values():
            if held.pool == pool.index:
                pages = pages_of(held).tolist()
                owners.update(pages)
                pinned.setdefault(tenant_of(held.namespace), {}).update(dict.fromkeys(pages))
                node_refs.update(id(node) for node in held.node.path())
                pins.update(id(node) for node in held.node.path())
        if {tenant: len(pages) for tenant, pages in pinned.items()} != pool.pinned:
            _fail(pool.name, f"pinned pages {pool.pinned}, pins hold { {tenant: len(pages) for tenant, pages in pinned.items()} }")
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
            if node.pins != pins[id(node)]:
                _fail(pool.name, f"index node of page {node.pages[0]}: {node.pins} pins, expected {pins[id(node)]}")
            if (node in pool.prefix.order) != (node.refs == 0 and node.waiters is None):
                _fail(pool.name, f"index node of page {node.pages[0]}: refs {node.refs}, in order of eviction {node in pool.prefix.order}")
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
        if prefix_keys := pool.prefix.neighbours:
            nodes = [*pool.prefix.roots.values(), *(node for _, node in pool.prefix.walk())]
            if prefix_keys.keys != {node: sorted(node.children) for node in nodes if node.children}:
                _fail(pool.name, "neighbours: not the children in the order of their token ids")
        check_queue(state, pool)
        check_accounts(state, pool)
    check_extras(state)
    families: dict[int, dict[int, None]] = {}
    for sequence_id in sorted(state.sequences):
        if family := state.sequences[sequence_id].family:
            families.setdefault(family, {})[sequence_id] = None
    if families != state.families:
        raise InvariantBroken(f"families: {state.families}, sequences say {families}")


def check_extras(state: State) -> None:
    """Each extra key has one id, and as many users as there are places where the id stands."""
    users: Counter[int] = Counter()
    everything = [sequence.tokens for sequence in state.sequences.values()] + [prompt.tokens for prompt in state.waiting.values()]
    for pool in state.pools:
        everything += [node.tokens for _, node in pool.prefix.walk()]
    for tokens in everything:
        array = np.frombuffer(bytes(tokens), "<i4")
        users.update(array[array < 0].tolist())
    extras = state.extras
    if (
        dict(users) != extras.uses
        or {meaning: each for each, meaning in extras.meanings.items()} != extras.ids
        or len(extras.ids) != len(users)
    ):
        _fail("all", f"extra keys: users {dict(users)}, counted {extras.uses}, named {extras.ids}")


def check_queue(state: State, pool: Pool) -> None:
    """The waiting queue is where it says it is, and whatever may be evicted comes in an order that never takes a parent first."""
    prefix = pool.prefix
    if [prompt.waiting_id for prompt in state.waiting.values() if pool.index in prompt.pools] != list(prefix.queue.entries):
        _fail(pool.name, f"waiting prompts {list(prefix.queue.entries)[:8]} are not the queue's")
    waiters: dict[int, list[int]] = {}
    sought: dict[tuple[int, bytes], list[int]] = {}
    for waiting in prefix.queue.entries.values():
        path = list(waiting.node.path())[::-1]
        run = b"".join(node.tokens for node in path)
        found = prefix.match(waiting.namespace, waiting.tokens, len(waiting.tokens) // prefix.page_bytes)
        if run != waiting.tokens[: waiting.at] or len(run) != found.page_count() * prefix.page_bytes:
            _fail(pool.name, f"waiting prompt {waiting.waiting_id}: stands at {waiting.at}, the index has {found.page_count()} pages of it")
        for node in path:
            waiters.setdefault(id(node), []).append(waiting.waiting_id)
        if waiting.at < len(waiting.tokens):
            sought.setdefault((id(waiting.node), waiting.tokens[waiting.at :][: prefix.page_bytes]), []).append(waiting.waiting_id)
    listed: dict[tuple[int, bytes], list[int]] = {}
    for node in [*prefix.roots.values(), *(node for _, node in prefix.walk())]:
        if list(node.waiters or []) != waiters.get(id(node), []):
            _fail(pool.name, f"node {node.pages[:1]}: lists waiting prompts {list(node.waiters or [])}, expected {waiters.get(id(node))}")
        listed.update({(id(node), key): list(group) for key, group in (node.sought or {}).items()})
    if listed != sought:
        _fail(pool.name, f"pages sought by waiting prompts: {list(listed.values())[:8]}, expected {list(sought.values())[:8]}")
    gone: set[int] = set()
    for node in prefix.victims(state.version):
        if any(id(child) not in gone for child in node.children.values()):
            _fail(pool.name, f"order of eviction: node of page {node.pages[0]} stands before one of its children")
        gone.add(id(node))
    if len(gone) != sum(node.refs == 0 for _, node in prefix.walk()):
        _fail(pool.name, f"order of eviction: {len(gone)} nodes, not all that nobody holds")
    for nodes in prefix.order.classes:
        used = [node.last_used for node in nodes]
        if used != sorted(used):
            _fail(pool.name, f"order of eviction: {used} is not the order of last use")


def check_accounts(state: State, pool: Pool) -> None:
    """Each tenant with a quota is charged with what it has, and its own order of eviction is the pool's."""
    prefix, have = pool.prefix, pages_of_tenant(state, pool)
    namespaces: dict[bytes, list[bytes]] = {}
    for namespace in sorted(prefix.roots):
        namespaces.setdefault(tenant_of(namespace), []).append(namespace)
    if namespaces != {tenant: sorted(each) for tenant, each in prefix.namespaces.items()}:
        _fail(pool.name, f"namespaces {prefix.namespaces}, roots {namespaces}")
    for tenant in {**prefix.namespaces, **have} if prefix.accounts.everybody >= 0 else {}:
        if tenant not in prefix.accounts.of:
            _fail(pool.name, f"tenant {tenant!r}: no account, though everybody has a quota")
    for tenant, account in prefix.accounts.of.items():
        if account.pages != have.get(tenant, 0):
            _fail(pool.name, f"tenant {tenant!r}: charged with {account.pages} pages, has {have.get(tenant, 0)}")
        if account.roots != len(namespaces.get(tenant, [])):
            _fail(pool.name, f"tenant {tenant!r}: {account.roots} namespaces counted, {len(namespaces.get(tenant, []))} in the index")
        if list(account.order) != [node for node in prefix.order if node.account is account]:
            _fail(pool.name, f"tenant {tenant!r}: its order of eviction is not the pool's")
    for namespace, node in [*prefix.roots.items(), *prefix.walk()]:
        if node.account is not prefix.accounts.of.get(tenant_of(namespace)):
            _fail(pool.name, f"index node of page {node.pages[:1]}: not of its tenant's account")


def _fail(pool: str, text: str) -> None:
    raise InvariantBroken(f"pool {pool}: {text}")
