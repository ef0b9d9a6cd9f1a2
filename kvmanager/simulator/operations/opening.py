"""Sequences are opened: what of a prompt is found in the index, and nothing else, comes from it."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.machine.commands import Open, Step
from kvmanager.simulator.books import PAGE, Chore, Text, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.rates import streams_prompts
from kvmanager.simulator.operations.tenants import check_quota
from kvmanager.simulator.registry import draws, follows, refused


@draws
def opens(driver: Any) -> dict[str, Any]:
    drawn = [_open(driver) for _ in range(driver.rng.choice(driver.drawn("opens", (0, 0, 1), (0, 1, 1, 2, 3))))]
    if drawn and driver.rng.random() < 0.3:
        drawn.append(drawn[0])  # the same prompt twice at once
    return {"opens": drawn}


def draw_prompt(driver: Any) -> list[int]:
    rng = driver.rng
    document, size = rng.choice(driver.documents), rng.choice(driver.config.pools).page_size
    pages = rng.choice((0, 1, 1, 2, 2, 3, 4))
    length = max(1, min(pages * size, 4 * PAGE) + rng.choice((-1, 0, 0, 1, 1, 7)))
    return document[:length] + [rng.choice((1, 2)) for _ in range(rng.choice((0, 0, 0, 1, PAGE)))]


def _open(driver: Any) -> Open:
    rng = driver.rng
    pool = rng.choice(driver.config.pools).name if rng.random() < driver.drawn("opens that name a pool", 0.3, 0.7, 1) else ""
    chunk = rng.choice((0, 0, 5, PAGE) if rng.random() < streams_prompts(driver) else (0, 5, PAGE, 100, 100, 100))
    tenant, extra = rng.choice((b"red", b"blue")), rng.choice((b"",) * 7 + (b"lora",))
    prompt = draw_prompt(driver)
    extras = _extras(driver, len(prompt)) if rng.random() < driver.drawn("opens with extra keys", 0, 0, 0.2, 0.6) else []
    reserve = rng.choice((0, 0, 1, PAGE, 2 * PAGE)) if driver.drawn("reserves", False, False, True) else 0
    return Open(
        prompt,
        pool,
        tenant,
        extra,
        chunk,
        "" if pool else "default",
        wait=rng.random() < 0.5,
        priority=rng.choice(driver.drawn("priorities", (0,), (-1, 0, 0, 2))),
        waiting=rng.choice([0, *driver.model.waiting]),
        extras=extras,
        reserve=reserve,
    )


def _extras(driver: Any, count: int) -> list[tuple[bytes, int, int]]:
    rng = driver.rng
    starts = [rng.choice((0, 5, PAGE - 1, PAGE, PAGE + 3)) % count for _ in range(rng.choice((1, 1, 2)))]
    return [(rng.choice((b"cat", b"dog")), start, min(count, start + rng.choice((1, 4, PAGE)))) for start in starts]


def stamps_of(model: Model, asked: Open) -> list[int]:
    """A stamp for each token: of all tokens up to it, and of all extra keys whose ranges have begun."""
    stamp, stamps = model.stamps.root(asked.tenant, asked.extra), []
    for place, token in enumerate(asked.tokens.tolist()):
        for key, start, stop in asked.extras:
            if start == place:
                stamp = model.stamps.after(stamp, (key, stop - start))
        stamps.append(stamp := model.stamps.after(stamp, token))
    return stamps


@follows(ev.SequenceOpened)
def opened(model: Model, event: ev.SequenceOpened, turn: Turn) -> None:
    asked = turn.opened[event.sequence]
    tokens, stamps = asked.tokens.tolist(), stamps_of(model, asked)
    cached, fresh, size = event.cached.tolist(), event.fresh.tolist(), model.sizes[event.pool]
    run = model.indexed_run(event.pool, turn.visible[event.pool], stamps, len(tokens) - 1)
    demand(cached == run, f"open {event.sequence}: cached pages {cached}, the model finds {run}")
    model.check_content(event.pool, cached, stamps[: len(cached) * size], f"open {event.sequence}")
    _check_placed(model, event, asked, stamps, turn)
    if asked.wait and model.config.inflight_wait_ms and len(run) < (len(tokens) - 1) // size:
        end = (len(run) + 1) * size
        for other in turn.opened:
            text = model.texts.get(other)
            same = text is not None and text.pool == event.pool and text.stamps[end - 1 : end] == stamps[end - 1 : end]
            demand(not same, f"open {event.sequence}: computes what sequence {other} of the same step computes")
    model.take(event.pool, fresh, f"open {event.sequence}")
    start = len(cached) * size + _check_copied(model, event, stamps, turn)
    text = Text(event.sequence, turn.client, event.pool, tokens, stamps, len(tokens), event.length, cached + fresh)
    text.tenant, text.published = asked.tenant, len(cached)
    text.reserved = model.pages_of(event.pool, len(tokens) + asked.reserve) if asked.reserve else 0
    demand(event.sequence not in model.texts, f"sequence id {event.sequence} given twice")
    enough = max(model.pages_of(event.pool, event.length), text.reserved)
    demand(len(text.pages) == enough, f"open {event.sequence}: {len(text.pages)} pages for {event.length} tokens")
    model.seen["reserved"] += text.reserved > 0
    model.texts[event.sequence] = text
    model.seen["cached"] += bool(cached)
    if fresh:
        check_quota(model, event.pool, asked.tenant, f"open {event.sequence}")
    if event.length > start:
        turn.starts[event.sequence] = start


def _check_copied(model: Model, event: ev.SequenceOpened, stamps: list[int], turn: Turn) -> int:
    """Tokens that come from the beginning of a page of the index: as many as the best of them agrees with."""
    size = model.sizes[event.pool]
    copied, full = event.copied, len(event.cached) * size
    rest = stamps[full : min(full + size, len(stamps) - 1)]
    pages = [page for page, _ in turn.visible[event.pool].values()]
    memory: Any = next(iter(model.crew(event.pool))).memory
    best = 0 if memory is not None else event.copied  # while a log is read again, nobody looks at what is in the pages
    for page in pages if memory is not None else ():
        same = [one == other for one, other in zip(memory[page].tolist(), rest, strict=False)]
        best = max(best, same.index(False) if False in same else len(same))
    least = model.config.pools[event.pool].partial_match
    demand(copied == 0 or least <= copied <= best, f"open {event.sequence}: {copied} copied tokens, the best page has {best}")
    demand(copied == 0 or least, f"open {event.sequence}: {copied} copied tokens in a pool that copies none")
    if copied:
        model.seen["matched below a page"] += 1
        target = int(event.fresh[0])
        chore = Chore(
            model.version, (event.sequence,), full + copied, target=target, stamps=stamps[full : full + copied], known=full + copied
        )
        turn.chores.append((event.pool, chore))
    elif least and best >= least:
        model.seen["not matched below a page"] += 1  # no page was free for it, or the one that agrees is given up in this very step
    return copied


def _check_placed(model: Model, event: ev.SequenceOpened, asked: Open, stamps: list[int], turn: Turn) -> None:
    """A pool of the group, and none that surely had room for the whole prompt would have been better."""
    config = model.config
    demand(event.pool not in model.draining, f"open {event.sequence}: in pool {event.pool}, which is being emptied")
    if asked.pool:
        demand(config.pools[event.pool].name == asked.pool, f"open {event.sequence}: asked for {asked.pool}, got pool {event.pool}")
        return
    model.seen["placed"] += 1
    if config.placement != "prefix" or (asked.wait and config.inflight_wait_ms) or model.quotas:
        return  # what is in flight where is not in these books; and a quota is a reason to go elsewhere
    if any(pool.partial_match for pool in config.pools):
        return  # nor is which of the pages that agree for a while was found

    assert isinstance(turn.command, Step)
    forgotten = dict.fromkeys(turn.command.forget.tolist())  # counted as closed by then, though their pages go last

    def score(pool: int) -> int:
        run = model.indexed_run(pool, turn.visible[pool], stamps, len(stamps) - 1)
        load = sum(text.known for text in model.texts.values() if text.pool == pool and text.sequence not in forgotten)
        return config.placement_match_weight * len(run) * model.sizes[pool] - config.placement_load_weight * load

    for other, pool in enumerate(config.pools):
        crew = model.crew(other, fenced=True)
        if (
            pool.group == asked.group
            and other not in model.draining
            and len(crew) == pool.workers
            and not any(worker.fenced for worker in crew)
        ):
            acked, owners = model.let_go_up_to(other), model.owners(other)
            indexed = {page for page, _ in model.index[other].values()}
            free = [
                page
                for page in range(pool.num_pages)
                if not owners[page] and page not in indexed and model.dropped[other].get(page, 0) <= acked
            ]
            if len(free) >= model.pages_of(other, len(stamps) + asked.reserve):
                demand(score(other) <= score(event.pool), f"open {event.sequence}: pool {event.pool} has {score(event.pool)}, {other} more")
                model.seen["placed with a choice"] += other != event.pool


@refused("prefix_pending")
def pending(model: Model, asked: Open, details: dict[str, Any], turn: Turn) -> None:
    """Somebody is computing just these tokens, in the pool that the prompt would go to, and can still go on."""
    what = f"prefix pending {details}"
    number = [pool.name for pool in model.config.pools].index(details["pool"])
    demand(asked.wait and details["pool"] in (asked.pool, "" if asked.pool else details["pool"]), f"{what}: {asked}")
    text = model.texts.get(details["sequence"])
    if text is None:
        demand(False, f"{what}: no such sequence is open")
        return
    stamps = stamps_of(model, asked)
    cached, size = len(model.indexed_run(number, turn.visible[number], stamps, len(stamps) - 1)), model.sizes[number]
    end = cached * size + details["tokens"]
    demand(details["tokens"] > 0 and details["tokens"] % size == 0 and end < len(stamps), f"{what}: {cached} pages are cached")
    demand(text.pool == number and text.known >= end and text.stamps[:end] == stamps[:end], f"{what}: {text} will not have them")
    model.seen["waited"] += 1
