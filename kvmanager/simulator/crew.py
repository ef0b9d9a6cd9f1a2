"""Crew: many seeds at once, a process each, and their outcomes in the order of the seeds. One that ends costs its seed alone.

Nothing here decides what a seed does: which process runs it, and when, changes no byte of its outcome.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NamedTuple

from kvmanager.simulator.hunt import Outcome, live, shorten

__all__ = ["Job", "outcomes"]

GRACE_S = 60.0  # for what is under way when the time is up


class Job(NamedTuple):
    """shortens  whether a failing run is tried again with fewer steps and faults"""

    seed: int
    steps: int
    faults: tuple[str, ...]
    shortens: bool


class _Hand:
    """One process and the place of what it has been given to do, -1 if nothing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.place = -1


def _work(connection: Connection) -> None:
    """In a process of its own: what was found is told at once, and once more when it has been shortened."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the crew ends it
    try:
        while True:
            job: Job = connection.recv()
            outcome = live(job.seed, job.steps, job.faults)
            if outcome.error and job.shortens:
                connection.send((False, outcome))
                outcome = shorten(outcome)
            connection.send((True, outcome))
    except (EOFError, BrokenPipeError):
        return  # nobody is listening any more


def _alone(jobs: list[Job], deadline: float) -> Iterator[Outcome]:
    for job in jobs:
        if time.monotonic() >= deadline:
            return
        outcome = live(job.seed, job.steps, job.faults)
        yield shorten(outcome) if outcome.error and job.shortens else outcome


def outcomes(jobs: list[Job], processes: int, deadline: float = float("inf")) -> Iterator[Outcome]:
    """Outcomes in the order of `jobs`. None is begun after `deadline` (time.monotonic): those and what is not over a minute later are left
    out. A process that ends, killed for its memory or by a fault of Python's own, is a violation of its seed, and another one goes on."""
    if processes == 1:
        yield from _alone(jobs, deadline)
        return
    crew = _Crew(jobs, deadline)
    try:
        yield from crew.run(min(processes, len(jobs)))
    finally:
        crew.end()


class _Crew:
    def __init__(self, jobs: list[Job], deadline: float) -> None:
        self.jobs, self.deadline = jobs, deadline
        self.begun = 0  # jobs handed out
        self.hands: list[_Hand] = []
        self.found: dict[int, Outcome] = {}  # by place, shortened or not
        self.over: dict[int, None] = {}

    def run(self, processes: int) -> Iterator[Outcome]:
        at = 0
        for _ in range(processes):
            self._start()
        while busy := [hand for hand in self.hands if hand.place >= 0]:
            left = self.deadline + GRACE_S - time.monotonic()
            if left <= 0:
                break
            ready = wait([hand.connection for hand in busy], min(left, 1.0))
            for hand in busy:
                if hand.connection in ready:
                    self._hear(hand)
            while at in self.over:
                yield self.found.pop(at)
                at += 1
        for place in sorted(self.found):  # behind one that was not over in time
            yield self.found[place]

    def _start(self) -> None:
        hand = _Hand()
        self.hands.append(hand)
        self._give(hand)

    def _give(self, hand: _Hand) -> None:
        hand.place = -1
        if self.begun < len(self.jobs) and time.monotonic() < self.deadline:
            hand.place, self.begun = self.begun, self.begun + 1
            hand.connection.send(self.jobs[hand.place])

    def _hear(self, hand: _Hand) -> None:
        place = hand.place
        try:
            final, outcome = hand.connection.recv()
        except (EOFError, OSError):
            hand.process.join(10)
            self.hands.remove(hand)
            job = self.jobs[place]
            lost = Outcome(
                job.seed, job.steps, job.faults, error=f"the process that lived through it ended: exit code {hand.process.exitcode}"
            )
            self.found.setdefault(place, lost)
            self.over[place] = None
            if self.begun < len(self.jobs):
                self._start()
            return
        self.found[place] = outcome
        if final:
            self.over[place] = None
            self._give(hand)

    def end(self) -> None:
        for hand in self.hands:
            hand.connection.close()
            hand.process.terminate()
        for hand in self.hands:
            hand.process.join(10)
