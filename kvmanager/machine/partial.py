"""Partial: a prompt that agrees with the beginning of a cached page copies that page's leading slots and goes on from there.

An option of a pool (`PoolConfig.partial_match`): sharing stops at whole pages, so up to a page of tokens is computed again where a
conversation turns off, and all of a prefix that is shorter than a page. A copy costs a fresh page, which the prompt needs sooner or later
anyway, and memory bandwidth for a fraction of a page; it saves the computation of those tokens.

Equality is compared here as everywhere: the page found is reached through equal pages of the same namespace, and its own tokens are
compared one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvmanager.machine.draft import PoolDraft
from kvmanager.pages.neighbours import agreement
from kvmanager.pages.prefix import PAGE_ID, Match, Node

__all__ = ["Partial", "find_partial"]


class Partial(NamedTuple):
    """The page at `place` of `node` agrees in its first `tokens` tokens."""

    node: Node
    place: int
    tokens: int

    @property
    def page(self) -> int:
        return int(np.frombuffer(self.node.ids, PAGE_ID)[self.place])


def find_partial(pages: PoolDraft, found: Match, namespace: bytes, rest: bytes) -> Partial | None:
    """The page that agrees furthest with `rest`, the token ids behind the match that may come from the cache; None if none agrees at all.

    The match ends inside a run of pages, and then only the run's next page can agree, or at its end: then a child's first page can.
    """
    prefix = pages.pool.prefix
    rest = rest[: prefix.page_bytes]
    node = found.nodes[-1] if found.nodes else prefix.roots.get(namespace)
    if node is None or not rest:
        return None
    candidates = []
    if found.last_pages < node.count:
        start = found.last_pages * prefix.page_bytes
        candidates.append((node, found.last_pages, node.tokens[start : start + prefix.page_bytes]))
    elif prefix.neighbours is not None:
        candidates += [(node.children[key], 0, key) for key in prefix.neighbours.near(node, rest)]
    best: Partial | None = None
    for owner, place, key in candidates:
        tokens = agreement(key, rest)
        if tokens > (best.tokens if best is not None else 0) and place < pages.trimmed.get(owner, owner.count):
            best = Partial(owner, place, tokens)
    return best
