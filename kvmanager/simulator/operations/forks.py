"""Sequences are forked: children share what is full and get a copy of the last page, and go on with words of their own."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Chore, Text, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def fork(driver: Any) -> dict[str, Any]:
    rng, rate = driver.rng, driver.drawn("fork rate", 0, 0, 0.05, 0.2)
    return {"fork": [(each, rng.choice((1, 1, 2, 3))) for each in driver.model.texts if rng.random() < rate]}


@follows(ev.SequenceForked)
def forked(model: Model, event: ev.SequenceForked, turn: Turn) -> None:
    parent, what = model.texts[event.parent], f"fork {event.parent}"
    demand(not parent.handoff, f"{what}: it is being handed off")
    demand(event.length == turn.starts.get(event.parent, parent.length), f"{what}: at {event.length} of {parent.length} tokens")
    demand(list(event.children) in turn.reply["forked"], f"{what}: {event.children} not in {turn.reply['forked']}")
    size = model.sizes[parent.pool]
    full, part = divmod(event.length, size)
    demand(full * size <= parent.known, f"{what}: tokens of shared pages are known up to {parent.known}")
    fresh = event.fresh.tolist()
    demand(len(fresh) == (len(event.children) if part else 0), f"{what}: {len(fresh)} fresh pages for {len(event.children)} children")
    model.take(parent.pool, fresh, what)
    for place, child in enumerate(event.children.tolist()):
        demand(child not in model.texts, f"sequence id {child} given twice")
        tokens, stamps = parent.tokens[: event.length], parent.stamps[: event.length]
        pages = parent.pages[:full] + fresh[place : place + 1]
        text = Text(child, turn.client, parent.pool, tokens, stamps, min(parent.known, event.length), event.length, pages)
        text.mood = parent.mood + place + 1
        text.tenant, text.unlisted, text.published = parent.tenant, parent.unlisted, min(parent.published, full)
        model.texts[child] = text
        chore = Chore(model.version, (child, event.parent), event.length)
        if part:
            chore.target, chore.stamps = fresh[place], stamps[full * size :]
        turn.chores.append((parent.pool, chore))


@follows(ev.PagesCopied)
def copied(model: Model, event: ev.PagesCopied, turn: Turn) -> None:
    sources, targets = event.sources.tolist(), event.targets.tolist()
    demand(len(set(targets)) == len(targets), f"copied twice to one of {targets}")
    demand(not set(sources) & set(targets), f"pages {set(sources) & set(targets)} are sources and targets of one step")
    turn.copies |= {
        (event.pool, target): (source, tokens) for source, target, tokens in zip(sources, targets, event.tokens.tolist(), strict=True)
    }
    owners = model.owners(event.pool)
    for source in sources:
        if not owners[source]:
            model.dropped[event.pool][source] = model.version  # used now: not to be evicted before this has been acknowledged
