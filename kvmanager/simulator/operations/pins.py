"""Prefixes are pinned, and let go: by their owner, by a longer pin of the same session, by a lease that ended, or with their memory."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.machine.commands import Pin, Step
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.opening import draw_prompt
from kvmanager.simulator.registry import draws, follows, heals


@draws
def pins(driver: Any) -> dict[str, Any]:
    rng, rate = driver.rng, driver.drawn("pin rate", 0, 0.1, 0.4)
    drawn: dict[str, Any] = {"unpin": [each for each in driver.model.pins if rng.random() < 0.1]}
    if rng.random() < 0.01:
        drawn["unpin"].append(987_654)
    if rng.random() < rate:
        lease = rng.choice(({}, {"lease_ms": rng.randint(1, 500)}, {"lease_steps": rng.randint(1, 50)}))
        session = rng.choice((b"", b"one", b"two"))
        texts = list(driver.model.texts)
        if texts and rng.random() < 0.6:
            drawn["pin"] = [Pin(sequence=rng.choice(texts), session=session, **lease)]
        else:
            pool, tenant = rng.choice(driver.config.pools).name, rng.choice((b"red", b"blue"))
            drawn["pin"] = [Pin(draw_prompt(driver), pool, tenant, session=session, **lease)]
    if rng.random() < 0.05:
        drawn["release"] = [(rng.choice((b"red", b"blue")), rng.choice((b"one", b"two", b"none")))]
    return drawn


@heals
def unpin(driver: Any) -> list[Any]:
    return [Step(unpin=list(driver.model.pins))] if driver.model.pins else []


@follows(ev.PinBegun)
def begun(model: Model, event: ev.PinBegun, turn: Turn) -> None:
    pages, what = event.pages.tolist(), f"pin {event.pin}"
    demand(event.pin not in model.pins, f"{what}: id given twice")
    places = {page: (stamp, above) for stamp, (page, above) in model.index[event.pool].items()}
    demand(pages and all(page in places for page in pages), f"{what}: not all of {pages} are in the index")
    for before, page in zip([None, *pages], pages, strict=False):
        expected = places[before][0] if before is not None else 0
        demand(places[page][1] == expected, f"{what}: page {page} does not continue {before}")
    model.pins[event.pin] = event.pool, pages
    held = {page for pool, each in model.pins.values() if pool == event.pool for page in each}
    limit = model.config.pools[event.pool].num_pages * model.config.pin_percent_all // 100
    demand(len(held) <= limit, f"{what}: {len(held)} pages are pinned, the budget is {limit}")


@follows(ev.PinsEnded)
def ended(model: Model, event: ev.PinsEnded, turn: Turn) -> None:
    for pin in event.pins.tolist():
        demand(pin in model.pins, f"pin {pin} ended twice")
        pool, pages = model.pins.pop(pin)
        model.let_go(pool, pages)
    model.seen[f"pins_ended_{event.reason}"] += 1
