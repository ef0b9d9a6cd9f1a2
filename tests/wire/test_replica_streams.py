"""Handoffs that are streamed, as the replica of the pulling worker sees them: what it pulls when, believes, and holds back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import StaleStep
from kvmanager.manager import KVManager
from kvmanager.worker.replica import Pull, Replica
from kvmanager.worker.streams import Stream

LAYERS = 8


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_of_what_is_written_and_together_they_are_everything(seed: int) -> None:
    """Against a grid of tokens and layers: whatever is reported, in whatever order and however late, no piece holds what was not written."""
    rng = random.Random(seed)
    start, length = rng.choice((0, 0, 16)), rng.randrange(20, 120)
    stream = Stream(start, length)
    written, there = np.zeros((2, length, LAYERS), bool)
    there[:start] = True
    reports: list[tuple[int, int]] = []
    done = 0
    while done < length:
        chunk = min(rng.randrange(1, 60), length - done)
        for layers in range(1, LAYERS + 1):
            written[done : done + chunk, :layers] = True
            if rng.random() < 0.5:
                reports.append((done + chunk, layers))
            while reports and rng.random() < 0.6:
                stream.note_layers(*reports.pop(rng.choice((0, -1))))
            if stream.piece is None and rng.random() < 0.5 and (piece := stream.advance()):
                rectangle = np.s_[piece.first : piece.stop, piece.first_layer : piece.end_layer or LAYERS]
                assert written[rectangle].all()
                there[rectangle] = True
            if stream.piece is not None and rng.random() < 0.5:
                stream.pulled()
        done += chunk
        if rng.random() < 0.7:
            stream.note_written(done)
    stream.pulled()
    stream.note_written(length)
    while piece := stream.advance():
        there[piece.first : piece.stop, piece.first_layer : piece.end_layer or LAYERS] = True
        stream.pulled()
    assert there.all()


class Rig:
    """Pool A of one worker, pool B of one; a replica for each; a sequence of 100 tokens that is streamed while A computes it."""

    def __init__(self, sizes: tuple[int, int] = (16, 16), pages: int = 20) -> None:
        pools = (PoolConfig("A", 40, sizes[0]), PoolConfig("B", pages, sizes[1]))
        self.kv = KVManager(ManagerConfig(pools, lease_ms=86_400_000), checked=True)
        self.workers = {name: self.kv.join(name, name, "x") for name in "AB"}
        self.replicas = {name: Replica(name) for name in "AB"}
        for name, replica in self.replicas.items():
            replica.load(self.kv.tables_snapshot())
            replica.joined(self.workers[name])
        self.kv.subscribe(lambda batch, data: [replica.feed(data) for replica in self.replicas.values()])
        self.source, self.target = self.replicas["A"], self.replicas["B"]
        self.sequence = self.kv.open(np.arange(100, dtype=np.int32), "A").sequence
        self.handoff = self.kv.hand_off(self.sequence, "B", reserve=True, stream=True)

    def ack(self, name: str) -> None:
        content = self.replicas[name].ack()
        if content is not None:
            self.kv.ack(self.workers[name], **content._asdict())

    def begin(self, tokens: int) -> None:
        self.kv.grow(self.sequence, tokens)

    def layers(self, layers: int) -> None:
        self.source.layers_written(self.source.step, self.source.streaming(), layers)
        self.ack("A")

    def finish(self) -> None:
        self.source.finish(self.source.step, [self.sequence])
        self.ack("A")

    def wanted(self) -> Pull:
        [pull] = self.target.pulls()
        return pull

    def pull(self) -> Pull:
        pull = self.wanted()
        self.target.begin_pull(pull.handoff)
        self.target.pulled(pull.handoff)
        return pull

    @property
    def quarantined(self) -> int:
        return self.kv.state.pools[1].counts().quarantined


def extent(pull: Pull) -> tuple[int, int, tuple[int, int]]:
    first = pull.shared_pages * pull.target_page_size
    return first, first + pull.tokens, pull.layers(LAYERS)


def test_chunks_and_groups_of_layers_are_pulled_while_the_rest_is_computed() -> None:
    rig = Rig()
    assert rig.target.pulls() == []
    rig.begin(40)
    assert rig.target.pulls() == [] and rig.source.streaming() == [rig.sequence]
    rig.layers(2)
    assert extent(rig.pull()) == (0, 40, (0, 2))
    rig.layers(5)
    assert extent(rig.pull()) == (0, 40, (2, 5))
    assert rig.target.pulls() == []
    rig.finish()
    assert extent(rig.pull()) == (0, 40, (5, LAYERS))
    rig.begin(60)
    rig.layers(4)
    early = rig.pull()
    assert extent(early) == (32, 100, (0, 4)) and early.early  # from a whole page on
    rig.finish()
    last = rig.pull()
    assert extent(last) == (32, 100, (4, LAYERS)) and not last.early
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1
    table = rig.kv.state.tables.pages_of(rig.sequence).tolist()
    assert early.target_pages.tolist() == table[2:] and last.target_pages.tolist() == table[2:]


def test_what_is_there_when_it_moves_is_not_pulled_again() -> None:
    rig = Rig()
    rig.begin(96)
    rig.finish()
    rig.pull()
    rig.begin(4)
    rig.finish()
    assert extent(rig.pull()) == (96, 100, (0, LAYERS))
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1


@pytest.mark.parametrize("sizes", [(64, 16), (16, 64)])
def test_pages_of_another_size(sizes: tuple[int, int]) -> None:
    rig, there = Rig(sizes), np.zeros((100, LAYERS), bool)
    for tokens in (30, 50, 20):
        rig.begin(tokens)
        for layers in (3, 0):
            if layers:
                rig.layers(layers)
            else:
                rig.finish()
            while rig.target.pulls():
                first, stop, (low, high) = extent(rig.pull())
                there[first:stop, low:high] = True
    assert there.all()
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1


def test_nothing_newer_than_its_beginning_is_acknowledged_while_an_early_pull_runs() -> None:
    """And once it has ended, or none has begun, the pool's quarantine is held up by nothing."""
    rig = Rig()
    rig.begin(40)
    rig.layers(2)
    rig.ack("B")
    waiting = rig.kv.state.workers[rig.workers["B"]].acked
    rig.target.begin_pull(rig.handoff)
    begun = rig.target.version
    rig.kv.abort(rig.handoff)
    assert rig.target.pulls() == [] and rig.quarantined == 7
    for _ in range(3):
        rig.kv.step()
        rig.ack("B")
    assert waiting <= rig.kv.state.workers[rig.workers["B"]].acked <= begun
    assert rig.quarantined == 7  # somebody may still be writing them
    rig.target.pulled(rig.handoff)
    rig.ack("B")
    assert rig.quarantined == 0 and not rig.kv.state.handoffs


def test_pages_that_are_shared_meanwhile_are_held_while_an_early_pull_writes_them() -> None:
    rig = Rig(pages=30)
    rig.begin(40)
    rig.finish()
    begun = rig.wanted()
    rig.target.begin_pull(rig.handoff)
    other = rig.kv.open(np.arange(100, dtype=np.int32), "B", chunk=100, wait=False).sequence
    rig.target.finish(rig.target.step, [other])
    content = rig.target.renewal()
    assert content.version < rig.target.version  # what was written counts, the version does not
    rig.kv.ack(rig.workers["B"], **content._asdict())
    rig.begin(60)
    rig.finish()
    handoff = rig.kv.state.handoffs[rig.handoff]
    assert handoff.target_shared == 6 and rig.quarantined >= 3
    held = {page for entry in rig.kv.state.pools[1].quarantine.values() for page in entry.pages.tolist()}
    assert set(begun.target_pages.tolist()) <= held
    rig.kv.step()
    rig.ack("B")
    assert rig.quarantined >= 3
    rig.target.pulled(rig.handoff)
    last = rig.pull()  # from where the shared pages end, not from where the early pull did
    assert extent(last) == (96, 100, (0, LAYERS)) and last.target_pages.tolist() == handoff.target_pages[6:]
    assert last.source_pages.tolist() == rig.kv.state.tables.pages_of(rig.sequence).tolist()[6:]
    assert rig.target.pulls() == []
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1
    rig.kv.step()
    rig.ack("B")
    assert rig.quarantined == 0


def test_an_early_pull_under_way_when_it_moves_counts_and_the_rest_waits_for_it() -> None:
    rig = Rig()
    rig.begin(100)
    rig.layers(3)
    rig.target.begin_pull(rig.handoff)
    rig.finish()
    assert extent(rig.wanted()) == (0, 100, (0, 3))
    rig.target.pulled(rig.handoff)
    assert extent(rig.pull()) == (0, 100, (3, LAYERS))
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1


@pytest.mark.parametrize("moved", [False, True])
def test_a_failed_early_pull_is_no_failure_of_the_handoff(moved: bool) -> None:
    rig = Rig()
    rig.begin(100)
    rig.layers(3)
    rig.target.begin_pull(rig.handoff)
    if moved:
        rig.finish()
    rig.target.pull_failed(rig.handoff, "gone")
    if not moved:
        rig.layers(5)
        assert rig.target.pulls() == []
        rig.finish()
    last = rig.pull()
    assert extent(last) == (0, 100, (0, LAYERS)) and last.attempt == 0
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1


@pytest.mark.parametrize("under_way", [False, True])
def test_after_a_snapshot_everything_is_pulled_again(under_way: bool) -> None:
    """Progress is not in it: what is under way then ends first, and is not believed."""
    rig = Rig()
    rig.begin(40)
    rig.layers(3)
    rig.target.begin_pull(rig.handoff)
    begun = rig.target.version
    if not under_way:
        rig.target.pulled(rig.handoff)
    rig.target.load(rig.kv.tables_snapshot())
    rig.finish()
    rig.begin(60)
    rig.finish()
    if under_way:
        assert rig.target.pulls() == []
        content = rig.target.ack()
        assert content is None or content.version <= begun
        rig.target.pulled(rig.handoff)
    last = rig.pull()
    assert extent(last) == (0, 100, (0, LAYERS)) and not last.early
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1


def test_pages_swapped_in_the_source_are_pulled_where_they_are_now() -> None:
    """Two sequences compute the same: one copy stays, and the other's pages may be anybody's before they have been copied."""
    rig = Rig()
    rig.begin(40)
    rig.layers(2)
    rig.pull()
    twin = rig.kv.open(np.arange(100, dtype=np.int32), "A", chunk=40, wait=False).sequence
    for _ in range(2):
        step = rig.source.step
        rig.source.finish(step, [twin if step > rig.kv.state.version - 1 else rig.sequence])
    content = rig.source.ack()
    assert content is not None
    ids = [each for each in content.ids if each == twin]
    rig.kv.ack(rig.workers["A"], **{**content._asdict(), "ids": ids, "tokens": [40] * len(ids)})
    before = rig.kv.state.tables.pages_of(rig.sequence).tolist()
    rig.kv.ack(rig.workers["A"], rig.source.version, ids=[rig.sequence], tokens=[40])
    after = rig.kv.state.tables.pages_of(rig.sequence).tolist()
    assert before != after
    pull = rig.wanted()
    assert extent(pull) == (0, 40, (0, LAYERS)) and pull.source_pages.tolist() == after


def test_only_of_a_step_that_runs_and_of_sequences_that_are_streamed() -> None:
    rig = Rig()
    rig.begin(40)
    with pytest.raises(StaleStep):
        rig.source.layers_written(rig.source.step - 1, [rig.sequence], 1)
    rig.source.layers_written(rig.source.step, [12345], 1)
    content = rig.source.ack()
    assert content is None or content.layers == []
