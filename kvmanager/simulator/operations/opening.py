"""Sequences are opened: what of a prompt is found in the index, and nothing else, comes from it."""

from __future__ import annotations

from typing import Any

from kvmanager import events as ev
from kvmanager.commands import Open
from kvmanager.simulator.books import PAGE, Text, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def opens(driver: Any) -> dict[str, Any]:
    drawn = [_open(driver) for _ in range(driver.rng.choice(driver.drawn("opens", (0, 0, 1), (0, 1, 1, 2, 3))))]
    if drawn and driver.rng.random() < 0.3:
        drawn.append(drawn[0])  # the same prompt twice at once
    return {"opens": drawn}


def _prompt(driver: Any) -> list[int]:
    rng = driver.rng
    document = rng.choice(driver.documents)
    pages = rng.choice((0, 1, 1, 2, 2, 3, 4))
    length = max(1, pages * PAGE + rng.choice((-1, 0, 0, 1, 1, 7)))
    return document[:length] + [rng.choice((1, 2)) for _ in range(rng.choice((0, 0, 0, 1, PAGE)))]


def _open(driver: Any) -> Open:
    rng = driver.rng
    pool = rng.choice(driver.config.pools).name
    chunk = rng.choice((0, 5, PAGE, 100, 100, 100))
    return Open(_prompt(driver), pool, tenant=rng.choice((b"red", b"blue")), extra=rng.choice((b"",) * 7 + (b"lora",)), chunk=chunk)


@follows(ev.SequenceOpened)
def opened(model: Model, event: ev.SequenceOpened, turn: Turn) -> None:
    asked = turn.opened[event.sequence]
    tokens = asked.tokens.tolist()
    stamp, stamps = model.stamps.root(asked.tenant, asked.extra), []
    for token in tokens:
        stamps.append(stamp := model.stamps.after(stamp, token))
    cached, fresh = event.cached.tolist(), event.fresh.tolist()
    run = model.indexed_run(turn.visible[event.pool], stamps, (len(tokens) - 1) // PAGE)
    demand(cached == run, f"open {event.sequence}: cached pages {cached}, the model finds {run}")
    model.check_content(event.pool, cached, stamps[: len(cached) * PAGE], f"open {event.sequence}")
    model.take(event.pool, fresh, f"open {event.sequence}")
    text = Text(event.sequence, turn.client, event.pool, tokens, stamps, len(tokens), event.length, cached + fresh)
    demand(event.sequence not in model.texts, f"sequence id {event.sequence} given twice")
    demand(len(text.pages) == -(-event.length // PAGE), f"open {event.sequence}: {len(text.pages)} pages for {event.length} tokens")
    model.texts[event.sequence] = text
    model.seen["cached"] += bool(cached)
    if event.length > len(cached) * PAGE:
        turn.starts[event.sequence] = len(cached) * PAGE
