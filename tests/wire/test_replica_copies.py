"""Replica: copies come before the step that asks for them, and what it says of forked and truncated sequences is true."""

from __future__ import annotations

import pytest

from kvmanager.errors import StaleStep, WrongState
from tests.wire.test_replica import PAGE, Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()


def written(rig: Rig, sequence: int) -> int:
    state = rig.kv.state
    return state.written(state.sequences[sequence])


def test_copies_alone_make_a_step_and_hold_everything_newer_back(rig: Rig) -> None:
    replica = rig.replicas["main"]
    parent = rig.open(PAGE + 4)
    rig.settle()
    [child] = rig.kv.fork(parent)
    at = rig.version
    rig.kv.grow(child, 1)
    copies = replica.copies()
    assert copies is not None and (copies.version, replica.version) == (at, at)
    tables = rig.kv.state.tables
    assert copies.source_pages.tolist() == [int(tables.pages_of(parent)[1])]
    assert copies.target_pages.tolist() == [int(tables.pages_of(child)[1])]
    assert copies.tokens.tolist() == [4]
    content = replica.ack()
    assert content is None or content.version < at
    replica.copied(at)
    assert replica.copies() is None
    assert replica.ready(at + 1)


def test_step_cannot_run_before_its_copies(rig: Rig) -> None:
    replica = rig.replicas["main"]
    parent = rig.open(PAGE + 4)
    rig.settle()
    rig.kv.step(grow=[parent], fork=[parent])
    with pytest.raises(WrongState, match="copies carried out first"):
        replica.ready(rig.version)
    with pytest.raises(WrongState):
        replica.batch(rig.version, [parent])
    with pytest.raises(StaleStep):
        replica.copied(rig.version - 1)
    replica.copied(rig.version)
    assert replica.ready(rig.version)


def test_fork_at_a_page_border_asks_for_nothing(rig: Rig) -> None:
    parent = rig.open(2 * PAGE)
    rig.settle()
    rig.kv.fork(parent)
    assert rig.replicas["main"].copies() is None and not rig.replicas["main"].step


def test_the_other_pool_is_not_asked(rig: Rig) -> None:
    parent = rig.open(PAGE + 4)
    rig.settle()
    rig.kv.fork(parent)
    assert rig.replicas["other"].copies() is None and rig.replicas["other"].version == rig.version


@pytest.mark.parametrize("who", ["parent", "child"])
def test_forked_sequence_is_moved_to_its_last_token_once_copied(rig: Rig, who: str) -> None:
    parent = rig.open(PAGE + 4)
    rig.settle()
    [child] = rig.kv.fork(parent)
    sequence = parent if who == "parent" else child
    handoff = rig.kv.hand_off(sequence, "other")
    rig.settle()
    assert [pull.handoff for pull in rig.replicas["other"].pulls()] == [handoff]


def test_child_of_a_sequence_with_a_hole_has_it_too(rig: Rig) -> None:
    parent = rig.open(PAGE + 4)
    rig.run("main", parent)
    [child] = rig.kv.fork(parent)
    rig.settle()
    assert (written(rig, parent), written(rig, child)) == (0, 0)


def test_truncation_cuts_what_has_been_written_and_what_is_written_again_counts_again(rig: Rig) -> None:
    sequence = rig.open(4)
    rig.settle()
    rig.kv.grow(sequence, 3 * PAGE)
    rig.settle()
    assert written(rig, sequence) == 3 * PAGE + 4
    rig.kv.truncate(sequence, PAGE + 2)
    assert written(rig, sequence) == PAGE + 2
    rig.settle()
    rig.kv.grow(sequence, PAGE)
    rig.settle()
    assert written(rig, sequence) == 2 * PAGE + 2


def test_report_under_way_while_the_sequence_is_cut_counts_for_what_stayed(rig: Rig) -> None:
    """Said on tables from before the truncation, heard after it; and what was cut off it is said again once written again."""
    sequence = rig.open(4)
    rig.settle()
    rig.kv.grow(sequence, 2 * PAGE)
    rig.run("main")
    content = rig.replicas["main"].ack()
    assert content is not None and content.tokens == [2 * PAGE + 4]
    rig.kv.step(truncate=[(sequence, PAGE + 3)], grow=[sequence], grow_counts=[PAGE])
    rig.send("main", content)
    assert written(rig, sequence) == PAGE + 3
    rig.settle()
    assert written(rig, sequence) == 2 * PAGE + 3


def test_speculative_decoding_ahead_of_the_workers_still_publishes(rig: Rig) -> None:
    """The scheduler is always one step ahead of the acknowledgements, so every report is of tables before the newest cut."""
    sequence, length = rig.open(4), 4
    rig.settle()
    rig.kv.grow(sequence, 4)
    for _ in range(60):
        rig.run("main")
        content = rig.replicas["main"].ack()
        length += 2
        rig.kv.step(truncate=[(sequence, length)], tokens=[(sequence, [5, 6])], grow=[sequence], grow_counts=[4])
        rig.send("main", content)
    rig.kv.step()
    published = rig.kv.state.sequences[sequence].published
    assert published >= length // PAGE - 1


def test_truncated_page_of_the_index_is_copied_before_the_step_that_writes_into_it(rig: Rig) -> None:
    sequence = rig.open(3 * PAGE)
    rig.settle()
    rig.kv.step()
    before = rig.kv.state.tables.pages_of(sequence).tolist()
    rig.kv.step(truncate=[(sequence, PAGE + 3)], grow=[sequence])
    copies = rig.replicas["main"].copies()
    assert copies is not None
    after = rig.kv.state.tables.pages_of(sequence).tolist()
    assert (copies.source_pages.tolist(), copies.target_pages.tolist(), copies.tokens.tolist()) == ([before[1]], [after[1]], [3])
    assert written(rig, sequence) == PAGE
    handoff = rig.kv.hand_off(sequence, "other")
    rig.settle()
    assert [pull.handoff for pull in rig.replicas["other"].pulls()] == [handoff]


def test_snapshot_in_place_of_a_copy_leaves_a_hole(rig: Rig) -> None:
    """A worker that went past the copy never says that the child has been written."""
    parent = rig.open(PAGE + 4)
    rig.settle()
    rig.deaf.add("main")
    [child] = rig.kv.fork(parent)
    rig.kv.tick()
    rig.replicas["main"].load(rig.kv.tables_snapshot())
    assert rig.replicas["main"].copies() is None
    rig.deaf.clear()
    rig.kv.grow(child, PAGE)
    rig.settle()
    assert written(rig, child) <= PAGE


def test_prompt_that_copies_part_of_a_page_has_been_written_so_far_once_copied() -> None:
    """Nothing else to write: the copy alone is a step, and then the sequence may move."""
    rig = Rig(partial_match=1)
    rig.open(2 * PAGE)
    rig.settle()
    rig.kv.step()
    replica = rig.replicas["main"]
    opened = rig.kv.open([*range(PAGE + 5), 7777, 7778], "main")
    assert opened.cached_tokens == opened.length == PAGE + 5
    assert replica.copies() is not None and not replica.step
    handoff = rig.kv.hand_off(opened.sequence, "other")
    assert not rig.replicas["other"].pulls()
    rig.settle()
    assert [pull.handoff for pull in rig.replicas["other"].pulls()] == [handoff]


def test_reserved_pages_are_neither_written_nor_pulled(rig: Rig) -> None:
    opened = rig.kv.open(list(range(PAGE + 4)), "main", reserve=5 * PAGE)
    assert not rig.replicas["main"].step
    rig.kv.grow(opened.sequence, PAGE + 4)
    rig.settle()
    rig.kv.hand_off(opened.sequence, "other")
    rig.settle()
    [pull] = rig.replicas["other"].pulls()
    assert len(pull.source_pages) == len(pull.target_pages) == 2
