"""Sequences end: by their client, or because their pool's memory is gone."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Text, Turn
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.rates import spares
from kvmanager.simulator.registry import draws, follows


@draws
def close(driver: Any) -> dict[str, Any]:
    rate = driver.drawn("close rate", 0.05, 0.15, 0.3)
    return {"close": [each for each, text in driver.model.texts.items() if driver.rng.random() < rate and not spares(driver, text)]}


@draws
def forget(driver: Any) -> dict[str, Any]:
    rate = driver.drawn("forget rate", 0, 0, 0.05)
    return {"forget": [each for each in driver.model.texts if driver.rng.random() < rate]}


@follows(ev.SequenceClosed)
def closed(model: Model, event: ev.SequenceClosed, turn: Turn) -> None:
    text = model.texts.pop(event.sequence)
    model.let_go(text.pool, text.pages)
    if event.reason == 3:
        _forget(model, text)
    if event.reason == 1:
        model.tell(text.owner, "lost", event.sequence, 0)


def _forget(model: Model, text: Text) -> None:
    """From the end of what it had in the index, pages leave that nobody owns or waits for, and nothing continues."""
    index, owners = model.index[text.pool], model.owners(text.pool)
    size = model.sizes[text.pool]
    waiting = [model.wanted[each] for each in model.waiting]
    wanted = {stamp for pools, stamps in waiting if text.pool in pools for stamp in stamps[size:-1:size]}
    for place in range(len(text.stamps) // size - 1, -1, -1):
        stamp = text.stamps[(place + 1) * size - 1]
        page = index.get(stamp, (-1, 0))[0]
        if page < 0 or place >= len(text.pages):
            continue
        if page != text.pages[place] or owners[page] or stamp in wanted or any(above == stamp for _, above in index.values()):
            break
        del index[stamp]
        model.dropped[text.pool][page] = model.version
        model.seen["forgotten"] += 1
