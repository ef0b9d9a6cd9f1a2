"""Running sequences grow; a step that repeats the last one's growth is one short event."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def grow(driver: Any) -> dict[str, Any]:
    rng, texts = driver.rng, driver.model.texts
    growing, counts = driver.last_grow
    if rng.random() < 0.5 or not growing or not set(growing) <= set(texts):
        # Seals come when growth stops; what is computed while it is streamed has to get to its end first.
        streamed = [move for move in driver.model.moves.values() if move.streaming and move.sequence in texts]
        left = {move.sequence: move.until - texts[move.sequence].length for move in streamed}
        rates = {
            each: 0.9 if left.get(each, 0) > 0 else 0.03 if each in left else 0.1 if text.handoff else 0.6 for each, text in texts.items()
        }
        rates |= {each: 0.95 for each, text in texts.items() if text.arrived and not text.handoff}  # it decodes on
        growing = [each for each in texts if rng.random() < rates[each]]
        rng.shuffle(growing)
        counts = [max(1, rng.choice((left.get(each, 0), 1, 5, 16) if each in left else (1, 1, 1, 1, 1, 1, 3, 20))) for each in growing]
        if rng.random() < 0.02:
            growing, counts = [*growing, 12345 << 20], [*counts, 1]
        driver.last_grow = growing, counts
    return {"grow": growing, "grow_counts": counts}


def _grow(model: Model, sequence: int, count: int, pages: list[int], turn: Turn) -> None:
    text = model.texts[sequence]
    move = model.moves.get(text.handoff)
    demand(move is None or move.state == "prefilling", f"sequence {sequence} grew while it was handed off")
    model.take(text.pool, pages, f"grow {sequence}")
    turn.starts[sequence] = text.length
    text.length, text.arrived = text.length + count, False
    text.pages = text.pages + pages
    enough = max(model.pages_of(text.pool, text.length), len(text.pages) - len(pages))
    demand(len(text.pages) == enough, f"grow {sequence}: {len(text.pages)} pages for {text.length} tokens")
    model.write_on(text, text.length)


@follows(ev.SequencesGrown)
def grown(model: Model, event: ev.SequencesGrown, turn: Turn) -> None:
    model.last_grow, at = [], 0
    for sequence, count, page_count in zip(event.ids.tolist(), event.counts.tolist(), event.page_counts.tolist(), strict=True):
        _grow(model, sequence, count, event.pages[at : at + page_count].tolist(), turn)
        model.last_grow.append((sequence, count))
        at += page_count


@follows(ev.GrownFurther)
def grown_further(model: Model, event: ev.GrownFurther, turn: Turn) -> None:
    pages: dict[int, list[int]] = {}
    for at, page in zip(event.at.tolist(), event.pages.tolist(), strict=True):
        pages.setdefault(at, []).append(page)
    demand(list(pages) == sorted(pages) and len(event.pages), f"grown further: {event.at.tolist()} does not ascend")
    for at, (sequence, count) in enumerate(model.last_grow):
        _grow(model, sequence, count, pages.pop(at, []), turn)
    demand(not pages, f"grown further: {list(pages)} are beyond the last growth")


@follows(ev.GrownAgain)
def grown_again(model: Model, event: ev.GrownAgain, turn: Turn) -> None:
    for sequence, count in model.last_grow:
        _grow(model, sequence, count, [], turn)
