"""An open that names a group gets the pool of it with the longest match and the least load, or the next in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, OutOfPages, PoolNotReady, SequenceTooLarge, Unknown
from kvmanager.machine.command_wire import command_from_wire, command_to_wire
from kvmanager.machine.commands import Open
from kvmanager.machine.commands import Step as StepCommand
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    pools=(
        PoolConfig("A", 8, page_size=16, group="dp"),
        PoolConfig("B", 8, page_size=16, group="dp"),
        PoolConfig("C", 12, page_size=16, group="dp"),
        PoolConfig("X", 8, page_size=16),
    ),
)


def test_the_longest_match_wins(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    for pool, count in (("A", 32), ("C", 64), ("B", 48)):
        rig.kv.close(rig.prefilled(tokens(count), pool).sequence)
    opened = rig.kv.open(tokens(70), group="dp", chunk=70)
    assert (opened.pool, opened.cached_tokens) == ("C", 64)
    assert rig.state.tables.pool_of(opened.sequence) == 2


def test_without_a_match_the_least_load_wins_and_ties_go_by_the_order_of_the_config(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    where = [rig.kv.open(tokens(20 + each, each * 1000), group="dp").pool for each in range(4)]
    assert where == ["A", "B", "C", "A"]  # A bears 20 tokens, B 21, C 22
    assert rig.kv.open(tokens(5, 9000), group="dp").pool == "B"


def test_load_is_seen_within_one_step_and_so_are_closes(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    heavy = [rig.kv.open(tokens(90, 1000 * each), pool).sequence for each, pool in enumerate("ABC", 1)]
    reply = rig.kv.step(close=heavy[1:2], opens=[Open(tokens(30, 10_000 * each), group="dp") for each in range(1, 5)])
    assert [each.pool for each in reply.opened if each] == ["B", "B", "B", "A"]


def test_load_is_known_tokens_and_moves_with_a_handoff(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.prefilled(tokens(30), "A").sequence
    rig.kv.append_tokens(first, [7])
    assert [pool.load for pool in rig.state.pools] == [31, 0, 0, 0]
    handoff = rig.kv.hand_off(first, "B")
    rig.ack("B", pulled=[handoff])
    assert [pool.load for pool in rig.state.pools] == [0, 31, 0, 0]
    rig.kv.close(first)
    assert [pool.load for pool in rig.state.pools] == [0, 0, 0, 0]


@pytest.mark.parametrize(("match_weight", "load_weight", "chosen"), [(1, 1, "B"), (3, 1, "A"), (1, 0, "A"), (0, 1, "B"), (0, 0, "A")])
def test_weights_say_what_a_match_is_worth(make_rig: MakeRig, match_weight: int, load_weight: int, chosen: str) -> None:
    rig = make_rig(replace(CONFIG, placement_match_weight=match_weight, placement_load_weight=load_weight))
    rig.prefilled(tokens(48), "A")  # stays open: 48 tokens of load, 32 of them of use to the prompt below
    assert rig.kv.open(tokens(40), group="dp").pool == chosen


def test_a_pool_without_room_for_the_whole_prompt_is_passed_over(make_rig: MakeRig) -> None:
    rig = make_rig(replace(CONFIG, placement_load_weight=0))
    rig.prefilled(tokens(32), "A")
    rig.kv.open(tokens(80, 1000), "A", chunk=80)  # one page of A is left
    assert rig.kv.open(tokens(80), group="dp", chunk=16).pool == "B"
    assert rig.kv.open(tokens(48), group="dp", chunk=16).pool == "A"  # one page is enough: the match wins again


def test_where_no_pool_has_room_for_all_one_with_room_for_the_chunk_is_taken(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    for place, pool in enumerate("ABC", 1):
        rig.kv.open(tokens(112 if pool != "C" else 176, 1000 * place), pool, chunk=200)
    opened = rig.kv.open(tokens(100), group="dp", chunk=16)
    assert (opened.pool, opened.length) == ("A", 16)
    with pytest.raises(OutOfPages, match="pool B: expected 2 free pages, got 1"):
        rig.kv.open(tokens(100), group="dp", chunk=32, wait=False)


def test_round_robin_takes_the_pools_in_turn_whatever_is_cached(make_rig: MakeRig) -> None:
    rig = make_rig(replace(CONFIG, placement="round_robin"))
    rig.kv.close(rig.prefilled(tokens(64), "A").sequence)
    where = [rig.kv.open(tokens(70), group="dp", wait=False).pool for _ in range(4)]
    assert where == ["B", "C", "A", "B"]
    reply = rig.kv.step(opens=[Open(tokens(70), group="dp", wait=False)] * 3)
    assert [each.pool for each in reply.opened if each] == ["C", "A", "B"]


def test_only_ready_pools_are_asked(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    rig.kv.close(rig.prefilled(tokens(64), "A").sequence)
    rig.die(rig.workers["A"][0])
    assert rig.kv.open(tokens(70), group="dp").pool == "B"
    for pool in "BC":
        rig.die(rig.workers[pool][0])
    with pytest.raises(PoolNotReady, match="pool A"):
        rig.kv.open(tokens(70), group="dp")


def test_only_pools_that_are_large_enough_at_all_are_asked(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    assert rig.kv.open(tokens(16 * 9), group="dp").pool == "C"
    with pytest.raises(SequenceTooLarge, match="pool C: expected at most 12 pages, got a sequence of 13"):
        rig.kv.open(tokens(16 * 12 + 1), group="dp")
    rig.die(rig.workers["C"][0])
    with pytest.raises(PoolNotReady, match="pool C"):  # the one that is too small for ever is not what to wait for
        rig.kv.open(tokens(16 * 9), group="dp")


def test_a_group_is_named_instead_of_a_pool(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    with pytest.raises(Unknown, match="group: nobody"):
        rig.kv.open([1], group="nobody")
    with pytest.raises(InvalidValue, match=r"^open.pool: expected printable text of 1..64 characters, got ''"):
        rig.kv.open([1])
    with pytest.raises(InvalidValue, match=r"^open.group: expected a pool, or else a group, got both"):
        rig.kv.open([1], "A", group="dp")
    with pytest.raises(InvalidValue, match=r"^open.group"):
        rig.kv.open([1], group=5)
    assert rig.kv.open([1], group="default").pool == "X"


def test_group_crosses_the_wire() -> None:
    made = command_from_wire(command_to_wire(StepCommand(opens=[Open([1], group="dp")])))
    assert isinstance(made, StepCommand) and (made.opens[0].pool, made.opens[0].group) == ("", "dp")


@pytest.mark.parametrize(
    ("name", "value"),
    [("placement", "best"), ("placement", None), ("placement_match_weight", -1), ("placement_load_weight", 1.5)],
)
def test_bad_placement_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=f"^{name}: expected"):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]
