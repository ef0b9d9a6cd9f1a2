"""Pulls that fail and are tried again, and who pulls from whom, as a replica sees it."""

from __future__ import annotations

import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.manager import KVManager
from kvmanager.worker.replica import Replica

PAGE = 16


class Rig:
    """Pool A of two ranks, pool B of `targets`; a replica for each rank of B, told its id or not."""

    def __init__(self, targets: int = 1, told: bool = True) -> None:
        pools = (PoolConfig("A", 20, PAGE, workers=2), PoolConfig("B", 20, PAGE, workers=targets))
        self.kv = KVManager(ManagerConfig(pools, lease_ms=86_400_000), checked=True)
        self.sources = [self.kv.join(f"A{rank}", "A", "x") for rank in range(2)]
        self.targets = [self.kv.join(f"B{rank}", "B", "x") for rank in range(targets)]
        self.replicas = [Replica("B") for _ in self.targets]
        for worker, replica in zip(self.targets, self.replicas, strict=True):
            replica.load(self.kv.tables_snapshot())
            if told:
                replica.joined(worker)
        self.kv.subscribe(lambda batch, data: [replica.feed(data) for replica in self.replicas])
        self.sequence = self.kv.open(np.arange(40, dtype=np.int32), "A", chunk=40).sequence
        for worker in self.sources:
            self.kv.ack(worker, self.kv.state.version, ids=[self.sequence], tokens=[40])
        self.handoff = self.kv.hand_off(self.sequence, "B")

    def acknowledge(self, rank: int = 0) -> None:
        content = self.replicas[rank].ack()
        assert content is not None
        self.kv.ack(self.targets[rank], **content._asdict())


def test_a_failed_pull_comes_back_from_another_rank_until_it_is_given_up() -> None:
    rig, seen = Rig(), []
    [replica] = rig.replicas
    for attempt in range(3):
        [pull] = replica.pulls()
        assert (pull.handoff, pull.attempt, len(pull.target_pages)) == (rig.handoff, attempt, 3)
        seen.append(pull.peer.worker)
        replica.begin_pull(pull.handoff)
        replica.pull_failed(pull.handoff, f"sums differ, {attempt}")
        assert replica.pulls() == []
        rig.acknowledge()
    assert seen[0] != seen[1] and set(seen) == set(rig.sources)
    assert replica.pulls() == []
    notice = rig.kv.step().notices[-1]
    assert (notice.code, notice.reason) == ("pull_failed", "worker B0, 3 tries: sums differ, 2")


def test_ranks_are_told_different_sources_and_fail_for_themselves() -> None:
    rig = Rig(targets=2)
    first, second = rig.replicas
    assert {first.pulls()[0].peer.worker, second.pulls()[0].peer.worker} == set(rig.sources)
    for replica in rig.replicas:
        replica.begin_pull(rig.handoff)
    first.pull_failed(rig.handoff, "x")
    rig.acknowledge(0)
    assert (first.pulls()[0].attempt, second.pulls()[0].attempt) == (1, 0)
    second.pulled(rig.handoff)
    rig.acknowledge(1)
    first.begin_pull(rig.handoff)
    first.pulled(rig.handoff)
    rig.acknowledge(0)
    assert rig.kv.state.sequences[rig.sequence].pool == 1


def test_a_replica_that_learns_its_id_late_pulls_from_its_own_source() -> None:
    rig = Rig(targets=2, told=False)
    wanted = rig.kv.state.handoffs[rig.handoff].sources
    for worker, replica in zip(rig.targets, rig.replicas, strict=True):
        replica.joined(worker)
        assert replica.pulls()[0].peer.worker == wanted[worker]


@pytest.mark.parametrize("reported", [False, True])
def test_a_snapshot_after_a_failed_pull_has_it_tried_again(reported: bool) -> None:
    rig = Rig()
    [replica] = rig.replicas
    replica.begin_pull(rig.handoff)
    replica.pull_failed(rig.handoff, "x")
    if reported:
        rig.acknowledge()
    replica.load(rig.kv.tables_snapshot())
    [pull] = replica.pulls()
    assert pull.attempt == int(reported)
    replica.begin_pull(rig.handoff)
    replica.pulled(rig.handoff)
    rig.acknowledge()
    assert rig.kv.state.sequences[rig.sequence].pool == 1


def test_an_aborted_handoff_takes_its_failure_with_it() -> None:
    rig = Rig()
    [replica] = rig.replicas
    replica.begin_pull(rig.handoff)
    replica.pull_failed(rig.handoff, "x")
    rig.kv.abort(rig.handoff)
    content = replica.ack()
    assert content is not None and content.failed == []
    rig.kv.ack(rig.targets[0], **content._asdict())
    assert not rig.kv.state.handoffs


def test_a_replica_that_learns_its_id_after_the_handoff_has_nothing_left_to_pull() -> None:
    """Found by the simulator: the worker's own report made the sequence resident before the reply to its joining was read."""
    rig = Rig(told=False)
    [replica] = rig.replicas
    assert [pull.handoff for pull in replica.pulls()] == [rig.handoff]
    rig.kv.ack(rig.targets[0], rig.kv.state.version, pulled=[rig.handoff])
    assert replica.pulls() == []
    replica.joined(rig.targets[0])
