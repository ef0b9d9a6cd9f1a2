"""A decode step that is run ahead, as the replica of the worker sees it: when a layer is there, what is held back, what counts in the end."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from kvmanager.errors import StaleStep, WrongState
from kvmanager.worker import ahead as ahead_module
from kvmanager.worker.streams import LAYERS_ALL, Stream
from tests.wire.test_replica_streams import LAYERS, Rig, extent


@pytest.mark.parametrize("seed", range(40))
def test_what_is_left_comes_layer_by_layer_and_no_layer_is_called_there_before_it_is(seed: int) -> None:
    """Against a grid of tokens and layers, from whatever was pulled early on."""
    rng = random.Random(seed)
    length, group = rng.randrange(20, 120), rng.choice((1, 2, 3, 8, 20))
    stream, there = Stream(0, length), np.zeros((length, LAYERS), bool)

    def take() -> None:
        piece = stream.piece
        assert piece is not None
        there[piece.first : piece.stop, piece.first_layer : piece.end_layer or LAYERS] = True
        stream.pulled()

    for _ in range(rng.randrange(4)):
        if stream.reach < length:
            stream.note_layers(rng.randrange(stream.reach + 1, length + 1), rng.randrange(1, LAYERS))
        if rng.random() < 0.4:
            stream.note_written(stream.reach)
        if rng.random() < 0.7 and stream.advance():
            take()
    stream.note_written(length)
    stream.by_layers(LAYERS, group)
    deepest = 0
    while stream.advance():
        take()
        layers = min(stream.layers_there(), LAYERS)
        assert there[:, :layers].all() and layers >= deepest
        deepest = layers
    assert there.all() and stream.layers_there() == LAYERS_ALL


@pytest.fixture
def rig() -> Rig:
    """100 tokens, of which the first 3 layers were pulled while they were computed; what is left moves in groups of 2."""
    rig = Rig()
    rig.target.pull_by_layers(LAYERS, 2)
    rig.begin(100)
    rig.layers(3)
    rig.pull()
    rig.finish()
    return rig


def resident(rig: Rig) -> None:
    while rig.target.pulls():
        rig.pull()
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1


def test_a_layer_is_there_once_its_group_is(rig: Rig) -> None:
    tables = rig.target.begin_ahead(rig.handoff)
    assert tables is not None and tables.lengths.tolist() == [101] and tables.batch == 1
    assert tables.pages_of(0).tolist() == rig.kv.state.handoffs[rig.handoff].target_pages
    seen = [rig.target.layers_there(rig.handoff)]
    while rig.target.pulls():
        assert extent(rig.pull())[2][0] == seen[-1]
        seen.append(rig.target.layers_there(rig.handoff))
    assert seen == [3, 5, 7, LAYERS_ALL]
    assert rig.target.end_ahead(rig.handoff)
    rig.ack("B")
    version = rig.kv.grow(rig.sequence)
    assert rig.target.ran_ahead(version, rig.sequence)
    rig.target.finish(version, [rig.sequence])
    with pytest.raises(StaleStep):
        rig.target.finish(version, [rig.sequence])
    rig.target.finish(rig.kv.grow(rig.sequence, 11), [rig.sequence])
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].written[rig.workers["B"]] == 112  # no hole in its pages


def test_it_counts_for_the_step_that_it_is_and_for_no_other(rig: Rig) -> None:
    rig.target.begin_ahead(rig.handoff)
    resident(rig)
    assert not rig.target.ran_ahead(rig.kv.grow(rig.sequence), rig.sequence)  # it runs still
    assert rig.target.end_ahead(rig.handoff)
    assert rig.target.ran_ahead(rig.target.step, rig.sequence)
    assert not rig.target.ran_ahead(rig.target.step - 1, rig.sequence)
    assert not rig.target.ran_ahead(rig.target.step, rig.sequence + 1)
    rig.target.finish(rig.target.step, [rig.sequence])
    assert not rig.target.ran_ahead(rig.kv.grow(rig.sequence), rig.sequence)


@pytest.mark.parametrize("then", ["grown", "grown by more", "cut and grown"])
def test_a_step_of_the_sequence_waits_until_what_runs_ahead_has_ended(rig: Rig, then: str) -> None:
    """Whatever becomes of its result: it would write over what the step writes."""
    rig.target.begin_ahead(rig.handoff)
    resident(rig)
    if then == "cut and grown":
        rig.kv.truncate(rig.sequence, 98)
    version = rig.kv.grow(rig.sequence, 1 if then == "grown" else 4)
    assert rig.target.step == version and not rig.target.ready(version)
    with pytest.raises(WrongState):
        rig.target.batch(version, [rig.sequence])
    rig.target.end_ahead(rig.handoff)
    assert rig.target.ready(version) and rig.target.ran_ahead(version, rig.sequence) == (then == "grown")
    assert rig.target.batch(version, [rig.sequence]).batch == 1


def test_two_tokens_at_once_are_another_step(rig: Rig) -> None:
    rig.target.begin_ahead(rig.handoff)
    rig.target.end_ahead(rig.handoff)
    resident(rig)
    assert not rig.target.ran_ahead(rig.kv.grow(rig.sequence, 2), rig.sequence)


def test_pages_that_were_swapped_are_another_step(rig: Rig) -> None:
    """Somebody else computed the same meanwhile, and that copy is in the index: what was written ahead went into the one that is let go of."""
    twin = rig.kv.open(np.arange(100, dtype=np.int32), "B", chunk=100, wait=False).sequence
    rig.target.begin_ahead(rig.handoff)
    rig.target.end_ahead(rig.handoff)
    rig.target.finish(rig.target.step, [twin])
    rig.ack("B")
    before = rig.kv.state.handoffs[rig.handoff].target_pages
    resident(rig)
    version = rig.kv.grow(rig.sequence)
    after = rig.kv.state.tables.pages_of(rig.sequence).tolist()
    assert before != after and before[-1] == after[-1]
    assert not rig.target.ran_ahead(version, rig.sequence)


def lose_the_source(rig: Rig) -> None:
    rig.kv.worker_gone(rig.workers["A"])


def fail_the_pull(rig: Rig) -> None:
    rig.target.begin_pull(rig.handoff)
    rig.target.pull_failed(rig.handoff, "sums differ")


def take_a_snapshot(rig: Rig) -> None:
    rig.target.load(rig.kv.tables_snapshot())


def abort(rig: Rig) -> None:
    rig.kv.abort(rig.handoff)


def give_up(rig: Rig) -> None:
    assert not rig.target.end_ahead(rig.handoff, whole=False)


ENDS = [lose_the_source, fail_the_pull, take_a_snapshot, abort, give_up]


@pytest.mark.parametrize(("end", "running"), [*((end, True) for end in ENDS), *((end, False) for end in ENDS if end is not give_up)])
def test_nothing_counts_that_was_begun_before_the_pull_came_to_nothing(rig: Rig, end: Callable[[Rig], None], running: bool) -> None:
    """Whether it still runs then or not; and if the sequence comes here after all, its next step is computed."""
    assert rig.target.begin_ahead(rig.handoff) is not None
    if not running:
        assert rig.target.end_ahead(rig.handoff)
    end(rig)
    assert rig.target.spoiled(rig.handoff)
    if running and end is not give_up:
        assert not rig.target.end_ahead(rig.handoff)
    if end in (lose_the_source, abort):
        assert rig.target.pulls() == [] and rig.target.begin_ahead(rig.handoff) is None
        return
    rig.ack("B")
    resident(rig)
    assert not rig.target.ran_ahead(rig.kv.grow(rig.sequence), rig.sequence)


def test_after_a_failed_pull_it_may_begin_again_once_that_is_tried_again(rig: Rig) -> None:
    """And waits for all that is pulled again: the first try's layers may be overwritten."""
    rig.target.begin_ahead(rig.handoff)
    fail_the_pull(rig)
    rig.target.end_ahead(rig.handoff)
    assert rig.target.begin_ahead(rig.handoff) is None  # nobody pulls it just now
    rig.ack("B")
    assert rig.target.begin_ahead(rig.handoff) is not None
    assert rig.target.layers_there(rig.handoff) == 0
    resident(rig)
    assert rig.target.end_ahead(rig.handoff)
    assert rig.target.ran_ahead(rig.kv.grow(rig.sequence), rig.sequence)


@pytest.mark.parametrize("then", ["truncated", "closed", "moved on", "step left out"])
def test_nothing_counts_once_something_else_has_become_of_the_sequence(rig: Rig, then: str) -> None:
    rig.target.begin_ahead(rig.handoff)
    rig.target.end_ahead(rig.handoff)
    resident(rig)
    if then == "truncated":
        rig.kv.truncate(rig.sequence, 100)
    elif then == "closed":
        rig.kv.close(rig.sequence)
    elif then == "moved on":
        rig.kv.abort(rig.kv.hand_off(rig.sequence, "A", reserve=True))
    else:
        rig.kv.grow(rig.sequence)
        rig.target.finish(rig.target.step, [])
    if then == "closed":
        assert len(rig.target._aheads) == 0
    else:
        assert not rig.target.ran_ahead(rig.kv.grow(rig.sequence), rig.sequence)


@pytest.mark.parametrize("end", [lose_the_source, abort])
def test_pages_that_it_writes_stay_held_until_it_has_ended(rig: Rig, end: Callable[[Rig], None]) -> None:
    rig.target.begin_ahead(rig.handoff)
    begun = rig.target.version
    end(rig)
    for _ in range(3):
        rig.kv.step()
        rig.ack("B")
    content = rig.target.renewal()
    assert content.version <= begun and rig.quarantined == 7
    rig.target.end_ahead(rig.handoff)
    rig.ack("B")
    assert rig.quarantined == 0


def test_a_snapshot_does_not_let_go_of_what_is_still_written(rig: Rig) -> None:
    rig.target.begin_ahead(rig.handoff)
    begun = rig.target.version
    rig.kv.abort(rig.handoff)
    rig.target.load(rig.kv.tables_snapshot())
    rig.ack("B")
    assert rig.target.renewal().version <= begun and rig.quarantined == 7
    assert not rig.target.end_ahead(rig.handoff)
    rig.ack("B")
    assert rig.quarantined == 0


def test_where_it_cannot_be(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a handoff of another pool, nor one that does not move, nor without a slot for the token, nor more than so many."""
    assert rig.source.begin_ahead(rig.handoff) is None and rig.target.begin_ahead(999) is None
    monkeypatch.setattr("kvmanager.worker.replica.AHEAD_MAX", 0)
    assert rig.target.begin_ahead(rig.handoff) is None
    monkeypatch.setattr("kvmanager.worker.replica.AHEAD_MAX", ahead_module.AHEAD_MAX)
    assert rig.target.begin_ahead(rig.handoff) is not None
    assert rig.target.begin_ahead(rig.handoff) is None  # it runs
    early = Rig()
    early.begin(40)
    early.finish()
    early.pull()
    assert early.target.begin_ahead(early.handoff) is None
    full = Rig()
    other = full.kv.open(np.arange(500, 596, dtype=np.int32), "A", chunk=96).sequence
    full.source.finish(full.source.step, [other])
    full.ack("A")
    handoff = full.kv.hand_off(other, "B")
    assert full.kv.state.handoffs[handoff].length == 96 and full.target.begin_ahead(handoff) is None


def test_a_page_that_was_reserved_for_the_next_token_goes_with_the_sequence() -> None:
    """Its prompt ends with its page, and still there is a slot behind it."""
    rig = Rig()
    rig.kv.abort(rig.handoff)
    rig.sequence = rig.kv.open(np.arange(500, 596, dtype=np.int32), "A", chunk=96, reserve=1).sequence
    rig.finish()
    rig.handoff = rig.kv.hand_off(rig.sequence, "B")
    tables = rig.target.begin_ahead(rig.handoff)
    assert tables is not None and tables.lengths.tolist() == [97] and len(tables.pages_of(0)) == 7
    resident(rig)
    assert rig.target.end_ahead(rig.handoff)
    assert rig.target.ran_ahead(rig.kv.grow(rig.sequence), rig.sequence)


def test_without_streaming_what_moves_comes_by_layers_too() -> None:
    rig = Rig()
    rig.target.pull_by_layers(LAYERS, 3)
    rig.kv.abort(rig.handoff)
    rig.begin(100)
    rig.finish()
    rig.handoff = rig.kv.hand_off(rig.sequence, "B")
    pieces = []
    while rig.target.pulls():
        pieces.append(extent(rig.pull()))
    assert pieces == [(0, 100, (0, 3)), (0, 100, (3, 6)), (0, 100, (6, LAYERS))]
    rig.ack("B")
    assert rig.kv.state.sequences[rig.sequence].pool == 1
