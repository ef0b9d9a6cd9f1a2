"""The scheduler alone, with a manager and workers that say what the test wants."""

from __future__ import annotations

from typing import Any, cast

import pytest

from kvmanager import KVClient, Notice, StepReply
from kvmanager.examples.engine.channel import SchedulerChannel
from kvmanager.examples.engine.request import Stage
from kvmanager.examples.engine.scheduler import Scheduler


class Manager:
    def __init__(self, *replies: StepReply) -> None:
        self.replies = list(replies)

    def step(self, **_: Any) -> StepReply:
        return self.replies.pop(0)


class Workers:
    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.reports: list[tuple[str, dict[str, Any]]] = []

    def send(self, pool: str, message: dict[str, Any]) -> None:
        self.sent.append((pool, message))

    def receive(self, timeout_ms: int) -> list[tuple[str, dict[str, Any]]]:
        reports, self.reports = self.reports, []
        return reports


class Nobody:
    def dead(self) -> list[str]:
        return []

    def kill(self, pool: str) -> None:
        pytest.fail(f"{pool} was to be killed")


def test_work_goes_where_the_manager_moved_the_sequence_in_the_meantime() -> None:
    """A drain moved it, and it was resident before the step that grew it: the reply that says so says where the step is."""
    news = [Notice("moving", 5, 9, "decode1"), Notice("resident", 5, 9, "decode1", "", 1, 0)]
    workers = Workers()
    manager = Manager(StepReply(21, notices=news), StepReply(22), StepReply(23))
    pools = {"prefill0": "prefill", "decode0": "decode", "decode1": "decode"}
    scheduler = Scheduler(cast(KVClient, manager), cast(SchedulerChannel, workers), Nobody(), pools, page_size=16)
    for number, pool in enumerate(scheduler.pools.values(), 1):
        pool.worker = number
    request = scheduler.submit([1, 2, 3], 8)
    request.stage, request.pool, request.sequence, request.length, request.generated = Stage.DECODING, "decode0", 5, 3, [7]
    scheduler._by_sequence[5] = request
    scheduler.pools["decode1"].busy.add(20)  # it is in the middle of a step of others
    scheduler.turn(0)
    assert [(pool, message["t"], message["version"]) for pool, message in workers.sent] == [("decode1", "run", 21)]
    workers.reports = [("decode1", {"t": "done", "version": 20, "out": [], "logits": b""})]
    scheduler._receive(0)
    assert scheduler.pools["decode1"].busy == {21}
    workers.reports = [("decode1", {"t": "done", "version": 21, "out": [[5, 11]], "logits": b""})]
    scheduler._receive(0)
    assert request.generated == [7, 11] and not scheduler.pools["decode1"].busy
