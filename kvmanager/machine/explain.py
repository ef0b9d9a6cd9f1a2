"""Explain: why a prompt was not found in the prefix index, pool by pool. A query for people and for tests; it may look around.

    cached        all that may come from the cache is there: whole pages, and never the prompt's last token
    in_flight     `sequence` computes the next page, which its workers have not acknowledged: `tokens` more could be shared then
    evicted       the next page was evicted at `version`; as far as that is remembered (see remnants)
    other_extra   another extra key of the same tenant has more of it: `tokens` from the start
    other_tenant  another tenant has; said only if the operator allows it (`explain_across_tenants`): it tells what others have asked
    diverges      the nearest cached branch differs first at token `at`
    never_seen    none of this; `pool_lost` is the version in which all that the pool held was lost, if that ever happened

The first that holds of the first page that is missing. Which extra key or tenant it is, is never said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue, Unknown
from kvmanager.machine.commands import check_prompt
from kvmanager.machine.state import State, encode_namespace
from kvmanager.pages.extras import ExtrasDraft
from kvmanager.pages.inflight import pages_agreeing
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import TOKEN_BYTES, Match, Node

__all__ = ["Explanation", "answer_explain"]

BRANCHES_MAX = 4096  # branches, and namespaces, that are looked at for one pool


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one pool knows of a prompt: `cached_tokens` of it are found, and `reason` says why no more; see the top of this module."""

    pool: str
    cached_tokens: int
    reason: str
    details: dict[str, int]


@dataclass(slots=True, eq=False)
class _Prompt:
    tokens: Any = b""
    pool: Any = ""
    tenant: Any = b""
    extra: Any = b""
    group: Any = ""
    extras: Any = ()


def answer_explain(state: State, message: Mapping[str, Any], now_ms: int) -> dict[str, Any]:
    """The query {"t": "explain", "tokens", "pool" or "group", "tenant", "extra", "extras"}."""
    prompt = _Prompt(**{name: message[name] for name in _Prompt.__slots__ if name in message})
    check_prompt("explain", prompt)
    if len(prompt.tokens) > state.config.sequence_tokens_max:
        raise InvalidValue("explain.tokens", f"at most {state.config.sequence_tokens_max} tokens", len(prompt.tokens))
    pools = [state.pool(prompt.pool)] if prompt.pool else state.groups.get(prompt.group, [])
    if not pools:
        raise Unknown("group", prompt.group)
    prompt.tokens = ExtrasDraft(state.extras, len(prompt.extras) + len(state.extras.ids)).write_in(prompt.tokens, prompt.extras)
    return {"pools": [_explain(state, pool, prompt) for pool in pools]}


def _explain(state: State, pool: Pool, prompt: _Prompt) -> list[Any]:
    """[pool name, cached tokens, reason, details]"""
    namespace, data, step = encode_namespace(prompt.tenant, prompt.extra), prompt.tokens.tobytes(), pool.prefix.page_bytes
    pages_max = (len(prompt.tokens) - 1) // pool.page_size
    found = pool.prefix.match(namespace, data, pages_max)
    pages = found.page_count()
    end = found.nodes[-1] if found.nodes else pool.prefix.roots.get(namespace)
    whole = end is not None and found.last_pages == end.count  # the match ends where a node ends, not in the middle of its run
    page = data[pages * step : (pages + 1) * step]

    def because(reason: str, **details: int) -> list[Any]:
        return [pool.name, pages * pool.page_size, reason, details]

    if pages == pages_max:
        return because("cached")
    if whole and end is not None and (sequence_id := pool.inflight.find(end, page)):
        known = bytes(state.sequences[sequence_id].tokens[pages * step :])
        agreeing = pages_agreeing(known, data[pages * step : pages_max * step], step)
        return because("in_flight", sequence=sequence_id, tokens=agreeing * pool.page_size)
    remnants = pool.prefix.remnants
    version = remnants.evicted_at(end, found.last_pages, page) if end is not None else remnants.evicted_root(namespace, page)
    if version:
        return because("evicted", version=version)
    others = {
        own: max((pool.prefix.match(each, data, pages_max).page_count() for each in _namespaces(pool, prompt, own)), default=0)
        for own in (True, False)
        if own or state.config.explain_across_tenants
    }
    for own, reason in ((True, "other_extra"), (False, "other_tenant")):
        if others.get(own, 0) > pages:
            return because(reason, tokens=others[own] * pool.page_size)
    at = _branch(found, end, whole, page, step)
    if at is not None and (at or pages):
        return because("diverges", at=pages * pool.page_size + at)
    return because("never_seen", **({"pool_lost": remnants.lost_at} if remnants.lost_at else {}))


def _namespaces(pool: Pool, prompt: _Prompt, own: bool) -> Iterator[bytes]:
    """Other namespaces of the tenant (own), or those of other tenants."""
    asked, of_tenants = encode_namespace(prompt.tenant, prompt.extra), pool.prefix.namespaces
    if own:
        found = iter(of_tenants.get(prompt.tenant, {}))
    else:
        found = (namespace for tenant, theirs in of_tenants.items() if tenant != prompt.tenant for namespace in theirs)
    return (namespace for namespace in islice(found, BRANCHES_MAX) if namespace != asked)


def _branch(found: Match, end: Node | None, whole: bool, page: bytes, step: int) -> int | None:
    """Tokens of `page` that agree with the nearest cached page in its place; None if there is none."""
    if end is None:
        return None
    rest = end.tokens[found.last_pages * step : (found.last_pages + 1) * step]
    pages = b"".join(islice(end.children, BRANCHES_MAX)) if whole else rest
    if not pages:
        return None
    there = np.frombuffer(pages, "<i4").reshape(-1, step // TOKEN_BYTES)
    differs = there != np.frombuffer(page, "<i4")
    return int(differs.argmax(axis=1).max())  # no row is equal: it would have been found
