"""A dry run says what a step would come to: it is decided by the same code, changes nothing, and the step that follows agrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import BadMessage, InvalidValue, OutOfPages, PoolNotReady, PrefixPending, SequenceTooLarge, Unknown
from kvmanager.machine.commands import Open, Step
from kvmanager.machine.events import PagesEvicted
from kvmanager.manager import KVManager
from tests.control.conftest import Clock, Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(
    pools=(PoolConfig("A", 8, page_size=16, group="dp"), PoolConfig("B", 6, page_size=16, group="dp"), PoolConfig("X", 4, page_size=16)),
    batch_max=16,
)


def test_it_names_pool_cached_tokens_and_pages_and_changes_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    rig.kv.close(rig.prefilled(tokens(40), "A").sequence)
    before = rig.kv.snapshot()
    found = rig.kv.dry_run(opens=[Open(tokens(64), group="dp", chunk=20), Open(tokens(20, 500), "B"), Open(tokens(17, 500), "B")])
    assert [(each.pool, each.cached_tokens, each.expected_tokens, each.pages, each.evicted, each.fits) for each in found.opens] == [
        ("A", 32, 0, 2, 0, True),
        ("B", 0, 0, 0, 0, True),
        ("B", 0, 16, 0, 0, False),
    ]
    assert isinstance(found.opens[2].error, PrefixPending) and found.error("open", 2) is found.opens[2].error
    assert found.error("open", 0) is None and not found.evicted
    assert rig.kv.snapshot() == before


def test_it_names_whom_it_would_evict(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    for first in (0, 1000):
        rig.kv.close(rig.prefilled(tokens(48, first), "A").sequence)
    rig.ack("A")
    assert rig.counts("A").cached == 6
    oldest = rig.state.pools[0].prefix
    found = rig.kv.dry_run(opens=[Open(tokens(40, 5000), "A", chunk=40), Open(tokens(60, 6000), "A", chunk=60)])
    assert [(each.pages, each.evicted) for each in found.opens] == [(3, 1), (4, 4)]
    assert [(each.pool, len(each.pages), each.keeps, each.loses) for each in found.evicted] == [("A", 3, 0, 48), ("A", 2, 16, 32)]
    assert sorted(np.concatenate([each.pages for each in found.evicted]).tolist()) == sorted(
        page for node in list(oldest.order)[:2] for page in node.pages if page in np.concatenate([each.pages for each in found.evicted])
    )


def test_it_shows_growth_and_what_a_close_would_change(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    one, two = (rig.prefilled(tokens(30, 1000 * each), "X").sequence for each in range(2))
    found = rig.kv.dry_run(grow=[one, two, 77], grow_counts=[2, 40, 1])
    assert [(each.pages, type(each.error)) for each in found.grow] == [(0, type(None)), (0, SequenceTooLarge), (0, Unknown)]
    found = rig.kv.dry_run(grow=[one, two], grow_counts=[3, 3])
    assert [(each.pages, type(each.error)) for each in found.grow] == [(1, OutOfPages), (1, OutOfPages)]
    found = rig.kv.dry_run(opens=[Open(tokens(20), "X")], close=[one, 5])
    assert found.opens[0].cached_tokens == 16
    assert [(kind, index, type(error)) for kind, index, error in found.refused] == [("close", 1, Unknown)]


def test_repeated_growth_is_seen_too(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    some = [rig.prefilled(tokens(count, 1000 * count), "A").sequence for count in (15, 30, 31)]
    for pages in ([0, 0, 0], [1, 0, 1], [0, 1, 0]):
        assert [each.pages for each in rig.kv.dry_run(grow=some).grow] == pages
        rig.kv.step(grow=some)


def test_it_shows_the_refusal_of_what_cannot_be_placed(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    rig.die(rig.workers["X"][0])
    found = rig.kv.dry_run(opens=[Open([1], "X"), Open([1], "nowhere"), Open([1], group="none"), Open(tokens(200), "A")])
    assert [type(each.error) for each in found.opens] == [PoolNotReady, Unknown, Unknown, SequenceTooLarge]
    assert [each.pool for each in found.opens] == [""] * 4


# --- wrong use ---


def test_items_are_checked_as_those_of_a_step(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    with pytest.raises(InvalidValue, match=r"^step.grow: expected each sequence once"):
        rig.kv.dry_run(grow=[1, 1])
    with pytest.raises(InvalidValue, match=r"^step.grow: expected at most 16 items, got 17"):
        rig.kv.dry_run(grow=range(1, 18))
    with pytest.raises(TypeError, match="nonsense"):
        rig.kv.dry_run(nonsense=1)


@pytest.mark.parametrize(
    ("message", "error", "text"),
    [
        ({}, InvalidValue, "dry_run.step: expected a map, got NoneType"),
        ({"step": [1]}, InvalidValue, "dry_run.step: expected a map, got list"),
        ({"step": {"opens": [[1]]}}, InvalidValue, "step.opens: expected maps"),
        ({"step": {"opens": [{"pool": "A"}]}}, BadMessage, "tokens"),
        ({"step": {"grow": b"123"}}, InvalidValue, "step.grow: expected bytes in multiples of 8"),
        ({"step": {"t": "tick", "grow": "x"}}, InvalidValue, "step.grow"),
    ],
)
def test_a_bad_message_names_its_field(message: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        KVManager(CONFIG).query({"t": "dry_run", **message})


# --- the property ---


@st.composite
def steps(draw: Any) -> dict[str, Any]:
    """A step in terms of the n-th open sequence."""
    some = st.lists(st.integers(0, 7), max_size=3, unique=True)
    opens = st.builds(
        lambda group, pool, document, count, chunk, wait, priority: Open(
            tokens(count, 1000 * document), "" if group else pool, group="dp" if group else "", chunk=chunk, wait=wait, priority=priority
        ),
        st.booleans(),
        st.sampled_from(["A", "B", "X"]),
        st.integers(0, 2),
        st.integers(1, 120),
        st.sampled_from([0, 16, 40, 200]),
        st.booleans(),
        st.integers(-1, 1),
    )
    return {
        "opens": draw(st.lists(opens, max_size=4)),
        "grow": draw(some),
        "count": draw(st.sampled_from([1, 1, 16, 50])),
        "close": draw(some),
        "hand_off": draw(some),
        "acks": draw(st.booleans()),
        "victims": draw(st.booleans()),
    }


@settings(max_examples=150)
@given(st.lists(steps(), min_size=1, max_size=25))
def test_dry_run_then_step_gives_the_same_outcome(days: list[dict[str, Any]]) -> None:
    manager = KVManager(CONFIG, clock=Clock(), checked=True)
    rig = Rig(manager, CONFIG, Clock())
    evicted: list[int] = []
    manager.subscribe(
        lambda batch, data: evicted.extend(
            event.pool << 32 | page for event in batch.events if isinstance(event, PagesEvicted) for page in event.pages.tolist()
        )
    )
    for day in days:
        there = list(manager.state.sequences)

        def nth(numbers: list[int], there: list[int] = there) -> list[int]:
            return [there[each] if each < len(there) else 10**9 + each for each in numbers]

        items: dict[str, Any] = {name: day[name] for name in ("opens", "victims")}
        items |= {"grow": nth(day["grow"]), "grow_counts": [day["count"]] * len(day["grow"]), "close": nth(day["close"])}
        items["hand_off"] = [(each, "B") for each in nth(day["hand_off"])]
        found = manager.dry_run(**items)
        version = manager.state.version
        evicted.clear()
        reply = manager.step(**items)
        assert reply.version == version + 1
        assert [(each.kind, each.index, each.error.to_wire()) for each in reply.refused] == [
            (kind, index, error.to_wire()) for kind, index, error in found.refused
        ]
        names = [pool.name for pool in CONFIG.pools]
        assert sorted(evicted) == sorted(names.index(each.pool) << 32 | page for each in found.evicted for page in each.pages.tolist())
        assert [tuple(each) for each in reply.victims] == found.victims
        for asked, would, made in zip(items["opens"], found.opens, reply.opened, strict=True):
            assert would.fits == (made is not None)
            if made is not None:
                assert (would.pool, would.cached_tokens) == (made.pool, made.cached_tokens)
                assert would.pages == len(rig.table(made.sequence)) - made.cached_tokens // 16
                assert made.length == min(made.cached_tokens + asked.chunk, len(asked.tokens))
        for sequence, would in zip(items["grow"], found.grow, strict=True):
            if would.fits:
                assert manager.state.tables.length(sequence) > 0
        if day["acks"]:
            rig.write(*manager.state.sequences)


def test_a_step_is_what_a_dry_run_carries() -> None:
    """Whatever a step can hold, a dry run can."""
    manager = KVManager(CONFIG)
    empty = Step()
    found = manager.dry_run(**{name: getattr(empty, name) for name in (each.name for each in fields(Step) if each.init)})
    assert (found.opens, found.grow, found.evicted, found.refused, found.victims) == ([], [], [], [], [])
