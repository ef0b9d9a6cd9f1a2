"""Tenants: quotas of pages, and the flush of everything that a tenant has cached.

A tenant at its quota makes room for itself: its own cached pages are evicted first, in the order of eviction, and nobody else's. If none can
go its open or growth is refused with OverQuota. Others' pages are never harmed. A quota may be set below what the tenant has: then it gets
nothing more until it is below. Copies that truncations need are never refused, so a quota may be exceeded by those.

A flush takes the tenant's cached pages out of the index, and ends its pins. Pages that nobody holds go into quarantine, as any page that is
freed. Sequences that are open go on, *unlisted*: what they hold is found by nobody and never published again, and is free when they close.
So does a sequence whose handoff shares flushed pages in its target pool, once it is there.
Waiting prompts go on waiting. Costs what the tenant has (and one look at each open sequence), not what the pool has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.errors import TooMany
from kvmanager.machine import events as ev
from kvmanager.machine import pins
from kvmanager.machine.commands import Flush, SetQuota
from kvmanager.machine.draft import Draft
from kvmanager.machine.state import State
from kvmanager.pages.accounts import Account, tenant_of
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import PAGE_ID

__all__ = ["account_restored", "apply_flushed", "apply_quota", "flush", "list_tenants", "pages_of_tenant", "set_quota"]


# --- called by decide ------------------------------------------------------------------------------------------------------------


def _pools(draft: Draft, name: str) -> list[Pool]:
    return [draft.state.pool(name)] if name else draft.state.pools


def set_quota(draft: Draft, command: SetQuota, now_ms: int, client: int) -> dict[str, Any]:
    limit = draft.state.config.quotas_max
    for pool in _pools(draft, command.pool):
        of = pool.prefix.accounts.of
        fresh = command.tenant is not None and command.pages is not None and command.tenant not in of
        if fresh and sum(account.own for account in of.values()) >= limit:
            raise TooMany("quotas", limit)
        pages = -1 if command.pages is None else command.pages
        draft.events.append(ev.QuotaSet(pool.index, command.tenant or b"", int(command.tenant is None), pages))
    return {}


def flush(draft: Draft, command: Flush, now_ms: int, client: int) -> dict[str, Any]:
    count = 0
    for pool in _pools(draft, command.pool):
        if command.tenant in pool.prefix.namespaces:
            count += sum(node.count for node in pool.prefix.nodes_of(command.tenant) if not node.refs)
            pins.lose(draft, pool.index, command.tenant)
            draft.events.append(ev.TenantFlushed(pool.index, command.tenant))
    return {"pages": count}


# --- called by apply -------------------------------------------------------------------------------------------------------------


def apply_quota(state: State, event: ev.QuotaSet) -> None:
    pool = state.pools[event.pool]
    accounts = pool.prefix.accounts
    before = {tenant: account for tenant, account in accounts.of.items() if account.own}
    if event.everybody:
        accounts.everybody = event.pages
    elif event.pages >= 0:
        before[event.tenant] = Account(event.tenant, event.pages, True)
    else:
        before.pop(event.tenant, None)
    account = accounts.of.get(event.tenant)
    if account is not None and not event.everybody and event.pages >= 0:
        account.quota, account.own = event.pages, True
        return
    _open_accounts(state, pool, {tenant: account.quota for tenant, account in before.items()})


def _open_accounts(state: State, pool: Pool, quotas: dict[bytes, int]) -> None:
    """Count everything anew. Looks at all of the pool, once for a quota that is set for a tenant that had none."""
    prefix = pool.prefix
    prefix.accounts.of = {tenant: Account(tenant, quota, True) for tenant, quota in quotas.items()}
    for tenant, namespaces in prefix.namespaces.items():
        account = None
        for _ in namespaces:
            account = prefix.accounts.enter(tenant)
        for node in prefix.nodes_of(tenant):
            node.account = account
    for tenant, count in pages_of_tenant(state, pool).items():
        found = prefix.accounts.find(tenant)
        if found is not None:
            prefix.accounts.of[tenant] = found
            found.pages = count
    for node in prefix.order:
        if node.account is not None:
            node.account.order.add(node)


def pages_of_tenant(state: State, pool: Pool) -> dict[bytes, int]:
    """Distinct pages that each tenant has in a pool, counted from scratch."""
    owned: dict[bytes, list[np.ndarray]] = {}
    for tenant in pool.prefix.namespaces:
        owned[tenant] = [np.frombuffer(node.ids, PAGE_ID) for node in pool.prefix.nodes_of(tenant)]
    for sequence in state.sequences.values():
        if sequence.pool == pool.index:
            owned.setdefault(tenant_of(sequence.namespace), []).append(state.tables.pages_of(sequence.sequence_id))
    for handoff in state.handoffs.values():
        for index, pages in ((handoff.source, handoff.source_pages), (handoff.target, handoff.target_pages)):
            if index == pool.index and pages is not None and len(pages):
                owned.setdefault(tenant_of(handoff.namespace), []).append(np.array(pages, np.int32))
    counts = {tenant: len(np.unique(np.concatenate(pages))) for tenant, pages in owned.items() if pages}
    return {tenant: count for tenant, count in counts.items() if count}


def account_restored(state: State, event: ev.AccountRestored, _: Any) -> None:
    """Comes before the nodes, which enter themselves."""
    account = Account(event.tenant, event.quota, bool(event.own))
    account.pages = event.pages
    state.pools[event.pool].prefix.accounts.of[event.tenant] = account


def apply_flushed(state: State, event: ev.TenantFlushed) -> None:
    pool = state.pools[event.pool]
    prefix = pool.prefix
    roots = {namespace: prefix.roots[namespace] for namespace in prefix.namespaces[event.tenant]}
    account = prefix.accounts.of.get(event.tenant)
    pages = prefix.forget(event.tenant)
    pool.put_in_quarantine(state.version, pages[pool.refs[pages] == 0], account)
    for sequence in state.sequences.values():
        if sequence.pool == pool.index and sequence.namespace in roots:
            # Pages that several of them hold are not to be written into: truncation has to know that they are shared still.
            sequence.shared = max(sequence.shared, sequence.published)
            sequence.node, sequence.published, sequence.unlisted = roots[sequence.namespace], 0, True
            pool.publishable.pop(sequence.sequence_id, None)
            pool.inflight.forget(sequence.sequence_id)
    for handoff in state.handoffs.values():
        if handoff.namespace in roots:
            if handoff.source == pool.index and handoff.source_node is not None:
                handoff.source_node, handoff.source_indexed = None, 0
            if handoff.target == pool.index and handoff.target_node is not None:
                handoff.flushed |= handoff.target_shared > 0
                handoff.target_node, handoff.target_shared = roots[handoff.namespace], 0


# --- queries ---------------------------------------------------------------------------------------------------------------------


def list_tenants(state: State) -> list[dict[str, Any]]:
    """Tenants with a quota or pins, by pool: what they have and may have, in pages."""
    rows = []
    for pool in state.pools:
        of = pool.prefix.accounts.of
        for tenant in sorted({**of, **pool.pinned}):
            account = of.get(tenant)
            rows.append(
                {
                    "pool": pool.name,
                    "tenant": tenant,
                    "pages": account.pages if account is not None else None,
                    "quota": account.quota if account is not None else None,
                    "pinned": pool.pinned.get(tenant, 0),
                }
            )
    return rows
