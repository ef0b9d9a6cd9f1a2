"""Steps run ahead: the first decode step of a sequence whose pages are still on their way to this worker, layer by layer as they come.

Nothing of it leaves the worker before the manager has put the sequence into this pool and the scheduler has ordered just that step; what the replica
calls void by then - a pull failed, the source died - is thrown away, and the step is computed as any other. Whoever waits for a layer gives
way to every other message: it begins anew when nothing else is to do.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from kvmanager.errors import Unknown
from kvmanager.worker.ahead import AHEAD_MAX

if TYPE_CHECKING:
    from kvmanager.examples.engine.worker import Worker

__all__ = ["StepsAhead"]

PATIENCE_S = 5.0  # for the handoff to move; after so long it is computed in its turn
WAIT_S = 200e-6  # for a transfer, between looks at everything else


class _Asked(NamedTuple):
    sequence: int
    position: int
    token: int
    until: float


class _GivesWay(Exception):
    """It is worth nothing any more, or something else is to be done first."""


class StepsAhead:
    """taken   results that became part of a step
    wasted  those that were computed and did not
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._asked: dict[int, _Asked] = {}  # by handoff
        self._results: dict[int, tuple[int, int, Tensor]] = {}  # sequence -> position, token, logits [vocab]
        self.taken = self.wasted = 0

    def __bool__(self) -> bool:
        return bool(self._asked)

    def ask(self, message: dict[str, Any]) -> None:
        asked = _Asked(message["sequence"], message["position"], message["token"], time.monotonic() + PATIENCE_S)
        self._asked[message["handoff"]] = asked

    def run(self) -> None:
        """Those that were asked for and can begin, one after the other."""
        for handoff, asked in list(self._asked.items()):
            tables = self._worker.replica.begin_ahead(handoff)
            if tables is None:
                if time.monotonic() > asked.until or self._is_here(asked.sequence):
                    del self._asked[handoff]
                continue
            logits = None
            if int(tables.lengths[0]) == asked.position + 1:
                logits = self._compute(handoff, asked, tables)
            again = logits is None and not self._worker.replica.spoiled(handoff)
            if self._worker.replica.end_ahead(handoff, whole=logits is not None) and logits is not None:
                self._results[asked.sequence] = asked.position, asked.token, logits[0]
                if len(self._results) > AHEAD_MAX:  # the oldest: its sequence was closed before its step came
                    del self._results[next(iter(self._results))]
            if not again or time.monotonic() > asked.until:
                del self._asked[handoff]

    def _is_here(self, sequence: int) -> bool:
        """Whether it has come without: it filled its last page, or its pages were here before anything could begin."""
        replica = self._worker.replica
        try:
            return replica.tables.pool_of(sequence) == replica.pool
        except Unknown:  # closed
            return True

    def _compute(self, handoff: int, asked: _Asked, tables: Any) -> Tensor | None:
        """Logits [1, vocab]; None if it gave way. What was launched has been done then."""
        worker = self._worker
        plan = worker.backend.plan(tables, [1])
        try:
            return worker.model.forward(
                np.array([asked.token]),
                np.array([asked.position]),
                worker.backend,
                plan,
                before_layer=lambda layer: self._wait(handoff, layer),
            )
        except _GivesWay:
            return None
        finally:
            worker.wait_for_device()

    def _wait(self, handoff: int, layer: int) -> None:
        """Until the pages of this layer are here. Transfers go on meanwhile, and so does the log."""
        worker = self._worker
        worker.pull()
        while worker.replica.layers_there(handoff) <= layer or worker.replica.spoiled(handoff):
            if worker.replica.spoiled(handoff) or worker.channel.socket.poll(0):
                raise _GivesWay
            if handoff in worker.pulling:
                worker.pulling[handoff][1].wait(WAIT_S)
            else:
                worker.follower.socket.poll(1)
            worker.follower.poll(0)
            worker.pull()
            worker.acknowledge()

    def take(self, version: int, items: list[list[Any]]) -> dict[int, Tensor]:
        """Of a step's items those that have been run already: sequence -> logits. All others of its sequences are of no use any more."""
        found = {}
        for sequence, position, tokens, _ in items if self._results else ():
            result = self._results.pop(sequence, None)
            if result is None:
                continue
            same = len(tokens) == 4 and result[:2] == (position, int(np.frombuffer(tokens, "<i4")[0]))
            if same and self._worker.replica.ran_ahead(version, sequence):
                found[sequence] = result[2]
                self.taken += 1
            else:
                self.wasted += 1
        return found
