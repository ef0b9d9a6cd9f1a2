"""A manager that comes back from its journal: what it keeps, what it holds back, and whose word it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import Fenced, InvalidValue, JournalMismatch, OutOfPages, ReplicaGap, StaleEpoch
from kvmanager.log.files import MemoryFiles
from kvmanager.machine.batch import decode_batch, encode_batch
from kvmanager.machine.commands import Ack, Open, Step
from kvmanager.machine.lives import LIVES_MAX
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.manager import KVManager
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from kvmanager.worker.replica import Replica
from tests.control.journaled import CONFIG, Life, reborn

PROMPT = np.arange(40, dtype=np.int32)


def begun() -> Life:
    life = Life(MemoryFiles())
    life.join()
    return life


def written(life: Life, pool: str = "main", tokens: Any = PROMPT) -> int:
    """A sequence whose prompt its worker has written and acknowledged."""
    opened = life.kv.open(tokens, pool, chunk=100)
    life.acknowledge()
    return opened.sequence


# --- what is kept ----------------------------------------------------------------------------------------------------------------


def test_sequences_prefixes_and_pages_are_kept() -> None:
    """The workers still hold the bytes: a sequence goes on where it was, and a prompt written before is a hit after."""
    life = begun()
    closed, kept = written(life), written(life, tokens=PROMPT + 100)
    life.kv.close(closed)
    life.acknowledge()
    before = life.kv.stats()["pools"]["main"]["pages"]
    again = reborn(life.files)
    assert (again.kv.state.epoch, again.kv.state.version) == (2, 2_000_000)
    assert again.kv.state.tables.pages_of(kept).tolist() == life.kv.state.tables.pages_of(kept).tolist()
    again.acknowledge()
    again.kv.tick()
    assert again.kv.stats()["pools"]["main"]["pages"] == before
    assert again.kv.open(PROMPT, "main", chunk=100).cached_tokens == 32
    assert again.kv.grow(kept) == again.kv.state.version


def test_restart_after_a_busy_life_is_the_same_state_but_for_what_the_new_life_holds() -> None:
    life = begun()
    life.live(40, 11)
    again = reborn(life.files)
    old = load_snapshot(CONFIG, snapshot(life.kv.state))
    for pool, kept in zip(again.kv.state.pools, old.pools, strict=True):
        before, after = kept.counts(), pool.counts()
        assert (after.used, after.cached, after.free) == (before.used, before.cached, 0)
    assert again.kv.state.tables.digest() == old.tables.digest()
    assert state_digest(load_snapshot(CONFIG, decode_batch(encode_batch(snapshot(again.kv.state))))) == state_digest(again.kv.state)
    again.live(40, 12)


def test_many_lives() -> None:
    """Only so many are remembered, and each goes on as if it were the second."""
    life = begun()
    epochs = [life.kv.state.epoch]
    for number in range(LIVES_MAX + 3):
        life = reborn(life.files)
        epochs.append(life.kv.state.epoch)
        assert life.kv.state.version % 1_000_000 == 0
        life.acknowledge()
        life.live(1, number)
        if number % 7 == 0:
            life.kv.compact()
    assert epochs == list(range(1, len(epochs) + 1)) and len(life.kv.state.past) == LIVES_MAX


def test_request_whose_reply_was_lost_is_answered_after_the_restart_and_not_executed_again() -> None:
    life = begun()
    command = Step(opens=[Open(PROMPT, "main", chunk=100)])
    reply = life.kv.execute(command, 77, 1)
    again = reborn(life.files)
    version = again.kv.state.version
    assert again.kv.execute(command, 77, 1) == reply
    assert again.kv.state.version == version and len(again.kv.state.sequences) == 1


def test_the_embedding_program_s_own_numbers_go_on() -> None:
    """Its client id is the same in each life: a number used again would be answered from the table."""
    life = begun()
    written(life)
    again = reborn(life.files)
    again.acknowledge()
    assert again.kv.open(PROMPT, "main", chunk=8).sequence in again.kv.state.sequences


# --- what is held ----------------------------------------------------------------------------------------------------------------


def test_free_pages_are_held_until_every_worker_has_acknowledged_the_new_life() -> None:
    """Rule 2: the end of the log may be lost, and with it that a worker was told to write into a page that looks free."""
    config = ManagerConfig((PoolConfig("main", 8, 16, workers=2),))
    life = Life(MemoryFiles(), config=config)
    workers = [life.kv.join(f"main{rank}", "main", "bf16") for rank in range(2)]
    again = Life(life.files.lost(lambda name, unsynced: unsynced), config=config)
    with pytest.raises(OutOfPages, match="8 more wait"):
        again.kv.open(PROMPT, "main", chunk=40)
    again.kv.ack(workers[0], again.kv.state.version, epoch=2)
    with pytest.raises(OutOfPages):
        again.kv.open(PROMPT, "main", chunk=40)
    again.kv.worker_gone(workers[1])
    joined = again.kv.join("main1", "main", "bf16")
    assert joined > workers[1] + 1_000_000, "an id that a lost end of the log may have given is not given again"
    assert again.kv.open(PROMPT, "main", chunk=40).length == 40


@pytest.mark.parametrize("ends", ["acknowledged", "gone"])
def test_pages_are_held_until_the_workers_of_other_pools_have_acknowledged_the_new_life(ends: str) -> None:
    """The simulator's find: a handoff was lost with its host. A worker of its target had seen it and was stopped, and when it went on it read
    source pages that had been handed out since: their own workers had acknowledged the new life."""
    life = begun()
    sequence = written(life)
    life.journal.sync()
    life.kv.hand_off(sequence, "other")  # "other" is told to pull from "main"; nothing of it is left
    again = Life(life.files.lost())
    main, other = again.kv.state.workers
    again.kv.close(sequence)
    again.kv.ack(main, again.kv.state.version, epoch=2)
    assert not len(again.kv.state.pool("main").free)
    with pytest.raises(OutOfPages, match=r"got 0 \(free"):  # nor is what it has cached evicted
        again.kv.open(np.arange(16, dtype=np.int32) + 100, "main", chunk=16)
    saved = load_snapshot(CONFIG, decode_batch(encode_batch(snapshot(again.kv.state))))
    assert saved.unsettled == again.kv.state.unsettled == {other: None}
    assert not any(pool.quarantine and pool.oldest_quarantined() <= saved.reusable(pool.index) for pool in saved.pools)
    if ends == "acknowledged":
        again.kv.ack(other, again.kv.state.version, epoch=2)
    else:
        again.kv.worker_gone(other)
    again.kv.tick()
    assert not again.kv.state.unsettled
    assert again.kv.open(np.arange(384, dtype=np.int32) + 100, "main", chunk=384).length == 384


def test_pages_in_quarantine_and_cached_ones_are_held_as_free_ones_are() -> None:
    """The simulator's find: a lost end of the log may have released or evicted them, and told a worker to write into them. An old
    acknowledgement, true as it is, must not let them go."""
    config = ManagerConfig((PoolConfig("main", 8, 16),))
    life = Life(MemoryFiles(), config=config)
    worker = life.kv.join("main0", "main", "bf16")
    cached = written(life, tokens=PROMPT + 100)
    life.kv.close(cached)
    life.acknowledge()
    freed = life.kv.open(PROMPT, "main", chunk=40).sequence
    life.kv.close(freed)
    again = Life(life.files.killed(), config=config)
    again.kv.ack(worker, life.kv.state.version, epoch=1)
    with pytest.raises(OutOfPages, match=r"got 0 \(free"):
        again.kv.open(PROMPT, "main", chunk=1)
    again.kv.ack(worker, again.kv.state.version, epoch=2)
    assert again.kv.open(np.arange(128, dtype=np.int32), "main", chunk=128).length == 128


def test_a_scheduler_that_was_told_something_that_is_lost_hears_of_it_once() -> None:
    """The simulator's find: token ids were appended behind others that the manager had lost, so that pages were shared under ids that
    they do not hold. A step says what its sender has seen; the manager refuses it if that did not happen."""
    life = begun()
    sequence = written(life)
    life.journal.sync()
    known = life.kv.state.version
    life.kv.append_tokens(sequence, [7, 8, 9])
    again = Life(life.files.lost())
    digest = state_digest(again.kv.state)
    for seen in (known + 1, again.kv.state.version + 1):
        with pytest.raises(StaleEpoch, match=rf"step\.seen: .* got {seen}"):
            again.kv.execute(Step(tokens=((sequence, [10]),), seen=seen), 5, seen)
    assert state_digest(again.kv.state) == digest
    for number, seen in enumerate((0, known, again.kv.state.version)):
        again.kv.execute(Step(tokens=((sequence, [10]),), seen=seen), 6 + number, 1)


def test_a_client_says_what_it_has_seen_and_is_told_once(tmp_path: Path) -> None:
    """After StaleEpoch it goes on, as somebody who knows."""
    lives = [begun()]
    lives[0].journal.sync()

    def serve(life: Life) -> Server:
        return Server(life.kv, address=f"ipc://{tmp_path}/req", publish=f"ipc://{tmp_path}/pub").start()

    server = serve(lives[0])
    with KVClient(server.address, timeout_ms=10_000, resend_ms=200) as client:
        client.open(PROMPT, "main", chunk=8)
        server.close()
        server = serve(Life(lives[0].files.lost()))
        with pytest.raises(StaleEpoch, match=r"step\.seen"):
            client.step()
        client.step()
        client.step()
    server.close()


def test_a_worker_that_acted_on_a_lost_version_is_refused() -> None:
    """What it holds is not what the recovered manager believes; what it says of older versions is true all the same."""
    life = begun()
    worker = next(iter(life.kv.state.workers))
    known = life.kv.state.version
    life.journal.sync()
    life.kv.open(PROMPT, "main", chunk=40)
    again = Life(life.files.lost())
    assert again.kv.state.past == {1: known}
    again.kv.ack(worker, known, epoch=1)
    for epoch in (0, 1):
        with pytest.raises(StaleEpoch, match=f"got {known + 1}"):
            again.kv.ack(worker, known + 1, epoch=epoch)
    with pytest.raises(StaleEpoch):
        again.kv.batches_since(1, known + 1)
    with pytest.raises(StaleEpoch, match="got 9"):
        again.kv.ack(worker, 1, epoch=9)
    again.kv.ack(worker, again.kv.state.version, epoch=2)


def test_a_worker_of_an_old_life_does_not_acknowledge_for_one_that_has_its_id() -> None:
    """Without a journal ids begin anew; the epoch tells."""
    first, second = KVManager(CONFIG, epoch=5), KVManager(CONFIG, epoch=6)
    old, new = first.join("main0", "main", "bf16"), second.join("main0", "main", "bf16")
    assert old == new
    with pytest.raises(StaleEpoch):
        second.execute(Ack(old, 1, epoch=first.epoch_of(old)), 9, 1)
    with pytest.raises(StaleEpoch):
        second.worker_gone(old, epoch=5)
    assert second.worker_gone(new) == []


def test_fenced_workers_stay_fenced() -> None:
    life = begun()
    worker = next(iter(life.kv.state.workers))
    life.now += 100_000
    life.kv.tick()
    again = reborn(life.files)
    with pytest.raises(Fenced):
        again.kv.ack(worker, again.kv.state.version, epoch=2)


@pytest.mark.parametrize("acknowledges", [True, False])
def test_pages_that_a_worker_may_have_overwritten_are_not_moved_before_it_says_that_it_did_not(acknowledges: bool) -> None:
    """A pull that ends before the source has acknowledged the new life counts once it has; if it never does, it is aborted."""
    life = begun()
    sequence = written(life)
    handoff = life.kv.hand_off(sequence, "other")
    main, other = life.kv.state.workers
    again = reborn(life.files)
    again.kv.ack(other, life.kv.state.version, pulled=[handoff], epoch=1)
    assert again.kv.state.handoffs[handoff].pulled == {other: None}
    if acknowledges:
        again.kv.ack(main, again.kv.state.version, epoch=2)
        assert again.kv.state.sequences[sequence].pool == 1 and not again.kv.state.handoffs
    else:
        assert again.kv.worker_gone(main) == [sequence]
        assert not again.kv.state.sequences


def test_a_handoff_asked_for_in_the_new_life_waits_for_its_source() -> None:
    life = begun()
    sequence = written(life)
    again = reborn(life.files)
    other = list(again.kv.state.workers)[1]
    again.kv.ack(other, again.kv.state.version, epoch=2)
    handoff = again.kv.hand_off(sequence, "other")
    assert again.kv.state.handoffs[handoff].state.name == "SEALED"
    again.acknowledge()
    assert again.kv.state.handoffs[handoff].state.name == "MOVING"


# --- replicas --------------------------------------------------------------------------------------------------------------------


def follow(life: Life, replica: Replica) -> None:
    """As Follower does: what is missing, else a snapshot."""
    try:
        while batches := life.kv.batches_since(replica.epoch, replica.known):
            for data in batches:
                replica.feed(data)
    except (ReplicaGap, StaleEpoch):
        replica.load(life.kv.tables_snapshot())


@pytest.mark.parametrize("behind", [0, 1, 3])
def test_replica_goes_on_over_a_restart_without_losing_what_it_did(behind: int) -> None:
    """It gets what it had not received yet, runs the steps in it, and what it writes is shareable: nothing is marked as broken."""
    life = begun()
    replica = Replica("main")
    replica.load(life.kv.tables_snapshot())
    sent: list[bytes] = []
    life.kv.subscribe(lambda batch, data: sent.append(data))
    opened = life.kv.open(PROMPT, "main", chunk=40)
    life.kv.step()
    life.kv.step()
    for data in sent[: len(sent) - behind]:
        replica.feed(data)
    again = reborn(life.files)
    follow(again, replica)
    assert replica.epoch == 2 and replica.known == again.kv.state.version
    assert replica.step == life.kv.state.version - 2
    replica.finish(replica.step, [opened.sequence])
    content = replica.ack()
    assert content is not None and (content.version, content.epoch) == (again.kv.state.version, 2)
    worker, other = again.kv.state.workers
    again.kv.ack(worker, content.version, ids=content.ids, tokens=content.tokens, epoch=content.epoch)
    assert again.kv.state.sequences[opened.sequence].published == 2
    assert again.kv.state.pool("main").counts().free == 0
    again.kv.ack(other, content.version, epoch=content.epoch)
    again.kv.tick()
    assert again.kv.state.pool("main").counts().free == 21


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"epoch": 0, "version": 1}, InvalidValue),
        ({"epoch": "1", "version": 1}, InvalidValue),
        ({"epoch": 1}, InvalidValue),
        ({"epoch": 1, "version": -1}, InvalidValue),
        ({"epoch": 1, "version": 2**63}, InvalidValue),
        ({"epoch": 1, "version": 50}, StaleEpoch),
        ({"epoch": 2, "version": 1}, StaleEpoch),
    ],
)
def test_asking_for_batches_is_checked(message: dict[str, Any], expected: type[Exception]) -> None:
    life = begun()
    with pytest.raises(expected):
        life.kv.query({"t": "batches", **message})
    assert life.kv.query({"t": "batches", "epoch": 1, "version": life.kv.state.version}) == {"batches": []}


def test_replica_that_gets_the_first_batch_of_the_next_life_needs_nothing_else() -> None:
    life = begun()
    replica = Replica("main")
    replica.load(life.kv.tables_snapshot())
    again = reborn(life.files)
    [data] = again.kv.batches_since(1, replica.known)
    replica.feed(data)
    assert (replica.epoch, replica.version) == (2, 2_000_000)
    replica.feed(encode_batch(decode_batch(data)._replace(epoch=1, version=2_000_001, events=[])))  # late, of the old life: dropped
    replica.check(2, 2_000_000, again.kv.state.tables.digest())


def test_worker_that_saw_the_lost_end_of_the_log_is_stranded() -> None:
    """It learns so with the snapshot, before it could run a step of the new life on pages that are not what the manager believes."""
    life = begun()
    life.journal.sync()
    worker, observer = Replica("main"), Replica()
    for replica in (worker, observer):
        replica.load(life.kv.tables_snapshot())
    life.kv.subscribe(lambda batch, data: (worker.feed(data), observer.feed(data)))
    life.kv.open(PROMPT, "main", chunk=40)
    again = Life(life.files.lost())
    for replica in (worker, observer):
        follow(again, replica)
    assert observer.tables.digest() == again.kv.state.tables.digest() and not observer.stranded
    for call in (worker.ack, worker.renewal, lambda: worker.ready(2_000_001)):
        with pytest.raises(StaleEpoch):
            call()


def test_replica_too_far_behind_for_the_log_starts_from_a_snapshot_and_is_not_stranded() -> None:
    """Its pages hold nothing that the manager does not know of; what it has not run is not shared."""
    config = replace(CONFIG, log_bytes_max=300)
    life = Life(MemoryFiles(), config=config)
    life.join()
    replica = Replica("main")
    replica.load(life.kv.tables_snapshot())
    life.live(10, 1)
    again = Life(life.files.killed(), config=config)
    follow(again, replica)
    assert replica.epoch == 2 and not replica.stranded and replica.version == again.kv.state.version
    content = replica.ack()
    assert content is not None and content.version == again.kv.state.version


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_replicas_at_any_place_after_a_lost_host(data: st.DataObject) -> None:
    """Whatever part of the log the host took with it, and however far each replica was: it is stranded if and only if it has seen what is
    lost, and otherwise comes to the manager's tables, and the manager to what it has written."""
    life = begun()
    replicas = {pool.name: Replica(pool.name) for pool in CONFIG.pools}
    sent: list[bytes] = []
    for replica in replicas.values():
        replica.load(life.kv.tables_snapshot())
    life.kv.subscribe(lambda batch, data: sent.append(data))
    start = life.kv.state.version
    life.live(data.draw(st.integers(0, 8)), data.draw(st.integers(0, 1000)))
    life.journal.sync()
    life.live(data.draw(st.integers(0, 8)), data.draw(st.integers(0, 1000)))
    seen = {name: data.draw(st.integers(0, len(sent)), label=name) for name in replicas}
    for name, replica in replicas.items():
        for each in sent[: seen[name]]:
            replica.feed(each)
            while replica.step:
                replica.finish(replica.step, replica.tables.open_ids().tolist())
        replica.ack()
    kept = data.draw(st.integers(0, 3000), label="kept")
    again = Life(life.files.lost(lambda name, unsynced: kept))
    assert again.kv.recovered is not None
    last = again.kv.recovered.segment.last
    for name, replica in replicas.items():
        follow(again, replica)
        assert replica.stranded == (start + seen[name] > last), (name, seen[name], last)
        if replica.stranded:
            continue
        while replica.step:
            replica.finish(replica.step, replica.tables.open_ids().tolist())
        assert (replica.epoch, replica.version) == (2, again.kv.state.version)
        assert replica.tables.digest() == again.kv.state.tables.digest()
        for pull in replica.pulls():
            replica.begin_pull(pull.handoff)
            replica.pulled(pull.handoff)
        content = replica.ack()
        assert content is not None and content.version == again.kv.state.version
        worker = next(each.worker_id for each in again.kv.state.workers.values() if each.name == f"{name}0")
        again.kv.ack(worker, **content._asdict())
    state = again.kv.state
    for pool in state.pools:
        current = not any(replica.stranded for replica in replicas.values())  # a lost end may have told any of them to pull from any pool
        again.kv.tick()
        held = bool(pool.quarantine) and pool.oldest_quarantined() <= state.begun
        assert not held if current else not len(pool.free), pool.counts()


# --- config and clock ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pools", "expected"),
    [
        ((PoolConfig("main", 25, 16), PoolConfig("other", 12, 16)), "pool main: num_pages: expected 24 as in the journal, got 25"),
        ((PoolConfig("main", 24, 32), PoolConfig("other", 12, 16)), "pool main: page_size: expected 16"),
        ((PoolConfig("other", 12, 16), PoolConfig("main", 24, 16)), "pool main: name: expected main as in the journal, got other"),
        ((PoolConfig("main", 24, 16),), "pools: expected main, other as in the journal, got main"),
        ((PoolConfig("main", 24, 16), PoolConfig("other", 12, 16, group="g")), "pool other: group"),
        ((PoolConfig("main", 24, 16, workers=2), PoolConfig("other", 12, 16)), "pool main: workers"),
        ((PoolConfig("main", 24, 16, layout="fp8"), PoolConfig("other", 12, 16)), "pool main: layout: expected bf16"),
    ],
)
def test_another_config_is_refused_with_the_difference(pools: tuple[PoolConfig, ...], expected: str) -> None:
    life = begun()
    with pytest.raises(JournalMismatch, match=expected):
        Life(life.files.killed(), config=replace(CONFIG, pools=pools))
    assert reborn(life.files).kv.state.epoch == 2, "nothing was written, and the lock is free"


def test_pools_may_be_added_and_more_sequences_allowed() -> None:
    life = begun()
    ids = [written(life, tokens=PROMPT + each) for each in range(5)]
    with pytest.raises(JournalMismatch, match="sequences_max: expected at least 16"):
        Life(life.files.killed(), config=replace(CONFIG, sequences_max=15))
    more = replace(CONFIG, pools=(*CONFIG.pools, PoolConfig("third", 100, 16)), sequences_max=40)
    again = Life(life.files.killed(), config=more)
    again.acknowledge()
    again.kv.join("third0", "third", "bf16")
    opened = [again.kv.open([1], "third", chunk=1).sequence for _ in range(35)]
    assert len({*ids, *opened}) == len({each & 0xFFFFF for each in (*ids, *opened)}) == 40
    assert Life(again.files.killed(), config=more).kv.state.pool("third").counts().used == 35


@pytest.mark.parametrize("clock", [0, 1000, 10**12], ids=["started-anew", "goes-on", "far-ahead"])
def test_leases_begin_anew_with_the_new_life_whatever_the_clock_says(clock: int) -> None:
    """A monotonic clock begins at 0 when the host does. Nobody could acknowledge while there was no manager."""
    life = begun()
    life.now += 59_000
    life.kv.step()
    logged = life.kv.state.now_ms
    again_now: list[int] = []
    again = Life(life.files.killed(), clock=lambda: again_now[0] if again_now else clock)
    again_now.append(clock + 59_000)
    again.kv.tick()
    assert not any(worker.fenced for worker in again.kv.state.workers.values())
    again_now[0] += 2_000
    again.kv.tick()
    assert all(worker.fenced for worker in again.kv.state.workers.values())
    assert again.kv.state.now_ms == logged + 61_000
