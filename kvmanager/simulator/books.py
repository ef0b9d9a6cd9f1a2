"""What the model writes down: stamps, texts, works in flight, pulls, moves. Plain records; the rules are in `model` and `operations`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvmanager.machine.commands import Command, Open

__all__ = ["PAGE", "Broken", "Chore", "Item", "Move", "Pull", "Stamps", "Text", "Turn", "Work", "Worker", "demand"]

PAGE = 16  # slots of the pages that most pools have, and what lengths are drawn around


class Broken(AssertionError):
    """The model and the manager disagree."""


SHUT = False  # with all books shut, what workers read must still give a bug away: the tests of the simulator try that


def demand(condition: object, text: str) -> None:
    if not condition and not SHUT:
        raise Broken(text)


class Stamps:
    """A number for each (tenant, extra, tokens up to here): equal if and only if all of it is."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}

    def root(self, tenant: bytes, extra: bytes) -> int:
        return self._numbers.setdefault((tenant, extra), len(self._numbers) + 1)

    def after(self, stamp: int, token: int | tuple[bytes, int]) -> int:
        return self._numbers.setdefault((stamp, token), len(self._numbers) + 1)


@dataclass
class Text:
    """One sequence as its author knows it. `stamps[i]` is what slot i of its pages must hold."""

    sequence: int
    owner: int
    pool: int
    tokens: list[int]
    stamps: list[int]
    known: int  # leading tokens whose ids the manager has been told
    length: int = 0
    pages: list[int] = field(default_factory=list)
    handoff: int = 0
    mood: int = 0  # what it goes on with: another word after each truncation, and in each fork
    tenant: bytes = b""
    unlisted: bool = False  # its tenant was flushed: nothing of it may be published
    reserved: int = 0  # pages that stay however short it is cut
    published: int = 0  # leading pages that it holds in the index
    arrived: bool = False  # in another pool, and nothing has been written there since
    written: dict[int, int] = field(
        default_factory=dict
    )  # worker -> tokens that it has said to have written; copies and what is found cached not counted


@dataclass
class Work:
    """One step's share of one sequence: read [0, start), write [start, length), on the tables of `version`."""

    version: int
    sequence: int
    start: int
    length: int
    pages: list[int]
    stamps: list[int]


@dataclass
class Chore:
    """What a worker does for `sequences` before it writes anything of `version`: after it the first of them is written up to `written`,
    or as far as the last of them was, if that is less. `target` gets `stamps` from the first slots of `source`, unless there are none."""

    version: int
    sequences: tuple[int, ...]
    written: int
    source: int = -1
    target: int = -1
    stamps: list[int] = field(default_factory=list)
    known: int = 0  # tokens that it knows to be written in any case

    @property
    def pages(self) -> list[int]:
        return [self.source, self.target] if self.stamps else []


class Item(NamedTuple):
    """One page of a pull: `runs` (page, first slot, slots) of the source, one behind the other, are the first slots of `target`; they hold
    `stamps`, and behind those whatever it is."""

    runs: tuple[tuple[int, int, int], ...]
    target: int
    stamps: list[int]

    @property
    def pages(self) -> list[int]:
        """The source's, in order."""
        return [page for page, _, _ in self.runs]

    def read(self, source: np.ndarray) -> np.ndarray:
        """What a puller finds there now."""
        if len(self.runs) == 1:
            page, slot, slots = self.runs[0]
            return source[page, slot : slot + slots]
        return np.concatenate([source[page, slot : slot + slots] for page, slot, slots in self.runs])


@dataclass
class Pull:
    handoff: int
    source_pool: int
    source: np.ndarray
    todo: list[Item]
    aborted_at: int = 0
    attempt: int = 0
    failed: bool = False  # this try has ended without success, and carries nothing on
    whole: list[Item] = field(default_factory=list)  # what a try begins with

    def fail(self) -> None:
        self.failed = True
        self.todo.clear()

    def begin_again(self) -> None:
        self.failed, self.todo = False, list(self.whole)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "source": None}


@dataclass
class Worker:
    worker: int
    name: str
    pool: int
    memory: np.ndarray
    acked: int
    fenced: bool = False
    works: list[Work] = field(default_factory=list)
    chores: list[Chore] = field(default_factory=list)
    pulls: dict[int, Pull] = field(default_factory=dict)
    early: dict[int, list[int]] = field(default_factory=dict)  # handoff -> pages that it is pulling into, and had not been told to for good
    ahead: dict[int, list[int]] = field(
        default_factory=dict
    )  # handoff -> pages that it reads and writes for a step that nobody ordered yet
    done: dict[int, int] = field(default_factory=dict)  # sequence -> tokens written

    def __getstate__(self) -> dict[str, Any]:
        """What the log says of it; memory and work in flight are the process's and know no way back."""
        return {**self.__dict__, "memory": None, "works": [], "chores": [], "early": {}, "ahead": {}}

    def may_ack(self, newest: int) -> int:
        """The newest version that this worker can truthfully acknowledge."""
        bound = newest
        for version in [work.version for work in self.works] + [chore.version for chore in self.chores]:
            bound = min(bound, version - 1)
        for pull in self.pulls.values():
            if pull.aborted_at and pull.todo:  # it has not stopped yet, so it has not seen the abort
                bound = min(bound, pull.aborted_at - 1)
        return bound


@dataclass
class Move:
    """A handoff as the event stream tells it."""

    handoff: int
    sequence: int
    source: int
    target: int
    state: str = "prefilling"
    source_pages: list[int] = field(default_factory=list)
    target_pages: list[int] = field(default_factory=list)
    until: int = 0
    group: str = ""
    tried: tuple[int, ...] = ()
    fresh: int = 0  # where in target_pages those begin that were taken for it
    flushed: bool = False
    streaming: bool = False
    since_ms: int = 0  # when its source last got further, or got something to do
    reach: tuple[int, int] = (0, 0)  # tokens and layers that it reported last


@dataclass
class Turn:
    """One command and its batch, while the model follows it.

    opened   sequence id -> what was asked for
    visible  for each pool the index as the decision saw it: pages published by this batch come after it
    free     pool -> pages that were surely free before, where pages were refused
    known    sequence id -> tokens known before this batch made more of them known
    starts   sequence id -> first slot that the workers are to write in this step; a handler that gives them something to write sets it
    chores   (pool, what its workers are to do before that)
    copies   (pool, target page) -> (source page, tokens)
    indexed  (pool, page) that have entered the index
    """

    command: Command
    client: int
    reply: dict[str, Any]
    opened: dict[int, Open] = field(default_factory=dict)
    visible: list[dict[int, tuple[int, int]]] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    known: dict[int, int] = field(default_factory=dict)
    free: dict[int, int] = field(default_factory=dict)
    chores: list[tuple[int, Chore]] = field(default_factory=list)
    copies: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    indexed: dict[tuple[int, int], None] = field(default_factory=dict)
