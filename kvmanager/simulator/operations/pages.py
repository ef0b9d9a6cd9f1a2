"""Pages enter the prefix index and leave it."""

from __future__ import annotations

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import follows


@follows(ev.PagesPublished)
def published(model: Model, event: ev.PagesPublished, turn: Turn) -> None:
    text, pages = model.texts[event.sequence], event.pages.tolist()
    index, size = model.index[text.pool], model.sizes[text.pool]
    last = event.first + len(pages)
    demand(last * size <= min(text.known, text.length), f"publish {event.sequence}: page {last - 1} is not known to its end")
    demand(not text.unlisted, f"publish {event.sequence}: its tenant was flushed")
    before = text.pages[event.first : last]
    for place, page in enumerate(pages, event.first):
        stamp, above = text.stamps[(place + 1) * size - 1], text.stamps[place * size - 1] if place else 0
        if stamp not in index:
            turn.indexed[text.pool, page] = None
        found = index.setdefault(stamp, (page, above))
        model.tenants[stamp] = text.tenant
        demand(found[0] == page, f"publish {event.sequence}: page {page} where the index has {found[0]}")
        if page != before[place - event.first]:
            model.seen["deduplicated"] += 1
    text.pages, text.published = text.pages[: event.first] + pages + text.pages[last:], last
    model.let_go(text.pool, before)
    model.check_content(text.pool, text.pages[:last], text.stamps[: last * size], f"publish {event.sequence}")


@follows(ev.PagesEvicted)
def evicted(model: Model, event: ev.PagesEvicted, turn: Turn) -> None:
    owners = model.owners(event.pool)
    index = model.index[event.pool]
    for page in event.pages.tolist():
        stamp = next((stamp for stamp, (each, _) in index.items() if each == page), 0)
        demand(stamp, f"evict: page {page} is not in the index")
        demand(not owners[page], f"evict: page {page} has {owners[page]} owners")
        demand(all(above != stamp for _, above in index.values()), f"evict: page {page} went before a page that continues it")
        model.check_drained(event.pool, page, "evict")
        del index[stamp]
        turn.visible[event.pool].pop(stamp, None)


@follows(ev.IndexDropped)
def dropped(model: Model, event: ev.IndexDropped, turn: Turn) -> None:
    pages = [page for page, _ in model.index[event.pool].values()]
    model.index[event.pool].clear()
    model.let_go(event.pool, pages)
    turn.visible[event.pool].clear()
