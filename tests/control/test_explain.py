"""Why a prompt missed: never seen, evicted, another branch, another key, or still being computed; and nothing about other tenants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, Unknown
from kvmanager.machine.events import PagesEvicted
from kvmanager.machine.explain import Explanation
from kvmanager.manager import KVManager
from kvmanager.pages.prefix import PrefixIndex
from tests.control.conftest import Clock, Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    pools=(PoolConfig("A", 8, page_size=16, group="dp"), PoolConfig("B", 8, page_size=16, group="dp")),
    lease_ms=86_400_000,  # the clock jumps in here, and a server ticks when it likes
)


def cached(rig: Rig, prompt: object, pool: str = "A", **more: Any) -> None:
    rig.kv.close(rig.prefilled(prompt, pool, **more).sequence)
    rig.ack(pool)


def why(rig: Rig, prompt: object, **more: Any) -> tuple[int, str, dict[str, int]]:
    [found] = rig.kv.explain(prompt, "A", **more)
    return found.cached_tokens, found.reason, found.details


def test_each_pool_of_a_group_says_its_own(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    cached(rig, tokens(40), "B")
    before = rig.kv.snapshot()
    assert rig.kv.explain(tokens(40), group="dp") == [Explanation("A", 0, "never_seen", {}), Explanation("B", 32, "cached", {})]
    assert rig.kv.snapshot() == before


def test_cached_is_all_that_may_come_from_the_cache(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    cached(rig, tokens(48))
    assert why(rig, tokens(48)) == (32, "cached", {})  # never the last token
    assert why(rig, tokens(49)) == (48, "cached", {})
    assert why(rig, tokens(64)) == (48, "cached", {})
    assert why(rig, tokens(65)) == (48, "never_seen", {})
    assert why(rig, [7]) == (0, "cached", {})


@pytest.mark.parametrize("place", [1, 15, 16, 17, 31, 32, 47])
def test_diverges_names_the_first_token_that_differs(make_rig: MakeRig, place: int) -> None:
    rig = make_rig(CONFIG)
    cached(rig, tokens(48))
    prompt = [*range(place), 999, *range(place + 1, 64)]
    assert why(rig, prompt) == (place // 16 * 16, "diverges", {"at": place})


def test_diverges_speaks_of_the_nearest_of_several_branches(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    for at in (18, 25, 20):
        cached(rig, [*range(at), 700 + at, *range(at + 1, 32)])
    assert why(rig, tokens(64)) == (16, "diverges", {"at": 25})
    assert why(rig, tokens(64, 5000)) == (0, "never_seen", {})


def test_in_flight_names_the_sequence_and_what_it_will_share(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    sequence = rig.kv.open(tokens(100), "A", chunk=100).sequence
    assert why(rig, tokens(70)) == (0, "in_flight", {"sequence": sequence, "tokens": 64})
    rig.kv.ack(rig.workers["A"][0], rig.version, ids=[sequence], tokens=[20])
    assert why(rig, [*range(50), *range(1000, 1050)]) == (16, "in_flight", {"sequence": sequence, "tokens": 32})
    rig.clock.now += 10**6  # nobody waits for it any longer, and it is the reason all the same
    assert why(rig, tokens(70)) == (16, "in_flight", {"sequence": sequence, "tokens": 48})


def test_evicted_names_the_version(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    cached(rig, tokens(64))
    rig.kv.open(tokens(96, 9000), "A", chunk=96)
    version = rig.version
    assert why(rig, tokens(65)) == (32, "evicted", {"version": version})
    rig.kv.open(tokens(32, 8000), "A", chunk=32)
    assert why(rig, tokens(65)) == (0, "evicted", {"version": rig.version})
    assert why(rig, [*range(20), *range(700, 750)]) == (0, "evicted", {"version": rig.version})  # it shared that page
    assert why(rig, tokens(65, 500)) == (0, "never_seen", {})


def test_a_page_that_came_back_is_cached_and_what_follows_is_not_confused(make_rig: MakeRig) -> None:
    """An eviction is remembered of its place, not of the tokens alone: the same page of tokens occurs at several depths here."""
    rig = make_rig(CONFIG)
    same = [5] * 64
    cached(rig, same)
    rig.kv.close(rig.kv.open(tokens(96, 9000), "A", chunk=96).sequence)
    rig.ack("A")
    gone = why(rig, [*same, 1])
    assert gone[:2] == (32, "evicted")
    cached(rig, [*same[:33], *range(100, 115)])  # another branch, and then the same node grows longer again
    assert why(rig, [*same, 1]) == (32, "evicted", gone[2])
    cached(rig, [*same, 1])
    assert why(rig, [*same, 1]) == (64, "cached", {})
    assert why(rig, [*same, *same])[:2] == (64, "never_seen")


def test_another_extra_key_of_the_same_tenant_is_told_and_not_which(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    cached(rig, tokens(40), tenant=b"red", extra=b"lora")
    cached(rig, tokens(20), tenant=b"red", extra=b"other")
    assert why(rig, tokens(40), tenant=b"red") == (0, "other_extra", {"tokens": 32})
    assert why(rig, tokens(40), tenant=b"red", extra=b"other") == (16, "other_extra", {"tokens": 32})
    assert why(rig, tokens(40), tenant=b"red", extra=b"lora") == (32, "cached", {})


def test_another_tenant_is_told_only_where_the_operator_allows_it(make_rig: MakeRig) -> None:
    closed, open_ = make_rig(CONFIG), make_rig(replace(CONFIG, explain_across_tenants=True))
    for rig, expected in ((closed, (0, "never_seen", {})), (open_, (0, "other_tenant", {"tokens": 32}))):
        cached(rig, tokens(40), tenant=b"red", extra=b"lora")
        assert why(rig, tokens(40), tenant=b"blue", extra=b"lora") == expected
        assert why(rig, tokens(40), tenant=b"re", extra=b"dlora") == expected  # no tenant's name is the start of another's
        assert why(rig, tokens(40), tenant=b"redx") == expected


def test_a_lost_pool_is_told(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    cached(rig, tokens(40))
    before = rig.version
    rig.die(rig.workers["A"][0])
    lost = rig.version  # the server may tick by itself
    rig.workers["A"].append(rig.kv.join("again", "A", "bf16"))
    found, reason, details = why(rig, tokens(40))
    assert (found, reason) == (0, "never_seen") and before < details["pool_lost"] <= lost


def test_what_was_evicted_is_remembered_within_a_bound_and_not_in_the_state(make_rig: MakeRig) -> None:
    tiny = make_rig(replace(CONFIG, remnants_bytes_max=3 * (64 + 256)))
    for first in range(0, 10_000, 1000):
        cached(tiny, tokens(100, first))
        cached(tiny, tokens(100, first + 500))
    reasons = [why(tiny, tokens(20, first))[1] for first in range(0, 10_000, 500)]
    assert 1 <= reasons.count("evicted") <= 3 and reasons.count("never_seen") >= 15
    nothing = make_rig(replace(CONFIG, remnants_bytes_max=0))
    cached(nothing, tokens(64))
    nothing.kv.open(tokens(128, 9000), "A", chunk=128)
    assert why(nothing, tokens(65)) == (0, "never_seen", {})
    assert not nothing.state.pools[0].prefix.remnants.entries and not tiny.state.pools[0].prefix.remnants.entries


# --- wrong use ---


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"tokens": []}, InvalidValue, "explain.tokens: expected at least one token"),
        ({"tokens": [-1]}, InvalidValue, "explain.tokens: expected ints in 0"),
        ({"tokens": "abc"}, InvalidValue, "explain.tokens"),
        ({"tokens": range(1 << 21)}, InvalidValue, "explain.tokens: expected at most 1048576 tokens, got 2097152"),
        ({"tokens": [1], "pool": "Z"}, Unknown, "pool: Z"),
        ({"tokens": [1], "pool": "", "group": "Z"}, Unknown, "group: Z"),
        ({"tokens": [1], "pool": ""}, InvalidValue, "explain.pool: expected printable text of 1..64"),
        ({"tokens": [1], "group": "dp"}, InvalidValue, "explain.group: expected a pool, or else a group, got both"),
        ({"tokens": [1], "tenant": b"x" * 257}, InvalidValue, "explain.tenant: expected at most 256 bytes"),
        ({"tokens": [1], "extra": 5}, InvalidValue, "explain.extra"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_are_typed_and_bounded(make_rig: MakeRig, values: dict[str, Any], error: type[Exception], text: str) -> None:
    rig = make_rig(CONFIG)
    with pytest.raises(error, match=text):
        rig.kv.explain(**{"pool": "A", **values})


@pytest.mark.parametrize(("name", "value"), [("remnants_bytes_max", -1), ("explain_across_tenants", 1), ("explain_across_tenants", None)])
def test_bad_configuration_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidValue, match=f"^{name}: expected"):
        replace(CONFIG, **{name: value})  # type: ignore[arg-type]


# --- the history against a model ---


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=40))
def test_evicted_is_never_said_wrongly_and_always_of_what_went_last(days: list[tuple[int, int, int]]) -> None:
    """The model: for each prefix in whole pages, the version in which its last page was evicted the last time."""
    config = ManagerConfig(pools=(PoolConfig("A", 6, page_size=16),))
    manager = KVManager(config, clock=Clock(), checked=True)
    rig = Rig(manager, config, Clock())
    paths: dict[int, tuple[int, ...]] = {}  # page -> tokens up to its end
    gone: dict[tuple[int, ...], int] = {}
    today: dict[tuple[int, ...], int] = {}

    def follow(batch: Any, data: bytes) -> None:
        for event in batch.events:
            if isinstance(event, PagesEvicted):
                today.update((paths[page], batch.version) for page in event.pages.tolist())

    def pages_in(index: PrefixIndex) -> None:
        for _, node in index.walk():
            above = b"".join(each.tokens for each in reversed(list(node.path())[1:]))
            for place, page in enumerate(node.pages, 1):
                whole = above + node.tokens[: place * index.page_bytes]
                paths[page] = tuple(int.from_bytes(whole[at : at + 4], "little") for at in range(0, len(whole), 4))

    def text(kind: int, pages: int) -> list[int]:
        """Few beginnings and repeated pages, so that branches meet and the same page occurs at several depths."""
        first = [1] * 16 if kind % 2 else [2] * 16
        rest = [3] * 16 if kind // 2 == 0 else [1] * 16 if kind // 2 == 1 else [2] * 15 + [9]
        return [*[*first, *rest, *first, *rest, *first][: pages * 16], 7]

    manager.subscribe(follow)
    for kind, count, asked in days:
        today.clear()
        rig.kv.close(rig.prefilled(text(kind, count), "A", wait=False).sequence)
        rig.ack("A")
        pages_in(manager.state.pools[0].prefix)
        gone.update(today)
        for other in range(6):
            prompt = text((other + asked) % 6, 5)
            [found] = rig.kv.explain(prompt, "A")
            missing = tuple(prompt[: found.cached_tokens + 16])
            if found.reason == "cached":
                assert found.cached_tokens == 80
            elif found.reason == "evicted":
                assert found.details["version"] <= gone[missing]
            if missing in today and missing[:-16] not in today:  # its place stayed where it was
                assert (found.reason, found.details) == ("evicted", {"version": today[missing]})
