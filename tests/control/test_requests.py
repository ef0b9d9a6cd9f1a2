"""A request sent again is answered again, not executed again; and tables of clients stay bounded."""

from __future__ import annotations

import msgpack
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import BadMessage, Internal, KVError, StaleEpoch, WrongState
from kvmanager.machine import decide as decide_module
from kvmanager.machine.commands import Ack, Join, Open, Step, Tick, WorkerGone
from kvmanager.machine.snapshot import state_digest
from kvmanager.manager import KVManager
from tests.control.conftest import tokens


@pytest.fixture
def manager() -> KVManager:
    config = ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16)), clients_max=3)
    manager = KVManager(config, clock=lambda: 0, checked=True)
    manager.join("A0", "A", "bf16")
    manager.join("B0", "B", "bf16")
    return manager


@pytest.mark.parametrize(
    "command",
    [
        Step(opens=[Open(tokens(20), "A", chunk=20)]),
        Step(),
        Ack(1, 1),
        Tick(),
        WorkerGone(2),
        Step(grow=[999 << 20]),
    ],
    ids=["open", "empty", "ack", "tick", "gone", "refused"],
)
def test_same_number_gets_the_same_bytes_and_changes_nothing(manager: KVManager, command: object) -> None:
    first = manager.execute(command, 77, 5)
    digest, batches = state_digest(manager.state), []
    manager.subscribe(lambda batch, data: batches.append(batch))
    for _ in range(3):
        assert manager.execute(command, 77, 5) == first
    assert manager.execute(Step(), 77, 5) == first  # by number: what the repetition holds is not looked at
    assert state_digest(manager.state) == digest and not batches


def test_lower_number_is_rejected_and_changes_nothing(manager: KVManager) -> None:
    manager.execute(Step(), 77, 5)
    digest = state_digest(manager.state)
    with pytest.raises(BadMessage, match="above 5, got 4"):
        manager.execute(Step(opens=[Open([1], "A")]), 77, 4)
    assert state_digest(manager.state) == digest
    manager.execute(Step(), 77, 9)


def test_a_late_copy_of_a_refused_request_is_refused_too(manager: KVManager) -> None:
    """The simulator's find: a join was refused, a copy of it came late and was carried out, and nobody knew of the worker it made. Its
    lease ended, nobody could report it dead, and the pool was never ready again."""
    with pytest.raises(KVError) as refused:
        manager.execute(Join("A1", "A", "bf16"), 77, 5)
    manager.worker_gone(1)
    digest = state_digest(manager.state)
    with pytest.raises(type(refused.value)) as again:
        manager.execute(Join("A1", "A", "bf16"), 77, 5)
    assert again.value.to_wire() == refused.value.to_wire()
    with pytest.raises(BadMessage, match="above 5, got 4"):
        manager.execute(Step(), 77, 4)
    assert state_digest(manager.state) == digest
    manager.execute(Join("A1", "A", "bf16"), 77, 6)


def test_a_step_whose_sender_has_not_seen_the_reply_to_its_last_command_is_refused_once(manager: KVManager) -> None:
    """The simulator's find: a step was given up, a copy of it was carried out late, and the next step appended the same token ids again."""
    opened = msgpack.unpackb(manager.execute(Step(opens=[Open(tokens(20), "A", chunk=20)]), 77, 1))
    sequence, seen = opened["opened"][0][0], opened["version"]
    appending = Step(tokens=[(sequence, [5])], seen=seen)
    manager.execute(appending, 77, 2)  # the late copy, of which its sender never hears
    digest = state_digest(manager.state)
    with pytest.raises(StaleEpoch, match="its reply never came, and it was carried out") as caught:
        manager.execute(appending, 77, 3)
    assert state_digest(manager.state) == digest
    assert caught.value.details["version"] == manager.state.version
    manager.execute(Step(tokens=[(sequence, [6])], seen=caught.value.details["version"]), 77, 4)
    manager.execute(Step(seen=seen), 78, 1)  # another client has had every reply


def test_a_joining_that_was_given_up_and_carried_out_all_the_same_is_found_again(manager: KVManager) -> None:
    """The simulator's find: nobody knew of the worker that a late copy had made, and pages freed since waited for it for ever."""
    manager.worker_gone(2)
    seen = manager.state.version
    made = msgpack.unpackb(manager.execute(Join("B0", "B", "bf16", seen=seen), 77, 1))
    again = msgpack.unpackb(manager.execute(Join("B0", "B", "bf16", seen=seen), 77, 2))
    assert again["worker"] == made["worker"] and len(manager.state.workers) == 2
    for other in (Join("B1", "B", "bf16", seen=seen), Join("B0", "B", "bf16", seen=again["version"]), Join("B0", "B", "bf16")):
        with pytest.raises(WrongState, match="live workers"):  # another worker; one that has heard; one that does not say
            manager.execute(other, 77, 1000 + manager.state.version)
    with pytest.raises(WrongState, match="live workers"):
        manager.execute(Join("B0", "B", "bf16", seen=seen), 78, 1)


def test_one_that_was_fenced_before_its_process_heard_of_it_makes_room() -> None:
    now = [0]
    manager = KVManager(ManagerConfig(pools=(PoolConfig("A", 8, page_size=16),)), clock=lambda: now[0], checked=True)
    made = msgpack.unpackb(manager.execute(Join("A0", "A", "bf16", seen=1), 77, 1))
    now[0] = 1_000_000
    manager.tick()
    assert manager.state.workers[made["worker"]].fenced
    again = msgpack.unpackb(manager.execute(Join("A0", "A", "bf16", seen=1), 77, 2))
    assert list(manager.state.workers) == [again["worker"]] != [made["worker"]]


def test_refusals_are_remembered_for_as_many_clients_as_there_may_be(manager: KVManager) -> None:
    for client in range(100, 110):
        with pytest.raises(KVError):
            manager.execute(Join("A1", "A", "bf16"), client, 1)
    manager.worker_gone(1)
    with pytest.raises(KVError):
        manager.execute(Join("A1", "A", "bf16"), 109, 1)
    manager.execute(Join("A1", "A", "bf16"), 100, 1)  # of ten clients, three


def test_numbers_of_different_clients_do_not_meet(manager: KVManager) -> None:
    one = msgpack.unpackb(manager.execute(Step(opens=[Open([1], "A")]), 77, 1))
    two = msgpack.unpackb(manager.execute(Step(opens=[Open([1], "A")]), 78, 1))
    assert one["opened"] != two["opened"]


def test_client_table_forgets_the_one_idle_longest(manager: KVManager) -> None:
    for client in (10, 11):
        manager.execute(Step(), client, 1)
    manager.execute(Step(), 10, 2)
    manager.execute(Step(), 12, 1)
    manager.execute(Step(), 13, 1)
    assert list(manager.state.clients) == [10, 12, 13]
    assert manager.state.config.clients_max == 3


def test_notices_are_delivered_once_to_the_owner(manager: KVManager) -> None:
    mine = msgpack.unpackb(manager.execute(Step(opens=[Open([1], "A"), Open([2], "B")]), 77, 1))["opened"]
    assert "notices" not in msgpack.unpackb(manager.execute(WorkerGone(1), 78, 1))
    second = manager.execute(Step(), 77, 2)
    assert [notice[:2] for notice in msgpack.unpackb(second)["notices"]] == [["lost", mine[0][0]]]
    assert manager.execute(Step(), 77, 2) == second  # with the notice: the first reply may have been lost
    assert "notices" not in msgpack.unpackb(manager.execute(Step(), 77, 3))
    assert "notices" not in msgpack.unpackb(manager.execute(Step(), 78, 2))


def test_notices_that_come_with_other_replies_reach_the_next_step(manager: KVManager) -> None:
    opened = manager.open([1], "A", chunk=1)
    manager.worker_gone(1)
    manager.join("A1", "A", "bf16")  # its reply carries the notice
    reply = manager.step()
    assert [(each.kind, each.sequence) for each in reply.notices] == [("lost", opened.sequence)]
    assert manager.step().notices == []


def test_idle_manager_logs_no_ticks() -> None:
    """A tick that would change nothing is not logged, even while a fenced worker holds pages for hours."""
    now = 0
    manager = KVManager(ManagerConfig(pools=(PoolConfig("A", 8, page_size=16),), lease_ms=1000), clock=lambda: now, checked=True)
    worker = manager.join("A0", "A", "bf16")
    manager.open(tokens(20), "A", chunk=20)
    manager.tick()
    now = 1001
    manager.tick()
    version = manager.state.version
    for _ in range(10):
        now += 10_000
        manager.tick()
    assert manager.state.version == version
    manager.worker_gone(worker)
    manager.tick()
    assert manager.state.pools[0].counts().free == 8


def test_tick_ends_an_aborted_handoff_when_nothing_is_quarantined() -> None:
    """The puller died with nothing to pull, so no page waits for anybody; the handoff must end without anybody asking."""
    config = ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16)))
    manager = KVManager(config, clock=lambda: 0, checked=True)
    manager.join("A0", "A", "bf16")
    target = manager.join("B0", "B", "bf16")
    manager.hand_off(manager.open(tokens(1), "A").sequence, "B")
    manager.worker_gone(target)
    assert manager.state.handoffs
    manager.tick()
    assert not manager.state.handoffs


def test_a_fault_of_our_own_in_deciding_costs_one_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 5, for the bug nobody has thought of: decide only reads, so its failure leaves the state as it was."""
    manager = KVManager(ManagerConfig(pools=(PoolConfig("p", 8, 16),)), checked=True)
    before = state_digest(manager.state)

    def broken(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setitem(decide_module._DECIDERS, Join, broken)
    with pytest.raises(Internal, match="Join: ZeroDivisionError: planted"):
        manager.join("w", "p", "layout")
    assert state_digest(manager.state) == before
