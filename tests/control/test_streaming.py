"""Streamed handoffs, as a scheduler and workers ask for them: `HandOff.stream`, `Ack.layers`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue
from kvmanager.machine.batch import decode_batch, encode_batch
from kvmanager.machine.command_wire import command_from_wire, command_to_wire
from kvmanager.machine.commands import Ack, HandOff, Step
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    (PoolConfig("P", 40, 16), PoolConfig("D0", 20, 16, "decode"), PoolConfig("D1", 20, 16, "decode")), lease_ms=86_400_000
)


def begun(rig: Rig, **more: object) -> tuple[int, int]:
    sequence = rig.kv.open(tokens(100), "P").sequence
    handoff = rig.kv.hand_off(sequence, reserve=True, stream=True, **more)
    rig.kv.grow(sequence, 40)
    return sequence, handoff


def test_without_a_reservation_there_is_nothing_to_stream_into() -> None:
    with pytest.raises(InvalidValue, match=r"^hand_off\.stream: expected false without hand_off\.reserve"):
        HandOff(1, "D0", stream=True)
    with pytest.raises(InvalidValue, match=r"^hand_off\.stream: expected true or false"):
        HandOff(1, "D0", reserve=True, stream=1)  # type: ignore[arg-type]
    asked = Step(hand_off=[HandOff(1, "D0", reserve=True, stream=True)])
    assert command_from_wire(command_to_wire(asked)).hand_off == asked.hand_off  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("layers", "what"),
    [
        (7, "a list"),
        ([(1, 2)], r"ack\.layers\[0\]: expected \(handoff, tokens, layers\)"),
        ([(0, 1, 1)], r"ack\.layers\[0\]: expected an int in 1"),
        ([(1, 1, 1 << 20)], r"ack\.layers\[0\]: expected an int in 1\.\.65536"),
        ([(1, 1, 1)] * 5000, "at most 4096 reports"),
    ],
)
def test_reports_are_typed_and_bounded(layers: object, what: str) -> None:
    with pytest.raises(InvalidValue, match=what):
        Ack(1, 0, layers=layers)


def test_reports_that_say_nothing_new_change_nothing(make_rig: MakeRig) -> None:
    """Late, twice, of more tokens than there are, of somebody else's handoff, of one that is over or never was."""
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig, pool="D0")
    [source], [target] = rig.workers["P"], rig.workers["D0"]
    for worker, report in ((source, (handoff, 101, 3)), (source, (999, 40, 3)), (target, (handoff, 40, 3))):
        rig.kv.ack(worker, 0, layers=[report])
        assert rig.handoff_state(handoff) == "prefilling"
    for _ in range(2):
        rig.kv.ack(source, 0, layers=[(handoff, 40, 3)])
    rig.write(sequence)
    rig.kv.ack(source, 0, layers=[(handoff, 40, 4)])
    rig.kv.abort(handoff)
    rig.kv.ack(source, 0, layers=[(handoff, 40, 5)])
    assert not rig.state.handoffs


def test_a_report_is_progress_and_a_silent_source_is_given_up(make_rig: MakeRig) -> None:
    rig = make_rig(ManagerConfig(CONFIG.pools, lease_ms=86_400_000, handoff_wait_ms=1000, handoff_prefill_ms=0))
    _, handoff = begun(rig, pool="D0")
    for layers in range(1, 5):
        rig.tick(800)
        rig.kv.ack(rig.workers["P"][0], 0, layers=[(handoff, 40, layers)])
    assert rig.handoff_state(handoff) == "prefilling"
    rig.tick(1200)
    assert rig.handoff_state(handoff) == "over"


def test_a_snapshot_holds_all_of_it(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    _, handoff = begun(rig, pool="D0")
    state = rig.state
    again = load_snapshot(CONFIG, decode_batch(encode_batch(snapshot(state))))
    assert state_digest(again) == state_digest(state)
    assert again.handoffs[handoff].streaming and again.handoffs[handoff].sources == {rig.workers["D0"][0]: rig.workers["P"][0]}


def test_the_next_pool_of_the_group_is_streamed_into_as_well(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig, group="decode")
    first = rig.state.handoffs[handoff].target
    rig.die(rig.workers[rig.state.pools[first].name][0])
    [again] = [each for each in rig.state.handoffs.values() if each.sequence_id == sequence]
    assert again.target != first and again.streaming and len(again.target_pages) == 7


def test_what_is_reserved_keeps_its_place_when_more_is_shared(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    sequence, handoff = begun(rig, pool="D0")
    reserved = list(rig.state.handoffs[handoff].target_pages)
    other = rig.kv.open(tokens(48), "D0", chunk=48, wait=False).sequence
    rig.write(other)
    rig.write(sequence)
    rig.kv.grow(sequence, 60)
    rig.write(sequence)
    found = rig.state.handoffs[handoff]
    assert rig.handoff_state(handoff) == "moving" and found.target_shared == 3
    assert found.target_pages[3:] == reserved[3:]
