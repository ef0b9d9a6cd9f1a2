"""Prompts that share a prefix which is still being computed wait for it instead of computing it again: for as long as that goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, PrefixPending
from kvmanager.machine.commands import Open
from kvmanager.pages.inflight import pages_agreeing
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    pools=(PoolConfig("A", 32, page_size=16, group="dp"), PoolConfig("B", 32, page_size=16, group="dp")), inflight_wait_ms=500
)


def test_of_ten_equal_prompts_in_one_step_one_is_computed_and_nine_share_it_afterwards(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    prompt = Open(tokens(70), "A", chunk=70)
    reply = rig.kv.step(opens=[prompt] * 10)
    first = reply.opened[0]
    assert first is not None and reply.opened[1:] == [None] * 9
    for index in range(1, 10):
        error = reply.error("open", index)
        assert isinstance(error, PrefixPending) and error.code == "prefix_pending"
        assert error.details == {"pool": "A", "sequence": first.sequence, "tokens": 64}
    assert rig.counts("A").used == 5
    rig.write(first.sequence)
    reply = rig.kv.step(opens=[prompt] * 9)
    assert [each.cached_tokens for each in reply.opened if each] == [64] * 9
    assert rig.counts("A").used == 5 + 9


def test_a_waiting_prompt_takes_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(40), "A", chunk=40)
    before = rig.state
    with pytest.raises(PrefixPending, match=f"pool A: 32 more tokens of this prompt are being computed by sequence {first.sequence}"):
        rig.kv.open(tokens(33), "A", chunk=40)
    after = rig.state
    assert (list(after.sequences), after.pools[0].free) == (list(before.sequences), before.pools[0].free)


def test_what_is_to_be_expected_is_what_both_prompts_share_in_whole_pages(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(100), "A", chunk=100).sequence
    for prompt, expected in (
        (tokens(100), 96),
        (tokens(200), 96),
        (tokens(97), 96),
        (tokens(96), 80),  # its own last token is never taken from the cache
        ([*range(50), 999, *range(51, 100)], 48),
        ([*range(16), 999], 16),
    ):
        with pytest.raises(PrefixPending) as caught:
            rig.kv.open(prompt, "A")
        assert (caught.value.details["sequence"], caught.value.details["tokens"]) == (first, expected)
    for prompt in (tokens(16), [*range(15), 999, *range(16, 100)]):  # nothing to share
        rig.kv.open(prompt, "A")


def test_waiting_goes_on_from_chunk_to_chunk_and_ends_when_all_is_there(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(100), "A", chunk=40).sequence
    expected = []
    for _ in range(3):
        with pytest.raises(PrefixPending) as caught:
            rig.kv.open(tokens(100), "A", chunk=100)
        expected.append(caught.value.details["tokens"])
        rig.clock.now += 400
        rig.write(first)
        if rig.length(first) < 100:
            rig.kv.grow(first, 30)
    assert expected == [96, 64, 32]
    assert rig.kv.open(tokens(100), "A").cached_tokens == 96


def test_waiting_is_for_the_same_tenant_and_extra_key_alone(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    rig.kv.open(tokens(40), "A", tenant=b"red")
    for others in ({}, {"tenant": b"blue"}, {"tenant": b"red", "extra": b"lora"}):
        assert rig.kv.open(tokens(40), "A", **others).cached_tokens == 0
    with pytest.raises(PrefixPending):
        rig.kv.open(tokens(40), "A", tenant=b"red")


def test_whoever_will_not_wait_computes_at_once(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(40), "A", chunk=40)
    second = rig.kv.open(tokens(40), "A", chunk=40, wait=False)
    assert (second.cached_tokens, second.length) == (0, 40)
    with pytest.raises(PrefixPending) as caught:
        rig.kv.open(tokens(40), "A")
    assert caught.value.details["sequence"] == first.sequence
    rig.write(first.sequence, second.sequence)
    assert rig.kv.open(tokens(40), "A").cached_tokens == 32


# --- what ends the wait ---


def test_waiting_ends_when_the_computing_sequence_closes(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(40), "A", chunk=40).sequence
    reply = rig.kv.step(close=[first], opens=[Open(tokens(40), "A"), Open(tokens(40), "A")])  # in the same step, too
    assert reply.opened[0] is not None
    error = reply.error("open", 1)
    assert isinstance(error, PrefixPending) and error.details["sequence"] == reply.opened[0].sequence


def test_nobody_waits_for_what_the_same_step_cuts_off(make_rig: MakeRig) -> None:
    """The simulator's find: truncations come before opens, and the prompt was told to wait for tokens that were just given up."""
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(40), "A", chunk=40).sequence
    reply = rig.kv.step(truncate=[(first, 1)], opens=[Open(tokens(40), "A", chunk=40)])
    assert reply.opened[0] is not None and reply.opened[0].cached_tokens == 0


def test_waiting_ends_when_no_page_came_for_a_while(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(100), "A", chunk=20).sequence
    rig.clock.now += 500
    with pytest.raises(PrefixPending):
        rig.kv.open(tokens(100), "A")
    rig.write(first)  # one page: it goes on
    rig.clock.now += 500
    with pytest.raises(PrefixPending):
        rig.kv.open(tokens(100), "A")
    rig.clock.now += 1
    assert rig.kv.open(tokens(100), "A").cached_tokens == 16


def test_waiting_ends_when_the_computing_sequence_is_handed_off_before_it_has_all(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(100), "A", chunk=20).sequence
    handoff = rig.kv.hand_off(first, "B")
    rig.write(first)
    assert rig.handoff_state(handoff) == "moving"
    assert rig.kv.open(tokens(100), "A").cached_tokens == 16
    rig.ack("B", pulled=[handoff])
    rig.tick()
    with pytest.raises(PrefixPending) as caught:  # it goes on there
        rig.kv.open(tokens(100), "B")
    assert caught.value.details == {"pool": "B", "sequence": first, "tokens": 80}


def test_waiting_ends_when_the_pool_is_lost(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(40), "A", chunk=40).sequence
    assert rig.die(rig.workers["A"][0]) == [first]
    rig.workers["A"].append(rig.kv.join("again", "A", "bf16"))
    assert rig.kv.open(tokens(40), "A").cached_tokens == 0


def test_all_of_a_crowd_get_in_though_everyone_before_them_gives_up(make_rig: MakeRig) -> None:
    """Nobody starves: each step opens the oldest one that waits, and giving up lets the next one in."""
    rig = make_rig(CONFIG)
    queue, steps = list(range(6)), 0
    last = 0
    while queue:
        reply = rig.kv.step(close=[last] if last else [], opens=[Open(tokens(40), "A", chunk=40) for _ in queue])
        assert reply.opened[0] is not None and reply.opened[1:] == [None] * (len(queue) - 1)
        last = reply.opened[0].sequence
        queue.pop(0)
        steps += 1
    assert steps == 6


# --- configuration, snapshots, placement ---


def test_the_wait_is_a_matter_of_configuration(make_rig: MakeRig) -> None:
    never = make_rig(replace(CONFIG, inflight_wait_ms=0))
    assert [each.cached_tokens for each in never.kv.step(opens=[Open(tokens(40), "A")] * 2).opened if each] == [0, 0]
    much = make_rig(replace(CONFIG, inflight_tokens_min=48))
    assert [bool(each) for each in much.kv.step(opens=[Open(tokens(48), "A")] * 2 + [Open(tokens(49), "A")] * 2).opened] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("name", "value"), [("inflight_wait_ms", -1), ("inflight_wait_ms", 1.5), ("inflight_tokens_min", 0)])
def test_bad_configuration_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=f"^{name}: expected"):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 1, "yes", b""])
def test_wait_is_true_or_false(make_rig: MakeRig, value: object) -> None:
    rig = make_rig(CONFIG)
    with pytest.raises(InvalidValue, match=r"^open.wait: expected true or false"):
        rig.kv.open([1], "A", wait=value)  # type: ignore[arg-type]


def test_a_restored_manager_knows_what_is_in_flight(make_rig: MakeRig) -> None:
    """The second of two that compute the same is not listed, live or restored, and neither is the time of progress forgotten."""
    rig = make_rig(CONFIG)
    first = rig.kv.open(tokens(100), "A", chunk=40).sequence
    rig.clock.now += 77
    rig.kv.open(tokens(100), "A", chunk=40, wait=False)
    rig.write(first)
    books = rig.state.pools[0].inflight  # read from a snapshot
    assert [(sequence, flight.since_ms) for sequence, flight in books.flights.items()] == [(first, 1077)]
    assert len(books.first) == 1


def test_a_group_waits_in_the_pool_where_the_prefix_is_in_flight(make_rig: MakeRig) -> None:
    rig = make_rig(replace(CONFIG, placement_match_weight=2))
    first = rig.kv.open(tokens(100), "B", chunk=100).sequence
    with pytest.raises(PrefixPending) as caught:
        rig.kv.open(tokens(100), group="dp")
    assert caught.value.details == {"pool": "B", "sequence": first, "tokens": 96}
    assert rig.kv.open(tokens(100), group="dp", wait=False).pool == "A"
    assert rig.kv.open(tokens(20), group="dp", wait=False).pool in "AB"


def test_a_group_does_not_wait_in_a_pool_that_is_not_worth_it(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    rig.kv.open(tokens(200), "B", chunk=200)  # 200 tokens of load against 16 to share
    assert rig.kv.open([*range(16), 999], group="dp").pool == "A"


# --- the comparison itself ---


@given(st.lists(st.integers(0, 1), max_size=12), st.lists(st.integers(0, 1), max_size=12), st.integers(1, 3))
def test_pages_agreeing_counts_leading_whole_pages(one: list[int], other: list[int], page: int) -> None:
    count = 0
    while (count + 1) * page <= min(len(one), len(other)) and one[: (count + 1) * page] == other[: (count + 1) * page]:
        count += 1
    assert pages_agreeing(bytes(one), bytes(other), page) == count
