"""Replica: equal to the manager at every version, never past its own step, and truthful about what has been written and copied."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np
import pytest

from kvmanager.errors import InvalidValue, KVError, ReplicaGap, StaleEpoch, StaleStep, Unknown
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch
from kvmanager.machine.commands import Tick
from kvmanager.machine.events import LruRestored, NodesRestored, PoolRestored
from kvmanager.manager import KVManager
from kvmanager.worker.replica import AckContent, Replica
from tests.wire.conftest import config

PAGE = 16


class Rig:
    """A manager and a worker in each of its two pools, each with a replica that is fed every batch at once unless `deaf`."""

    def __init__(self, num_pages: int = 64, partial_match: int = 0) -> None:
        self.kv = KVManager(config(num_pages=num_pages, partial_match=partial_match), clock=lambda: 1000, checked=True)
        self.log: list[tuple[int, bytes]] = []
        self.digests = {self.kv.state.version: self.kv.state.tables.digest()}
        self.deaf: set[str] = set()
        self.replicas = {name: Replica(name) for name in ("main", "other")}
        self.workers = {name: self.kv.join(f"{name}0", name, "bf16") for name in self.replicas}
        self.digests[self.version] = self.kv.state.tables.digest()
        for replica in self.replicas.values():
            replica.load(self.kv.tables_snapshot())
        self.kv.subscribe(self._on_batch)

    def _on_batch(self, batch: EventBatch, data: bytes) -> None:
        self.log.append((batch.version, data))
        self.digests[batch.version] = self.kv.state.tables.digest()
        for name, replica in self.replicas.items():
            if name not in self.deaf:
                replica.feed(data)

    @property
    def version(self) -> int:
        return self.kv.state.version

    def heartbeat(self) -> tuple[int, int, bytes]:
        state = self.kv.state
        return state.epoch, state.version, state.tables.digest()

    def open(self, count: int, pool: str = "main", first: int = 0) -> int:
        """A sequence with slots for its whole prompt: a step for the pool."""
        return self.kv.open(list(range(first, first + count)), pool, chunk=count, wait=False).sequence

    def run(self, pool: str, *leave_out: int) -> None:
        """Run the step that the pool's replica stands at, for all of its sequences but some."""
        replica = self.replicas[pool]
        replica.finish(replica.step, [each for each in replica._step_ids if each not in leave_out])

    def send(self, pool: str, content: AckContent | None) -> None:
        if content is not None:
            self.kv.ack(self.workers[pool], **content._asdict())

    def copy(self, pool: str) -> None:
        """Make the copies that the pool's replica asks for."""
        replica = self.replicas[pool]
        while (copies := replica.copies()) is not None:
            replica.copied(copies.version)

    def settle(self) -> int:
        """Everybody runs what is to be run and says what is to be said, until nobody has anything to say; versions that took."""
        before = self.version
        for _ in range(100):
            quiet = True
            for name, replica in self.replicas.items():
                while replica.step or replica.copies():
                    self.copy(name)
                    if replica.step:
                        self.run(name)
                content = replica.ack()
                quiet &= content is None
                self.send(name, content)
            if quiet:
                return self.version - before
        pytest.fail(f"still talking after {self.version - before} versions")

    def moving(self, count: int = 2 * PAGE) -> tuple[int, int]:
        """(sequence, handoff): written in main, and now to be copied to other."""
        sequence = self.open(count)
        self.settle()
        handoff = self.kv.hand_off(sequence, "other")
        assert [pull.handoff for pull in self.replicas["other"].pulls()] == [handoff]
        return sequence, handoff


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- equal -----------------------------------------------------------------------------------------------------------------------


def act(rig: Rig, rng: random.Random, held: list[int]) -> None:
    """One random command of a scheduler."""
    state = rig.kv.state
    held[:] = [each for each in held if each in state.sequences]
    kind = rng.choice(["open", "open", "grow", "grow", "grow", "tokens", "close", "hand_off", "abort", "fork", "truncate"])
    some = rng.sample(held, min(len(held), rng.randrange(1, 5)))
    if kind == "open":
        first = rng.choice([0, 0, 1000])  # prompts that share pages, computed at once or one after the other
        opened = rig.kv.open(
            range(first, first + rng.randrange(1, 60)), rng.choice(["main", "other"]), chunk=rng.choice([0, PAGE, 60]), wait=False
        )
        held.append(opened.sequence)
    elif kind == "grow" and held:
        rig.kv.step(grow=some, grow_counts=[rng.choice([1, 1, PAGE + 1]) for _ in some] if rng.random() < 0.3 else None)
    elif kind == "tokens" and held:
        rig.kv.append_tokens(some[0], [rng.randrange(4) for _ in range(rng.randrange(1, 20))])
    elif kind == "close" and held:
        rig.kv.step(close=some[:1])
    elif kind == "hand_off" and held:
        source = state.pools[state.sequences[some[0]].pool].name
        rig.kv.hand_off(some[0], "other" if source == "main" else "main")
    elif kind == "fork" and held:
        held += [child for children in rig.kv.step(fork=some[:1], grow=some).forked for child in children]
    elif kind == "truncate" and held:
        cut = [(each, max(1, state.tables.length(each) - rng.randrange(20))) for each in some]
        rig.kv.step(truncate=cut, grow=some[:2])
    elif kind == "abort" and state.handoffs:
        rig.kv.abort(rng.choice(list(state.handoffs)))


@pytest.mark.parametrize("seed", range(8))
def test_replica_equals_the_manager_after_every_batch(seed: int) -> None:
    """DESIGN, one log, many readers: by digest, at every version a replica is at; for workers that lag and an observer that never does;
    also when batches are lost and a snapshot takes their place."""
    rng = random.Random(seed)
    rig, observer, held = Rig(num_pages=40), Replica(), []
    observer.load(rig.kv.tables_snapshot())
    copying: dict[str, list[int]] = {"main": [], "other": []}

    def check(batch: EventBatch, data: bytes) -> None:
        observer.feed(data)
        assert observer.version == batch.version and observer.tables.digest() == rig.digests[batch.version]

    rig.kv.subscribe(check)
    snapshots = 0
    for _ in range(250):
        with contextlib.suppress(KVError):  # refused: out of pages, in the middle of a handoff
            act(rig, rng, held)
        for name, replica in rig.replicas.items():
            if rng.random() < 0.8:
                rig.copy(name)
            if replica.step and replica.copies() is None and rng.random() < 0.6:
                rig.run(name, *(replica._step_ids[:1] if rng.random() < 0.1 else ()))
            for pull in replica.pulls():
                if pull.handoff not in copying[name] and rng.random() < 0.5:
                    assert pull.peer.worker == rig.workers["main" if name == "other" else "other"]
                    replica.begin_pull(pull.handoff)
                    copying[name].append(pull.handoff)
            while copying[name] and rng.random() < 0.5:
                replica.pulled(copying[name].pop())
            if rng.random() < 0.5:
                rig.send(name, replica.ack())
            if rng.random() < 0.03:
                snapshots += 1
                replica.load(rig.kv.tables_snapshot())
            assert replica.tables.digest() == rig.digests[replica.version]
            replica.check(*rig.heartbeat())
    for name, replica in rig.replicas.items():
        for handoff in copying[name]:
            replica.pulled(handoff)
    rig.settle()
    assert len(rig.log) > 200 and snapshots
    for replica in (*rig.replicas.values(), observer):
        assert replica.version == rig.version and replica.tables.digest() == rig.kv.state.tables.digest()


@pytest.mark.parametrize("seed", range(4))
def test_replica_that_loses_batches_is_equal_again_after_a_snapshot(seed: int) -> None:
    """Rule 3: a gap leads to a snapshot, never to a guess - whatever was lost, doubled or came late."""
    rng = random.Random(seed)
    rig, lossy, held, gaps = Rig(num_pages=40), Replica(), [], 0
    lossy.load(rig.kv.tables_snapshot())
    for _ in range(200):
        before = len(rig.log)
        with contextlib.suppress(KVError):
            act(rig, rng, held)
            rig.settle()
        feed = [data for _, data in rig.log[before:] if rng.random() > 0.05]
        feed += [rng.choice(rig.log)[1]] if rng.random() < 0.2 and rig.log else []  # an old one again, or the last one early
        for data in feed:
            try:
                lossy.feed(data)
            except ReplicaGap:
                gaps += 1
                lossy.load(rig.kv.tables_snapshot())
            assert lossy.tables.digest() == rig.digests[lossy.version]
    assert gaps > 3


def test_lost_batch_is_a_gap_that_says_which(rig: Rig) -> None:
    """Nothing of the batch behind the gap is applied."""
    replica = rig.replicas["main"]
    rig.deaf.add("main")
    known = replica.known
    rig.open(5, "other")
    rig.open(5, "other")
    with pytest.raises(ReplicaGap, match=f"expected version {known + 1}, got {known + 2}") as caught:
        replica.feed(rig.log[-1][1])
    assert caught.value.details["expected"] == known + 1
    assert (replica.version, replica.known) == (known, known) and replica.tables.digest() == rig.digests[known]
    replica.load(rig.kv.tables_snapshot())
    assert replica.tables.digest() == rig.kv.state.tables.digest()


def test_tables_snapshot_grows_with_open_sequences_not_with_the_cache(rig: Rig) -> None:
    """A replica needs neither the prefix index nor token ids; both snapshots start it equally well."""
    rig.open(40, "other")
    small, whole = Replica(), Replica()
    small.load(rig.kv.tables_snapshot())
    whole.load(rig.kv.snapshot())
    assert small.tables.digest() == whole.tables.digest() == rig.kv.state.tables.digest()
    kinds = {type(event) for event in decode_batch(rig.kv.tables_snapshot()).events}
    assert not kinds & {NodesRestored, PoolRestored, LruRestored}
    assert len(rig.kv.tables_snapshot()) < len(rig.kv.snapshot()) - 40 * 4


def test_older_batches_are_dropped(rig: Rig) -> None:
    """Subscribe first, then snapshot, then drop what is older."""
    for _ in range(4):
        rig.open(5, "other")
    late = Replica()
    late.load(rig.kv.tables_snapshot())
    for _, data in rig.log:
        late.feed(data)
    assert late.version == rig.version and late.tables.digest() == rig.kv.state.tables.digest()


def test_heartbeat_reveals_a_lost_last_message(rig: Rig) -> None:
    """DESIGN: nothing follows that could reveal it, but the heartbeat names a newer version."""
    rig.deaf.add("main")
    replica = rig.replicas["main"]
    replica.check(*rig.heartbeat())
    rig.open(5, "other")
    with pytest.raises(ReplicaGap, match=rf"replica: at 1:{replica.known}, the manager at 1:{rig.version}"):
        replica.check(*rig.heartbeat())


@pytest.mark.parametrize("column", ["lengths", "pools", "page_counts", "pages", "last_counts"])
def test_heartbeat_reveals_differing_tables(rig: Rig, column: str) -> None:
    """Rule 3: a digest mismatch leads to a snapshot. Every column counts."""
    sequence = rig.open(PAGE + 1, "other")
    rig.settle()
    rig.kv.grow(sequence)
    rig.settle()
    replica = rig.replicas["main"]
    replica.check(*rig.heartbeat())
    if column == "last_counts":
        replica.tables.last_counts = replica.tables.last_counts.copy()  # as it came it is read-only
    changed = getattr(replica.tables, column)
    changed[0 if column == "last_counts" else replica.tables.row(sequence)] += 1 if column != "page_counts" else -1
    with pytest.raises(ReplicaGap, match="differ from the manager's"):
        replica.check(*rig.heartbeat())
    replica.load(rig.kv.tables_snapshot())
    replica.check(*rig.heartbeat())


def test_heartbeat_of_another_version_compares_nothing(rig: Rig) -> None:
    """One from before the snapshot, and one for a version that the replica holds back: neither is a mismatch."""
    replica = rig.replicas["main"]
    before = rig.heartbeat()
    rig.open(5)
    rig.open(5, "other")
    assert replica.version < rig.version
    replica.check(*before)
    replica.check(*rig.heartbeat())


def test_change_of_epoch_is_a_gap(rig: Rig) -> None:
    """Rule 3: a restart of the manager leads to a snapshot, by the first batch or heartbeat of the new life, whatever its version."""
    replica = rig.replicas["main"]
    for version in (1, replica.known, replica.known + 1, replica.known + 9):
        with pytest.raises(ReplicaGap, match="restarted"):
            replica.feed(encode_batch(EventBatch(2, version, 0, [])))
        with pytest.raises(ReplicaGap):
            replica.check(2, version, rig.heartbeat()[2])
    assert replica.tables.digest() == rig.kv.state.tables.digest()
    reborn = KVManager(config(), epoch=2)
    reborn.join("main0", "main", "bf16")
    replica.load(reborn.tables_snapshot())
    assert (replica.epoch, replica.version, replica.acked) == (2, 2, 0)
    replica.check(2, 2, reborn.state.tables.digest())


def test_snapshot_without_the_worker_s_pool_is_refused(rig: Rig) -> None:
    """A worker started with another manager's pool name learns it at once."""
    with pytest.raises(Unknown, match="pool: nowhere"):
        Replica("nowhere").load(rig.kv.tables_snapshot())


# --- steps -----------------------------------------------------------------------------------------------------------------------


def test_replica_stops_at_its_own_step_until_finish(rig: Rig) -> None:
    """Lengths and tables are exactly those of the step, however much has been published since."""
    main, other = rig.replicas["main"], rig.replicas["other"]
    sequence = rig.open(PAGE - 1)
    step = rig.version
    for _ in range(3):
        rig.kv.grow(sequence)
    foreign = rig.open(3, "other")
    assert (main.version, main.step, main.known) == (step, step, step + 4)
    assert main.tables.digest() == rig.digests[step]
    assert main.ready(step) and not main.ready(step + 1) and not main.ready(step + 99)
    tables = main.batch(step, [sequence])
    assert (tables.version, tables.lengths.tolist(), len(tables.page_ids)) == (step, [PAGE - 1], 1)
    # The other pool has nothing to write before its own step.
    assert (other.version, other.step) == (step + 4, step + 4)
    for number in range(1, 4):
        main.finish(main.step, [sequence])
        assert (main.version, main.step) == (step + number, step + number)
        assert main.batch(step + number, [sequence]).lengths.tolist() == [PAGE - 1 + number]
    main.finish(main.step, [sequence])
    assert (main.version, main.step) == (step + 4, 0)
    assert main.tables.length(foreign) == 3


def test_opening_from_the_cache_alone_is_no_step(rig: Rig) -> None:
    """Nothing to write, nothing to wait for."""
    rig.open(2 * PAGE + 1)
    rig.settle()
    opened = rig.kv.open(range(2 * PAGE + 1), "main", chunk=0)
    assert opened.cached_tokens == 2 * PAGE and rig.replicas["main"].step == 0


def test_step_that_is_not_here_yet_or_not_for_this_pool_is_refused(rig: Rig) -> None:
    """batch() checks what it is asked for before it gives tables."""
    main = rig.replicas["main"]
    sequence = rig.open(3)
    step = rig.version
    foreign = rig.open(3, "other")
    with pytest.raises(ReplicaGap, match=f"at {step + 1}, it is at {step}|expected the replica to be at"):
        main.batch(step + 1, [sequence])
    with pytest.raises(Unknown):
        main.batch(step, [foreign])  # not opened yet at this version
    with pytest.raises(StaleStep):
        main.finish(step + 1, [sequence])
    main.finish(step, [sequence])
    rig.kv.grow(sequence)
    with pytest.raises(InvalidValue, match=r"step\.sequences: expected sequences of pool main") as caught:
        main.batch(rig.version, [sequence, foreign])
    assert caught.value.details["got"] == str(foreign)


def test_ready_refuses_acknowledged_steps(rig: Rig) -> None:
    """Rule 2: what was acknowledged may be somebody else's page by now; a step command that comes late is never run."""
    main = rig.replicas["main"]
    sequence = rig.open(3)
    step = rig.version
    assert main.ready(step)
    main.finish(step, [sequence])
    with pytest.raises(StaleStep) as caught:
        main.ready(step)
    assert caught.value.details["version"] == step
    content = main.ack()
    assert content is not None and content.version == step == main.acked
    for version in (0, 1, step):
        with pytest.raises(StaleStep, match=f"expected a version above {step} "):
            main.ready(version)
        with pytest.raises(StaleStep):
            main.batch(version, [sequence])
    assert not main.ready(step + 1)


def test_ready_refuses_steps_that_a_snapshot_skipped(rig: Rig) -> None:
    """Not acknowledged, but their tables are gone: running them on newer ones would be a guess."""
    main = rig.replicas["main"]
    rig.open(3)
    skipped = rig.version
    rig.open(4)
    main.load(rig.kv.tables_snapshot())
    assert main.step == 0 and main.acked < skipped
    for version in (skipped, rig.version):
        with pytest.raises(StaleStep, match=f"expected a version above {rig.version} "):
            main.ready(version)
    assert not main.ready(rig.version + 1)


def test_acknowledgement_outlives_a_snapshot_of_the_same_epoch_only(rig: Rig) -> None:
    """Versions count anew in a new epoch."""
    main = rig.replicas["main"]
    rig.open(3)
    rig.settle()
    acked = main.acked
    assert acked > 0
    main.load(rig.kv.tables_snapshot())
    assert main.acked == acked
    main.load(encode_batch(decode_batch(rig.kv.snapshot())._replace(epoch=2)))
    assert main.acked == 0


# --- written ---------------------------------------------------------------------------------------------------------------------


def test_sequence_that_a_step_left_out_is_never_reported_as_written(rig: Rig) -> None:
    """Rule 4: its pages have a hole, so nobody may share them, whatever is written later."""
    main = rig.replicas["main"]
    whole, holed = (rig.open(PAGE, first=1000 * number) for number in range(2))
    rig.run("main")
    rig.run("main", holed)
    for _ in range(2 * PAGE):
        rig.kv.step(grow=[whole, holed])
        rig.run("main")
    rig.settle()
    assert rig.kv.state.sequences[whole].written == {rig.workers["main"]: 3 * PAGE}
    assert rig.kv.state.sequences[holed].written.get(rig.workers["main"], 0) == 0
    assert rig.kv.open(range(PAGE + 1), "main").cached_tokens == PAGE
    assert rig.kv.open(range(1000, 1001 + PAGE), "main", wait=False).cached_tokens == 0
    assert main.renewal().ids == []


def test_sequence_with_a_hole_is_never_moved(rig: Rig) -> None:
    """A handoff waits for what is written, and a hole never is; it can be given up."""
    holed = rig.open(PAGE)
    rig.run("main", holed)
    handoff = rig.kv.hand_off(holed, "other")
    rig.kv.grow(holed)
    rig.settle()
    assert rig.kv.state.handoffs[handoff].state.name == "PREFILLING" and rig.replicas["other"].pulls() == []
    rig.kv.abort(handoff)
    assert rig.kv.state.handoffs == {}


def test_what_was_written_before_a_snapshot_is_never_reported_again(rig: Rig) -> None:
    """The snapshot may have skipped a step of the same sequence."""
    sequence = rig.open(PAGE)
    rig.run("main")
    rig.kv.grow(sequence, PAGE)
    rig.replicas["main"].load(rig.kv.tables_snapshot())
    rig.kv.grow(sequence, PAGE)
    rig.settle()
    assert rig.kv.state.sequences[sequence].written.get(rig.workers["main"], 0) == 0


def test_only_full_pages_are_worth_reporting(rig: Rig) -> None:
    """An acknowledgement is an event for everybody: a token more within a page helps nobody."""
    main = rig.replicas["main"]
    sequence = rig.open(PAGE - 1)
    rig.run("main")
    content = main.ack()
    assert content is not None and content.ids == []
    rig.kv.grow(sequence)
    rig.run("main")
    content = main.ack()
    assert content is not None and (content.ids, content.tokens) == ([sequence], [PAGE])
    rig.kv.grow(sequence)
    rig.run("main")
    content = main.ack()
    assert content is not None and content.ids == []


def test_sequence_on_its_way_out_is_reported_to_the_token(rig: Rig) -> None:
    """It is sealed once all of it is written, the last part of a page included."""
    sequence = rig.open(PAGE + 3)
    rig.settle()
    rig.kv.grow(sequence)
    rig.settle()
    handoff = rig.kv.hand_off(sequence, "other")
    assert rig.kv.state.handoffs[handoff].state.name == "PREFILLING"
    content = rig.replicas["main"].ack()
    assert content is not None and (content.ids, content.tokens) == ([sequence], [PAGE + 4])
    rig.send("main", content)
    assert rig.kv.state.handoffs[handoff].state.name == "MOVING"
    assert len(rig.replicas["other"].pulls()[0].source_pages) == 2


# --- pulls -----------------------------------------------------------------------------------------------------------------------


def test_pull_names_the_pages_of_both_sides(rig: Rig) -> None:
    """source_pages[i] of the peer to target_pages[i]; what the target shares already is in neither."""
    rig.open(PAGE, "other")
    rig.settle()
    sequence, handoff = rig.moving(2 * PAGE + 5)
    replica = rig.replicas["other"]
    [pull] = replica.pulls()
    source = rig.kv.state.tables.pages_of(sequence)
    assert (pull.sequence, pull.version, pull.shared_pages) == (sequence, rig.version, 1)
    assert pull.source_pages.tolist() == source[1:].tolist() and len(pull.target_pages) == 2
    assert (pull.peer.worker, pull.peer.name, pull.peer.pool) == (rig.workers["main"], "main0", 0)
    assert rig.replicas["main"].pulls() == []
    replica.begin_pull(handoff)
    replica.pulled(handoff)
    rig.settle()
    assert rig.kv.state.handoffs == {} and rig.kv.state.tables.pages_of(sequence)[1:].tolist() == pull.target_pages.tolist()
    assert replica.tables.pages_of(sequence).tolist() == rig.kv.state.tables.pages_of(sequence).tolist()
    rig.kv.grow(sequence)
    assert replica.step == rig.version and rig.replicas["main"].step == 0


@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "copying"])
def test_acknowledgement_never_passes_a_pull_in_progress(rig: Rig, begun: bool) -> None:
    """Rule 2: while pages are being copied into, or out of, nothing newer than the copy's beginning is finished."""
    _, handoff = rig.moving()
    began = rig.version
    replica = rig.replicas["other"]
    if begun:
        replica.begin_pull(handoff)
    for _ in range(3):
        rig.open(3, "other")
        rig.run("other")
        rig.send("other", replica.ack())
        rig.send("other", replica.renewal())
        assert replica.acked < began and rig.kv.state.workers[rig.workers["other"]].acked < began
    if not begun:
        replica.begin_pull(handoff)
    replica.pulled(handoff)
    content = replica.ack()
    assert content is not None and content.pulled == [handoff] and content.version == rig.version
    rig.send("other", content)
    assert rig.kv.state.handoffs == {}


@pytest.mark.parametrize("snapshot", [False, True], ids=["aborted", "aborted-and-resynchronised"])
def test_acknowledgement_never_passes_a_pull_aborted_meanwhile(rig: Rig, snapshot: bool) -> None:
    """Rule 2: the abort does not stop the copy. Its target pages are quarantined until the copy has ended and only then reused, even if
    the replica had to load a snapshot that knows nothing of it any more."""
    _, handoff = rig.moving()
    began = rig.version
    replica = rig.replicas["other"]
    replica.begin_pull(handoff)
    rig.kv.abort(handoff)
    assert replica.pulls() == []
    if snapshot:
        rig.open(3, "other")
        replica.load(rig.kv.tables_snapshot())
    for _ in range(3):
        rig.open(3, "other")
        rig.run("other")
        rig.send("other", replica.ack())
        rig.send("other", replica.renewal())
        rig.kv._run(Tick())
        assert replica.acked < began
        assert rig.kv.state.pool("other").counts().quarantined == 2
        assert handoff in rig.kv.state.handoffs
    replica.pulled(handoff)
    content = replica.ack()
    assert content is not None and content.pulled == [] and content.version > began
    rig.send("other", content)
    rig.settle()
    rig.kv._run(Tick())
    assert rig.kv.state.handoffs == {} and rig.kv.state.pool("other").counts().quarantined == 0


def test_a_worker_of_a_manager_that_is_gone_acknowledges_nothing_to_the_next(rig: Rig) -> None:
    """Without a journal the next one knows nothing of what this worker holds, nor of the pages that it is pulling into."""
    _, handoff = rig.moving()
    replica = rig.replicas["other"]
    replica.begin_pull(handoff)
    replica.load(encode_batch(EventBatch(2, 50, 0, decode_batch(KVManager(config(), epoch=2).snapshot()).events)))
    for call in (replica.renewal, replica.ack, lambda: replica.ready(51)):
        with pytest.raises(StaleEpoch, match="drain, join again"):
            call()


def test_pull_aborted_before_it_began_holds_nothing_up(rig: Rig) -> None:
    """It vanishes from the list: nobody copies, so nobody has to be waited for."""
    _, handoff = rig.moving()
    rig.kv.abort(handoff)
    assert rig.replicas["other"].pulls() == []
    rig.settle()
    rig.kv._run(Tick())
    assert rig.kv.state.handoffs == {} and rig.kv.state.pool("other").counts().quarantined == 0


def test_pull_that_ended_just_before_the_abort_is_not_reported(rig: Rig) -> None:
    """The pages went back; to say that they hold the sequence would be a lie."""
    _, handoff = rig.moving()
    replica = rig.replicas["other"]
    replica.begin_pull(handoff)
    replica.pulled(handoff)
    rig.kv.abort(handoff)
    content = replica.ack()
    assert content is not None and content.pulled == []


def test_pull_is_found_again_in_a_snapshot(rig: Rig) -> None:
    """A replica that resynchronises in the middle of a handoff goes on with it: same pages, same peer."""
    _, handoff = rig.moving()
    replica = rig.replicas["other"]
    [before] = replica.pulls()
    rig.open(3, "other")
    replica.load(rig.kv.tables_snapshot())
    [after] = replica.pulls()
    assert before._replace(source_pages=0, target_pages=0) == after._replace(source_pages=0, target_pages=0)
    assert np.array_equal(before.source_pages, after.source_pages) and np.array_equal(before.target_pages, after.target_pages)
    replica.begin_pull(handoff)
    replica.pulled(handoff)
    rig.settle()
    assert rig.kv.state.handoffs == {}


# --- quiet -----------------------------------------------------------------------------------------------------------------------


def test_idle_replicas_do_not_answer_each_other_for_ever(rig: Rig) -> None:
    """An acknowledgement is an event that all replicas apply: after all work is done a few are sent, then none."""
    assert rig.settle() <= 2
    sequences = [rig.open(2 * PAGE, pool) for pool in ("main", "other", "main")]  # two of equal text: their pages are swapped
    rig.settle()
    rig.kv.step(grow=sequences)
    assert rig.settle() <= 6
    handoff = rig.kv.hand_off(sequences[0], "other")
    rig.settle()
    for pull in rig.replicas["other"].pulls():
        rig.replicas["other"].begin_pull(pull.handoff)
        rig.replicas["other"].pulled(pull.handoff)
    assert rig.settle() <= 6 and handoff not in rig.kv.state.handoffs
    rig.kv.step(close=sequences)
    assert rig.settle() <= 6
    assert rig.settle() == 0
    counts = [pool.counts() for pool in rig.kv.state.pools]
    assert [(count.used, count.quarantined) for count in counts] == [(0, 0), (0, 0)]


def test_freed_pages_come_back_without_another_step(rig: Rig) -> None:
    """Liveness of rule 2: an idle worker acknowledges what frees pages of its pool, also if it learned of it by snapshot."""
    sequence = rig.open(PAGE - 1)
    rig.settle()
    rig.deaf.add("main")
    rig.kv.close(sequence)
    rig.deaf.clear()
    assert rig.kv.state.pool("main").counts().quarantined == 1
    rig.replicas["main"].load(rig.kv.tables_snapshot())
    rig.settle()
    assert rig.kv.state.pool("main").counts().free == 64


def test_renewal_is_possible_at_any_time_and_claims_nothing_new(rig: Rig) -> None:
    """For the lease's sake, in the middle of a step: the step itself is not acknowledged."""
    replica = rig.replicas["main"]
    rig.open(3)
    assert replica.renewal() == AckContent(rig.version - 1, [], [], [], rig.kv.state.epoch)
    content: Any = replica.renewal()
    assert content.version == rig.version - 1 and replica.ready(rig.version)


def test_failed_pull_is_not_reported_and_holds_nothing_up(rig: Rig) -> None:
    """The copy has ended, so acknowledging may go on; the handoff stays under way until somebody aborts it, and then pages come home."""
    sequence, handoff = rig.moving()
    replica = rig.replicas["other"]
    replica.begin_pull(handoff)
    replica.pull_failed(handoff)
    assert replica.pulls() == []
    rig.settle()
    assert list(rig.kv.state.handoffs) == [handoff] and rig.kv.state.sequences[sequence].pool == 0
    rig.kv.close(sequence)
    rig.settle()
    for pool in rig.kv.stats()["pools"].values():
        assert pool["pages"]["used"] == pool["pages"]["quarantined"] == 0
