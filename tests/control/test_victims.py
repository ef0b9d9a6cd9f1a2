"""When pages run out: who did not get theirs, and on request whom to preempt, in the order of priority and arrival."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, OutOfPages
from kvmanager.machine.command_wire import command_from_wire, command_to_wire
from kvmanager.machine.commands import Open, Step
from kvmanager.pages.arrivals import Arrivals
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16)))


def full(rig: Rig, *priorities: int, pages: int = 2) -> list[int]:
    """Sequences of `pages` full pages each, one for each priority, in this order."""
    return [
        rig.kv.open(tokens(16 * pages, 1000 * place), "A", chunk=1000, priority=priority).sequence
        for place, priority in enumerate(priorities)
    ]


def test_victims_are_the_lowest_priority_first_then_the_latest(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    high, old, new, low = full(rig, 1, 0, 0, -1)
    reply = rig.kv.step(grow=[high], grow_counts=[65], victims=True)
    error = reply.error("grow", 0)
    assert isinstance(error, OutOfPages) and error.details["needed"] == 5
    assert [tuple(each) for each in reply.victims] == [(low, "A", 2), (new, "A", 2), (old, "A", 2)]


def test_victims_suffice_and_are_no_more_than_needed(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    one, two, three, four = full(rig, 0, 0, 0, 0)
    for count, expected in ((1, [four]), (32, [four]), (33, [four, three])):
        reply = rig.kv.step(grow=[one], grow_counts=[count], victims=True)
        assert [each.sequence for each in reply.victims] == expected
    rig.kv.step(close=[four, three])
    rig.ack("A")
    assert rig.kv.step(grow=[one], grow_counts=[33], victims=True).victims == []
    assert rig.length(one) == 65 and rig.length(two) == 32


def test_a_sequence_that_cannot_grow_may_be_its_own_victim(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    *_, last = full(rig, 0, 0, 0, 0)
    assert [each.sequence for each in rig.kv.step(grow=[last], victims=True).victims] == [last]


def test_nobody_goes_for_somebody_of_lower_priority(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    *_, low = full(rig, 1, 1, 1, 0)
    reply = rig.kv.step(grow=[low], grow_counts=[48], victims=True)
    assert [each.sequence for each in reply.victims] == [low]  # not enough, and yet no other


def test_a_prompt_displaces_only_those_below_its_priority(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    *_, low, _ = full(rig, 0, 0, -1, 0)
    prompts = [Open(tokens(40, 9000), "A", chunk=40, priority=priority) for priority in (-1, 0, 1)]
    assert [[each.sequence for each in rig.kv.step(opens=[prompt], victims=True).victims] for prompt in prompts[:2]] == [[], [low]]
    assert len(rig.kv.step(opens=prompts[2:], victims=True).victims) == 2


def test_pages_that_others_hold_are_not_counted_until_they_go_too(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.prefilled(tokens(49), "A").sequence  # 4 pages, 3 of them shareable
    others = [rig.kv.open(tokens(49), "A", chunk=100).sequence for _ in range(2)]
    rig.kv.open(tokens(32, 900), "A", chunk=32, priority=7)
    reply = rig.kv.step(grow=[first], grow_counts=[60], victims=True)
    assert [tuple(each) for each in reply.victims] == [(others[1], "A", 1), (others[0], "A", 1), (first, "A", 4)]


def test_pages_in_the_hands_of_a_handoff_are_not_counted(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first, second = (rig.prefilled(tokens(64, 1000 * each), "A").sequence for each in range(2))
    rig.kv.hand_off(second, "B")
    rig.tick()
    assert [each.sequence for each in rig.kv.step(grow=[first], victims=True).victims] == [first]


def test_those_that_close_in_the_same_step_are_no_victims(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    one, two, three, four = full(rig, 0, 0, 0, 0)
    reply = rig.kv.step(close=[four], grow=[one], victims=True)  # quarantined: it does not help this step
    assert [each.sequence for each in reply.victims] == [three]
    assert two in rig.state.sequences


def test_a_handed_off_sequence_is_the_latest_where_it_has_come_to(make_rig: MakeRig) -> None:
    """Also in a restored manager: the order is part of the state."""
    rig = make_rig(CONFIG)
    moved = rig.prefilled(tokens(32), "A").sequence
    others = [rig.kv.open(tokens(32, 1000 * each), "B", chunk=32).sequence for each in range(1, 4)]
    handoff = rig.kv.hand_off(moved, "B")
    rig.tick()
    rig.ack("B", pulled=[handoff])
    assert [each for _, each in rig.state.pools[1].arrivals.latest_first()] == [moved, *reversed(others)]
    assert rig.kv.step(grow=others[:1], victims=True).victims[0].sequence == moved
    assert rig.kv.stats()["pools"]["B"]["sequences"] == 4 and rig.kv.stats()["pools"]["A"]["sequences"] == 0


def test_victims_come_on_request_alone(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    one, *_ = full(rig, 0, 0, 0, 0)
    assert rig.kv.step(grow=[one]).victims == []
    for value in (1, None, "yes"):
        with pytest.raises(InvalidValue, match=r"^step.victims: expected true or false"):
            rig.kv.step(victims=value)  # type: ignore[arg-type]
    wired = command_to_wire(Step(victims=True))
    made: Any = command_from_wire(wired)
    assert made.victims and "victims" not in command_to_wire(Step())


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), max_size=40))
def test_arrivals_against_a_list(changes: list[tuple[int, bool]]) -> None:
    arrivals, model = Arrivals(), list[tuple[int, int]]()
    for number, (priority, leaves) in enumerate(changes):
        if leaves and model:
            gone = model.pop(number % len(model))
            arrivals.remove(gone[1], gone[0])
        else:
            model.append((priority, number))
            arrivals.add(number, priority)
    assert arrivals.count == len(model)
    assert list(arrivals.latest_first()) == sorted(model, key=lambda item: (item[0], -item[1]))
    again, priority_of = Arrivals(), {sequence: priority for priority, sequence in model}
    for each in arrivals.in_order():
        again.add(each, priority_of[each])
    assert list(again.latest_first()) == list(arrivals.latest_first())
