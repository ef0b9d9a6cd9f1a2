"""The life of a page: free, used, cached, quarantined, and who may make it free again (rules 1, 2 and 6)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import Fenced, OutOfPages, PoolNotReady, SequenceTooLarge, Unknown
from kvmanager.machine.commands import Open
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def one_pool(num_pages: int = 8, workers: int = 1, **more: int) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=16, workers=workers),), lease_ms=1000, **more)


def test_page_goes_from_free_to_used_to_cached_and_an_unwritten_one_through_quarantine(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    opened = rig.kv.open(tokens(33), "A", chunk=33)
    counts = rig.counts("A")
    assert (counts.free, counts.used, counts.cached, counts.quarantined) == (5, 3, 0, 0)
    rig.write(opened.sequence)
    rig.kv.close(opened.sequence)
    counts = rig.counts("A")  # two full pages stay for others; the third is not full, so it is of no use to anybody
    assert (counts.free, counts.used, counts.cached, counts.quarantined) == (5, 0, 2, 1)
    rig.ack("A")
    counts = rig.counts("A")
    assert (counts.free, counts.used, counts.cached, counts.quarantined) == (6, 0, 2, 0)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33])
def test_table_has_just_the_pages_that_the_length_needs(make_rig: MakeRig, count: int) -> None:
    rig = make_rig(one_pool())
    opened = rig.kv.open(tokens(count), "A", chunk=count)
    assert opened.length == count
    assert len(rig.table(opened.sequence)) == -(-count // 16)
    rig.kv.grow(opened.sequence, 1)
    assert len(rig.table(opened.sequence)) == -(-(count + 1) // 16)
    rig.kv.grow(opened.sequence, 16)
    assert (rig.length(opened.sequence), len(rig.table(opened.sequence))) == (count + 17, -(-(count + 17) // 16))


def test_chunks_reserve_no_more_than_asked_for(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    assert rig.kv.open(tokens(40), "A").length == 0
    opened = rig.kv.open(tokens(40, 100), "A", chunk=20)
    assert (opened.length, len(rig.table(opened.sequence))) == (20, 2)


def test_freed_page_stays_held_until_every_live_worker_acked(make_rig: MakeRig) -> None:
    """Rule 2: each rank of a tensor-parallel pool writes its own copy, so each must be past the step that freed the page."""
    rig = make_rig(one_pool(workers=2))
    first, second = rig.workers["A"]
    opened = rig.kv.open(tokens(20), "A", chunk=20)
    opened_at = rig.version
    rig.kv.close(opened.sequence)
    freed_at = rig.version
    rig.kv.ack(first, freed_at)
    rig.kv.ack(second, opened_at)  # still before the version that freed them
    assert (rig.counts("A").quarantined, rig.counts("A").free) == (2, 6)
    with pytest.raises(OutOfPages) as caught:
        rig.kv.open(tokens(128, 500), "A", chunk=128)
    assert caught.value.details == {"pool": "A", "needed": 8, "free": 6, "quarantined": 2}
    rig.kv.ack(second, freed_at)
    assert (rig.counts("A").quarantined, rig.counts("A").free) == (0, 8)


def test_cached_page_is_not_reused_while_its_last_reader_may_be_reading(make_rig: MakeRig) -> None:
    """Rule 2 for eviction: a page of the index that lost its last owner in version v is safe once v is acknowledged."""
    rig = make_rig(one_pool(num_pages=2))
    opened = rig.prefilled(tokens(32), "A")
    rig.kv.close(opened.sequence)
    assert rig.counts("A").cached == 2
    with pytest.raises(OutOfPages):
        rig.kv.open(tokens(32, 100), "A", chunk=32)
    rig.ack("A")
    rig.kv.open(tokens(32, 100), "A", chunk=32)


def test_fenced_worker_holds_pages_until_it_is_known_dead(make_rig: MakeRig) -> None:
    """A timeout alone never frees a page: the silent worker may still be writing."""
    rig = make_rig(one_pool())
    [worker] = rig.workers["A"]
    opened = rig.kv.open(tokens(40), "A", chunk=40)
    rig.tick(1001)
    assert list(rig.state.sequences) == []
    counts = rig.counts("A")
    assert (counts.free, counts.quarantined) == (5, 3)
    for _ in range(3):
        rig.tick(100_000)
    assert rig.counts("A").quarantined == 3
    joined = rig.kv.join("A0", "A", "bf16")
    with pytest.raises(PoolNotReady) as caught:
        rig.kv.open(tokens(4), "A", chunk=4)
    assert caught.value.details["fenced"] == 1
    assert rig.die(worker) == []
    rig.kv.ack(joined, rig.version)
    assert rig.counts("A").free == 8
    notices = rig.kv.step().notices
    assert [(each.kind, each.sequence) for each in notices] == [("lost", opened.sequence)]


def test_one_silent_rank_of_two_holds_the_pages_of_both(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(workers=2))
    silent, lively = rig.workers["A"]
    rig.kv.open(tokens(40), "A", chunk=40)
    rig.clock.now += 900
    rig.kv.ack(lively, rig.version)
    rig.tick(200)
    rig.kv.ack(lively, rig.version)
    assert list(rig.kv.stats()["pools"]["A"]["fenced"]) == [str(silent)]
    assert rig.counts("A").quarantined == 3
    rig.die(silent)
    rig.tick()
    assert rig.counts("A").free == 8


def test_acks_of_a_fenced_worker_are_rejected_and_free_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    [worker] = rig.workers["A"]
    rig.kv.open(tokens(40), "A", chunk=40)
    rig.tick(1001)
    before = rig.kv.snapshot()
    with pytest.raises(Fenced):
        rig.kv.ack(worker, rig.version)
    assert rig.kv.snapshot() == before
    rig.die(worker)
    with pytest.raises(Fenced):
        rig.kv.ack(worker, rig.version)


def test_ack_renews_the_lease(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    opened = rig.kv.open(tokens(4), "A", chunk=4)
    for _ in range(5):
        rig.tick(900)
        rig.ack("A")
    assert opened.sequence in rig.state.sequences


def test_clock_that_jumps_back_ends_no_lease(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    rig.kv.open(tokens(4), "A", chunk=4)
    rig.tick(900)
    rig.tick(-100_000)
    rig.ack("A")
    rig.tick(100_900)
    assert len(rig.state.sequences) == 1


def test_dead_workers_pages_come_home_with_nobody_left_to_ack(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    [worker] = rig.workers["A"]
    opened = rig.prefilled(tokens(40), "A")
    assert rig.die(worker) == [opened.sequence]
    rig.tick()
    assert rig.counts("A").free == 8  # nothing cached either: the memory is gone
    rig.kv.join("A0", "A", "bf16")
    assert rig.kv.open(tokens(40), "A", chunk=40).cached_tokens == 0


def test_out_of_pages_refuses_only_those_that_do_not_fit(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    running = [rig.kv.open(tokens(16, 100 * each), "A", chunk=16).sequence for each in range(3)]
    reply = rig.kv.step(grow=running, grow_counts=[1, 1, 20], opens=[Open(tokens(4, 900), "A", chunk=4), Open(tokens(4, 950), "A")])
    assert [(each.kind, each.index, each.error.code) for each in reply.refused] == [
        ("grow", 1, "out_of_pages"),
        ("grow", 2, "out_of_pages"),
        ("open", 0, "out_of_pages"),
    ]
    assert [rig.length(each) for each in running] == [17, 16, 16]
    assert reply.opened[0] is None and reply.opened[1].length == 0
    assert reply.error("grow", 0) is None


def test_later_item_that_fits_is_not_refused_for_an_earlier_one_that_does_not(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    big, small = (rig.kv.open(tokens(16, 100 * each), "A", chunk=16).sequence for each in range(2))
    reply = rig.kv.step(grow=[big, small], grow_counts=[48, 32])
    assert [each.index for each in reply.refused] == [0]
    assert rig.length(small) == 48


def test_sequence_that_could_never_fit_is_too_large_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    with pytest.raises(SequenceTooLarge) as caught:
        rig.kv.open(tokens(65), "A", chunk=1)
    assert caught.value.details == {"pool": "A", "needed": 5, "total": 4}
    opened = rig.kv.open(tokens(10), "A", chunk=10)
    with pytest.raises(SequenceTooLarge):
        rig.kv.grow(opened.sequence, 55)
    rig.kv.grow(opened.sequence, 54)


def test_pages_given_back_by_a_closing_item_serve_a_later_step_not_the_same(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=2))
    opened = rig.kv.open(tokens(20), "A", chunk=20)
    reply = rig.kv.step(close=[opened.sequence], opens=[Open(tokens(20), "A", chunk=20)])
    assert reply.error("open", 0).code == "out_of_pages"
    rig.ack("A")
    assert rig.kv.open(tokens(20), "A", chunk=20).length == 20


def test_steady_decode_step_is_a_few_tens_of_bytes() -> None:
    """DESIGN.md, "on the wire": nobody crosses a page, so the log says only that the last growth happened again."""
    from kvmanager.machine import events as ev
    from kvmanager.machine.batch import EventBatch
    from kvmanager.manager import KVManager

    manager = KVManager(one_pool(num_pages=512), checked=True)
    manager.join("A0", "A", "bf16")
    reply = manager.step(opens=[Open([each + 1], "A", chunk=1) for each in range(256)])
    ids = np.array([each.sequence for each in reply.opened])
    manager.step(grow=ids)
    seen: list[tuple[EventBatch, bytes]] = []
    manager.subscribe(lambda batch, data: seen.append((batch, data)))
    manager.step(grow=ids)
    batch, data = seen[0]
    assert isinstance(batch.events[0], ev.GrownAgain)
    assert len(data) < 64
    assert manager.state.tables.length(int(ids[-1])) == 3


def test_at_the_end_everything_is_free_or_cached(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=12, workers=2))
    open_now: list[int] = []
    for each in range(6):
        opened = rig.kv.open(tokens(17 + each, 7 * (each % 2)), "A", chunk=40)
        open_now.append(opened.sequence)
        rig.kv.step(grow=open_now)
        rig.write(*open_now)
        if len(open_now) > 2:
            rig.kv.close(open_now.pop(0))
            rig.ack("A")
    rig.kv.step(close=open_now)
    rig.ack("A")
    counts = rig.counts("A")
    assert counts.free + counts.cached == counts.total == 12
    assert counts.cached > 0
    assert rig.kv.open(tokens(12 * 16, 5000), "A", chunk=12 * 16).length == 192


def test_closed_sequence_id_is_never_valid_again(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(sequences_max=1))
    first = rig.kv.open(tokens(3), "A", chunk=3).sequence
    rig.kv.close(first)
    second = rig.kv.open(tokens(3), "A", chunk=3).sequence
    assert first != second
    with pytest.raises(Unknown):
        rig.kv.grow(first)
