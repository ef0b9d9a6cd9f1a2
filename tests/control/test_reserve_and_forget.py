"""Pages for a known output length, taken at once; and sequences whose pages leave the cache with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, OutOfPages, SequenceTooLarge, Unknown
from kvmanager.machine.commands import Open, Step
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def config(num_pages: int = 16, pools: str = "A") -> ManagerConfig:
    return ManagerConfig(pools=tuple(PoolConfig(name, num_pages, page_size=16) for name in pools), lease_ms=1000)


# --- reserve ---------------------------------------------------------------------------------------------------------------------


def test_admitted_sequence_never_runs_out_of_pages(make_rig: MakeRig) -> None:
    """What is left goes to others, and growing to the reserved length takes no page from anybody."""
    rig = make_rig(config(num_pages=6))
    opened = rig.kv.open(tokens(20), "A", chunk=20, reserve=40)
    assert (opened.length, len(rig.table(opened.sequence))) == (20, 4)
    rig.kv.open(tokens(32, 900), "A", chunk=32)
    table = rig.table(opened.sequence)
    for _ in range(40):
        rig.kv.grow(opened.sequence)
    assert (rig.length(opened.sequence), rig.table(opened.sequence)) == (60, table)
    rig.kv.grow(opened.sequence, 4)
    with pytest.raises(OutOfPages):
        rig.kv.grow(opened.sequence, 1)


def test_request_that_does_not_fit_with_its_output_is_not_admitted(make_rig: MakeRig) -> None:
    rig = make_rig(config(num_pages=4))
    with pytest.raises(SequenceTooLarge) as caught:
        rig.kv.open(tokens(20), "A", reserve=60)
    assert caught.value.details == {"pool": "A", "needed": 5, "total": 4}
    rig.kv.open(tokens(20, 900), "A", chunk=20)
    with pytest.raises(OutOfPages) as caught:
        rig.kv.open(tokens(20), "A", reserve=20)
    assert caught.value.details["needed"] == 3
    with pytest.raises(InvalidValue, match=r"open\.reserve"):
        Open([1], "A", reserve=-1)


def test_cached_pages_count_towards_the_reserve(make_rig: MakeRig) -> None:
    rig = make_rig(config(num_pages=4))
    rig.kv.close(rig.prefilled(tokens(32), "A").sequence)
    opened = rig.kv.open(tokens(40), "A", reserve=24)
    assert opened.cached_tokens == 32
    assert len(rig.table(opened.sequence)) == 4


def test_truncation_gives_no_reserved_page_back(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    opened = rig.kv.open(tokens(20), "A", chunk=20, reserve=40)
    table = rig.table(opened.sequence)
    rig.kv.grow(opened.sequence, 60)
    assert len(rig.table(opened.sequence)) == 5
    rig.kv.truncate(opened.sequence, 22)
    assert rig.table(opened.sequence) == table
    assert rig.counts("A").quarantined == 1


def test_reserved_pages_come_home(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    opened = rig.prefilled(tokens(20), "A", reserve=100)
    rig.kv.close(opened.sequence)
    rig.ack("A")
    counts = rig.counts("A")
    assert (counts.free, counts.cached) == (15, 1)


def test_reserve_moves_along_with_a_handoff_and_nothing_is_pulled_for_it(make_rig: MakeRig) -> None:
    rig = make_rig(config(pools="AB"))
    opened = rig.prefilled(tokens(20), "A", reserve=40)
    handoff = rig.kv.hand_off(opened.sequence, "B")
    assert rig.handoff_state(handoff) == "moving"
    rig.ack("B", pulled=[handoff])
    assert len(rig.table(opened.sequence)) == 4
    rig.kv.open(tokens(16 * 12, 900), "B", chunk=16 * 12)
    rig.kv.grow(opened.sequence, 40)


def test_children_have_no_reserve_of_their_own(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    opened = rig.kv.open(tokens(20), "A", chunk=20, reserve=40)
    [child] = rig.kv.fork(opened.sequence)
    assert len(rig.table(child)) == 2


# --- forget ----------------------------------------------------------------------------------------------------------------------


def test_forgotten_pages_leave_the_index_through_quarantine(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    opened = rig.prefilled(tokens(40), "A")
    rig.kv.close(opened.sequence, forget=True)
    counts = rig.counts("A")
    assert (counts.used, counts.cached, counts.quarantined) == (0, 0, 3)
    assert rig.kv.open(tokens(40), "A").cached_tokens == 0
    rig.ack("A")
    assert rig.counts("A").free == 16
    with pytest.raises(Unknown):
        rig.kv.close(opened.sequence, forget=True)


def test_what_others_hold_is_untouched(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    first = rig.prefilled(tokens(40), "A")
    second = rig.kv.open(tokens(20), "A")
    rig.kv.close(first.sequence, forget=True)
    assert rig.table(second.sequence) == [rig.state.tables.pages_of(second.sequence).tolist()[0]]
    assert rig.kv.open(tokens(40), "A").cached_tokens == 16


def test_what_cached_pages_continue_stays(make_rig: MakeRig) -> None:
    """The system prompt that other conversations have in common is theirs as well, open or not."""
    rig = make_rig(config())
    for each in range(2):
        opened = rig.prefilled([*range(16), *range(100 * each + 50, 100 * each + 70)], "A")
        rig.kv.close(opened.sequence, forget=each == 1)
    assert rig.kv.open([*range(16), *range(50, 70)], "A", wait=False).cached_tokens == 32
    assert rig.kv.open([*range(16), *range(150, 170)], "A", wait=False).cached_tokens == 16


def test_pinned_prefix_stays(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    opened = rig.prefilled(tokens(40), "A")
    rig.kv.pin(tokens(16), "A")
    rig.kv.close(opened.sequence, forget=True)
    assert rig.kv.open(tokens(40), "A").cached_tokens == 16


def test_sequence_opened_in_the_same_step_keeps_what_it_found(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    opened = rig.prefilled(tokens(40), "A")
    reply = rig.kv.step(forget=[opened.sequence], opens=[Open(tokens(20), "A")], grow=[opened.sequence])
    assert reply.opened[0].cached_tokens == 16
    assert reply.error("grow", 0).code == "unknown"
    assert rig.counts("A").quarantined == 2
    assert rig.kv.open(tokens(40), "A").cached_tokens == 16


def test_forks_forget_what_the_last_of_them_had(make_rig: MakeRig) -> None:
    rig = make_rig(config())
    parent = rig.prefilled(tokens(40), "A").sequence
    child = rig.kv.fork(parent)[0]
    rig.kv.close(parent, forget=True)
    assert rig.kv.open(tokens(20), "A").cached_tokens == 16
    rig.kv.step(close=[each for each in rig.state.sequences if each != child], forget=[child])
    counts = rig.counts("A")
    assert counts.cached == 0 and counts.used == 0


def test_ids_are_checked() -> None:
    with pytest.raises(InvalidValue, match=r"step\.forget"):
        Step(forget=["x"])
