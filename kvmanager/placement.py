"""Placement: which pool of a group is to compute a prompt. Reads the state and the draft, takes nothing.

    score = placement_match_weight * tokens found in the pool's prefix index
          - placement_load_weight  * load

Both terms are tokens, so weights of 1 and 1 say: computing a token again is as bad as standing beside one token more. The load of a pool
is the number of known token ids of its open sequences (prompts, whether computed yet or not, and decoded tokens that were appended),
each sequence counted whole: a decode step reads shared pages once for every sequence that shares them. Counted up at open and append
and down at close, never by a walk. The shape is that of KV-aware routers in front of many engines (prompt blocks to compute, weighted,
plus blocks in use); here both are exact and as of this very step, not as of the last report.

A higher score comes first; equal ones in the order of the config. `round_robin` starts one pool further for each sequence opened,
whatever is cached where. Either way a pool without room for the whole prompt is passed over while another pool of the group has it.

One match a pool of the group is all that this costs.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.commands import Open
from kvmanager.draft import Draft
from kvmanager.pool import Pool
from kvmanager.prefix import Match
from kvmanager.tables import div_ceil

__all__ = ["Look", "in_order", "look"]


@dataclass(slots=True)
class Look:
    """What one pool offers a prompt: `cached` leading tokens are in its index, and end at the last node of `found`."""

    pool: Pool
    found: Match
    cached: int


def look(draft: Draft, pool: Pool, namespace: bytes, data: bytes, command: Open) -> Look:
    found = draft.pool(pool.index).match(namespace, data, (len(command.tokens) - 1) // pool.page_size)
    return Look(pool, found, found.page_count() * pool.page_size)


def in_order(draft: Draft, looks: list[Look]) -> list[Look]:
    """The pools of a group as they are to be tried, best first; `looks` come in the order of the config."""
    state = draft.state
    if len(looks) < 2:
        return looks
    if state.config.placement == "round_robin":
        turn = (state.next_generation - 1 + draft.opened) % len(looks)
        return looks[turn:] + looks[:turn]
    match_weight, load_weight = state.config.placement_match_weight, state.config.placement_load_weight

    def cost(item: Look) -> int:
        load = item.pool.load + draft.load_change.get(item.pool.index, 0)
        return load_weight * load - match_weight * item.cached

    return sorted(looks, key=cost)  # stable: equal ones stay in the order of the config


def pages_wanted(item: Look, tokens: int) -> int:
    """Pages that a prompt of so many tokens takes beyond those that are there."""
    return div_ceil(tokens, item.pool.page_size) - item.cached // item.pool.page_size
