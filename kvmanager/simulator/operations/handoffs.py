"""Sequences change pools: prefilling, sealed, reserving, moving, resident, or aborted on the way."""

from __future__ import annotations

from typing import Any

from kvmanager.machine import events as ev
from kvmanager.simulator.books import PAGE, Move, Pull, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import draws, follows


@draws
def hand_off(driver: Any) -> dict[str, Any]:
    rng, rate = driver.rng, driver.drawn("hand_off rate", 0.02, 0.1, 0.3)
    return {"hand_off": [(each, rng.choice(driver.config.pools).name) for each in driver.model.texts if rng.random() < rate]}


@draws
def abort(driver: Any) -> dict[str, Any]:
    rate = driver.drawn("abort rate", 0.01, 0.1)
    return {"abort": [each for each in driver.model.moves if driver.rng.random() < rate]}


@follows(ev.HandoffBegun)
def begun(model: Model, event: ev.HandoffBegun, turn: Turn) -> None:
    text = model.texts[event.sequence]
    demand(not text.handoff, f"sequence {event.sequence} in two handoffs")
    text.handoff = event.handoff
    model.moves[event.handoff] = Move(event.handoff, event.sequence, text.pool, event.target)


@follows(ev.HandoffSealed)
def sealed(model: Model, event: ev.HandoffSealed, turn: Turn) -> None:
    move = model.moves[event.handoff]
    demand(move.state == "prefilling", f"handoff {event.handoff} sealed while {move.state}")
    move.state = "sealed"
    text = model.texts[move.sequence]
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
    shared, fresh = event.shared.tolist(), event.fresh.tolist()
    known = turn.known.get(move.sequence, text.known)  # what this batch makes known, its decision did not see yet
    run = model.indexed_run(turn.visible[move.target], text.stamps[: min(known, text.length)], text.length // PAGE)
    demand(shared == run, f"handoff {event.handoff}: shared pages {shared}, the model finds {run}")
    demand(len(shared) + len(fresh) == len(text.pages), f"handoff {event.handoff}: {len(shared) + len(fresh)} of {len(text.pages)} pages")
    model.check_content(move.target, shared, text.stamps[: len(shared) * PAGE], f"handoff {event.handoff}")
    model.take(move.target, fresh, f"handoff {event.handoff}")
    move.state, move.source_pages, move.target_pages, move.shared = "moving", list(text.pages), shared + fresh, len(shared)
    sources = model.crew(move.source)
    for rank, worker in enumerate(model.crew(move.target)):
        todo = [
            (text.pages[place], page, text.stamps[place * PAGE : min((place + 1) * PAGE, text.length)])
            for place, page in enumerate(fresh, len(shared))
            if place * PAGE < text.length
        ]
        worker.pulls[event.handoff] = Pull(event.handoff, move.source, sources[rank % len(sources)].memory, todo)
    model.seen["moving_shared"] += bool(shared)


@follows(ev.HandoffPulled)
def pulled(model: Model, event: ev.HandoffPulled, turn: Turn) -> None:
    pull = model.workers[event.worker].pulls.get(event.handoff)
    # None: the log went on to its end, and that was lost. The worker has pulled all the same.
    has = not pull.todo if pull is not None else model.begun
    demand(has, f"handoff {event.handoff}: pulled, says the log, but {event.worker} has not")


@follows(ev.HandoffResident)
def resident(model: Model, event: ev.HandoffResident, turn: Turn) -> None:
    move = model.moves.pop(event.handoff)
    demand(move.state == "moving", f"handoff {event.handoff} resident while {move.state}")
    text = model.texts[move.sequence]
    left = text.pages
    text.pool, text.pages, text.handoff = move.target, move.target_pages, 0
    text.unlisted |= move.flushed
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
    if move.state == "moving":
        pages, move.target_pages, move.state = move.target_pages, [], "aborted"
        model.let_go(move.target, pages)
        for worker in model.workers.values():
            if event.handoff in worker.pulls:
                worker.pulls[event.handoff].aborted_at = model.version
    else:
        del model.moves[event.handoff]
    model.tell(text.owner, "aborted", move.sequence, event.handoff)


@follows(ev.HandoffEnded)
def ended(model: Model, event: ev.HandoffEnded, turn: Turn) -> None:
    move = model.moves.pop(event.handoff)
    demand(move.state == "aborted", f"handoff {event.handoff} ended while {move.state}")
    for worker in model.workers.values():
        pull = worker.pulls.get(event.handoff)
        demand(pull is None or not pull.todo, f"handoff {event.handoff} ended while {worker.name} was pulling")
    model.let_go(move.source, move.source_pages)
