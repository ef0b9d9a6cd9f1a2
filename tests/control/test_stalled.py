"""A handoff whose source has tokens to write and gets on with nothing: ended after `handoff_prefill_ms`, with a reason, on both surfaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue
from kvmanager.machine.batch import decode_batch, encode_batch
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    (PoolConfig("P", 40, 16, workers=2), PoolConfig("D0", 20, 16, "decode"), PoolConfig("D1", 20, 16, "decode")), lease_ms=86_400_000
)


def begun(rig: Rig, computed: int = 40, **more: object) -> tuple[int, int]:
    """100 tokens on their way to D0, `computed` of which are P's to write."""
    sequence = rig.kv.open(tokens(100), "P", chunk=0, wait=False).sequence
    handoff = rig.kv.hand_off(sequence, **(more or {"pool": "D0", "reserve": True, "stream": True}))
    if computed:
        rig.kv.grow(sequence, computed)
    return sequence, handoff


def test_it_ends_after_five_seconds_with_a_reason_and_its_reservation_comes_back(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig)
    rig.tick(5000)
    assert rig.handoff_state(handoff) == "prefilling"
    rig.tick(1)
    assert rig.handoff_state(handoff) == "over" and rig.counts("D0").used == 0
    [notice] = rig.kv.step().notices
    assert (notice.kind, notice.sequence, notice.code) == ("aborted", sequence, "stalled")
    assert notice.reason == "prefilling for more than 5000 ms without getting further: not written by P0, P1, 0 of 40 tokens are"
    rig.write(sequence)  # it is where it was, and may be asked for again
    assert rig.handoff_state(rig.kv.hand_off(sequence, "D0")) == "moving"


def test_no_other_pool_of_the_group_is_tried_for_it(make_rig: MakeRig) -> None:
    """It is the source that does not get on."""
    rig = make_rig(CONFIG)
    begun(rig, group="decode", reserve=True)
    rig.tick(5001)
    assert not rig.state.handoffs
    assert [notice.kind for notice in rig.kv.step().notices] == ["aborted"]


def test_acknowledgements_that_say_nothing_new_are_no_progress(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig)
    [one, other] = rig.workers["P"]
    for worker in (one, other):
        rig.kv.ack(worker, 0, ids=[sequence], tokens=[20], as_of=rig.version)
        rig.kv.ack(worker, 0, layers=[(handoff, 40, 3)])
    for _ in range(5):
        rig.tick(1000)
        for worker in (one, other):
            rig.kv.ack(worker, 0, ids=[sequence], tokens=[20], as_of=rig.version)
            rig.kv.ack(worker, 0, layers=[(handoff, 40, 2)])
    assert rig.handoff_state(handoff) == "prefilling"
    rig.tick(1)
    assert rig.handoff_state(handoff) == "over"


@pytest.mark.parametrize("what", ["tokens", "layers"])
def test_tokens_and_layers_are_progress(make_rig: MakeRig, what: str) -> None:
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig)
    for number in range(1, 6):
        rig.tick(4000)
        for worker in rig.workers["P"]:
            if what == "tokens":
                rig.kv.ack(worker, 0, ids=[sequence], tokens=[7 * number], as_of=rig.version)
            else:
                rig.kv.ack(worker, 0, layers=[(handoff, 40, number)])
    assert rig.handoff_state(handoff) == "prefilling"
    rig.tick(5001)
    assert rig.handoff_state(handoff) == "over"


def test_while_there_is_nothing_to_write_the_source_is_not_to_blame(make_rig: MakeRig) -> None:
    """Its scheduler has other things to do: `handoff_wait_ms` bounds that. The time counts from the growth on."""
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig, 0)
    rig.tick(30_000)
    rig.kv.grow(sequence, 40)
    rig.tick(5000)
    rig.write(sequence)
    rig.tick(30_000)
    assert rig.handoff_state(handoff) == "prefilling"
    rig.kv.grow(sequence)
    rig.tick(3000)
    rig.kv.grow(sequence)  # more to do is no progress, and this one is short: it repeats the last growth
    rig.tick(2001)
    assert rig.handoff_state(handoff) == "over"


def test_one_worker_of_several_that_gets_on_with_nothing_is_named(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    sequence, _ = begun(rig)
    rig.write(sequence, only=rig.workers["P"][0])
    rig.tick(5001)
    [notice] = rig.kv.step().notices
    assert notice.code == "stalled" and "not written by P1," in notice.reason


def test_a_snapshot_has_the_time_and_how_far_it_was(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    _, handoff = begun(rig)
    begun(rig, 0, pool="D1")
    for worker in rig.workers["P"]:  # one of them is D0's source
        rig.kv.ack(worker, 0, layers=[(handoff, 40, 3)])
    state = rig.state
    again = load_snapshot(CONFIG, decode_batch(encode_batch(snapshot(state))))
    assert state_digest(again) == state_digest(state)
    assert again.handoffs[handoff].reach == (40, 3)
    assert list(again.handoffs.owing) == [handoff]


def test_0_is_no_bound_and_the_limit_is_checked(make_rig: MakeRig) -> None:
    rig = make_rig(ManagerConfig(CONFIG.pools, lease_ms=86_400_000, handoff_prefill_ms=0))
    _, handoff = begun(rig)
    rig.tick(59_000)
    assert rig.handoff_state(handoff) == "prefilling"
    with pytest.raises(InvalidValue, match=r"^handoff_prefill_ms: expected an int in 0\.\.86400000"):
        ManagerConfig(CONFIG.pools, handoff_prefill_ms=-1)
