"""Drains: a pool is emptied while everybody goes on, so that its workers can leave.

Nothing new comes into a draining pool. Its sequences are handed to other pools of its group, `drain_at_once` at a time, each only once
there is room for it: until then it goes on where it is. Their owners hear of it as "moving" and "resident". When no sequence and no
handoff holds anything in the pool, whoever asked for the drain is told that it is "drained". What is cached in it is lost with it.

A drain ends when it is stopped, or when the pool's last worker has left: the next one to join finds a pool like any other.
"""

from __future__ import annotations

from typing import Any

from kvmanager.errors import KVError
from kvmanager.machine import events as ev
from kvmanager.machine.clients import notify
from kvmanager.machine.commands import Drain
from kvmanager.machine.draft import Draft
from kvmanager.machine.handoffs import begin, give_up, others
from kvmanager.machine.state import Notice, State
from kvmanager.pages.pool import Pool

__all__ = ["apply_drained", "apply_draining", "drain", "go_on", "is_due"]

REFUSALS_MAX = 4  # sequences that find no room in one look; the others would hardly


def drain(draft: Draft, command: Drain, now_ms: int, client: int) -> dict[str, Any]:
    """What is still there: sequences, and handoffs that hold pages of the pool. Raises Unknown (pool), Fenced (worker)."""
    state = draft.state
    pool = state.pools[state.worker(command.worker).pool] if command.worker else state.pool(command.pool)
    draft.events.append(ev.PoolDraining(pool.index, 0 if command.stop else client))
    draft.draining[pool.index] = not command.stop
    if not command.stop:
        for number in sorted(state.handoffs.waiting):
            handoff = state.handoffs[number]
            if handoff.target == pool.index and number not in draft.aborted:
                give_up(draft, handoff, "pool_draining", f"pool {pool.name} is being drained")
        _leave(draft, pool)
    return {"sequences": pool.arrivals.count, "handoffs": state.handoffs.holding.get(pool.index, 0)}


def go_on(draft: Draft) -> None:
    """As time passes: more sequences leave, and pools turn out to be empty."""
    for pool in draft.state.pools:
        if pool.draining and not pool.drained:
            if _empty(draft.state, pool):
                draft.events.append(ev.PoolDrained(pool.index))
            else:
                _leave(draft, pool)


def is_due(state: State) -> bool:
    """Whether `go_on` has something to do, as far as a glance can tell."""
    for pool in state.pools:
        if pool.draining and not pool.drained:
            if _empty(state, pool):
                return True
            under_way = state.handoffs.holding.get(pool.index, 0)
            elsewhere = any(
                other is not pool and not other.draining and len(state.live_workers(other.index)) >= other.workers_expected
                for other in state.groups[pool.group]
            )
            if elsewhere and under_way < min(pool.arrivals.count, state.config.drain_at_once):
                return True
    return False


def _empty(state: State, pool: Pool) -> bool:
    return not pool.arrivals.count and not state.handoffs.holding.get(pool.index, 0)


def _leave(draft: Draft, pool: Pool) -> None:
    """Begin handoffs for sequences of the pool, those that came first first, each into a pool that has room for it now."""
    state = draft.state
    left = state.config.drain_at_once - state.handoffs.holding.get(pool.index, 0)
    refused = 0
    for sequence_id in pool.arrivals.in_order():
        if left <= 0 or refused >= REFUSALS_MAX:
            return
        sequence = state.sequences[sequence_id]
        if not draft.alive(sequence_id) or draft.active_handoff(sequence) or sequence_id in draft.cut:
            continue
        try:
            begin(draft, sequence, others(state, sequence, pool.group), pool.group, reserve=True, cause="drain")
        except KVError:
            refused += 1
            continue
        left -= 1


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_draining(state: State, event: ev.PoolDraining) -> None:
    pool = state.pools[event.pool]
    pool.draining, pool.drained = event.client, False


def apply_drained(state: State, event: ev.PoolDrained) -> None:
    pool = state.pools[event.pool]
    pool.drained = True
    notify(state, pool.draining, Notice("drained", 0, 0, pool.name))
