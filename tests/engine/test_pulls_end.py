"""The example worker's pulls from a peer that the manager has given up."""

from __future__ import annotations

from typing import Any

import pytest

from kvmanager.examples.engine.worker import Worker
from tests.wire.test_replica_leaving import Rig


class Transfer:
    """One that never ends by itself."""

    settled = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


@pytest.mark.parametrize(("how", "told"), [("dead", ["gone"]), ("fenced", [])])
def test_pulls_from_a_peer_that_was_fenced_or_is_dead_are_cancelled_before_the_next_step(how: str, told: list[str]) -> None:
    """A frozen peer that wakes must find the pull on its way to its end, however long the worker's own step takes."""
    rig, transfer, peer = Rig(), Transfer(), Transfer()
    worker = Worker.__new__(Worker)
    [pull] = rig.replica.pulls()
    rig.replica.begin_pull(pull.handoff)
    worker.replica, worker.pulling, worker.peers = rig.replica, {pull.handoff: (pull, transfer)}, {rig.source: peer}  # type: ignore[assignment]
    worker.pull()
    assert transfer.calls == ["poll"]
    rig.end(how)
    assert rig.replica.step  # not run yet
    worker.pull()
    assert transfer.calls == ["poll", "cancel", "poll"]
    assert peer.calls == told
