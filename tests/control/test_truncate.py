"""Truncation: pages come back, rejected tokens are never shared, and what is said of them late does not count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, OutOfPages, Unknown, WrongState
from kvmanager.machine.commands import Ack, Step
from kvmanager.machine.truncation import CUTS_MAX, believed
from kvmanager.manager import KVManager
from kvmanager.pages.sequences import Sequence
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def one_pool(num_pages: int = 16, workers: int = 1) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=16, workers=workers),), lease_ms=1000)


def cached(rig: Rig, prompt: np.ndarray) -> int:
    """Tokens of a prompt that the index would serve."""
    opened = rig.kv.open(np.append(prompt, 99999), "A", wait=False)
    rig.kv.close(opened.sequence)
    return opened.cached_tokens


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_table_and_length_are_those_of_the_tokens_that_stay(make_rig: MakeRig, length: int) -> None:
    rig = make_rig(one_pool())
    opened = rig.kv.open(tokens(10), "A", chunk=10)
    rig.kv.grow(opened.sequence, 23)
    before = rig.table(opened.sequence)
    rig.kv.truncate(opened.sequence, length)
    keep = -(-length // 16)
    assert (rig.length(opened.sequence), rig.table(opened.sequence)) == (length, before[:keep])
    assert rig.counts("A").quarantined == len(before) - keep
    rig.ack("A")
    counts = rig.counts("A")
    assert (counts.used, counts.quarantined) == (keep, 0)


def test_speculative_decoding_reserves_accepts_and_gives_back_in_one_command(make_rig: MakeRig) -> None:
    """Step n tells what came of step n - 1: cut to the accepted tokens, name them, reserve the next draft."""
    rig = make_rig(one_pool())
    sequence = rig.prefilled(tokens(16), "A").sequence
    length, text = 16, tokens(16).tolist()
    rig.kv.grow(sequence, 4)
    for accepted in (1, 4, 2, 3, 1, 4, 4):
        rig.write(sequence)
        news = [1000 * length + place for place in range(accepted)]
        length, text = length + accepted, text + news
        reply = rig.kv.step(truncate=[(sequence, length)], tokens=[(sequence, news)], grow=[sequence], grow_counts=[4])
        assert not reply.refused
        assert rig.length(sequence) == length + 4
    rig.write(sequence)
    rig.kv.step()
    assert cached(rig, np.array(text)) == 32
    assert bytes(rig.state.sequences[sequence].tokens) == np.array(text, "<i4").tobytes()


def test_token_ids_beyond_the_new_length_are_forgotten(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    sequence = rig.kv.open(tokens(40), "A", chunk=20).sequence  # known beyond what is computed yet
    rig.kv.truncate(sequence, 18)
    assert len(rig.state.sequences[sequence].tokens) // 4 == 18
    rig.kv.append_tokens(sequence, [7, 8])
    rig.kv.grow(sequence, 14)
    rig.write(sequence)
    assert cached(rig, np.append(tokens(18), [7, 8])) == 16


def test_unknown_tokens_stay_unknown(make_rig: MakeRig) -> None:
    """Cutting where no ids are known yet drops none; the next ones that are told come after those known."""
    rig = make_rig(one_pool())
    sequence = rig.prefilled(tokens(10), "A").sequence
    rig.kv.grow(sequence, 30)
    rig.kv.truncate(sequence, 20)
    rig.kv.append_tokens(sequence, tokens(10, 10))
    rig.write(sequence)
    rig.kv.step()
    assert cached(rig, tokens(20)) == 16


def test_ack_of_rejected_tokens_that_comes_late_does_not_count_for_those_written_over_them(make_rig: MakeRig) -> None:
    """The worker wrote 32 tokens, and says so after they were cut to 20 and reserved again for others: the second page holds the old
    ones until the worker has written it again."""
    rig = make_rig(one_pool())
    [worker] = rig.workers["A"]
    sequence = rig.prefilled(tokens(16), "A").sequence
    rig.kv.grow(sequence, 16)
    written_at = rig.version
    rig.kv.step(truncate=[(sequence, 20)], tokens=[(sequence, tokens(16, 500))], grow=[sequence], grow_counts=[12])
    rig.kv.ack(worker, written_at, ids=[sequence], tokens=[32])
    rig.kv.step()
    wanted = np.append(tokens(16), tokens(16, 500))
    assert cached(rig, wanted) == 16
    rig.write(sequence)
    rig.kv.step()
    assert cached(rig, wanted) == 32


def test_ack_before_the_truncation_does_not_count_either(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    sequence = rig.prefilled(tokens(16), "A").sequence
    rig.kv.grow(sequence, 16)
    rig.write(sequence)  # all 32, but the ids of the last 16 were never told
    rig.kv.truncate(sequence, 17)
    rig.kv.step(tokens=[(sequence, tokens(16, 500))], grow=[sequence], grow_counts=[15])
    assert cached(rig, np.append(tokens(16), tokens(16, 500))) == 16


def test_every_rank_must_have_written_again(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(workers=2))
    first, second = rig.workers["A"]
    sequence = rig.prefilled(tokens(16), "A").sequence
    rig.kv.grow(sequence, 16)
    grown_at = rig.version
    rig.kv.step(truncate=[(sequence, 16)], tokens=[(sequence, tokens(16, 500))], grow=[sequence], grow_counts=[16])
    wanted = np.append(tokens(16), tokens(16, 500))
    rig.kv.ack(first, rig.version, ids=[sequence], tokens=[32])
    rig.kv.ack(second, grown_at, ids=[sequence], tokens=[32])  # the old ones
    rig.kv.step()
    assert cached(rig, wanted) == 16
    rig.kv.ack(second, rig.version, ids=[sequence], tokens=[32])
    rig.kv.step()
    assert cached(rig, wanted) == 32


def test_ack_may_speak_of_newer_tables_than_it_acknowledges(make_rig: MakeRig) -> None:
    """A pull in progress holds the acknowledged version back; what was written meanwhile counts all the same."""
    rig = make_rig(one_pool())
    [worker] = rig.workers["A"]
    sequence = rig.prefilled(tokens(16), "A").sequence
    rig.kv.grow(sequence, 4)
    old = rig.version
    rig.kv.step(truncate=[(sequence, 17)], tokens=[(sequence, tokens(16, 500))], grow=[sequence], grow_counts=[15])
    with pytest.raises(InvalidValue, match=r"ack\.as_of: expected"):
        rig.kv.ack(worker, old, ids=[sequence], tokens=[32], as_of=rig.version + 1)
    rig.kv.ack(worker, old, ids=[sequence], tokens=[32], as_of=rig.version)
    rig.kv.step()
    assert cached(rig, np.append(tokens(16), tokens(16, 500))) == 32


def test_published_pages_stay_cached_and_the_cut_one_is_copied(make_rig: MakeRig) -> None:
    """A turn is taken back: the pages of the index serve others as before, and nobody writes into them."""
    rig = make_rig(one_pool())
    sequence = rig.prefilled(tokens(48), "A").sequence
    rig.kv.step()
    before = rig.table(sequence)
    rig.kv.truncate(sequence, 20)
    after = rig.table(sequence)
    assert after[0] == before[0] and len(after) == 2 and after[1] not in before
    counts = rig.counts("A")
    assert (counts.used, counts.cached, counts.quarantined) == (2, 2, 0)
    assert cached(rig, tokens(48)) == 48
    rig.kv.step(tokens=[(sequence, tokens(12, 500))], grow=[sequence], grow_counts=[12])
    rig.write(sequence)
    rig.kv.step()
    assert cached(rig, tokens(48)) == 48
    assert cached(rig, np.append(tokens(20), tokens(12, 500))) == 32


def test_the_copy_counts_once_it_has_been_acknowledged(make_rig: MakeRig) -> None:
    """A handoff must not move a page that no worker has copied yet."""
    config = ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16)))
    rig = make_rig(config)
    sequence = rig.prefilled(tokens(48), "A").sequence
    rig.kv.step()
    rig.kv.truncate(sequence, 20)
    handoff = rig.kv.hand_off(sequence, "B")
    assert rig.handoff_state(handoff) == "prefilling"
    rig.write(sequence)
    assert rig.handoff_state(handoff) == "moving"


def test_cut_at_a_page_border_needs_no_page(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=3))
    sequence = rig.prefilled(tokens(48), "A").sequence
    rig.kv.step()
    with pytest.raises(OutOfPages):
        rig.kv.truncate(sequence, 31)
    assert rig.length(sequence) == 48
    rig.kv.truncate(sequence, 32)
    assert (rig.length(sequence), rig.counts("A").cached) == (32, 1)


@pytest.mark.parametrize("length", [0, -1, 2**24 + 1, "x", True], ids=str)
def test_malformed_lengths_reject_the_step(make_rig: MakeRig, length: object) -> None:
    rig = make_rig(one_pool())
    sequence = rig.kv.open(tokens(10), "A", chunk=10).sequence
    before = rig.version
    with pytest.raises(InvalidValue, match=r"step\.truncate"):
        rig.kv.step(truncate=[(sequence, length)], grow=[sequence])
    assert rig.version == before


def test_what_cannot_be_cut_is_refused_alone(make_rig: MakeRig) -> None:
    config = ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16)))
    rig = make_rig(config)
    fine, short, moving = (rig.kv.open(tokens(10, 100 * each), "A", chunk=10).sequence for each in range(3))
    rig.kv.hand_off(moving, "B")
    reply = rig.kv.step(truncate=[(fine, 3), (short, 11), (12345 << 20, 1), (moving, 3)])
    assert [(each.kind, each.index, type(each.error)) for each in reply.refused] == [
        ("truncate", 1, InvalidValue),
        ("truncate", 2, Unknown),
        ("truncate", 3, WrongState),
    ]
    assert [rig.length(each) for each in (fine, short, moving)] == [3, 10, 10]
    with pytest.raises(InvalidValue, match="each sequence once"):
        rig.kv.step(truncate=[(fine, 3), (fine, 2)])


def test_pairs_come_as_list_or_array() -> None:
    for pairs in ([(5, 3), (6, 4)], np.array([[5, 3], [6, 4]]), ((5, 3), [6, 4]), np.array([5, 3, 6, 4], "<i8").tobytes()):
        assert Step(truncate=pairs).truncate.tolist() == [[5, 3], [6, 4]]
    for wrong in ([5, 3], [(5, 3, 1)], np.array([5, 3, 6]), 7, b"12345678"):
        with pytest.raises(InvalidValue):
            Step(truncate=wrong)
    assert Step(fork=[5, (6, 4)]).fork.tolist() == [[5, 1], [6, 4]]
    assert Step(fork=np.array([5, 6])).fork.tolist() == [[5, 1], [6, 1]]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_what_is_believed_is_what_no_cut_since_then_has_taken(data: st.DataObject) -> None:
    """Against the plain rule: a report as of version v counts up to the shortest that the sequence has been cut to after v."""
    manager = KVManager(one_pool(num_pages=64), checked=True)
    worker = manager.join("A0", "A", "bf16")
    opened = manager.open([1], "A", chunk=1).sequence
    cuts: list[tuple[int, int]] = []
    length = 1
    for _ in range(data.draw(st.integers(1, 12))):
        length += data.draw(st.integers(1, 40))
        manager.grow(opened, length - manager.state.tables.length(opened))
        length = data.draw(st.integers(1, length))
        cuts.append((manager.truncate(opened, length), length))
        if data.draw(st.booleans()):
            manager.ack(worker, data.draw(st.integers(0, manager.state.version)))
    sequence: Sequence = manager.state.sequences[opened]
    for as_of in range(manager.state.workers[worker].acked, manager.state.version + 1):
        tokens_said = data.draw(st.integers(0, 600))
        expected = min([tokens_said, *(stayed for version, stayed in cuts if version > as_of)])
        assert believed(sequence, tokens_said, as_of) == expected


def test_cuts_that_nobody_acknowledges_are_bounded_and_believe_too_little_rather_than_too_much() -> None:
    manager = KVManager(one_pool(num_pages=64), checked=True)
    worker = manager.join("A0", "A", "bf16")
    opened = manager.open([1], "A", chunk=1).sequence
    begun = manager.state.version
    for _ in range(3 * CUTS_MAX):
        manager.grow(opened, 3)
        last = manager.truncate(opened, manager.state.tables.length(opened) - 1)
    sequence = manager.state.sequences[opened]
    assert len(sequence.cuts) == CUTS_MAX
    assert believed(sequence, 1, begun) == 0
    assert believed(sequence, 300, last) == 300
    manager.execute(Ack(worker, last), 7, 1)
    manager.truncate(opened, 5)
    assert len(manager.state.sequences[opened].cuts) == 1
