"""Pins and sessions: what stays cached until it is let go, within a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmanager import ManagerConfig, Open, Pin, PoolConfig
from kvmanager.errors import InvalidValue, KVError, NotCached, OutOfPages, OverPinBudget, TooMany, Unknown
from tests.control.conftest import Rig
from tests.control.test_eviction import PAGE, cached, finished, text

MakeRig = Callable[[ManagerConfig], Rig]


def small(pages: int = 8, **more: Any) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("p", pages, page_size=PAGE),), **{"pin_percent": 50, **more})


@pytest.fixture
def rig(make_rig: MakeRig) -> Rig:
    return make_rig(small())


def fill(rig: Rig, pages: int) -> int:
    """A sequence that takes so many pages, from the cache's share if need be."""
    return rig.kv.open([9] * pages * PAGE, "p", chunk=1 << 20, wait=False).sequence


def test_pinned_pages_are_not_evicted_and_count_as_used(rig: Rig) -> None:
    """FEATURES.md, demand 3: closed unmerged in vLLM five times, gone again from SGLang."""
    finished(rig, 1, 2)
    finished(rig, 3)
    pin = rig.kv.pin(text(1, 2), "p")
    assert pin.tokens == 2 * PAGE
    assert (rig.counts("p").used, rig.counts("p").cached) == (2, 1)
    with pytest.raises(OutOfPages):
        fill(rig, 7)
    fill(rig, 6)
    assert cached(rig, 1, 2) == 2
    assert cached(rig, 3) == 0


def test_only_what_is_cached_now_is_pinned(rig: Rig) -> None:
    finished(rig, 1, 2)
    assert rig.kv.pin(text(1, 5, 6), "p").tokens == PAGE
    with pytest.raises(NotCached):
        rig.kv.pin(text(5), "p")
    with pytest.raises(NotCached):
        rig.kv.pin(text(1), "p", tenant=b"other")


def test_unpinned_pages_may_go_and_a_pin_ends_once(rig: Rig) -> None:
    finished(rig, 1, 2)
    pin = rig.kv.pin(text(1, 2), "p").pin
    rig.kv.unpin(pin)
    rig.ack("p")
    assert rig.counts("p").cached == 2
    fill(rig, 8)
    with pytest.raises(Unknown):
        rig.kv.unpin(pin)


def test_a_page_of_two_pins_stays_until_both_are_gone(rig: Rig) -> None:
    finished(rig, 1, 2)
    one, other = rig.kv.pin(text(1, 2), "p").pin, rig.kv.pin(text(1), "p").pin
    rig.kv.unpin(one)
    assert rig.counts("p").used == 1
    rig.kv.unpin(other)
    assert rig.counts("p").used == 0


def test_the_budget_counts_distinct_pages_of_a_tenant_and_names_both_numbers(make_rig: MakeRig) -> None:
    rig = make_rig(small(8, pin_percent=25))
    finished(rig, 1, 2, 3)
    rig.kv.pin(text(1, 2), "p")
    rig.kv.pin(text(1), "p")  # the same page costs nothing
    with pytest.raises(OverPinBudget) as caught:
        rig.kv.pin(text(1, 2, 3), "p")
    assert (caught.value.details["needed"], caught.value.details["budget"]) == (3, 2)
    finished(rig, 1, tenant=b"other")
    rig.kv.pin(text(1), "p", tenant=b"other")


def test_all_tenants_together_never_pin_a_pool_full(make_rig: MakeRig) -> None:
    rig = make_rig(small(8, pin_percent=25, pin_percent_all=25))
    finished(rig, 1, 2)
    finished(rig, 1, tenant=b"other")
    rig.kv.pin(text(1, 2), "p")
    with pytest.raises(OverPinBudget, match="of all tenants, got 3"):
        rig.kv.pin(text(1), "p", tenant=b"other")


def test_one_step_lets_go_before_it_pins(make_rig: MakeRig) -> None:
    """The budget is that of what is left: an exchange within it always works, and items of a step see each other."""
    rig = make_rig(small(8, pin_percent=25))
    finished(rig, 1, 2)
    finished(rig, 3, 4)
    old = rig.kv.pin(text(1, 2), "p").pin
    reply = rig.kv.step(unpin=[old, old], pin=[Pin(text(3, 4), "p"), Pin(text(3), "p"), Pin(text(1), "p")])
    assert [item and item.tokens for item in reply.pinned] == [2 * PAGE, PAGE, None]
    assert [(item.kind, item.index, type(item.error)) for item in reply.refused] == [("unpin", 1, Unknown), ("pin", 2, OverPinBudget)]


def test_pins_are_bounded_in_number(make_rig: MakeRig) -> None:
    rig = make_rig(small(pins_max=1))
    finished(rig, 1)
    rig.kv.pin(text(1), "p")
    with pytest.raises(TooMany):
        rig.kv.pin(text(1), "p")


def test_a_step_does_not_evict_what_it_pins(rig: Rig) -> None:
    finished(rig, 1, 2)
    finished(rig, 3)
    reply = rig.kv.step(
        pin=[Pin(text(1, 2), "p")], opens=[Open([9] * 7 * PAGE, "p", chunk=1 << 20), Open([8] * 6 * PAGE, "p", chunk=1 << 20)]
    )
    assert [bool(item) for item in reply.opened] == [False, True]
    assert cached(rig, 1, 2) == 2


def test_leases_end_by_the_clock_and_by_steps(rig: Rig) -> None:
    finished(rig, 1)
    finished(rig, 2)
    finished(rig, 3)
    rig.kv.pin(text(1), "p", lease_ms=100)
    rig.kv.pin(text(2), "p", lease_steps=5)
    rig.kv.pin(text(3), "p")
    assert [(pin["lease_ms"] is None, pin["lease_steps"] is None) for pin in rig.kv.pins()] == [(False, True), (True, False), (True, True)]
    rig.tick(101)
    assert [pin["tokens"] for pin in rig.kv.pins()] == [PAGE, PAGE]
    for _ in range(5):
        rig.kv.step()
    rig.tick()
    assert len(rig.kv.pins()) == 1
    assert rig.counts("p").used == 1


def test_pins_are_listed(rig: Rig) -> None:
    finished(rig, 1, tenant=b"red")
    finished(rig, 1, tenant=b"blue")
    red = rig.kv.pin(text(1), "p", tenant=b"red", session=b"s").pin
    rig.kv.pin(text(1), "p", tenant=b"blue")
    assert [pin["tenant"] for pin in rig.kv.pins()] == [b"red", b"blue"]
    [pin] = rig.kv.pins(b"red")
    assert (pin["pin"], pin["pool"], pin["session"], pin["pages"], pin["tokens"]) == (red, "p", b"s", 1, PAGE)
    assert rig.kv.stats()["pools"]["p"]["pinned"] == 2
    with pytest.raises(InvalidValue):
        rig.kv.pins("red")  # type: ignore[arg-type]


def test_pins_die_with_the_memory_of_their_pool(rig: Rig) -> None:
    finished(rig, 1)
    pin = rig.kv.pin(text(1), "p").pin
    rig.die(rig.workers["p"][0])
    assert rig.kv.pins() == []
    with pytest.raises(Unknown):
        rig.kv.unpin(pin)
    rig.workers["p"] = [rig.kv.join("w", "p", "bf16")]
    fill(rig, 8)


# --- sessions --------------------------------------------------------------------------------------------------------------------


def turn(rig: Rig, *pages: int, session: bytes = b"s") -> int:
    """One turn: the prompt is computed, then its sequence is closed and the session holds it, in one step."""
    opened = rig.prefilled(text(*pages), "p")
    reply = rig.kv.step(close=[opened.sequence], pin=[Pin(sequence=opened.sequence, session=session)])
    assert not reply.refused
    return reply.pinned[0].pin


def test_the_next_turn_of_a_session_supersedes_the_one_before(make_rig: MakeRig) -> None:
    rig = make_rig(small(8))
    first = turn(rig, 1, 2)
    second = turn(rig, 1, 2, 3)
    assert [(pin["pin"], pin["pages"]) for pin in rig.kv.pins()] == [(second, 3)]
    with pytest.raises(Unknown):
        rig.kv.unpin(first)


def test_a_turn_that_went_another_way_is_a_branch_of_its_own(rig: Rig) -> None:
    first = turn(rig, 1, 2)
    branch = turn(rig, 1, 3)
    other = turn(rig, 1, session=b"t")
    assert [pin["pin"] for pin in rig.kv.pins()] == [first, branch, other]
    rig.kv.unpin(branch)
    assert rig.counts("p").used == 2
    rig.kv.release(b"s")
    assert [pin["session"] for pin in rig.kv.pins()] == [b"t"]
    with pytest.raises(Unknown):
        rig.kv.release(b"s")


def test_a_session_superseded_within_a_full_budget(make_rig: MakeRig) -> None:
    """Only pages that are new in the longer prefix count."""
    rig = make_rig(small(8, pin_percent=38))
    turn(rig, 1, 2)
    turn(rig, 1, 2, 3)
    with pytest.raises(AssertionError):
        turn(rig, 1, 2, 3, 4)
    assert [pin["pages"] for pin in rig.kv.pins()] == [3]


def test_hold_keeps_what_the_index_has_of_an_open_sequence(rig: Rig) -> None:
    opened = rig.prefilled(text(1, 2), "p")
    assert rig.kv.hold(opened.sequence, b"s").tokens == 2 * PAGE
    rig.kv.close(opened.sequence)
    rig.ack("p")
    fill(rig, 6)
    assert cached(rig, 1, 2) == 2
    with pytest.raises(Unknown):
        rig.kv.hold(opened.sequence, b"s")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Pin([], "p"), "pin.tokens"),
        (lambda: Pin([1]), "pin.pool"),
        (lambda: Pin([1], "p", sequence=5), "pin.tokens"),
        (lambda: Pin(pool="p", sequence=5), "pin.pool"),
        (lambda: Pin(sequence=-5), "pin.sequence"),
        (lambda: Pin([1], "p", lease_ms=-1), "pin.lease_ms"),
        (lambda: Pin([1], "p", lease_steps=1.5), "pin.lease_steps"),
        (lambda: Pin([1], "p", session=b"x" * 257), "pin.session"),
    ],
)
def test_malformed_values_name_their_field(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()
    assert caught.value.field == field


@pytest.mark.parametrize("release", [[(b"a",)], [b"ab"], [(1, 2)], "x"])
def test_malformed_sessions_reject_the_step(rig: Rig, release: Any) -> None:
    with pytest.raises(KVError):
        rig.kv.step(release=release)
