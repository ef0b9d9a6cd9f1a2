"""Handoffs to a group: the manager chooses the pool, and another one if that fails. Reservations. Drains. Pools of different page sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import (
    LayoutMismatch,
    NoConversion,
    OutOfPages,
    OverQuota,
    PoolDrains,
    PoolNotReady,
    SequenceTooLarge,
    Unknown,
    WrongState,
)
from kvmanager.machine.commands import HandOff
from tests.control.conftest import Rig, tokens
from tests.control.test_handoff import all_home, pulled

MakeRig = Callable[[ManagerConfig], Rig]


def fleet(*decode: int, prefill: int = 16, **more: Any) -> ManagerConfig:
    """Pool P, and D0, D1, ... of group "decode" with so many pages."""
    made = (
        PoolConfig("P", prefill, 16, group="prefill"),
        *(PoolConfig(f"D{n}", pages, 16, group="decode") for n, pages in enumerate(decode)),
    )
    return ManagerConfig(pools=made, **{"lease_ms": 60_000, **more})


def where(rig: Rig, sequence: int) -> str:
    state = rig.state
    return state.pools[state.sequences[sequence].pool].name


def target(rig: Rig, handoff: int) -> str:
    state = rig.state
    return state.pools[state.handoffs[handoff].target].name


def news(rig: Rig) -> list[tuple[str, str, str]]:
    """Those of the last command too, which come with the reply after it."""
    rig.kv.touch()
    return [(each.kind, each.code, each.reason if each.kind in ("moving", "resident", "drained") else "") for each in rig.kv.step().notices]


# --- the choice ------------------------------------------------------------------------------------------------------------------


def test_the_pool_that_has_most_of_it_gets_it(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8, 8))
    there = rig.prefilled(tokens(40), "D1").sequence
    rig.kv.close(there)
    opened = rig.prefilled(tokens(40), "P").sequence
    reply = rig.kv.step(hand_off=[HandOff(opened, group="decode")])
    assert reply.targets == ["D1"]
    pulled(rig, reply.handoffs[0], "D1")
    assert where(rig, opened) == "D1"


def test_what_is_on_its_way_weighs_too(make_rig: MakeRig) -> None:
    """Many handoffs of one step are spread: none of them is resident when the next one is placed."""
    rig = make_rig(fleet(16, 16, 16))
    opened = [rig.prefilled(tokens(20, 100 * each), "P").sequence for each in range(6)]
    reply = rig.kv.step(hand_off=[HandOff(each, group="decode") for each in opened])
    assert sorted(reply.targets) == ["D0", "D0", "D1", "D1", "D2", "D2"]


def test_a_full_pool_is_passed_over(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(4, 8))
    rig.kv.open(tokens(40, 500), "D0", chunk=40)
    rig.prefilled(tokens(60, 700), "D1")  # more load, and room
    opened = rig.prefilled(tokens(40), "P").sequence
    handoff = rig.kv.hand_off(opened, group="decode")
    assert (target(rig, handoff), rig.handoff_state(handoff)) == ("D1", "moving")


def test_any_pool_is_any_other(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8))
    opened = rig.prefilled(tokens(40), "D0").sequence
    pulled(rig, rig.kv.hand_off(opened, group="*"), "P")
    assert where(rig, opened) == "P"
    with pytest.raises(WrongState, match="another pool that it may go to"):
        rig.kv.hand_off(opened, group="prefill")
    with pytest.raises(Unknown, match="group: nobody"):
        rig.kv.hand_off(opened, group="nobody")


def test_the_refusal_of_a_group_says_why(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(2, 2))
    opened = rig.prefilled(tokens(40), "P").sequence
    with pytest.raises(SequenceTooLarge, match="pool D0"):
        rig.kv.hand_off(opened, group="decode")
    short = rig.prefilled(tokens(10, 200), "P").sequence
    for pool in ("D0", "D1"):
        rig.die(rig.workers[pool][0])
    with pytest.raises(PoolNotReady, match="pool D0"):
        rig.kv.hand_off(short, group="decode")


# --- another one ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dead", "hung", "failing"])
def test_a_target_that_fails_is_replaced_by_another_of_the_group(make_rig: MakeRig, how: str) -> None:
    rig = make_rig(fleet(8, 8, handoff_tries=1))
    opened = rig.prefilled(tokens(40), "P").sequence
    handoff = rig.kv.hand_off(opened, group="decode")
    assert target(rig, handoff) == "D0"
    code = {"dead": "lost", "hung": "timed_out", "failing": "pull_failed"}[how]
    if how == "dead":
        rig.die(rig.workers["D0"][0])
    elif how == "hung":
        rig.tick(5001)
    else:
        rig.ack("D0", failed=[(handoff, 0, "sums differ")])
    assert news(rig) == [("aborted", code, ""), ("moving", code, "D1")]
    [second] = [each for each in rig.state.handoffs if each != handoff]
    assert (target(rig, second), rig.handoff_state(second), rig.state.handoffs[second].tried) == ("D1", "moving", (1,))
    pulled(rig, second, "D1")
    assert news(rig) == [("resident", "", "D1")]
    rig.kv.close(opened)
    all_home(rig)


def test_each_pool_is_tried_once(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8, 8))
    opened = rig.prefilled(tokens(40), "P").sequence
    rig.kv.hand_off(opened, group="decode")
    rig.tick(5001)
    rig.tick(5001)
    assert [each[:2] for each in news(rig)] == [("aborted", "timed_out"), ("moving", "timed_out"), ("aborted", "timed_out")]
    rig.kv.grow(opened)  # it is where it was
    assert where(rig, opened) == "P"


def test_a_pool_that_has_become_full_meanwhile_is_replaced_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(4, 8))
    opened = rig.kv.open(tokens(40), "P", chunk=40).sequence
    handoff = rig.kv.hand_off(opened, group="decode")
    assert target(rig, handoff) == "D0"
    rig.kv.open(tokens(40, 500), "D0", chunk=40)
    rig.write(opened)
    assert news(rig) == [("aborted", "out_of_pages", ""), ("moving", "out_of_pages", "D1")]
    [second] = rig.state.handoffs
    assert rig.handoff_state(second) == "moving"


def test_the_sources_death_and_an_abort_that_was_asked_for_begin_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8, 8))
    first, second = (rig.prefilled(tokens(40, each), "P").sequence for each in (0, 500))
    rig.kv.abort(rig.kv.hand_off(first, group="decode"))
    rig.kv.hand_off(second, group="decode")
    rig.die(rig.workers["P"][0])
    kinds = [each[0] for each in news(rig)]
    assert "moving" not in kinds and kinds.count("lost") == 2


# --- reserving --------------------------------------------------------------------------------------------------------------------


def test_reserved_pages_are_taken_before_anything_is_computed(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(4))
    opened = rig.kv.open(tokens(40), "P").sequence  # no slot yet
    handoff = rig.kv.hand_off(opened, "D0", reserve=True)
    assert (rig.handoff_state(handoff), rig.counts("D0").used) == ("prefilling", 3)
    other = rig.kv.open(tokens(40, 500), "P").sequence
    with pytest.raises(OutOfPages):
        rig.kv.hand_off(other, "D0", reserve=True)  # back-pressure: before a token of it is computed
    for _ in range(2):
        rig.kv.grow(opened, 20)
        assert rig.handoff_state(handoff) == "prefilling"  # not after the first half, although every token of that is written
        rig.write(opened)
    assert rig.handoff_state(handoff) == "moving"
    reserved = rig.state.handoffs[handoff].target_pages
    pulled(rig, handoff, "D0")
    assert rig.table(opened) == reserved
    rig.kv.step(close=[opened, other])
    all_home(rig)


def test_a_reservation_counts_against_the_quota_of_the_target(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8))
    rig.kv.set_quota(b"red", 4, "D0")
    first, second = (rig.kv.open(tokens(40, each), "P", tenant=b"red").sequence for each in (0, 500))
    rig.kv.hand_off(first, "D0", reserve=True)
    with pytest.raises(OverQuota):
        rig.kv.hand_off(second, "D0", reserve=True)


@pytest.mark.parametrize("how", ["aborted", "closed", "source-dead", "target-dead"])
def test_reserved_pages_come_home(make_rig: MakeRig, how: str) -> None:
    rig = make_rig(fleet(8))
    there = rig.prefilled(tokens(40), "D0").sequence
    opened = rig.kv.open(tokens(100), "P", chunk=20).sequence
    handoff = rig.kv.hand_off(opened, "D0", reserve=True)
    assert rig.counts("D0").used == 3 + 7 - 2
    if how == "aborted":
        rig.kv.abort(handoff)
    elif how == "closed":
        rig.kv.close(opened)
    else:
        rig.die(rig.workers["P" if how == "source-dead" else "D0"][0])
    rig.kv.step(close=[each for each in (there, opened) if each in rig.state.sequences])
    all_home(rig)


def test_what_the_target_learns_meanwhile_is_not_moved_and_the_reserved_pages_come_back(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(12))
    opened = rig.kv.open(tokens(60), "P", chunk=20).sequence
    handoff = rig.kv.hand_off(opened, "D0", reserve=True)
    assert rig.counts("D0").used == 4
    rig.kv.close(rig.prefilled(tokens(60), "D0").sequence)
    rig.kv.grow(opened, 40)
    rig.write(opened)
    found = rig.state.handoffs[handoff]
    assert (rig.handoff_state(handoff), found.target_shared, len(found.target_pages)) == ("moving", 3, 4)
    rig.ack("D0")
    assert rig.counts("D0").used == 4
    pulled(rig, handoff, "D0")
    rig.kv.close(opened)
    all_home(rig)


def test_a_flush_meanwhile_takes_nothing_from_under_anybody(make_rig: MakeRig) -> None:
    """What was shared when it was reserved is found by nobody afterwards: it is pulled, and not into pages that others read."""
    rig = make_rig(fleet(12))
    there = rig.prefilled(tokens(40), "D0", tenant=b"red").sequence
    opened = rig.kv.open(tokens(60), "P", chunk=20, tenant=b"red").sequence
    handoff = rig.kv.hand_off(opened, "D0", reserve=True)
    rig.kv.flush(b"red", "D0")
    rig.kv.grow(opened, 40)
    rig.write(opened)
    found = rig.state.handoffs[handoff]
    assert (found.target_shared, len(found.target_pages)) == (0, 4)
    assert not set(found.target_pages) & set(rig.table(there))
    pulled(rig, handoff, "D0")
    rig.kv.step(close=[there, opened])
    all_home(rig)


def test_a_flush_of_the_target_while_pages_move(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(12))
    there = rig.prefilled(tokens(40), "D0", tenant=b"red").sequence
    opened = rig.prefilled(tokens(60), "P", tenant=b"red").sequence
    handoff = rig.kv.hand_off(opened, "D0")
    rig.kv.flush(b"red", "D0")
    pulled(rig, handoff, "D0")
    rig.kv.truncate(opened, 20)  # a page that `there` reads as well: it has to be copied before it is written
    assert rig.table(opened)[0] == rig.table(there)[0] and rig.table(opened)[1] != rig.table(there)[1]
    rig.write(opened)
    rig.kv.step(close=[there, opened])
    all_home(rig)


# --- draining --------------------------------------------------------------------------------------------------------------------


def test_a_drained_pool_has_lost_nobody(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(12, 12, 12, drain_at_once=1))
    opened = [rig.prefilled(tokens(20, 100 * each), "D0").sequence for each in range(3)]
    assert rig.kv.drain("D0") == {"sequences": 3, "handoffs": 0}
    with pytest.raises(PoolDrains):
        rig.kv.open(tokens(10, 900), "D0")
    assert rig.kv.open(tokens(10, 900), group="decode").pool != "D0"
    other = rig.prefilled(tokens(20, 1000), "P").sequence
    with pytest.raises(PoolDrains):
        rig.kv.hand_off(other, "D0")
    for _ in range(3):
        [handoff] = rig.state.handoffs
        sequence = rig.state.handoffs[handoff].sequence_id
        pulled(rig, handoff, target(rig, handoff))
        rig.kv.grow(sequence)
        assert where(rig, sequence) != "D0"
        rig.tick()
    assert sorted(where(rig, each) for each in opened) == ["D1", "D1", "D2"] or sorted(where(rig, each) for each in opened) == [
        "D1",
        "D2",
        "D2",
    ]
    assert news(rig)[-1] == ("drained", "", "D0") and rig.kv.stats()["pools"]["D0"]["drained"]
    assert rig.die(rig.workers["D0"][0]) == []
    rig.workers["D0"].append(rig.kv.join("D0.new", "D0", "bf16"))
    assert rig.kv.open(tokens(10, 950), "D0").pool == "D0"


def test_a_worker_drains_its_pool(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8, 8))
    rig.kv.drain(worker=rig.workers["D1"][0])
    assert rig.kv.stats()["pools"]["D1"]["draining"]
    rig.tick()
    assert news(rig) == [("drained", "", "D1")]
    rig.kv.drain("D1", stop=True)
    assert not rig.kv.stats()["pools"]["D1"]["draining"]
    rig.kv.open(tokens(10), "D1")


def test_draining_stalls_nobody_who_has_nowhere_to_go(make_rig: MakeRig) -> None:
    """No room elsewhere: the sequence goes on where it is, and leaves once there is room."""
    rig = make_rig(fleet(8, 4))
    blocker = rig.kv.open(tokens(60, 500), "D1", chunk=60).sequence
    opened = rig.prefilled(tokens(40), "D0").sequence
    rig.kv.drain("D0")
    for _ in range(3):
        rig.tick(1000)
        rig.kv.grow(opened)
        rig.write(opened)
    assert not rig.state.handoffs
    rig.kv.close(blocker)
    rig.ack("D1")
    rig.tick()
    [handoff] = rig.state.handoffs
    assert rig.handoff_state(handoff) == "moving"


def test_a_handoff_on_its_way_into_a_pool_that_begins_to_drain_goes_elsewhere(make_rig: MakeRig) -> None:
    rig = make_rig(fleet(8, 8))
    opened = rig.kv.open(tokens(40), "P", chunk=20).sequence
    rig.kv.hand_off(opened, group="decode")
    moving = rig.prefilled(tokens(20, 500), "P").sequence
    there = rig.kv.hand_off(moving, "D0")
    rig.kv.drain("D0")
    assert [each[:2] for each in news(rig)] == [("aborted", "pool_draining"), ("moving", "pool_draining")]
    pulled(rig, there, "D0")  # its bytes were under way: it arrives, and then leaves
    rig.tick()
    leaving = [each for each in rig.state.handoffs.values() if each.sequence_id == moving]
    assert [rig.state.pools[each.target].name for each in leaving] == ["D1"]


def test_a_restart_goes_on_draining(tmp_path: Any) -> None:
    from kvmanager.manager import KVManager

    config = fleet(8, 8)
    manager = KVManager(config, checked=True, journal=tmp_path)
    for pool in config.pools:
        manager.join(pool.name, pool.name, "bf16")
    manager.open(tokens(40), "D0", chunk=40)
    manager.drain("D0")
    manager.disconnect()
    again = KVManager(config, checked=True, journal=tmp_path)
    assert again.stats()["pools"]["D0"]["draining"] and not again.stats()["pools"]["D0"]["drained"]
    with pytest.raises(PoolDrains):
        again.open(tokens(40, 500), "D0")
    again.disconnect()


# --- different page sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "into"), [(64, 16), (16, 64), (48, 32)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_pages_of_another_size(make_rig: MakeRig, source: int, into: int, length: int) -> None:
    config = ManagerConfig(pools=(PoolConfig("A", 40, source), PoolConfig("B", 40, into)), lease_ms=60_000)
    rig = make_rig(config)
    opened = rig.prefilled(tokens(length), "A").sequence
    handoff = rig.kv.hand_off(opened, "B")
    found = rig.state.handoffs[handoff]
    assert (len(found.source_pages), len(found.target_pages)) == (-(-length // source), -(-length // into))
    pulled(rig, handoff)
    rig.kv.grow(opened, 100)
    assert len(rig.table(opened)) == -(-(length + 100) // into)
    rig.write(opened)
    rig.tick()
    assert rig.kv.open(tokens(length + 1), "B").cached_tokens == length // into * into
    pulled(rig, rig.kv.hand_off(opened, "A"), "A")
    rig.kv.step(close=list(rig.state.sequences))
    all_home(rig)


def test_a_pull_between_page_sizes_names_slots(make_rig: MakeRig) -> None:
    """What the target shares ends in the middle of a source page: the pull begins there."""
    from kvmanager.manager import KVManager
    from kvmanager.worker.replica import Replica
    from tests.control.conftest import Clock

    config = ManagerConfig(pools=(PoolConfig("A", 10, 64), PoolConfig("B", 40, 16)), lease_ms=60_000)
    manager = KVManager(config, clock=Clock(), checked=True)
    rig, replica = Rig(manager, config, Clock()), Replica("B")
    replica.load(manager.tables_snapshot())
    replica.joined(rig.workers["B"][0])
    manager.subscribe(lambda batch, data: replica.feed(data))
    opened = rig.prefilled(tokens(100), "A").sequence
    there = rig.prefilled(np.concatenate([tokens(80), tokens(5, 900)]), "B").sequence
    replica.finish(replica.step, [there])
    manager.hand_off(opened, "B")
    [pull] = replica.pulls()
    assert (pull.shared_pages, pull.tokens, pull.source_skip) == (5, 20, 16)
    assert (pull.source_page_size, pull.target_page_size) == (64, 16)
    assert pull.source_pages.tolist() == rig.table(opened)[1:] and len(pull.target_pages) == 2


def test_contents_must_agree_where_page_sizes_do_not(make_rig: MakeRig) -> None:
    made = (PoolConfig("A", 8, 64, layout="v3/64"), PoolConfig("B", 8, 16, layout="v3/16"), PoolConfig("C", 8, 16, layout="v2/16"))
    rig = make_rig(ManagerConfig(pools=made, lease_ms=60_000))
    opened = rig.prefilled(tokens(100), "A").sequence
    with pytest.raises(LayoutMismatch):
        rig.kv.hand_off(opened, "C")
    pulled(rig, rig.kv.hand_off(opened, "B"))
    with pytest.raises(LayoutMismatch):
        rig.kv.hand_off(opened, "C")


BF16, FP8 = "v3:bf16/p16", "v3:fp8/p16<bf16,fp16"


def test_a_pool_whose_workers_convert_takes_what_is_stored_otherwise(make_rig: MakeRig) -> None:
    """From sixteen bits to eight, into pages of another size too, and on from there; what has come is shared like anything else."""
    made = (PoolConfig("A", 16, 16, layout=BF16), PoolConfig("B", 20, 16, layout=FP8), PoolConfig("C", 4, 64, layout="v3:fp8/p64<bf16"))
    rig = make_rig(ManagerConfig(pools=made, lease_ms=60_000))
    opened = rig.prefilled(tokens(100), "A").sequence
    pulled(rig, rig.kv.hand_off(opened, "B"))
    assert len(rig.table(opened)) == 7
    other = rig.prefilled(tokens(90, 500), "A").sequence
    pulled(rig, rig.kv.hand_off(other, "C"), "C")
    assert len(rig.table(other)) == 2
    pulled(rig, rig.kv.hand_off(other, "B"))  # the same eight bits in pages of another size
    assert [rig.kv.open(tokens(100), "B").cached_tokens, rig.kv.open(tokens(90, 500), "B").cached_tokens] == [96, 80]


def test_formats_that_nobody_converts_are_refused_by_name(make_rig: MakeRig) -> None:
    made = (PoolConfig("A", 8, 16, layout=FP8), PoolConfig("B", 8, 16, layout=BF16), PoolConfig("C", 8, 64, layout="v3:bf16/p64"))
    rig = make_rig(ManagerConfig(pools=made, lease_ms=60_000))
    opened = rig.prefilled(tokens(30), "A").sequence
    for target in ("B", "C"):
        with pytest.raises(
            NoConversion, match=f"^handoff from pool A to {target}: expected a target that stores or converts fp8, got one of bf16"
        ):
            rig.kv.hand_off(opened, target)
    with pytest.raises(NoConversion) as caught:
        rig.kv.hand_off(opened, group="*")
    assert caught.value.code == "no_conversion" and isinstance(caught.value, LayoutMismatch)
    assert (caught.value.details["expected"], caught.value.details["got"]) == ("fp8", "bf16")
    assert not rig.state.handoffs


@pytest.mark.parametrize(
    ("layout", "expected"), [("v2:fp8/p16<bf16", LayoutMismatch), ("v3:fp8/p16-x<bf16", LayoutMismatch), ("v3/p16", NoConversion)]
)
def test_conversion_is_of_the_same_latents_in_pages_of_a_kind(make_rig: MakeRig, layout: str, expected: type) -> None:
    """Other latents, something else that differs at one page size, a layout that names no format: not by conversion either."""
    made = (PoolConfig("A", 8, 16, layout=BF16), PoolConfig("B", 8, 16, layout=layout))
    rig = make_rig(ManagerConfig(pools=made, lease_ms=60_000))
    opened = rig.prefilled(tokens(30), "A").sequence
    with pytest.raises(LayoutMismatch) as caught:
        rig.kv.hand_off(opened, "B")
    assert type(caught.value) is expected


def test_a_group_s_pool_that_cannot_convert_is_passed_over(make_rig: MakeRig) -> None:
    """The better one by load is not chosen, and not when a handoff begins anew either."""
    made = (
        PoolConfig("P", 8, 16, layout=BF16),
        *(PoolConfig(f"D{n}", 8, 16, group="decode", layout=layout) for n, layout in enumerate(("v3:fp16/p16", FP8, "v3:fp16/p16"))),
    )
    rig = make_rig(ManagerConfig(pools=made, lease_ms=60_000))
    rig.prefilled(tokens(60, 300), "D1")
    opened = rig.prefilled(tokens(30), "P").sequence
    handoff = rig.kv.hand_off(opened, group="decode")
    assert rig.state.handoffs[handoff].target == rig.state.pool("D1").index
    rig.die(rig.workers["D1"][0])
    assert not any(each.state.name != "ABORTED" for each in rig.state.handoffs.values())
