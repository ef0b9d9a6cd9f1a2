"""What a replica says of peers that end before it has come to the batch that says so; and how it tells by what it reaches them."""

from __future__ import annotations

import pytest

from kvmanager import KVManager, ManagerConfig, PoolConfig, Replica
from kvmanager.machine.commands import Tick


class Clock:
    now = 1000

    def __call__(self) -> int:
        return self.now


class Rig:
    """Worker `source` of pool A, from which the worker behind `replica` pulls; that one has a step of its own to run."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.kv = kv = KVManager(
            ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16))), clock=self.clock
        )
        self.source, self.own = kv.join("a", "A", "bf16", lease_ms=100), kv.join("b", "B", "bf16", lease_ms=60_000)
        self.replica = Replica("B")
        self.replica.load(kv.snapshot())
        self.replica.joined(self.own)
        moving = kv.open(list(range(40)), "A", chunk=40)
        kv.ack(self.source, kv.state.version, ids=[moving.sequence], tokens=[40])
        self.handoff = kv.hand_off(moving.sequence, "B")
        self.sequence = kv.open([1, 2, 3], "B", chunk=3).sequence
        self.feed()

    def feed(self) -> None:
        for data in self.kv.batches_since(self.replica.epoch, self.replica.known):
            self.replica.feed(data)

    def end(self, how: str) -> None:
        if how == "dead":
            self.kv.worker_gone(self.source)
        else:
            self.clock.now += 500
            self.kv.execute(Tick(), 77, 1)
        self.feed()


@pytest.mark.parametrize("how", ["dead", "fenced"])
def test_a_peer_s_end_is_known_before_the_step_that_stands_in_front_of_it_has_been_run(how: str) -> None:
    """Until then the replica does not apply the abort, and whoever only looked at `pulls` would go on copying."""
    rig = Rig()
    assert [pull.handoff for pull in rig.replica.pulls()] == [rig.handoff]
    assert rig.replica.leaving == {}
    rig.end(how)
    assert rig.replica.step
    assert [pull.handoff for pull in rig.replica.pulls()] == [rig.handoff]
    assert rig.replica.leaving == {rig.source: how == "dead"}
    rig.replica.finish(rig.replica.step, [rig.sequence])
    assert rig.replica.pulls() == []
    assert rig.replica.leaving == {}
    assert rig.source not in rig.replica.peers


def test_how_a_peer_is_reached_is_told_once_and_again_after_a_snapshot() -> None:
    rig = Rig()
    rig.replica.ack()
    assert rig.replica.ack() is None
    rig.replica.linked(rig.source, "shm", "r" * 1000)
    content = rig.replica.ack()
    assert content is not None
    assert content.links == [(rig.source, "shm", "r" * 300)]
    rig.kv.ack(rig.own, **content._asdict())
    assert rig.kv.workers()[1]["links"][0]["transport"] == "shm"
    rig.replica.linked(rig.source, "shm", "r" * 300)
    assert rig.replica.ack() is None
    rig.replica.load(rig.kv.snapshot())
    content = rig.replica.ack()
    assert content is not None
    assert [link[0] for link in content.links] == [rig.source]
    rig.end("dead")
    rig.replica.load(rig.kv.snapshot())
    content = rig.replica.ack()
    assert content is None or content.links == []
