"""Preview: what a step would do, and whom it would cost their pages, without doing it.

It is decided by the very code that decides a step, against the same state, and the batch is thrown away: deciding only reads. So a step
that is sent next, with nothing in between, has just this outcome. Ids of sequences that would be opened are not shown: they are nobody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue, KVError, OutOfPages, error_from_wire
from kvmanager.machine import events as ev
from kvmanager.machine.command_wire import command_from_wire
from kvmanager.machine.commands import Step
from kvmanager.machine.decide import carry_out
from kvmanager.machine.draft import Draft
from kvmanager.machine.placement import pages_wanted
from kvmanager.machine.state import State
from kvmanager.pages.prefix import Node

__all__ = ["DryRun", "Evicted", "WouldGrow", "WouldOpen", "answer_dry_run", "read_dry_run"]

NOBODY = 0  # a client that no request comes from


@dataclass(frozen=True, slots=True)
class WouldOpen:
    """One open of a dry run.

    pool             where it would go; "" if it is refused before that is known
    cached_tokens    of the prompt, found there
    expected_tokens  more that it would wait for (see errors.PrefixPending)
    pages            pages it would take now beyond the cached ones: for its chunk
    evicted          how many cached pages would be evicted for those
    error            what it would be refused with, None if it fits
    """

    pool: str
    cached_tokens: int
    expected_tokens: int
    pages: int
    evicted: int
    error: KVError | None

    @property
    def fits(self) -> bool:
        return self.error is None


@dataclass(frozen=True, slots=True)
class WouldGrow:
    """One growth of a dry run: pages it would take, or lacks; and what it would be refused with."""

    pages: int
    error: KVError | None

    @property
    def fits(self) -> bool:
        return self.error is None


@dataclass(frozen=True, slots=True, eq=False)
class Evicted:
    """What would be evicted of one cached prefix: these pages, its end first. `keeps` of its tokens would still be found, `loses` not."""

    pool: str
    pages: np.ndarray
    keeps: int
    loses: int


@dataclass(frozen=True, slots=True)
class DryRun:
    """The outcome that a step would have.

    opens, grow  one for each of the step's
    evicted      cached prefixes that would lose pages, first to go first
    refused      (kind, index, error) of every item that would not be done, of these kinds and others
    victims      (sequence, pool, pages that preempting it would free), if asked for, as in the reply to a step
    """

    opens: list[WouldOpen] = field(default_factory=list)
    grow: list[WouldGrow] = field(default_factory=list)
    evicted: list[Evicted] = field(default_factory=list)
    refused: list[tuple[str, int, KVError]] = field(default_factory=list)
    victims: list[tuple[int, str, int]] = field(default_factory=list)

    def error(self, kind: str, index: int) -> KVError | None:
        """Why item `index` of the step's list `kind` would be refused; None if it would be done."""
        return next((error for each, at, error in self.refused if (each, at) == (kind, index)), None)


def answer_dry_run(state: State, message: Mapping[str, Any], now_ms: int) -> dict[str, Any]:
    """The query {"t": "dry_run", "step": a step as on the wire}."""
    wire = message.get("step")
    if not isinstance(wire, Mapping):
        raise InvalidValue("dry_run.step", "a map", type(wire).__name__)
    command = command_from_wire({**wire, "t": "step"})
    if not isinstance(command, Step):
        raise InvalidValue("dry_run.step", "a step", type(command).__name__)
    draft, reply = carry_out(state, command, now_ms, NOBODY)
    refused = reply.get("refused", [])
    return {
        "opens": _opens(draft, command, reply.get("opened", [])),
        "grow": _grow(draft, command, refused),
        "evicted": _evicted(draft),
        "refused": refused,
        "victims": reply.get("victims", []),
    }


def _opens(draft: Draft, command: Step, opened: list[Any]) -> list[list[Any]]:
    taken: dict[int, tuple[int, int]] = {}  # sequence -> pages, evicted for it
    evicted = 0
    for event in draft.events:
        if isinstance(event, ev.PagesEvicted):
            evicted += len(event.pages)
            continue
        if isinstance(event, ev.SequenceOpened):
            taken[event.sequence] = len(event.fresh), evicted
        evicted = 0
    found = []
    for asked, made, item in zip(command.opens, opened, draft.examined, strict=True):
        if item is None:
            found.append(["", 0, 0, 0, 0])
            continue
        pages, lost = taken[made[0]] if made else (pages_wanted(item, min(item.cached + asked.chunk, len(asked.tokens))), 0)
        found.append([item.pool.name, item.cached, item.expected, pages, lost])
    return found


def _grow(draft: Draft, command: Step, refused: list[Any]) -> list[int]:
    """Pages for each growth, those that are refused for lack of them included."""
    pages = dict.fromkeys(command.grow.tolist(), 0)
    ids = list(pages)
    for kind, index, code, _, details in refused:
        if kind == "grow" and code == OutOfPages.code:
            pages[ids[index]] = details["needed"]
    for event in draft.events:
        if isinstance(event, ev.SequencesGrown):
            pages.update(zip(event.ids.tolist(), event.page_counts.tolist(), strict=True))
        elif isinstance(event, ev.GrownFurther):
            for at in event.at.tolist():
                pages[ids[at]] += 1
    return list(pages.values())


def _evicted(draft: Draft) -> list[list[Any]]:
    gone: dict[Node, tuple[int, list[int]]] = {}
    for event in draft.events:
        if isinstance(event, ev.PagesEvicted):
            for page in event.pages.tolist():
                gone.setdefault(draft.state.pools[event.pool].prefix.node_of[page], (event.pool, []))[1].append(page)
    found = []
    for node, (index, pages) in gone.items():
        pool = draft.state.pools[index]
        ends_at = sum(each.count for each in node.path())
        ids = np.array(pages, "<i4").tobytes()
        found.append([pool.name, ids, (ends_at - len(pages)) * pool.page_size, len(pages) * pool.page_size])
    return found


def read_dry_run(answer: dict[str, Any]) -> DryRun:
    """What a surface makes of the answer."""
    refused = [(kind, index, error_from_wire(*error)) for kind, index, *error in answer["refused"]]
    errors = {(kind, index): error for kind, index, error in refused}
    return DryRun(
        [
            WouldOpen(pool, cached, expected, pages, evicted, errors.get(("open", index)))
            for index, (pool, cached, expected, pages, evicted) in enumerate(answer["opens"])
        ],
        [WouldGrow(pages, errors.get(("grow", index))) for index, pages in enumerate(answer["grow"])],
        [Evicted(pool, np.frombuffer(ids, "<i4"), keeps, loses) for pool, ids, keeps, loses in answer["evicted"]],
        refused,
        [(sequence, pool, pages) for sequence, pool, pages in answer["victims"]],
    )
