"""Forks: children share what is full, copy what is not, and nobody's pages are lost or given away."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, OutOfPages, TooMany, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch
from kvmanager.machine.commands import Open
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.manager import KVManager
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def one_pool(num_pages: int = 16, workers: int = 1, **more: int) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=16, workers=workers),), lease_ms=1000, **more)


def two_pools(num_pages: int = 16) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=16), PoolConfig("B", num_pages, page_size=16)), lease_ms=1000)


def at_rest(rig: Rig) -> None:
    """Everything has ended: each page is free or cached."""
    rig.kv.step(close=list(rig.state.sequences))
    for pool in rig.config.pools:
        for _ in range(2):
            rig.ack(pool.name)
        counts = rig.counts(pool.name)
        assert counts.free + counts.cached == counts.total


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_children_share_full_pages_and_have_a_last_page_of_their_own(make_rig: MakeRig, length: int) -> None:
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(length), "A", chunk=length).sequence
    children = rig.kv.fork(parent, 3)
    full, part = divmod(length, 16)
    tables = [rig.table(each) for each in (parent, *children)]
    assert [rig.length(each) for each in children] == [length] * 3
    assert all(table[:full] == tables[0][:full] for table in tables)
    assert len({table[full] for table in tables if part}) == 4 * bool(part)
    assert rig.counts("A").used == full + 4 * bool(part)
    at_rest(rig)


def test_the_copy_is_an_instruction_of_the_step() -> None:
    manager = KVManager(one_pool(), checked=True)
    manager.join("A0", "A", "bf16")
    parent = manager.open(tokens(20), "A", chunk=20).sequence
    seen: list[EventBatch] = []
    manager.subscribe(lambda batch, data: seen.append(batch))
    children = manager.fork(parent, 2)
    [copied] = [event for event in seen[0].events if isinstance(event, ev.PagesCopied)]
    tables = manager.state.tables
    assert copied.sources.tolist() == [int(tables.pages_of(parent)[1])] * 2
    assert copied.targets.tolist() == [int(tables.pages_of(child)[1]) for child in children]
    assert copied.tokens.tolist() == [4, 4]


def test_parent_may_grow_in_the_same_step_and_children_begin_before_that(make_rig: MakeRig) -> None:
    """The copy is made before the step's writes: what the parent writes now is not in it."""
    rig = make_rig(one_pool())
    parent = rig.prefilled(tokens(20), "A").sequence
    reply = rig.kv.step(grow=[parent], grow_counts=[15], fork=[parent])
    [[child]] = reply.forked
    assert (rig.length(parent), rig.length(child)) == (35, 20)
    assert len(rig.table(child)) == 2


def test_fork_sees_the_truncation_of_its_step_and_copies_chain_to_the_first_source() -> None:
    """The parent's own last page is being copied in this very step: the child copies from where the parent does."""
    manager = KVManager(one_pool(), checked=True)
    worker = manager.join("A0", "A", "bf16")
    parent = manager.open(tokens(48), "A", chunk=48).sequence
    manager.ack(worker, manager.state.version, ids=[parent], tokens=[48])
    source = int(manager.state.tables.pages_of(parent)[1])
    seen: list[EventBatch] = []
    manager.subscribe(lambda batch, data: seen.append(batch))
    reply = manager.step(truncate=[(parent, 20)], fork=[(parent, 2)])
    assert not reply.refused
    [copied] = [event for event in seen[0].events if isinstance(event, ev.PagesCopied)]
    assert copied.sources.tolist() == [source] * 3
    assert len(set(copied.targets.tolist())) == 3 and source not in copied.targets
    assert [manager.state.tables.length(each) for each in reply.forked[0]] == [20, 20]


def test_shared_pages_are_published_for_all_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    child, other = rig.kv.fork(parent, 2)
    rig.write(child)
    rig.kv.step()
    state = rig.state
    assert [state.sequences[each].published for each in (parent, child, other)] == [2, 2, 2]
    assert rig.kv.open(tokens(40), "A").cached_tokens == 32
    at_rest(rig)


def test_shared_pages_that_turn_out_to_be_known_already_become_one_copy(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    reply = rig.kv.step(opens=[Open(tokens(40), "A", chunk=40, wait=False) for _ in range(2)])
    first, parent = (each.sequence for each in reply.opened)
    child = rig.kv.fork(parent)[0]
    rig.write(first)
    rig.write(parent, child)
    rig.kv.step()
    rig.kv.step()
    assert rig.table(first)[:2] == rig.table(parent)[:2] == rig.table(child)[:2]
    rig.ack("A")
    counts = rig.counts("A")
    assert (counts.used, counts.quarantined) == (5, 0)
    at_rest(rig)


@pytest.mark.parametrize("written", [False, True])
def test_shared_page_is_free_only_after_its_last_owner_has_gone(make_rig: MakeRig, written: bool) -> None:
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    child = rig.kv.fork(parent)[0]
    if written:
        rig.write(parent, child)
    rig.kv.close(parent)
    counts = rig.counts("A")
    assert (counts.used, counts.quarantined) == (3, 1)
    rig.kv.close(child)
    counts = rig.counts("A")
    assert (counts.used, counts.cached, counts.quarantined) == ((0, 2, 2) if written else (0, 0, 4))
    at_rest(rig)


def test_page_published_after_its_first_owner_has_gone_stays_with_the_others(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    one, two = rig.kv.fork(parent, 2)
    rig.write(parent)
    rig.kv.close(parent)
    rig.kv.close(one)
    assert rig.kv.open(tokens(40), "A").cached_tokens == 32
    rig.kv.grow(two, 30)
    at_rest(rig)


def test_truncated_child_copies_the_shared_page_it_would_write_into(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    child = rig.kv.fork(parent)[0]
    rig.kv.truncate(child, 20)
    assert rig.table(child)[0] == rig.table(parent)[0]
    assert rig.table(child)[1] not in rig.table(parent)
    rig.kv.step(tokens=[(child, tokens(12, 500))], grow=[child], grow_counts=[12])
    rig.write(parent, child)
    rig.kv.step()
    assert rig.kv.open(np.append(tokens(40), 1), "A").cached_tokens == 32
    assert rig.kv.open(np.append(np.append(tokens(20), tokens(12, 500)), 1), "A").cached_tokens == 32
    at_rest(rig)


def test_last_owner_copies_as_well(make_rig: MakeRig) -> None:
    """A step of a fork that was closed a moment ago may still be reading the page."""
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    child = rig.kv.fork(parent)[0]
    rig.kv.close(parent)
    before = rig.table(child)
    rig.kv.truncate(child, 20)
    after = rig.table(child)
    assert after[0] == before[0] and after[1] not in before
    assert rig.counts("A").quarantined == 3
    at_rest(rig)


def test_beam_search_keeps_the_best_and_drops_the_rest_in_one_step(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=40))
    beams = [rig.prefilled(tokens(20), "A").sequence]
    beams += rig.kv.fork(beams[0], 3)
    for turn in range(30):
        best, worst = beams[turn % 4], beams[(turn + 1) % 4]
        reply = rig.kv.step(
            close=[worst],
            tokens=[(each, [1000 * turn + place]) for place, each in enumerate(beams) if each != worst],
            grow=[each for each in beams if each != worst],
            fork=[best],
        )
        assert not reply.refused
        beams.remove(worst)
        # The child begins before the growth: it says its own next token, and takes its slot, one step later.
        [[child]] = reply.forked
        rig.kv.step(grow=[child])
        beams.append(child)
        rig.kv.append_tokens(child, [7_000_000 + turn])
        rig.write(*beams)
    assert {rig.length(each) for each in beams} == {50}
    at_rest(rig)


def test_owner_is_the_client_that_forked(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    parent = rig.kv.open(tokens(5), "A", chunk=5).sequence
    child = rig.kv.fork(parent)[0]
    rig.tick(1001)
    lost = {each.sequence for each in rig.kv.step().notices if each.kind == "lost"}
    assert lost == {parent, child}


def test_ids_of_shared_pages_must_be_known(make_rig: MakeRig) -> None:
    """Otherwise parent and child could name different tokens for the same page. Telling them in the same step is soon enough."""
    rig = make_rig(one_pool())
    parent = rig.prefilled(tokens(10), "A").sequence
    rig.kv.grow(parent, 10)
    with pytest.raises(WrongState, match="known token ids up to 16"):
        rig.kv.fork(parent)
    reply = rig.kv.step(tokens=[(parent, tokens(6, 10))], fork=[parent])
    assert not reply.refused
    child = reply.forked[0][0]
    assert len(rig.state.sequences[child].tokens) // 4 == 16


def test_all_children_or_none(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4, sequences_max=4))
    parent = rig.kv.open(tokens(20), "A", chunk=20).sequence
    with pytest.raises(OutOfPages) as caught:
        rig.kv.fork(parent, 3)
    assert caught.value.details == {"pool": "A", "needed": 3, "free": 2, "quarantined": 0}
    with pytest.raises(TooMany):
        rig.kv.fork(parent, 4)
    before = rig.state.pool("A").counts()
    reply = rig.kv.step(fork=[(parent, 3), (parent, 1), (12345 << 20, 1)], opens=[Open(tokens(3), "A", chunk=3)])
    assert [(each.kind, each.index, type(each.error)) for each in reply.refused] == [("fork", 0, OutOfPages), ("fork", 2, Unknown)]
    assert [len(each) for each in reply.forked] == [0, 1, 0]
    assert reply.opened[0] is not None
    assert rig.state.pool("A").counts().used == before.used + 2
    with pytest.raises(InvalidValue):
        rig.kv.fork(parent, 0)


def test_handed_off_sequence_is_not_forked(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    parent = rig.kv.open(tokens(20), "A", chunk=20).sequence
    reply = rig.kv.step(hand_off=[(parent, "B")], fork=[parent])
    assert isinstance(reply.error("fork", 0), WrongState)
    with pytest.raises(WrongState):
        rig.kv.fork(parent)


@pytest.mark.parametrize("who", ["parent", "child"])
def test_forked_sequence_moves_to_another_pool_alone(make_rig: MakeRig, who: str) -> None:
    """Its shared pages are published first, so that whatever the others do with theirs, the handoff's stay where they are."""
    rig = make_rig(two_pools())
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    child = rig.kv.fork(parent)[0]
    moving, staying = (parent, child) if who == "parent" else (child, parent)
    handoff = rig.kv.hand_off(moving, "B")
    rig.write(parent, child)
    rig.tick()
    assert rig.handoff_state(handoff) == "moving"
    rig.kv.close(staying)
    rig.ack("A")
    rig.ack("B", pulled=[handoff])
    assert rig.handoff_state(handoff) == "over"
    rig.kv.step()
    assert rig.kv.open(tokens(40), "A").cached_tokens == 32
    assert rig.kv.open(tokens(40), "B").cached_tokens == 32
    assert rig.kv.fork(moving, 2)
    assert rig.kv.fork(rig.kv.open(tokens(40), "A", chunk=8).sequence, 2)
    at_rest(rig)


def test_copied_page_is_not_moved_before_it_has_been_copied(make_rig: MakeRig) -> None:
    rig = make_rig(two_pools())
    parent = rig.prefilled(tokens(20), "A").sequence
    rig.kv.step()
    child = rig.kv.fork(parent)[0]
    handoff = rig.kv.hand_off(child, "B")
    assert rig.handoff_state(handoff) == "prefilling"
    rig.write(child)
    assert rig.handoff_state(handoff) == "moving"


def test_snapshot_in_the_middle_decides_the_same(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=30))
    parent = rig.kv.open(tokens(40), "A", chunk=40).sequence
    children = rig.kv.fork(parent, 2)
    rig.kv.step(truncate=[(children[0], 35)], grow=[children[1]])
    state = rig.state
    again = load_snapshot(rig.config, decode_batch(encode_batch(snapshot(state))))
    assert state_digest(again) == state_digest(state)
    assert again.families == {children[0]: dict.fromkeys([parent, *children])}
    assert [again.sequences[each].shared for each in (parent, *children)] == [2, 2, 2]
    assert [stayed for _, stayed in again.sequences[children[0]].cuts] == [35]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_tree_of_forks_ends_with_every_page_at_home(data: st.DataObject) -> None:
    """Invariants are checked after every command; at the end nothing is used and what is cached is what was known and written."""
    manager = KVManager(one_pool(num_pages=60, sequences_max=16), checked=True)
    worker = manager.join("A0", "A", "bf16")
    lengths = {manager.open(tokens(data.draw(st.integers(1, 50))), "A", chunk=99).sequence: 0}
    for _ in range(data.draw(st.integers(1, 25))):
        lengths = {each: manager.state.tables.length(each) for each in manager.state.sequences}
        if not lengths:
            break
        one = data.draw(st.sampled_from(sorted(lengths)))
        known = len(manager.state.sequences[one].tokens) // 4
        action = data.draw(st.sampled_from(["fork", "fork", "cut", "grow", "close", "ack", "tell"]))
        if action == "fork":
            reply = manager.step(fork=[(one, data.draw(st.integers(1, 3)))])
            assert len(reply.forked) == 1
        elif action == "cut":
            manager.step(truncate=[(one, data.draw(st.integers(1, lengths[one])))])
        elif action == "grow":
            manager.step(grow=[one], grow_counts=[data.draw(st.integers(1, 20))])
        elif action == "close":
            manager.step(close=[one])
        elif action == "tell" and known < lengths[one]:
            manager.step(tokens=[(one, data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=lengths[one] - known)))])
        else:
            manager.ack(worker, manager.state.version, ids=list(lengths), tokens=list(lengths.values()))
    manager.step(close=list(manager.state.sequences))
    manager.ack(worker, manager.state.version)
    manager.step()
    counts = manager.state.pools[0].counts()
    assert counts.free + counts.cached == counts.total
    assert not manager.state.families
