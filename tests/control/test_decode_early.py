"""A first decode step that is run before the sequence is there: nothing of it reaches the manager or its clients, whatever comes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import WrongState
from kvmanager.machine.invariants import check_invariants
from kvmanager.machine.snapshot import state_digest
from kvmanager.worker.replica import Replica
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    (PoolConfig("P", 40, 16), PoolConfig("D0", 20, 16, "decode"), PoolConfig("D1", 20, 16, "decode")), lease_ms=86_400_000
)
LAYERS = 6


class Target:
    """The worker of D0, and a sequence of 100 tokens on its way there, of which the first two layers have come and one token more is computed."""

    def __init__(self, rig: Rig, **more: object) -> None:
        self.rig, self.kv, self.replica = rig, rig.kv, Replica("D0")
        self.replica.pull_by_layers(LAYERS, 2)
        self.replica.load(self.kv.tables_snapshot())
        [self.worker] = rig.workers["D0"]
        self.replica.joined(self.worker)
        self.sequence = rig.prefilled(tokens(100), "P").sequence
        self.handoff = self.kv.hand_off(self.sequence, **(more or {"pool": "D0"}))
        self.follow()
        self.pull()
        self.ack()
        self.before = state_digest(rig.state)
        assert self.replica.begin_ahead(self.handoff) is not None and self.replica.layers_there(self.handoff) == 2

    def follow(self) -> None:
        while batches := self.kv.batches_since(self.replica.epoch, self.replica.known):
            for data in batches:
                self.replica.feed(data)

    def pull(self) -> None:
        [pull] = self.replica.pulls()
        self.replica.begin_pull(pull.handoff)
        self.replica.pulled(pull.handoff)

    def ack(self) -> None:
        self.follow()
        if (content := self.replica.ack()) is not None:
            self.kv.ack(self.worker, **content._asdict())
        self.follow()

    @property
    def quarantined(self) -> int:
        return self.rig.counts("D0").quarantined


def test_it_is_nobodys_business_and_cannot_be_ordered_before_the_pull_is_acknowledged(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    target = Target(rig)
    assert target.replica.ack() is None and state_digest(rig.state) == target.before  # neither an event nor a flag
    with pytest.raises(WrongState, match="moving"):
        rig.kv.grow(target.sequence)
    while target.replica.pulls():
        target.pull()
    assert target.replica.end_ahead(target.handoff)
    with pytest.raises(WrongState, match="moving"):
        rig.kv.grow(target.sequence)  # pulled, and not acknowledged
    target.ack()
    version = rig.kv.grow(target.sequence)
    assert rig.length(target.sequence) == 101
    target.follow()
    assert target.replica.ran_ahead(version, target.sequence)


@pytest.mark.parametrize("ended", [False, True], ids=["running", "ended"])
@pytest.mark.parametrize("what", ["source dies", "puller's sums differ", "asked for", "timed out", "target dies"])
def test_its_result_is_thrown_away_with_the_handoff(make_rig: MakeRig, what: str, ended: bool) -> None:
    """No token is appended, nothing is published, every page comes home; what goes elsewhere is what the source computed."""
    rig = make_rig(ManagerConfig(CONFIG.pools, lease_ms=86_400_000, handoff_tries=1))
    target = Target(rig, group="decode") if what in ("timed out", "puller's sums differ", "target dies") else Target(rig)
    if ended:
        assert target.replica.end_ahead(target.handoff)
    if what == "source dies":
        rig.die(rig.workers["P"][0])
    elif what == "puller's sums differ":
        [pull] = target.replica.pulls()
        target.replica.begin_pull(pull.handoff)
        target.replica.pull_failed(pull.handoff, "sums differ")
        target.ack()
    elif what == "asked for":
        rig.kv.abort(target.handoff)
    elif what == "timed out":
        rig.tick(5001)
    else:
        rig.die(target.worker)
    if what != "target dies":
        target.ack()
        assert target.replica.spoiled(target.handoff)
        assert target.quarantined == (0 if ended else 7)  # a slot of them is written until it has ended
        if not ended:
            assert not target.replica.end_ahead(target.handoff)
            target.ack()
            rig.kv.step()
            assert target.quarantined == 0
    state = rig.state
    check_invariants(state)
    if what == "source dies":
        assert target.sequence not in state.sequences
        return
    assert rig.length(target.sequence) == 100 and state.sequences[target.sequence].pool == 0
    if what in ("timed out", "puller's sums differ", "target dies"):
        [again] = [each for each in state.handoffs.values() if each.sequence_id == target.sequence and each.handoff_id != target.handoff]
        assert state.pools[again.target].name == "D1"
    else:
        rig.kv.grow(target.sequence)
