"""Prompts wait in the scheduler's queue, and leave it: opened, given up, or with their client. Nothing is promised, so nothing is owed.

That eviction spares their pages is checked where its order is (tests/control/test_eviction.py); here it is the queue's books that have to
stay right, in every reader, whatever happens to the index meanwhile.
"""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.machine.commands import Enqueue
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.opening import draw_prompt
from kvmanager.simulator.registry import draws, follows


@draws
def queue(driver: Any) -> dict[str, Any]:
    rng, rate = driver.rng, driver.drawn("queue rate", 0, 0.2, 0.6)
    waiting = [each for each in driver.model.waiting if rng.random() < 0.2]
    if rng.random() < 0.01:
        waiting.append(987_654)
    if rng.random() >= rate:
        return {"dequeue": waiting}
    tenant = rng.choice((b"red", b"blue"))
    pool = rng.choice(driver.config.pools).name if rng.random() < 0.7 else ""
    front = rng.random() < 0.2
    return {"dequeue": waiting, "enqueue": [Enqueue(draw_prompt(driver), pool, tenant, b"", "" if pool else "default", front)]}


@follows(ev.PromptEnqueued)
def enqueued(model: Model, event: ev.PromptEnqueued, turn: Turn) -> None:
    demand(event.waiting not in model.waiting, f"waiting prompt id {event.waiting} given twice")
    demand(event.waiting in turn.reply.get("queued", []), f"waiting prompt {event.waiting} is in no reply")
    model.waiting[event.waiting] = event.client
    tenant = event.namespace[4 : 4 + int.from_bytes(event.namespace[:2], "little")]
    stamps = [model.stamps.root(tenant, event.namespace[4 + len(tenant) :])]
    for token in event.tokens.tolist():
        stamps.append(model.stamps.after(stamps[-1], token))
    model.wanted[event.waiting] = event.pools.tolist(), stamps
    demand(len(model.waiting) <= model.config.waiting_max, f"{len(model.waiting)} prompts wait")


@follows(ev.PromptsDequeued)
def dequeued(model: Model, event: ev.PromptsDequeued, turn: Turn) -> None:
    for waiting in event.waiting.tolist():
        demand(model.waiting.pop(waiting, None) is not None, f"prompt {waiting} left a queue that it was not in")
