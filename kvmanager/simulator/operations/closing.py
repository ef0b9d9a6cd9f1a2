"""Sequences end: by their client, or because their pool's memory is gone."""

from __future__ import annotations

from typing import Any

from kvmanager import events as ev
from kvmanager.simulator.books import Turn
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def close(driver: Any) -> dict[str, Any]:
    rate = driver.drawn("close rate", 0.05, 0.15, 0.3)
    return {"close": [each for each in driver.model.texts if driver.rng.random() < rate]}


@follows(ev.SequenceClosed)
def closed(model: Model, event: ev.SequenceClosed, turn: Turn) -> None:
    text = model.texts.pop(event.sequence)
    model.let_go(text.pool, text.pages)
    if event.reason == 1:
        model.tell(text.owner, "lost", event.sequence, 0)
