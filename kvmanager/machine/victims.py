"""Victims: which open sequences to preempt when pages run out.

    the lowest priority first, within a priority the one that came last: what it loses is the least, and those before it finish

Only on request (`Step.victims`), and only a proposal: the scheduler preempts by closing. What a sequence would free are the pages that
nobody else holds, counting out the victims named before it. They are free once the workers have acknowledged the close.

Nobody is proposed for the sake of somebody of lower priority: a sequence that cannot grow or fork may cost those of its own priority and below
(itself among them), a prompt that cannot be opened only those below its own. Costs as much as there are victims, however many are open.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmanager.errors import OutOfPages
from kvmanager.machine.commands import Step
from kvmanager.machine.draft import Draft
from kvmanager.pages.pool import Pool

__all__ = ["choose_victims"]


def choose_victims(draft: Draft, command: Step, refused: list[list[Any]]) -> list[list[Any]]:
    """[sequence, pool name, pages it would free] for the items of a step that were refused for lack of pages, first to go first."""
    state = draft.state
    wants: dict[str, list[list[int]]] = {}  # pool name -> [highest priority that may go for it, pages]
    for kind, index, code, _, details in refused:
        if code != OutOfPages.code:
            continue
        if kind == "open":
            limit = command.opens[index].priority - 1
        elif kind == "grow":
            limit = state.sequences[int(command.grow[index])].priority
        elif kind == "fork":
            limit = state.sequences[int(command.fork[index][0])].priority
        else:
            continue
        wants.setdefault(details["pool"], []).append([limit, details["needed"]])
    return [victim for name, wanted in wants.items() for victim in _victims_in(draft, state.pool(name), wanted)]


def _serve(unmet: list[list[int]], pages: int) -> None:
    """So many pages for those who want them, in this order."""
    for want in unmet:
        served = min(want[1], pages)
        want[1] -= served
        pages -= served


def _victims_in(draft: Draft, pool: Pool, wanted: list[list[int]]) -> Iterator[list[Any]]:
    wanted.sort(key=lambda want: want[0])
    _serve(wanted[::-1], draft.pool(pool.index).can_take(sum(pages for _, pages in wanted)))  # what is left goes to the highest
    seen: dict[int, int] = {}  # page that several hold -> how many of them are victims
    for priority, sequence_id in pool.arrivals.latest_first():
        unmet = [want for want in wanted if want[1] and want[0] >= priority]
        if not unmet:
            return
        if not draft.alive(sequence_id):
            continue
        pages = draft.state.tables.pages_of(sequence_id)
        refs = pool.refs[pages]
        freed = int((refs == 1).sum())
        shared = list(zip(pages[refs > 1].tolist(), refs[refs > 1].tolist(), strict=True))
        freed += sum(seen.get(page, 0) + 1 == count for page, count in shared)
        if freed:
            seen.update((page, seen.get(page, 0) + 1) for page, _ in shared)
            _serve(unmet, freed)
            yield [sequence_id, pool.name, freed]
