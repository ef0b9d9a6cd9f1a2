"""Sequences are cut back: drafts that were rejected, turns that were taken back. What follows then is something else."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Chore, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def truncate(driver: Any) -> dict[str, Any]:
    rng, rate = driver.rng, driver.drawn("truncate rate", 0, 0, 0.05, 0.2)
    driver.cutting = {}
    for each, text in driver.model.texts.items():
        if text.length and rng.random() < rate:
            driver.cutting[each] = max(
                1, text.length - rng.choice((0, 1, 2, 3, driver.config.pools[text.pool].page_size, rng.randint(0, text.length)))
            )
    return {"truncate": list(driver.cutting.items())}


@follows(ev.SequencesTruncated)
def truncated(model: Model, event: ev.SequencesTruncated, turn: Turn) -> None:
    columns = (event.ids, event.lengths, event.page_counts, event.sources, event.targets)
    for sequence, length, keep, _, target in zip(*(column.tolist() for column in columns), strict=True):
        text, what = model.texts[sequence], f"truncate {sequence}"
        size = model.sizes[text.pool]
        demand(not text.handoff, f"{what}: it is being handed off")
        demand(1 <= length <= text.length, f"{what}: {length} of {text.length} tokens")
        least = -(-length // size)
        demand(least <= keep <= max(least, text.reserved), f"{what}: {keep} pages for {length} tokens")
        full, part = divmod(length, size)
        last = text.pages[full] if part else -1
        indexed = any(last == page for page, _ in model.index[text.pool].values())
        if target >= 0:
            demand(part and keep == least, f"{what}: a copy of {part} slots, {keep} pages")
            model.take(text.pool, [target], what)
            model.seen["copied on truncation"] += 1
            model.copied[text.pool, text.tenant] += 1
        elif part:
            demand(not indexed, f"{what}: it would write into page {last} of the index")
            others = [each for each, other in model.texts.items() if other.pool == text.pool and last in other.pages and each != sequence]
            demand(not others, f"{what}: it would write into page {last} of {others}")
        start = full if target >= 0 else keep
        gone, text.pages = text.pages[start:], text.pages[:start] + ([target] if target >= 0 else [])
        text.length, text.known, text.published = length, min(text.known, length), min(text.published, full)
        text.written = {}
        text.tokens, text.stamps, text.mood = text.tokens[:length], text.stamps[:length], text.mood + 1
        model.let_go(text.pool, gone)
        stamps = text.stamps[full * size :] if target >= 0 else []
        turn.chores.append((text.pool, Chore(model.version, (sequence,), length, target=target, stamps=stamps)))
