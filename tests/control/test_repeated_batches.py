"""What is remembered of the last batch must never outlive it: growth that looks the same, and is not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, OutOfPages, Unknown
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch, same_batch
from kvmanager.machine.commands import Open
from kvmanager.machine.snapshot import load_snapshot, state_digest
from kvmanager.manager import KVManager
from kvmanager.worker.replica import Replica
from tests.control.conftest import Rig, tokens

CONFIG = ManagerConfig(pools=(PoolConfig("A", 64, page_size=16), PoolConfig("B", 64, page_size=8)))


MakeRig = Callable[[ManagerConfig], Rig]


def opened(rig: Rig, count: int, pool: str = "A") -> list[int]:
    return [rig.kv.open(tokens(20, 100 * index), pool, chunk=20, wait=False).sequence for index in range(count)]


def test_a_closed_sequence_is_refused_and_the_others_grow(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    ids = np.array(opened(rig, 3), np.int64)
    for _ in range(2):
        assert not rig.kv.step(grow=ids).refused
    rig.kv.close(int(ids[1]))
    reply = rig.kv.step(grow=ids)
    assert [(item.kind, item.index, type(item.error)) for item in reply.refused] == [("grow", 1, Unknown)]
    assert [rig.length(int(each)) for each in ids[[0, 2]]] == [23, 23]


def test_one_closed_in_the_same_step_is_refused(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    ids = np.array(opened(rig, 3), np.int64)
    rig.kv.step(grow=ids)
    reply = rig.kv.step(grow=ids, close=[int(ids[0])])
    assert [(item.kind, item.index) for item in reply.refused] == [("grow", 0)]
    assert [rig.length(int(each)) for each in ids[1:]] == [22, 22]


def test_a_new_sequence_in_a_closed_ones_row_is_another(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    ids = np.array(opened(rig, 2), np.int64)
    rig.kv.step(grow=ids)
    rig.kv.close(int(ids[1]))
    other = rig.kv.open(tokens(5, 9000), "A", chunk=5).sequence
    assert other % (1 << 20) == int(ids[1]) % (1 << 20)  # the same row
    assert [item.index for item in rig.kv.step(grow=ids).refused] == [1]
    assert (rig.length(int(ids[0])), rig.length(other)) == (22, 5)


def test_reordered_ids_grow_by_their_own_counts(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first, second = opened(rig, 2)
    rig.kv.step(grow=np.array([first, second]), grow_counts=[1, 30])
    rig.kv.step(grow=np.array([second, first]), grow_counts=[1, 30])
    rig.kv.step(grow=np.array([second, first]), grow_counts=[1, 30])
    assert (rig.length(first), rig.length(second)) == (20 + 1 + 30 + 30, 20 + 30 + 1 + 1)
    assert (len(rig.table(first)), len(rig.table(second))) == (6, 4)


def test_an_array_changed_in_place_is_looked_at_again(make_rig: MakeRig) -> None:
    """The caller's array is the caller's: neither what is remembered nor the state may hang on it."""
    rig = make_rig(CONFIG)
    first, second = opened(rig, 2)
    ids = np.array([first, second], np.int64)
    rig.kv.step(grow=ids)
    ids[1] = first
    with pytest.raises(InvalidValue, match="each sequence once"):
        rig.kv.step(grow=ids)
    ids[:] = 0
    with pytest.raises(InvalidValue, match=r"step\.grow"):
        rig.kv.step(grow=ids)
    ids[:] = first, second
    rig.kv.step(grow=ids)
    assert (rig.length(first), rig.length(second)) == (22, 22)


def test_a_sequence_that_moved_takes_pages_of_its_new_pool(make_rig: MakeRig) -> None:
    config = ManagerConfig(pools=(PoolConfig("A", 16, page_size=16), PoolConfig("B", 16, page_size=16)))
    rig = make_rig(config)
    stays, moves = (rig.prefilled(tokens(16, 1000 * index), "A").sequence for index in (1, 2))
    ids = np.array([stays, moves], np.int64)
    rig.kv.step(grow=ids)
    rig.write(stays, moves)
    handoff = rig.kv.hand_off(moves, "B")
    assert rig.handoff_state(handoff) == "moving"
    rig.ack("B", pulled=[handoff])
    used = rig.counts("A").used, rig.counts("B").used
    for _ in range(16):
        assert not rig.kv.step(grow=ids).refused
    assert (rig.counts("A").used, rig.counts("B").used) == (used[0] + 1, used[1] + 1)
    assert rig.length(moves) == 33


def test_several_pages_at_once_and_pools_of_different_page_sizes(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    ids = opened(rig, 2, "A") + opened(rig, 2, "B")
    for _ in range(3):
        assert not rig.kv.step(grow=np.array(ids), grow_counts=[1, 40, 1, 40]).refused
    assert [rig.length(each) for each in ids] == [23, 140, 23, 140]
    assert [len(rig.table(each)) for each in ids] == [2, 9, 3, 18]
    for pool in ("A", "B"):
        pages = [page for each in ids for page in rig.table(each) if rig.state.pools[rig.state.sequences[each].pool].name == pool]
        assert len(pages) == len(set(pages))


def test_when_pages_run_out_the_repeated_batch_is_looked_at_one_by_one(make_rig: MakeRig) -> None:
    rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 5, page_size=16),)))
    ids = [rig.kv.open(tokens(16, 100 * index), "A", chunk=16, wait=False).sequence for index in range(3)]
    counts = [1, 1, 1]
    for _ in range(2):
        reply = rig.kv.step(grow=np.array(ids), grow_counts=counts)
        assert [(item.index, type(item.error)) for item in reply.refused] == [(2, OutOfPages)]
    assert [rig.length(each) for each in ids] == [18, 18, 16]


def test_a_steady_step_is_a_few_bytes_and_names_only_who_got_pages() -> None:
    kv = KVManager(CONFIG, checked=True)
    kv.join("w", "A", "bf16")
    log: list[EventBatch] = []
    kv.subscribe(lambda batch, data: log.append(decode_batch(data)))
    ids = np.array(
        [
            each.sequence
            for each in kv.step(opens=[Open(tokens(10 + index, 100 * index), "A", chunk=30) for index in range(3)]).opened
            if each
        ]
    )
    for _ in range(7):
        kv.step(grow=ids)
    kinds = [type(batch.events[0]) for batch in log[1:]]
    assert kinds == [ev.SequencesGrown, ev.GrownAgain, ev.GrownAgain, ev.GrownAgain, ev.GrownFurther, ev.GrownFurther, ev.GrownFurther]
    assert [batch.events[0].at.tolist() for batch in log[5:]] == [[2], [1], [0]]
    assert max(len(encode_batch(batch)) for batch in log[2:]) < 70


@pytest.mark.parametrize("seed", range(6))
def test_lengths_tables_and_replica_agree_with_counting(seed: int) -> None:
    """Batches that repeat, shrink, reorder, close, open and fork at random; the manager, a log read from bytes and a replica."""
    rng = random.Random(seed)
    config = ManagerConfig(pools=(PoolConfig("A", 200, page_size=16), PoolConfig("B", 300, page_size=16)), sequence_tokens_max=600)
    kv = KVManager(config, checked=True)
    worker = {name: kv.join(name, name, "bf16") for name in ("A", "B")}
    follower = load_snapshot(config, decode_batch(kv.snapshot()))
    replica = Replica("A")
    replica.load(kv.tables_snapshot())

    def follow(batch: EventBatch, data: bytes) -> None:
        from kvmanager.machine.apply import apply

        apply(follower, decode_batch(data))
        replica.feed(data)
        assert same_batch(decode_batch(data), batch)

    kv.subscribe(follow)
    lengths: dict[int, int] = {}
    batch: list[int] = []
    counts: list[int] = []
    for _ in range(150):
        if not batch or rng.random() < 0.2:
            batch = [each for each in lengths if rng.random() < 0.7]
            rng.shuffle(batch)
            counts = [rng.choice((1, 1, 1, 2, 50)) for _ in batch] if rng.random() < 0.5 else [1] * len(batch)
        close = [each for each in lengths if rng.random() < 0.02]
        opens = [
            Open(tokens(rng.randrange(1, 60), rng.randrange(9) * 1000), rng.choice("AB"), chunk=100, wait=False)
            for _ in range(rng.choice((0, 0, 0, 3)))
        ]
        ids = np.array(batch, np.int64) if rng.random() < 0.8 else list(batch)
        reply = kv.step(grow=ids, grow_counts=None if counts == [1] * len(batch) else counts, close=close, opens=opens)
        for each in close:
            del lengths[each]
        refused = {item.index for item in reply.refused if item.kind == "grow"}
        for index, (each, count) in enumerate(zip(batch, counts, strict=True)):
            if each in lengths and index not in refused:
                lengths[each] += count
            assert (each in lengths) or index in refused
        lengths |= {each.sequence: each.length for each in reply.opened if each is not None}
        tables = kv.state.tables
        assert {each: tables.length(each) for each in tables.open_ids().tolist()} == lengths
        if replica.step:
            asked = [each for each in batch if each in lengths and kv.state.sequences[each].pool == 0]
            if replica.step == reply.version and asked:
                for _again in range(2):
                    found = replica.batch(reply.version, asked)
                    assert found.lengths.tolist() == [lengths[each] for each in asked]
                    assert [found.pages_of(row).tolist() for row in range(len(asked))] == [tables.pages_of(each).tolist() for each in asked]
            replica.finish(replica.step, replica._step_ids)
        assert replica.tables.digest() == tables.digest() and state_digest(follower) == state_digest(kv.state)
        if rng.random() < 0.5:
            for name, each in worker.items():
                own = [one for one in lengths if kv.state.pools[kv.state.sequences[one].pool].name == name]
                kv.ack(each, kv.state.version, ids=own, tokens=[lengths[one] for one in own])


@pytest.mark.parametrize("seed", range(4))
def test_a_repeated_batch_gets_what_it_gets_when_each_is_looked_at(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole batch in a few calls, its room carried on from step to step, or each sequence alone: the same pages and refusals."""

    def day(carried: bool) -> list[object]:
        if not carried:
            monkeypatch.setattr("kvmanager.machine.decide.grow_all", lambda draft, command: False)
            monkeypatch.setattr("kvmanager.machine.decide.truncate_all", lambda draft, pairs: False)
        rng = random.Random(seed)
        config = ManagerConfig(pools=(PoolConfig("A", 60, page_size=8), PoolConfig("B", 90, page_size=4)), sequence_tokens_max=200)
        kv = KVManager(config, checked=True)
        workers = [kv.join(name, name, "bf16") for name in "AB"]
        kv.set_quota(b"a", 25)
        seen: list[object] = []
        ids: list[int] = []
        for step in range(250):
            if step % 40 == 0:
                opens = [
                    Open(
                        tokens(rng.randrange(1, 30), 100 * index),
                        rng.choice("AB"),
                        rng.choice((b"a", b"b")),
                        chunk=99,
                        wait=False,
                        reserve=rng.choice((0, 50)),
                    )
                    for index in range(6)
                ]
                found = kv.step(opens=opens, close=ids)
                ids = [each.sequence for each in found.opened if each is not None]
                counts = [rng.choice((1, 3, 20)) for _ in ids] if rng.random() < 0.4 else [1] * len(ids)
            cuts = [(each, max(1, kv.state.tables.length(each) - 2)) for each in ids if rng.random() < 0.7] if step % 5 == 0 else []
            reply = kv.step(grow=np.array(ids, np.int64), grow_counts=counts, truncate=cuts)
            for each in workers:
                kv.ack(each, reply.version)
            seen.append([(item.kind, item.index, item.error.code) for item in reply.refused])
            seen.append([(kv.state.tables.length(each), kv.state.tables.pages_of(each).tolist()) for each in ids])
        return seen

    assert day(True) == day(False)


def test_a_tenant_with_room_in_its_quota_repeats_its_batch_all_the_same() -> None:
    kv = KVManager(CONFIG, checked=True)
    kv.join("w", "A", "bf16")
    kv.set_quota(b"", 5, "A")
    log: list[EventBatch] = []
    kv.subscribe(lambda batch, data: log.append(batch))
    opens = [Open(tokens(15 + index, 100 * index), "A", chunk=30) for index in range(2)]
    ids = np.array([each.sequence for each in kv.step(opens=opens).opened if each is not None])
    del log[:]
    while not (reply := kv.step(grow=ids)).refused:
        pass
    kinds = [type(batch.events[0]) for batch in log]
    assert (kinds[0], kinds.count(ev.GrownFurther), kinds.count(ev.GrownAgain)) == (ev.SequencesGrown, 2, len(kinds) - 4)
    assert [(item.index, item.error.code) for item in reply.refused] == [(0, "over_quota")] and kinds[-1] is ev.SequencesGrown
