"""Placement: which pool of a group is to compute a prompt. Reads the state and the draft, takes nothing.

    score = placement_match_weight * (tokens in the pool's prefix index + tokens of it in flight there that the prompt would wait for)
          - placement_load_weight  * load

Both terms are tokens, so weights of 1 and 1 say: computing a token again is as bad as standing beside one token more. The load of a pool
is the number of known token ids of its open sequences (prompts, whether computed yet or not, and decoded tokens that were appended),
each sequence counted whole: a decode step reads shared pages once for every sequence that shares them. Counted up at open and append
and down at close, never by a walk. The shape is that of KV-aware routers in front of many engines (prompt blocks to compute, weighted,
plus blocks in use); here both are exact and as of this very step, not as of the last report.

A higher score comes first; equal ones in the order of the config. `round_robin` starts one pool further for each sequence opened,
whatever is cached where. Either way a pool without room for the whole prompt is passed over while another pool of the group has it.

One match a pool of the group is all that this costs, and one look into the books of what is in flight.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.machine.commands import Open
from kvmanager.machine.draft import Draft
from kvmanager.machine.partial import Partial, find_partial
from kvmanager.pages.inflight import pages_agreeing
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import TOKEN_BYTES, Match, Node
from kvmanager.tables import div_ceil

__all__ = ["Look", "forgo_partial", "in_order", "look", "pages_now", "pages_wanted", "place_of"]


@dataclass(slots=True)
class Look:
    """What one pool offers a prompt.

    found      leading pages in its index, and the nodes they are in; `cached` is their tokens, and those of `partial`
    partial    the page that goes on to agree for a while, to be copied; None if there is none or the pool does not
    computing  the sequence that computes what comes next, 0 if none does or the prompt does not wait
    expected   tokens beyond the cached ones that come from there
    """

    pool: Pool
    found: Match
    cached: int
    computing: int = 0
    expected: int = 0
    partial: Partial | None = None


def look(draft: Draft, pool: Pool, namespace: bytes, data: bytes, command: Open, now_ms: int) -> Look:
    pages_max = (len(command.tokens) - 1) // pool.page_size
    found = draft.pool(pool.index).match(namespace, data, pages_max)
    pages = found.page_count()
    item = Look(pool, found, pages * pool.page_size)
    if command.wait and pages < pages_max and draft.state.config.inflight_wait_ms:
        item.computing, expected = _in_flight(draft, item, namespace, data, pages_max, now_ms)
        item.expected = expected * pool.page_size
        if item.expected < draft.state.config.inflight_tokens_min:
            item.computing = item.expected = 0
    least = draft.state.config.pools[pool.index].partial_match
    if least and not item.computing:
        rest = data[item.cached * TOKEN_BYTES : (len(command.tokens) - 1) * TOKEN_BYTES]
        item.partial = find_partial(draft.pool(pool.index), found, namespace, rest)
        if item.partial is not None and item.partial.tokens >= least:
            item.cached += item.partial.tokens
        else:
            item.partial = None
    return item


def forgo_partial(item: Look) -> bool:
    """The pool has no page for the copy: whole pages only. False if there is nothing to forgo."""
    if item.partial is None:
        return False
    item.cached, item.partial = item.cached - item.partial.tokens, None
    return True


def place_of(item: Look, namespace: bytes, data: bytes) -> tuple[int, Node | bytes, int, bytes]:
    """Where a prompt's match ends, and the token ids of its next page: equal for prompts of one step that would compute the same page."""
    step = item.pool.prefix.page_bytes
    at = item.found.page_count() * step
    return item.pool.index, item.found.nodes[-1] if item.found.nodes else namespace, item.found.last_pages, data[at : at + step]


def _in_flight(draft: Draft, item: Look, namespace: bytes, data: bytes, pages_max: int, now_ms: int) -> tuple[int, int]:
    """(sequence, pages): who computes the pages that follow the match, and how many of them it will have, of the first `pages_max`."""
    pool, step = item.pool, item.pool.prefix.page_bytes
    place = place_of(item, namespace, data)
    earlier = draft.flying.get(place)  # opened by this very step
    at = item.cached * TOKEN_BYTES
    if earlier is not None:
        return earlier[0], pages_agreeing(earlier[1][at:], data[at : pages_max * step], step)
    node = item.found.nodes[-1] if item.found.nodes else pool.prefix.roots.get(namespace)
    if node is None or item.found.last_pages < node.count:
        return 0, 0  # who holds a place ends at the end of a node
    sequence_id = pool.inflight.find(node, place[3])
    if not sequence_id or not draft.alive(sequence_id) or sequence_id in draft.cut:
        return 0, 0
    sequence = draft.state.sequences[sequence_id]
    if sequence.sealed or now_ms - pool.inflight.flights[sequence_id].since_ms > draft.state.config.inflight_wait_ms:
        return 0, 0
    return sequence_id, pages_agreeing(sequence.tokens[at : pages_max * step], data[at : pages_max * step], step)


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
        return load_weight * load - match_weight * (item.cached + item.expected)

    return sorted(looks, key=cost)  # stable: equal ones stay in the order of the config


def pages_now(item: Look, command: Open) -> int:
    """Pages that opening the prompt takes at once."""
    count = len(command.tokens)
    return pages_wanted(item, max(min(item.cached + command.chunk, count), count + command.reserve if command.reserve else 0))


def pages_wanted(item: Look, tokens: int) -> int:
    """Pages that a prompt of so many tokens takes beyond those that are there."""
    return max(0, div_ceil(tokens, item.pool.page_size) - item.cached // item.pool.page_size)
