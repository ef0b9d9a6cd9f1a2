"""A handoff that gets no further ends within a bounded time, with a reason; a pull that failed is tried again, a bounded number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue
from kvmanager.machine import events as ev
from kvmanager.machine.batch import decode_batch, encode_batch
from kvmanager.machine.commands import LINKS_MAX
from kvmanager.machine.snapshot import snapshot
from kvmanager.machine.workers import apply_link_chosen
from kvmanager.manager import KVManager
from tests.control.conftest import Clock, Rig, tokens
from tests.control.test_handoff import all_home, pulled, reach

MakeRig = Callable[[ManagerConfig], Rig]


def pools(*names: str, workers: int = 1, pages: int = 8, **more: Any) -> ManagerConfig:
    made = tuple(PoolConfig(name, pages, page_size=16, workers=workers) for name in names)
    return ManagerConfig(pools=made, **{"lease_ms": 60_000, **more})


def news(rig: Rig) -> list[tuple[str, int, str]]:
    return [(each.kind, each.handoff, each.code) for each in rig.kv.step().notices]


def test_a_moving_handoff_that_gets_no_further_is_aborted_in_time(make_rig: MakeRig) -> None:
    """Its worker lives, acknowledges and pulls nothing: no lease ends, and still the sequence is free to go elsewhere after 5 s."""
    rig = make_rig(pools("A", "B"))
    sequence, handoff = reach(rig, "moving")
    for _ in range(5):
        rig.tick(1000)
    assert rig.handoff_state(handoff) == "moving"
    rig.tick(1)
    assert rig.handoff_state(handoff) == "aborted"
    [notice] = rig.kv.step().notices
    assert (notice.kind, notice.handoff, notice.code) == ("aborted", handoff, "timed_out")
    assert "moving for more than 5000 ms" in notice.reason and "not pulled by B0" in notice.reason
    assert (rig.counts("A").used, rig.counts("B").quarantined) == (3, 3)  # the silent puller may wake, and reads and writes nobody else's
    pulled(rig, rig.kv.hand_off(sequence, "B"), "B")
    rig.kv.close(sequence)
    all_home(rig)


def test_a_worker_that_has_pulled_gives_the_others_their_time(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B", workers=2))
    _, handoff = reach(rig, "moving")
    rig.tick(4000)
    rig.kv.ack(rig.workers["B"][0], 0, pulled=[handoff])
    rig.tick(4000)
    assert rig.handoff_state(handoff) == "moving"
    rig.tick(1001)
    [notice] = rig.kv.step().notices
    assert notice.code == "timed_out" and "B1" in notice.reason and "B0" not in notice.reason


@pytest.mark.parametrize("state", ["prefilling", "reserving"])
def test_a_waiting_handoff_has_a_bound_of_its_own(make_rig: MakeRig, state: str) -> None:
    rig = make_rig(pools("A", "B", handoff_wait_ms=8000, handoff_prefill_ms=0))
    _, handoff = reach(rig, state)
    rig.tick(8000)
    assert rig.handoff_state(handoff) == state
    rig.tick(1)
    assert rig.handoff_state(handoff) == "over"
    assert news(rig) == [("aborted", handoff, "timed_out")]


def test_tokens_that_are_written_are_progress(make_rig: MakeRig) -> None:
    """A long prompt may take its time, as long as its worker gets on with it."""
    rig = make_rig(pools("A", "B", handoff_wait_ms=8000, handoff_prefill_ms=0))
    opened = rig.kv.open(tokens(60), "A", chunk=20)
    handoff = rig.kv.hand_off(opened.sequence, "B", reserve=True)
    for _ in range(2):
        rig.tick(6000)
        rig.write(opened.sequence)
        rig.kv.grow(opened.sequence, 20)
    rig.tick(6000)
    assert rig.handoff_state(handoff) == "prefilling"
    rig.write(opened.sequence)
    assert rig.handoff_state(handoff) == "moving"


def test_0_is_no_bound(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B", handoff_timeout_ms=0, handoff_wait_ms=0))
    _, handoff = reach(rig, "moving")
    rig.tick(59_000)
    assert rig.handoff_state(handoff) == "moving"


def test_the_service_itself_notices_that_time_is_up() -> None:
    """`tick` is called all the time and logs nothing while there is nothing to do: an overdue handoff is something."""
    clock = Clock()
    manager = KVManager(pools("A", "B"), clock=clock, checked=True)
    rig = Rig(manager, manager.config, clock)
    _, handoff = reach(rig, "moving")
    before = manager.state.version
    clock.now += 5000
    manager.tick()
    assert manager.state.version == before
    clock.now += 1
    manager.tick()
    assert manager.state.version == before + 1 and rig.handoff_state(handoff) == "aborted"


def test_a_failed_pull_is_tried_again_and_then_given_up_with_its_reason(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B"))
    sequence, handoff = reach(rig, "moving")
    [puller] = rig.workers["B"]
    for attempt in range(2):
        rig.kv.ack(puller, 0, failed=[(handoff, attempt, "page 2: expected checksum 1, got 2")])
        assert rig.handoff_state(handoff) == "moving"
        assert rig.state.handoffs[handoff].failures == {puller: attempt + 1}
    rig.kv.ack(puller, 0, failed=[(handoff, 2, "page 2: expected checksum 1, got 2")])
    [notice] = rig.kv.step().notices
    assert (notice.kind, notice.handoff, notice.code) == ("aborted", handoff, "pull_failed")
    assert notice.reason == "worker B0, 3 tries: page 2: expected checksum 1, got 2"
    rig.kv.close(sequence)
    all_home(rig)


def test_a_try_that_follows_a_failed_one_may_succeed(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B", workers=2))
    sequence, handoff = reach(rig, "moving")
    first, second = rig.workers["B"]
    before = rig.state.handoffs[handoff].sources
    rig.kv.ack(first, 0, failed=[(handoff, 0, "peer gone")])
    after = rig.state.handoffs[handoff].sources
    assert after[first] != before[first] and after[second] == before[second]  # it pulls from another worker now
    pulled(rig, handoff)
    assert rig.state.sequences[sequence].pool == 1


@pytest.mark.parametrize("when", ["another-try", "done", "aborted", "over", "not-a-puller"])
def test_late_reports_of_failures_change_nothing(make_rig: MakeRig, when: str) -> None:
    rig = make_rig(pools("A", "B", workers=2))
    sequence, handoff = reach(rig, "moving")
    first = rig.workers["B"][0]
    attempt, worker = 0, first
    if when == "another-try":
        rig.kv.ack(first, 0, failed=[(handoff, 0, "once")])
    elif when == "done":
        rig.kv.ack(first, 0, pulled=[handoff])
    elif when == "aborted":
        rig.kv.abort(handoff)
    elif when == "over":
        pulled(rig, handoff)
    else:
        worker = rig.workers["A"][0]
    before = rig.state.handoffs.get(handoff)
    for _ in range(2):
        rig.kv.ack(worker, 0, failed=[(handoff, attempt, "late")])
    after = rig.state.handoffs.get(handoff)
    if before is None or after is None:
        assert before is after is None
    else:
        assert (after.state, after.failures, after.sources) == (before.state, before.failures, before.sources)
    assert sequence in rig.state.sequences


def test_snapshot_knows_tries_and_times(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B", workers=2))
    _, handoff = reach(rig, "moving")
    rig.kv.ack(rig.workers["B"][1], 0, failed=[(handoff, 0, "x")])
    rig.kv.ack(rig.workers["B"][0], 0, pulled=[handoff])
    found = rig.state.handoffs[handoff]
    assert found.failures == {rig.workers["B"][1]: 1} and list(found.pulled) == [rig.workers["B"][0]]
    assert found.since_ms == rig.clock.now
    assert sorted(found.sources.values()) != [] and list(rig.state.handoffs.moving) == [handoff]


def test_a_full_pool_serves_its_queue_in_order(make_rig: MakeRig) -> None:
    """A large sequence does not wait for ever behind small ones that come later."""
    rig = make_rig(pools("A", "B", pages=9))
    blockers = [rig.kv.open(tokens(40, 500 + 100 * each), "B", chunk=40).sequence for each in range(3)]
    large, small = rig.prefilled(tokens(70), "A").sequence, rig.prefilled(tokens(20, 900), "A").sequence
    first, second = rig.kv.hand_off(large, "B"), rig.kv.hand_off(small, "B")
    for blocker, expected in zip(blockers, (["reserving", "reserving"], ["moving", "reserving"], ["moving", "moving"]), strict=True):
        rig.kv.close(blocker)
        rig.ack("B", pulled=[])
        states = [rig.handoff_state(first), rig.handoff_state(second)]
        assert states == expected


def test_a_tenant_at_its_quota_holds_up_nobody_in_the_queue(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B", pages=8))
    rig.kv.set_quota(b"red", 3, "B")
    rig.prefilled(tokens(10, 300), "B", tenant=b"red")
    blocker = rig.kv.open(tokens(100, 500), "B", chunk=100).sequence
    red, blue = rig.prefilled(tokens(40), "A", tenant=b"red").sequence, rig.prefilled(tokens(40, 900), "A", tenant=b"blue").sequence
    first, second = rig.kv.hand_off(red, "B"), rig.kv.hand_off(blue, "B")
    rig.kv.close(blocker)
    rig.ack("B")
    assert (rig.handoff_state(first), rig.handoff_state(second)) == ("reserving", "moving")


def test_what_was_moved_and_what_was_spared_is_reported(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B"))
    rig.prefilled(tokens(40), "B")
    opened = rig.prefilled(tokens(40), "A")
    pulled(rig, rig.kv.hand_off(opened.sequence, "B"))
    [notice] = rig.kv.step().notices
    assert (notice.kind, notice.reason, notice.moved, notice.spared) == ("resident", "B", 1, 2)
    stats = rig.kv.stats()["pools"]["B"]
    assert (stats["pages_moved"], stats["pages_spared"]) == (1, 2)
    assert (rig.state.pool("B").pages_moved, rig.state.pool("B").pages_spared) == (1, 2)


@pytest.mark.parametrize("count", [10, 300])
def test_no_command_looks_at_all_handoffs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: with 300 in flight an acknowledgement asks as much of the state as with 10."""
    from kvmanager.pages.handoff import Handoff

    config = pools("A", "B", pages=2000, handoffs_max=4000)
    manager = KVManager(config, clock=Clock())
    rig = Rig(manager, config, Clock())
    opened = [manager.open(tokens(20, 30 * each), "A", chunk=20).sequence for each in range(count + 1)]
    rig.write(*opened)
    for each in opened[:-1]:
        manager.hand_off(each, "B")
    assert len(manager.state.handoffs.moving) == count
    looked = 0
    honest = Handoff.__getattribute__

    def look(self: Handoff, name: str) -> Any:
        nonlocal looked
        looked += 1
        return honest(self, name)

    monkeypatch.setattr(Handoff, "__getattribute__", look)
    manager.step(grow=[opened[-1]])
    [puller] = rig.workers["B"]
    manager.ack(puller, 0, pulled=[next(iter(manager.state.handoffs))])
    manager.tick()
    assert 0 < looked < 90, looked


def test_events_carry_who_pulls_from_whom(make_rig: MakeRig) -> None:
    """Tensor-parallel degrees differ: 4 ranks pull from 2, and each of the 2 is asked by 2; 1 pulls from another of 4 each time."""
    made = (PoolConfig("A", 40, 16, workers=2), PoolConfig("B", 40, 16, workers=4), PoolConfig("C", 40, 16, workers=1))
    config = ManagerConfig(pools=made, lease_ms=60_000)
    manager = KVManager(config, clock=Clock(), checked=True)
    rig, seen = Rig(manager, config, Clock()), []
    manager.subscribe(lambda batch, data: seen.extend(each for each in batch.events if isinstance(each, ev.HandoffMoving)))
    opened = [rig.prefilled(tokens(10, 100 * each), "A").sequence for each in range(4)]
    for each in opened:
        pulled(rig, manager.hand_off(each, "B"), "B")
    for moving in seen:
        assert moving.pullers.tolist() == rig.workers["B"]
        assert sorted(moving.sources.tolist().count(each) for each in rig.workers["A"]) == [2, 2]
    seen.clear()
    for each in opened:
        pulled(rig, manager.hand_off(each, "C"), "C")
    assert sorted(moving.sources.tolist()[0] for moving in seen) == rig.workers["B"]


# --- what is told of the way that pages take, and of bytes --------------------------------------------------------------------------


def links_logged(rig: Rig, version: int) -> int:
    batches = [decode_batch(data) for data in rig.kv.batches_since(rig.state.epoch, version)]
    return sum(isinstance(event, ev.LinkChosen) for batch in batches for event in batch.events)


def test_the_transport_of_a_puller_and_its_reason_are_kept_listed_and_logged_once(make_rig: MakeRig) -> None:
    """Issue 6: the choice and its reason are visible."""
    rig = make_rig(pools("A", "B"))
    [source], [target] = rig.workers["A"], rig.workers["B"]
    rig.kv.hand_off(rig.prefilled(tokens(40), "A").sequence, "B")
    assert [each["transport"] for each in rig.kv.handoffs()] == [""]
    before = rig.version
    for _ in range(2):
        rig.kv.ack(target, 1, links=[(source, "shm", "both here"), (999, "nixl", "nobody's")])
    assert links_logged(rig, before) == 1
    assert [each["transport"] for each in rig.kv.handoffs()] == ["shm"]
    links = {each["worker"]: each["links"] for each in rig.kv.workers()}
    assert links == {source: [], target: [{"worker": source, "name": "A0", "transport": "shm", "reason": "both here"}]}
    assert encode_batch(snapshot(rig.state)) == rig.kv.snapshot()
    rig.kv.ack(target, 1, links=[(source, "nixl", "forced")])
    assert rig.state.workers[target].links == {source: ("nixl", "forced")}
    rig.kv.worker_gone(source)
    assert rig.state.workers[target].links == {}


def test_of_each_worker_so_many_links_are_kept_the_newest(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B"))
    state, [worker] = rig.state, rig.workers["B"]
    for peer in range(1000, 1001 + LINKS_MAX):
        apply_link_chosen(state, ev.LinkChosen(worker, peer, "shm", "both here"))
    assert list(state.workers[worker].links) == list(range(1001, 1001 + LINKS_MAX))


@pytest.mark.parametrize(
    "links",
    [
        [(1, "shm")],
        [(0, "shm", "")],
        [(1, "", "")],
        [(1, "s" * 300, "")],
        [(1, "shm", "r" * 301)],
        [(1, "shm", 7)],
        7,
        [(1, "shm", "")] * 257,
    ],
)
def test_links_that_are_none_are_refused_by_name(make_rig: MakeRig, links: object) -> None:
    rig = make_rig(pools("A", "B"))
    with pytest.raises(InvalidValue, match=r"ack\.links"):
        rig.kv.ack(rig.workers["B"][0], 1, links=links)


def test_bytes_spared_are_told_once_a_worker_has_said_what_a_page_takes(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B"))
    rig.kv.worker_gone(rig.workers["B"][0])
    rig.workers["B"] = [rig.kv.join("B1", "B", "bf16", page_bytes=73_728)]
    rig.prefilled(tokens(40), "B")
    pulled(rig, rig.kv.hand_off(rig.prefilled(tokens(40), "A").sequence, "B"))
    [notice] = rig.kv.step().notices
    assert (notice.moved, notice.spared, notice.page_bytes) == (1, 2, 73_728)
    stats = rig.kv.stats()["pools"]
    assert [stats["B"][name] for name in ("page_bytes", "bytes_moved", "bytes_spared")] == [73_728, 73_728, 147_456]
    assert stats["A"]["page_bytes"] == stats["A"]["bytes_moved"] == 0
    assert encode_batch(snapshot(rig.state)) == rig.kv.snapshot()


def test_workers_of_a_pool_have_pages_of_the_same_bytes(make_rig: MakeRig) -> None:
    rig = make_rig(pools("A", "B"))
    for first, second in ((None, 512), (512, 1024)):
        rig.kv.worker_gone(rig.workers["B"][0])
        if first:
            with pytest.raises(InvalidValue, match=r"join\.page_bytes: expected 512, as other workers of pool B say, got 1024"):
                rig.kv.join("B1", "B", "bf16", page_bytes=second)
            rig.kv.join("B1", "B", "bf16")  # does not say
        else:
            rig.workers["B"] = [rig.kv.join("B1", "B", "bf16", page_bytes=second)]
    with pytest.raises(InvalidValue, match=r"join\.page_bytes"):
        rig.kv.join("B1", "B", "bf16", page_bytes=-1)
