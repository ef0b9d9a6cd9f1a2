"""Queries: what can be asked of a state without changing it. They are no commands: not logged, not numbered, answered from what is there.

On the wire a query is a map `{"t": kind, field: value}` like a command, and its answer the map that `answer` gives: plain ints, texts,
bytes, lists and maps, so that the embedded manager and the client get the same. Unknown fields are ignored; the fields of a kind are
typed and bounded before anything is allocated for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from kvmanager.config import check_int
from kvmanager.errors import BadMessage, InvalidValue
from kvmanager.machine.batch import encode_batch
from kvmanager.machine.commands import TENANT_BYTES_MAX
from kvmanager.machine.explain import answer_explain
from kvmanager.machine.handoffs import list_handoffs
from kvmanager.machine.pins import list_pins
from kvmanager.machine.preview import answer_dry_run
from kvmanager.machine.snapshot import snapshot, tables_snapshot
from kvmanager.machine.state import State
from kvmanager.machine.tenants import list_tenants
from kvmanager.machine.workers import list_workers

__all__ = ["QUERIES", "answer", "is_query", "pool_stats"]

HANDOFFS_LISTED = 10_000  # the most that one answer lists

Message: TypeAlias = Mapping[str, Any]


def pool_stats(state: State) -> dict[str, Any]:
    """Counts for people and programs: pages of each pool by state, sequences, workers, handoffs."""
    pools = {}
    for pool in state.pools:
        counts = pool.counts()
        pools[pool.name] = {
            "group": pool.group,
            "page_size": pool.page_size,
            "pages": {
                "free": counts.free,
                "used": counts.used,
                "cached": counts.cached,
                "quarantined": counts.quarantined,
                "total": counts.total,
            },
            "pinned": sum(pool.pinned.values()),
            "tokens_copied": pool.tokens_copied,
            "pages_moved": pool.pages_moved,
            "pages_spared": pool.pages_spared,
            "page_bytes": pool.page_bytes,
            "bytes_moved": pool.pages_moved * pool.page_bytes,
            "bytes_spared": pool.pages_spared * pool.page_bytes,
            "draining": bool(pool.draining),
            "drained": pool.drained,
            "sequences": pool.arrivals.count,
            "workers": {str(each): state.workers[each].name for each in state.live_workers(pool.index)},
            "fenced": {str(each): state.workers[each].name for each in state.pool_workers[pool.index] if state.workers[each].fenced},
        }
    handoffs = {str(handoff.handoff_id): handoff.state.name.lower() for handoff in state.handoffs.values()}
    return {"epoch": state.epoch, "version": state.version, "pools": pools, "handoffs": handoffs}


def _stats(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    return pool_stats(state)


def _snapshot(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    return {"snapshot": encode_batch(snapshot(state))}


def _tables(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    return {"tables": encode_batch(tables_snapshot(state))}


def _pins(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    tenant = message.get("tenant")
    if tenant is not None and not (isinstance(tenant, bytes) and len(tenant) <= TENANT_BYTES_MAX):
        raise InvalidValue("pins.tenant", f"at most {TENANT_BYTES_MAX} bytes", type(tenant).__name__)
    return {"pins": list_pins(state, tenant, now_ms)}


def _tenants(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    return {"tenants": list_tenants(state)}


def _workers(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    return {"workers": list_workers(state, now_ms)}


def _handoffs(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    return {"handoffs": list_handoffs(state, check_int("handoffs.limit", message.get("limit", HANDOFFS_LISTED), 1, HANDOFFS_LISTED))}


# kind -> the function that reads its fields, checks them (InvalidValue naming the field) and answers
QUERIES: dict[str, Callable[[State, Message, int], dict[str, Any]]] = {
    "stats": _stats,
    "snapshot": _snapshot,
    "tables": _tables,
    "pins": _pins,
    "dry_run": answer_dry_run,
    "tenants": _tenants,
    "explain": answer_explain,
    "workers": _workers,
    "handoffs": _handoffs,
}


def is_query(message: Message) -> bool:
    kind = message.get("t")
    return isinstance(kind, str) and kind in QUERIES


def answer(state: State, message: Message, now_ms: int) -> dict[str, Any]:
    """The answer to one query. Raises BadMessage, InvalidValue, or what else the query says; nothing changes either way."""
    if not is_query(message):
        raise BadMessage(f"query: expected t to be one of {', '.join(QUERIES)}, got {message.get('t')!r}"[:200])
    return QUERIES[message["t"]](state, message, now_ms)
