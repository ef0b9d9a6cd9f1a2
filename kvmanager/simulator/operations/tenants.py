"""Tenants have quotas of pages, and what one has cached is flushed."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.machine.commands import Flush, SetQuota
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import action, follows, heals


@action(0, 0.5, 1)
def quota(driver: Any) -> None:
    rng = driver.rng
    tenant = rng.choice((b"red", b"blue", b"blue", None))
    driver.send(SetQuota(tenant, rng.choice((None, 1, 3, 5, 9)), rng.choice(driver.config.pools).name), 70)


@action(0, 0.5, 1)
def flush(driver: Any) -> None:
    driver.send(Flush(driver.rng.choice((b"red", b"blue", b"nobody")), driver.rng.choice(("", driver.config.pools[0].name))), 70)


@heals
def no_quotas(driver: Any) -> list[Any]:
    return [SetQuota(tenant, None, driver.config.pools[pool].name) for pool, tenant in driver.model.quotas]


@follows(ev.QuotaSet)
def quota_set(model: Model, event: ev.QuotaSet, turn: Turn) -> None:
    key = event.pool, None if event.everybody else event.tenant
    model.quotas.pop(key, None)
    if event.pages >= 0:
        model.quotas[key] = event.pages


@follows(ev.TenantFlushed)
def flushed(model: Model, event: ev.TenantFlushed, turn: Turn) -> None:
    index = model.index[event.pool]
    gone = [stamp for stamp in index if model.tenants[stamp] == event.tenant]
    pages = [index.pop(stamp)[0] for stamp in gone]
    model.let_go(event.pool, pages)
    for text in model.texts.values():
        if text.pool == event.pool and text.tenant == event.tenant:
            text.unlisted = True
    for move in model.moves.values():
        owner = model.texts.get(move.sequence)
        if move.target == event.pool and move.fresh and owner is not None and owner.tenant == event.tenant:
            move.flushed = True
    model.seen["flushed_pages"] += bool(pages)


def check_quota(model: Model, pool: int, tenant: bytes, what: str) -> None:
    """After somebody got pages: its tenant has no more than it may."""
    quota = model.quotas.get((pool, tenant), model.quotas.get((pool, None)))
    if quota is not None:
        has = {page for text in model.texts.values() if text.pool == pool and text.tenant == tenant for page in text.pages}
        has |= {page for stamp, (page, _) in model.index[pool].items() if model.tenants[stamp] == tenant}
        copies = model.copied[pool, tenant]  # never refused, and not yet counted when the step's opens are
        demand(len(has) <= quota + copies, f"{what}: tenant {tenant!r} has {len(has)} pages, its quota is {quota}")
        model.seen["within_a_quota"] += 1
