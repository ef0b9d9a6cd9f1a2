"""Sequences change pools: prefilling, sealed, reserving, moving, resident, or aborted on the way."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.machine.commands import Drain, HandOff
from kvmanager.simulator.books import Item, Move, Pull, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.rates import spares, streams_prompts
from kvmanager.simulator.registry import action, draws, follows, heals


@draws
def hand_off(driver: Any) -> dict[str, Any]:
    rng, rate = driver.rng, driver.drawn("hand_off rate", 0.02, 0.1, 0.3)
    reserving, grouped = driver.drawn("reserving handoffs", 0, 0.3, 1), driver.drawn("handoffs to a group", 0, 0.3, 1)
    streaming = driver.drawn("streamed handoffs", 0, 0.5, 1)
    drawn: list[Any] = []
    for each, text in driver.model.texts.items():
        if text.length < text.known and not text.handoff and rng.random() < streams_prompts(driver):
            drawn.append(HandOff(each, group=rng.choice(("default", "*")), reserve=True, stream=True))
        elif rng.random() < rate and not spares(driver, text):
            reserve, pool = rng.random() < reserving, rng.choice(driver.config.pools).name
            stream = reserve and rng.random() < streaming
            if rng.random() < grouped:
                drawn.append(HandOff(each, group=rng.choice(("default", "*")), reserve=reserve, stream=stream))
            else:
                drawn.append(HandOff(each, pool, reserve=reserve, stream=stream) if reserve else (each, pool))
    return {"hand_off": drawn}


@draws
def abort(driver: Any) -> dict[str, Any]:
    rate = driver.drawn("abort rate", 0.01, 0.1)
    texts = driver.model.texts
    return {
        "abort": [
            each for each, move in driver.model.moves.items() if driver.rng.random() < rate and not spares(driver, texts.get(move.sequence))
        ]
    }


@action(0, 0.1, 0.4)
def drain(driver: Any) -> None:
    """A pool is emptied; more often than not somebody changes his mind, so that the other pools do not stand alone for good."""
    rng = driver.rng
    pool = rng.choice(driver.config.pools)
    number = driver.config.pools.index(pool)
    workers = [worker.worker for worker in driver.model.crew(number)]
    stop = number in driver.model.draining and rng.random() < 0.7
    by_worker = bool(workers) and rng.random() < 0.3
    driver.send(Drain("" if by_worker else pool.name, rng.choice(workers) if by_worker else 0, stop), 70)


@heals
def no_drains(driver: Any) -> list[Any]:
    return [Drain(driver.config.pools[pool].name, stop=True) for pool in driver.model.draining]


@follows(ev.PoolDraining)
def draining(model: Model, event: ev.PoolDraining, turn: Turn) -> None:
    model.drained.pop(event.pool, None)
    model.draining.pop(event.pool, None)
    if event.client:
        model.draining[event.pool] = event.client


@follows(ev.PoolDrained)
def drained(model: Model, event: ev.PoolDrained, turn: Turn) -> None:
    demand(event.pool in model.draining and event.pool not in model.drained, f"pool {event.pool} drained, and nobody asked for it")
    demand(all(text.pool != event.pool for text in model.texts.values()), f"pool {event.pool} drained with open sequences")
    demand(all(event.pool not in (move.source, move.target) for move in model.moves.values()), f"pool {event.pool} drained with handoffs")
    model.drained[event.pool] = None
    model.tell(model.draining[event.pool], "drained", 0, 0)


@follows(ev.HandoffBegun)
def begun(model: Model, event: ev.HandoffBegun, turn: Turn) -> None:
    text, what = model.texts[event.sequence], f"handoff {event.handoff}"
    demand(not text.handoff, f"sequence {event.sequence} in two handoffs")
    demand(event.target != text.pool, f"{what}: from pool {text.pool} to itself")
    demand(model.may_move(text.pool, event.target), f"{what}: from pool {text.pool} to {event.target}, whose workers do not convert it")
    demand(event.target not in event.tried, f"{what}: to pool {event.target}, which has failed it before")
    demand(event.target not in model.draining, f"{what}: into pool {event.target}, which is being emptied")
    if event.cause == "drain":
        demand(text.pool in model.draining, f"{what}: nobody empties pool {text.pool}")
    text.handoff = event.handoff
    model.moves[event.handoff] = Move(
        event.handoff, event.sequence, text.pool, event.target, until=event.until, group=event.group, tried=tuple(event.tried.tolist())
    )
    model.moves[event.handoff].since_ms = model.now_ms
    model.seen[f"begun_{event.cause or 'asked'}"] += 1
    if event.cause:
        model.tell(text.owner, "moving", event.sequence, event.handoff)


@follows(ev.HandoffReserved)
def reserved(model: Model, event: ev.HandoffReserved, turn: Turn) -> None:
    move = model.moves[event.handoff]
    text, shared, fresh = model.texts[move.sequence], event.shared.tolist(), event.fresh.tolist()
    demand(move.state == "prefilling" and not move.target_pages, f"handoff {event.handoff} reserves while {move.state}")
    known = turn.known.get(move.sequence, text.known)
    run = model.indexed_run(move.target, turn.visible[move.target], text.stamps, known)
    demand(shared == run, f"handoff {event.handoff}: shared pages {shared}, the model finds {run}")
    total = max(model.pages_in(text, move.target), model.pages_of(move.target, known))
    demand(len(shared) + len(fresh) == total, f"handoff {event.handoff}: reserves {len(shared) + len(fresh)} of {total} pages")
    model.take(move.target, fresh, f"handoff {event.handoff}")
    move.target_pages, move.fresh = shared + fresh, len(shared)


@follows(ev.HandoffStreaming)
def streaming(model: Model, event: ev.HandoffStreaming, turn: Turn) -> None:
    move, what = model.moves[event.handoff], f"handoff {event.handoff}"
    demand(move.state == "prefilling" and not move.streaming, f"{what} is streamed while {move.state}")
    move.streaming = True
    _check_pullers(model, move, event.pullers.tolist(), event.sources.tolist())


@follows(ev.LayersWritten)
def layers_written(model: Model, event: ev.LayersWritten, turn: Turn) -> None:
    for handoff, tokens, layers in zip(event.handoffs.tolist(), event.tokens.tolist(), event.layers.tolist(), strict=True):
        move = model.moves[handoff]
        demand(move.streaming and move.state == "prefilling", f"handoff {handoff}: layers written while {move.state}")
        demand(model.workers[event.worker].pool == move.source, f"handoff {handoff}: layers written by {event.worker} of another pool")
        demand(tokens <= model.texts[move.sequence].length, f"handoff {handoff}: layers of {tokens} tokens written")
        if (tokens, layers) > move.reach:
            move.reach, move.since_ms = (tokens, layers), model.now_ms
        model.seen["layers_written"] += 1


@follows(ev.SequencesWritten)
def written(model: Model, event: ev.SequencesWritten, turn: Turn) -> None:
    for sequence, tokens in zip(event.ids.tolist(), event.tokens.tolist(), strict=True):
        text = model.texts[sequence]
        demand(tokens <= text.length, f"sequence {sequence}: {tokens} of {text.length} tokens are written")
        before = text.written.get(event.worker)
        if before is not None and tokens > before and text.handoff:
            model.moves[text.handoff].since_ms = model.now_ms
        text.written[event.worker] = max(tokens, before or 0)


def _check_pullers(model: Model, move: Move, pullers: list[int], sources: list[int]) -> None:
    crew, there = [worker.worker for worker in model.crew(move.target)], [worker.worker for worker in model.crew(move.source)]
    demand(pullers == crew and all(each in there for each in sources), f"handoff {move.handoff}: {pullers} pull from {sources}")
    most = max((sources.count(each) for each in there), default=0)
    demand(most <= -(-len(crew) // max(len(there), 1)), f"handoff {move.handoff}: {most} of {len(crew)} workers pull from one")


@follows(ev.HandoffSealed)
def sealed(model: Model, event: ev.HandoffSealed, turn: Turn) -> None:
    move = model.moves[event.handoff]
    demand(move.state == "prefilling", f"handoff {event.handoff} sealed while {move.state}")
    move.state = "sealed"
    text = model.texts[move.sequence]
    demand(text.length >= move.until, f"handoff {event.handoff} sealed at {text.length} tokens, {move.until} were to be computed")
    model.check_content(move.source, text.pages, text.stamps[: text.length], f"seal {event.handoff}")


@follows(ev.HandoffReserving)
def reserving(model: Model, event: ev.HandoffReserving, turn: Turn) -> None:
    move = model.moves[event.handoff]
    demand(move.state == "sealed", f"handoff {event.handoff} reserving while {move.state}")
    move.state = "reserving"


@follows(ev.HandoffMoving)
def moving(model: Model, event: ev.HandoffMoving, turn: Turn) -> None:
    move = model.moves[event.handoff]
    demand(move.state in ("sealed", "reserving"), f"handoff {event.handoff} moving while {move.state}")
    text = model.texts[move.sequence]
    shared, fresh, kept = event.shared.tolist(), event.fresh.tolist(), event.kept
    known = turn.known.get(move.sequence, text.known)  # what this batch makes known, its decision did not see yet
    run = model.indexed_run(move.target, turn.visible[move.target], text.stamps, min(known, text.length))
    demand(shared == run, f"handoff {event.handoff}: shared pages {shared}, the model finds {run}")
    total, size = model.pages_in(text, move.target), model.sizes[move.target]
    demand(len(shared) + len(fresh) == total, f"handoff {event.handoff}: {len(shared) + len(fresh)} of {total} pages")
    model.check_content(move.target, shared, text.stamps[: len(shared) * size], f"handoff {event.handoff}")
    own, skipped = move.target_pages[move.fresh :], event.skipped
    demand(skipped == min(max(len(shared) - move.fresh, 0), len(own)), f"handoff {event.handoff}: skips {skipped} of {own}")
    left = own[skipped:]
    demand(fresh[:kept] == left[:kept] and kept == min(len(left), len(fresh)), f"handoff {event.handoff}: keeps {fresh[:kept]} of {own}")
    model.take(move.target, fresh[kept:], f"handoff {event.handoff}")
    unused = move.target_pages[: move.fresh] + own[:skipped] + left[kept:]
    move.state, move.source_pages, move.target_pages, move.fresh = "moving", list(text.pages), shared + fresh, len(shared)
    move.flushed = False
    model.let_go(move.target, unused)
    pullers, sources = event.pullers.tolist(), event.sources.tolist()
    _check_pullers(model, move, pullers, sources)
    for puller, source in zip(pullers, sources, strict=True):
        todo = [
            Item(_regathered(model, move, text.length, place), page, text.stamps[place * size : min((place + 1) * size, text.length)])
            for place, page in enumerate(fresh, len(shared))
            if place * size < text.length
        ]
        model.workers[puller].pulls[event.handoff] = Pull(event.handoff, move.source, model.workers[source].memory, todo, whole=list(todo))
    model.seen["moving_shared"] += bool(shared)
    model.seen["moving_converted"] += model.formats[move.source] != model.formats[move.target]
    model.seen["moving_regathered"] += size != model.sizes[move.source]
    model.seen["moving_reserved"] += bool(kept)
    model.seen["moving_streamed"] += move.streaming
    model.seen["moving_with_early_pulls"] += any(event.handoff in worker.early for worker in model.crew(move.target))


def _regathered(model: Model, move: Move, length: int, place: int) -> tuple[tuple[int, int, int], ...]:
    """(page, first slot, slots) of the source, for page `place` of a sequence of `length` tokens in the target."""
    ours, theirs = model.sizes[move.target], model.sizes[move.source]
    if ours == theirs:
        return ((move.source_pages[place], 0, theirs),)
    at, stop, runs = place * ours, min((place + 1) * ours, length), []
    while at < stop:
        page, slot = divmod(at, theirs)
        slots = min(theirs - slot, stop - at)
        runs.append((move.source_pages[page], slot, slots))
        at += slots
    return tuple(runs)


@follows(ev.HandoffFailed)
def failed(model: Model, event: ev.HandoffFailed, turn: Turn) -> None:
    move, worker = model.moves[event.handoff], model.workers[event.worker]
    demand(move.state == "moving", f"handoff {event.handoff} is tried again while {move.state}")
    pull = worker.pulls.get(event.handoff)
    if pull is None:  # as with a pull that the end of a lost log told of
        demand(model.begun, f"handoff {event.handoff}: failed, says the log, but {event.worker} does not pull")
        return
    if not model.replaying:
        demand(pull.failed and pull.attempt == event.attempt, f"handoff {event.handoff}: {worker.name} is at {pull}")
        pull.begin_again()
    pull.attempt = event.attempt + 1
    pull.source = model.workers[event.source].memory
    demand(model.workers[event.source].pool == move.source, f"handoff {event.handoff}: pulled from {event.source} of another pool")


@follows(ev.HandoffPulled)
def pulled(model: Model, event: ev.HandoffPulled, turn: Turn) -> None:
    pull = model.workers[event.worker].pulls.get(event.handoff)
    # None: the log went on to its end, and that was lost. The worker has pulled all the same.
    has = not pull.todo and not pull.failed if pull is not None else model.begun
    demand(has, f"handoff {event.handoff}: pulled, says the log, but {event.worker} has not")


@follows(ev.HandoffResident)
def resident(model: Model, event: ev.HandoffResident, turn: Turn) -> None:
    move = model.moves.pop(event.handoff)
    demand(move.state == "moving", f"handoff {event.handoff} resident while {move.state}")
    text = model.texts[move.sequence]
    left = text.pages
    if model.sizes[move.target] != model.sizes[move.source]:
        text.reserved = model.pages_of(move.target, text.reserved * model.sizes[move.source])
    text.pool, text.pages, text.handoff = move.target, move.target_pages, 0
    text.unlisted |= move.flushed
    text.published, text.written, text.arrived = move.fresh, {}, True
    model.let_go(move.source, left)
    for worker in model.crew(move.target, fenced=True):
        pull = worker.pulls.pop(event.handoff, None)  # None: as above, or it has heard of an abort that was lost, and ends itself
        demand(not pull.todo if pull is not None else model.begun, f"handoff {event.handoff}: resident before {worker.name} had all pages")
        worker.done[move.sequence] = text.length
    model.check_content(move.target, text.pages, text.stamps[: text.length], f"resident {event.handoff}")
    model.tell(text.owner, "resident", move.sequence, event.handoff)


@follows(ev.HandoffAborted)
def aborted(model: Model, event: ev.HandoffAborted, turn: Turn) -> None:
    move = model.moves[event.handoff]
    demand(move.state != "aborted", f"handoff {event.handoff} aborted twice")
    text = model.texts[move.sequence]
    text.handoff = 0
    model.seen[f"aborted_{move.state}"] += 1
    model.seen[f"aborted_because_{event.code}"] += 1
    if event.code == "stalled":
        limit, waited = model.config.handoff_prefill_ms, model.now_ms - move.since_ms
        demand(move.state == "prefilling" and 0 < limit < waited, f"handoff {event.handoff}: stalled after {waited} ms while {move.state}")
        told = [text.written.get(worker.worker, 0) for worker in model.crew(move.source)]
        demand(min(told, default=0) < text.length, f"handoff {event.handoff}: stalled, and all {text.length} tokens are written")
    if move.state == "moving":
        pages, move.target_pages, move.state = move.target_pages, [], "aborted"
        model.let_go(move.target, pages)
        for worker in model.workers.values():
            if event.handoff in worker.pulls:
                worker.pulls[event.handoff].aborted_at = model.version
    else:
        del model.moves[event.handoff]
        model.seen["aborted_reserved"] += bool(move.target_pages)
        model.seen["aborted_with_early_pulls"] += any(event.handoff in worker.early for worker in model.workers.values())
        model.let_go(move.target, move.target_pages)
    model.tell(text.owner, "aborted", move.sequence, event.handoff)


@follows(ev.HandoffEnded)
def ended(model: Model, event: ev.HandoffEnded, turn: Turn) -> None:
    move = model.moves.pop(event.handoff)
    demand(move.state == "aborted", f"handoff {event.handoff} ended while {move.state}")
    for worker in model.workers.values():
        pull = worker.pulls.get(event.handoff)
        demand(pull is None or not pull.todo, f"handoff {event.handoff} ended while {worker.name} was pulling")
    model.let_go(move.source, move.source_pages)


@follows(ev.LinkChosen)
def link_chosen(model: Model, event: ev.LinkChosen, turn: Turn) -> None:
    """Said by the worker itself, of one that is not known dead; what the manager tells of it is what was said last."""
    worker, peer = model.workers[event.worker], model.workers[event.peer]
    demand(worker.pool != peer.pool, f"{worker.name} says how it reaches {peer.name} of its own pool")
    demand(model.replaying or event.reason == f"{worker.name} from {peer.name}", f"link of {worker.name} to {peer.name}: {event.reason}")
    model.seen["links"] += 1
