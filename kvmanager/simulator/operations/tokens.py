"""Token ids of decoded tokens become known to the manager, some later than they are written, some never."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def append(driver: Any) -> dict[str, Any]:
    rng, tokens = driver.rng, []
    for text in driver.model.texts.values():
        end = driver.cutting.get(text.sequence, len(text.tokens))  # what a truncation of this step leaves
        if text.known < end and rng.random() < 0.4:
            tokens.append((text.sequence, text.tokens[text.known : min(end, text.known + rng.choice((1, 4, 100)))]))
    return {"tokens": tokens}


@follows(ev.TokensAppended)
def appended(model: Model, event: ev.TokensAppended, turn: Turn) -> None:
    text = model.texts[event.sequence]
    told = event.tokens.tolist()
    demand(text.tokens[text.known : text.known + len(told)] == told, f"tokens of {event.sequence} arrived changed")
    turn.known.setdefault(event.sequence, text.known)
    text.known += len(told)
