"""prefilling → sealed → reserving → moving → resident, with aborted reachable from each; pages are where they should be in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import LayoutMismatch, OutOfPages, SequenceTooLarge, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.commands import Open
from kvmanager.manager import KVManager
from tests.control.conftest import Clock, Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def two_pools(source: int = 8, target: int = 8, target_workers: int = 1, **more: int) -> ManagerConfig:
    pools = (PoolConfig("A", source, page_size=16), PoolConfig("B", target, page_size=16, workers=target_workers))
    return ManagerConfig(pools=pools, lease_ms=1000, **more)


def pulled(rig: Rig, handoff: int, pool: str = "B") -> None:
    for worker in list(rig.workers[pool]):
        rig.kv.ack(worker, rig.version, pulled=[handoff])


def notices(rig: Rig) -> list[tuple[str, int, int]]:
    return [(each.kind, each.sequence, each.handoff) for each in rig.kv.step().notices]


def all_home(rig: Rig) -> None:
    """Whatever happened: once everybody has acknowledged, each pool is free or cached from end to end."""
    for pool in rig.workers:
        rig.ack(pool)
    rig.tick()
    for pool in rig.workers:
        rig.ack(pool)
    state = rig.state
    assert not state.handoffs
    for pool_state in state.pools:
        counts = pool_state.counts()
        assert counts.free + counts.cached == counts.total, counts


def test_sequence_moves_and_decodes_on_where_it_went(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    opened = rig.prefilled(tokens(40), "A")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == "moving"
    assert (rig.counts("A").used, rig.counts("B").used) == (3, 3)  # both sides hold their own
    pulled(rig, handoff)
    assert rig.handoff_state(handoff) == "over"
    assert notices(rig) == [("resident", opened.sequence, handoff)]
    assert notices(rig) == []
    state = rig.state
    assert state.sequences[opened.sequence].pool == 1
    assert rig.length(opened.sequence) == 40
    rig.kv.grow(opened.sequence, 20)
    assert len(rig.table(opened.sequence)) == 4
    assert rig.counts("A").quarantined == 1  # the full ones are cached in the source; its worker may still be busy with the last
    rig.ack("A")
    assert (rig.counts("A").used, rig.counts("A").cached, rig.counts("A").free) == (0, 2, 6)
    rig.kv.close(opened.sequence)
    all_home(rig)


def test_events_of_a_handoff_come_in_order() -> None:
    manager = KVManager(two_pools(target=4), clock=Clock(), checked=True)
    rig = Rig(manager, manager.config, Clock())
    seen: list[Any] = []
    manager.subscribe(lambda batch, data: seen.extend(batch.events))
    blocker = manager.open(tokens(40, 500), "B", chunk=40)
    opened = manager.open(tokens(40), "A", chunk=40)
    handoff = manager.hand_off(opened.sequence, "B")
    rig.write(opened.sequence)
    manager.close(blocker.sequence)
    rig.ack("B")
    pulled(rig, handoff)
    told = [type(each).__name__ for each in seen if type(each).__name__.startswith("Handoff")]
    assert told == ["HandoffBegun", "HandoffSealed", "HandoffReserving", "HandoffMoving", "HandoffPulled", "HandoffResident"]


def test_handoff_waits_until_every_token_is_written(make_rig: MakeRig) -> None:
    """A page that the prefill worker is still writing must not be pulled."""
    rig = make_rig(two_pools())
    opened = rig.kv.open(tokens(40), "A", chunk=20)
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == "prefilling"
    rig.kv.grow(opened.sequence, 20)  # prefilling goes on
    [worker] = rig.workers["A"]
    rig.kv.ack(worker, rig.version, ids=[opened.sequence], tokens=[39])
    assert rig.handoff_state(handoff) == "prefilling"
    rig.kv.ack(worker, rig.version, ids=[opened.sequence], tokens=[40])
    assert rig.handoff_state(handoff) == "moving"
    assert rig.state.handoffs[handoff].length == 40


def test_handoff_and_growth_in_one_step_seals_after_the_growth_is_written(make_rig: MakeRig) -> None:
    """The step asks for both; what it grows by has not been written when it is decided."""
    rig = make_rig(two_pools())
    opened = rig.prefilled(tokens(16), "A")
    [handoff] = rig.kv.step(hand_off=[(opened.sequence, "B")], grow=[opened.sequence]).handoffs
    assert rig.handoff_state(handoff) == "prefilling"
    rig.write(opened.sequence)
    assert rig.handoff_state(handoff) == "moving"
    found = rig.state.handoffs[handoff]
    assert (found.length, len(found.source_pages), len(found.target_pages)) == (17, 2, 2)


@pytest.mark.parametrize("at", ["reserving", "moving"])
def test_sealed_sequence_cannot_grow_and_the_others_of_the_step_can(make_rig: MakeRig, at: str) -> None:
    rig = make_rig(two_pools(target=4))
    if at == "reserving":
        rig.kv.open(tokens(40, 500), "B", chunk=40)
    opened, other = rig.prefilled(tokens(40), "A"), rig.prefilled(tokens(10, 900), "A")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == at
    reply = rig.kv.step(grow=[opened.sequence, other.sequence])
    assert [(each.index, each.error.code, each.error.details["got"]) for each in reply.refused] == [(0, "wrong_state", at)]
    assert (rig.length(opened.sequence), rig.length(other.sequence)) == (40, 11)


def test_aborted_sequence_grows_again_in_its_source(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    opened = rig.prefilled(tokens(40), "A")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    rig.kv.step(abort=[handoff], grow=[opened.sequence])
    assert rig.length(opened.sequence) == 41
    rig.write(opened.sequence)
    again = rig.kv.hand_off(opened.sequence, "B")
    assert again > handoff
    pulled(rig, again)
    assert rig.state.sequences[opened.sequence].pool == 1


def test_pages_that_the_target_shares_are_not_moved(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    there = rig.prefilled(tokens(40), "B")
    opened = rig.prefilled(tokens(40), "A")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    found = rig.state.handoffs[handoff]
    assert found.target_shared == 2
    assert found.target_pages[:2] == rig.table(there.sequence)[:2]
    assert rig.counts("B").used == 4
    pulled(rig, handoff)
    assert rig.table(opened.sequence)[:2] == rig.table(there.sequence)[:2]
    rig.kv.step(close=[there.sequence, opened.sequence])
    all_home(rig)


def test_tenants_share_nothing_in_the_target_either(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    rig.prefilled(tokens(40), "B", tenant=b"red")
    opened = rig.prefilled(tokens(40), "A", tenant=b"blue")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.state.handoffs[handoff].target_shared == 0


def test_moved_pages_can_be_shared_in_the_target_and_the_source_keeps_its_own(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    opened = rig.prefilled(tokens(40), "A")
    pulled(rig, rig.kv.hand_off(opened.sequence, "B"))
    rig.tick()
    assert rig.kv.open(tokens(40), "B").cached_tokens == 32
    assert rig.kv.open(tokens(40), "A").cached_tokens == 32


def test_reserving_goes_on_once_pages_come_free(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools(target=4))
    blocker = rig.kv.open(tokens(40, 500), "B", chunk=40)
    opened = rig.prefilled(tokens(40), "A")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == "reserving"
    rig.kv.close(blocker.sequence)
    assert rig.handoff_state(handoff) == "reserving"  # quarantined is not free
    rig.ack("B")
    assert rig.handoff_state(handoff) == "moving"


def reach(rig: Rig, state: str) -> tuple[int, int]:
    """(sequence, handoff) in that state."""
    if state == "reserving":
        rig.kv.open(tokens(100, 500), "B", chunk=100)
    opened = rig.kv.open(tokens(40), "A", chunk=40)
    if state != "prefilling":
        rig.write(opened.sequence)
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == state
    return opened.sequence, handoff


@pytest.mark.parametrize("state", ["prefilling", "reserving", "moving"])
def test_abort_in_each_state_leaves_the_sequence_in_its_source_and_every_page_comes_home(make_rig: MakeRig, state: str) -> None:
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, state)
    before = rig.table(sequence)
    rig.kv.abort(handoff)
    assert notices(rig) == [("aborted", sequence, handoff)]
    assert rig.table(sequence) == before
    assert rig.state.sequences[sequence].pool == 0
    rig.write(sequence)
    rig.kv.grow(sequence)
    if state == "moving":
        assert rig.counts("B").used == 0
    rig.kv.step(close=list(rig.state.sequences))
    all_home(rig)
    assert notices(rig) == []


def test_aborted_handoff_holds_the_source_until_the_pullers_acked_the_abort(make_rig: MakeRig) -> None:
    """Until then one of them may be reading: those pages must not be written by anybody else."""
    rig = make_rig(two_pools(source=3, target_workers=2))
    sequence, handoff = reach(rig, "moving")
    rig.kv.step(close=[sequence])
    assert notices(rig) == [("aborted", sequence, handoff)]
    rig.ack("A")
    first, second = rig.workers["B"]
    rig.kv.ack(first, rig.version)
    assert (rig.counts("A").used, rig.counts("B").quarantined) == (3, 3)
    with pytest.raises(OutOfPages):
        rig.kv.open(tokens(10, 900), "A", chunk=10)
    rig.kv.ack(second, rig.version)
    rig.ack("A")
    assert (rig.counts("A").used, rig.counts("B").quarantined, rig.handoff_state(handoff)) == (0, 0, "over")
    rig.kv.open(tokens(10, 900), "A", chunk=10)


@pytest.mark.parametrize("state", ["prefilling", "reserving", "moving"])
def test_closing_the_sequence_ends_its_handoff(make_rig: MakeRig, state: str) -> None:
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, state)
    rig.kv.close(sequence)
    assert notices(rig) == [("aborted", sequence, handoff)]
    assert sequence not in rig.state.sequences
    rig.kv.step(close=list(rig.state.sequences))
    all_home(rig)


def test_close_and_abort_in_one_step_end_it_once(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, "moving")
    reply = rig.kv.step(close=[sequence], abort=[handoff])
    assert [(each.kind, each.error.code) for each in reply.refused] == [("abort", "wrong_state")]
    assert notices(rig) == [("aborted", sequence, handoff)]
    all_home(rig)


@pytest.mark.parametrize("state", ["prefilling", "reserving", "moving"])
def test_source_worker_dies(make_rig: MakeRig, state: str) -> None:
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, state)
    assert rig.die(rig.workers["A"][0]) == [sequence]
    assert notices(rig) == [("aborted", sequence, handoff), ("lost", sequence, 0)]
    if state == "moving":
        assert rig.counts("A").used == 3  # the target may still be reading them
        assert rig.counts("B").quarantined == 3
    rig.kv.step(close=list(rig.state.sequences))
    all_home(rig)
    assert rig.counts("A").free == 8


@pytest.mark.parametrize("state", ["prefilling", "reserving", "moving"])
def test_target_worker_dies(make_rig: MakeRig, state: str) -> None:
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, state)
    rig.die(rig.workers["B"][0])
    assert notices(rig)[0] == ("aborted", sequence, handoff)
    assert rig.state.sequences[sequence].pool == 0
    rig.workers["B"].append(rig.kv.join("B0", "B", "bf16"))
    rig.write(sequence)
    again = rig.kv.hand_off(sequence, "B")
    assert rig.handoff_state(again) == "moving"
    pulled(rig, again)
    assert rig.state.sequences[sequence].pool == 1
    rig.kv.close(sequence)
    all_home(rig)


def test_silent_target_holds_pages_of_both_pools_until_it_is_known_dead(make_rig: MakeRig) -> None:
    """Its lease ends and the handoff is aborted, but it may still be pulling: only its known death frees the source."""
    rig = make_rig(two_pools(source=3))
    sequence, handoff = reach(rig, "moving")
    rig.clock.now += 900
    rig.ack("A")
    rig.tick(200)
    assert notices(rig) == [("aborted", sequence, handoff)]
    rig.kv.close(sequence)
    rig.ack("A")
    for _ in range(3):
        rig.tick(300)
        rig.ack("A")
    assert (rig.counts("A").used, rig.counts("B").quarantined) == (3, 3)
    rig.die(rig.workers["B"][0])
    rig.tick()
    rig.ack("A")
    assert (rig.counts("A").used, rig.counts("B").free) == (0, 8)
    assert rig.handoff_state(handoff) == "over"


def test_both_pools_lost_in_one_tick_end_the_handoff_once(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools(target_workers=2))
    sequence, handoff = reach(rig, "moving")
    rig.tick(1001)
    assert notices(rig) == [("aborted", sequence, handoff), ("lost", sequence, 0)]
    for worker in [*rig.workers["A"], *rig.workers["B"]]:
        rig.die(worker)
    all_home(rig)


@pytest.mark.parametrize("when", ["aborted", "ended", "resident", "never-begun"])
def test_late_pulled_changes_nothing(make_rig: MakeRig, when: str) -> None:
    """A completion of an older handoff names nothing: ids are never used twice."""
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, "moving")
    if when in ("aborted", "ended"):
        rig.kv.abort(handoff)
    if when == "ended":
        rig.ack("B")
    if when == "resident":
        pulled(rig, handoff)
    before = rig.state
    [worker] = rig.workers["B"]
    rig.kv.ack(worker, 0, pulled=[handoff + 1 if when == "never-begun" else handoff])
    after = rig.state
    assert after.tables.digest() == before.tables.digest()
    assert {each: handoff.state for each, handoff in after.handoffs.items()} == {each: h.state for each, h in before.handoffs.items()}
    assert [pool.counts() for pool in after.pools] == [pool.counts() for pool in before.pools]
    assert after.sequences[sequence].pool == before.sequences[sequence].pool


def test_only_the_targets_workers_can_say_that_it_was_pulled(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools(target_workers=2))
    sequence, handoff = reach(rig, "moving")
    rig.ack("A", pulled=[handoff])
    first, second = rig.workers["B"]
    rig.kv.ack(first, rig.version, pulled=[handoff, handoff])
    rig.kv.ack(first, rig.version, pulled=[handoff])
    assert rig.handoff_state(handoff) == "moving"  # each rank needs its copy
    rig.kv.ack(second, rig.version, pulled=[handoff])
    assert rig.state.sequences[sequence].pool == 1


def test_sequence_has_one_handoff_at_a_time(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    sequence, handoff = reach(rig, "moving")
    with pytest.raises(WrongState, match="without an active handoff"):
        rig.kv.hand_off(sequence, "B")
    reply = rig.kv.step(abort=[handoff], hand_off=[(sequence, "B"), (sequence, "B")])
    assert [(each.kind, each.index) for each in reply.refused] == [("hand_off", 1)]


def test_abort_of_one_that_is_over_is_refused(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    _, handoff = reach(rig, "moving")
    rig.kv.abort(handoff)
    with pytest.raises(WrongState):
        rig.kv.abort(handoff)
    rig.ack("B")
    with pytest.raises(Unknown):
        rig.kv.abort(handoff)


def test_layouts_must_agree_before_a_byte_moves(make_rig: MakeRig) -> None:
    pools = (PoolConfig("A", 8, page_size=16, layout="bf16"), PoolConfig("B", 8, page_size=16, layout="fp8"))
    rig = make_rig(ManagerConfig(pools=pools))
    opened = rig.prefilled(tokens(10), "A")
    with pytest.raises(LayoutMismatch) as caught:
        rig.kv.hand_off(opened.sequence, "B")
    assert (caught.value.details["expected"], caught.value.details["got"]) == ("bf16", "fp8")
    assert not rig.state.handoffs


def test_sequence_too_large_for_the_target_is_refused_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools(target=2))
    opened = rig.prefilled(tokens(40), "A")
    with pytest.raises(SequenceTooLarge, match="pool B: expected at most 2 pages, got a sequence of 3") as caught:
        rig.kv.hand_off(opened.sequence, "B")
    assert caught.value.details == {"pool": "B", "needed": 3, "total": 2}
    assert not rig.state.handoffs
    rig.kv.grow(opened.sequence)


def test_sequence_that_grows_too_large_for_the_target_is_aborted_not_kept_waiting(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools(target=2))
    opened = rig.kv.open(tokens(40), "A", chunk=20)
    handoff = rig.kv.hand_off(opened.sequence, "B")  # its prompt is not computed yet
    rig.kv.grow(opened.sequence, 20)
    rig.write(opened.sequence)
    [notice] = rig.kv.step().notices
    assert (notice.kind, notice.sequence, notice.handoff) == ("aborted", opened.sequence, handoff)
    assert notice.code == "sequence_too_large"
    assert "expected at most 2 pages, got a sequence of 3" in notice.reason
    rig.kv.grow(opened.sequence)


def test_a_notice_has_a_code_for_programs(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    first, second, third = (rig.prefilled(tokens(20, 100 * each), "A").sequence for each in range(3))
    asked, closed = rig.kv.hand_off(first, "B"), rig.kv.hand_off(second, "B")
    rig.kv.abort(asked)
    rig.kv.close(second)
    rig.kv.hand_off(third, "B")
    rig.die(rig.workers["B"][0])
    rig.die(rig.workers["A"][0])
    notices = rig.kv.step().notices
    assert [(each.kind, each.sequence, each.code) for each in notices] == [
        ("aborted", first, "asked"),
        ("aborted", second, "closed"),
        ("aborted", third, "lost"),
        ("lost", first, "lost"),
        ("lost", third, "lost"),
    ]
    assert closed == notices[1].handoff


def test_unwritten_sequence_moves_without_a_page(make_rig: MakeRig) -> None:
    """Opened and never run: nothing moves, and a snapshot taken meanwhile still knows which namespace it entered."""
    rig = make_rig(two_pools())
    opened = rig.kv.open(tokens(40), "A", tenant=b"red")
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == "moving"
    pulled(rig, handoff)
    rig.kv.grow(opened.sequence, 40)
    rig.write(opened.sequence)
    assert rig.kv.open(tokens(40), "B", tenant=b"red").cached_tokens == 32


def test_snapshot_in_the_middle_of_an_empty_move_continues_identically() -> None:
    from kvmanager.machine.apply import apply
    from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest

    manager = KVManager(two_pools(), clock=Clock(), checked=True)
    rig = Rig(manager, manager.config, Clock())
    handoff = manager.hand_off(manager.open(tokens(40), "A", tenant=b"red").sequence, "B")
    loaded = load_snapshot(manager.config, snapshot(manager.state))
    manager.subscribe(lambda batch, data: apply(loaded, batch))
    pulled(rig, handoff)
    assert state_digest(loaded) == state_digest(manager.state)


def test_handoff_there_and_back_meets_its_own_pages_again(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    opened = rig.prefilled(tokens(40), "A")
    first = rig.table(opened.sequence)
    pulled(rig, rig.kv.hand_off(opened.sequence, "B"))
    back = rig.kv.hand_off(opened.sequence, "A")
    found = rig.state.handoffs[back]
    assert (found.target_shared, found.target_pages[:2]) == (2, first[:2])
    pulled(rig, back, "A")
    assert rig.state.sequences[opened.sequence].pool == 0
    rig.kv.close(opened.sequence)
    all_home(rig)


def test_pages_of_a_moving_handoff_are_not_swapped_for_equal_ones(make_rig: MakeRig) -> None:
    """The puller was told ids; an equal copy that enters the index meanwhile must not take their place under it."""
    rig = make_rig(two_pools(target=8))
    reply = rig.kv.step(opens=[Open(tokens(40), "A", chunk=40), Open(tokens(40), "A", chunk=40, wait=False)])
    one, two = (each.sequence for each in reply.opened)
    handoff = rig.kv.hand_off(two, "B")
    rig.write(one, two)
    assert rig.handoff_state(handoff) == "moving"
    held = rig.state.handoffs[handoff].source_pages
    for _ in range(3):
        rig.tick()
        assert rig.state.handoffs[handoff].source_pages == held == rig.table(two)
    pulled(rig, handoff)
    rig.kv.step(close=[one, two])
    all_home(rig)


def test_events_name_what_the_puller_needs() -> None:
    manager = KVManager(two_pools(), clock=Clock(), checked=True)
    rig = Rig(manager, manager.config, Clock())
    opened = rig.prefilled(tokens(40), "A")
    seen: list[Any] = []
    manager.subscribe(lambda batch, data: seen.extend(batch.events))
    handoff = manager.hand_off(opened.sequence, "B")
    [moving] = [each for each in seen if isinstance(each, ev.HandoffMoving)]
    assert (moving.handoff, moving.shared.tolist(), len(moving.fresh)) == (handoff, [], 3)
    assert manager.state.handoffs[handoff].source_pages == rig.table(opened.sequence)
