"""Matching below a page: the tokens that agree are copied, equality decides, and the source is safe until everybody has copied it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.commands import Open
from kvmanager.manager import KVManager
from kvmanager.pages.neighbours import Neighbours, agreement
from kvmanager.pages.prefix import Node
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def one_pool(num_pages: int = 16, least: int = 1) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=16, partial_match=least),), lease_ms=1000)


def prompt(common: int, own: int, first: int = 5000) -> np.ndarray:
    """`common` tokens of the document that begins at 0, then `own` others."""
    return np.append(tokens(common), tokens(own, first))


@pytest.mark.parametrize("common", [1, 15, 16, 17, 31, 32, 40, 47])
def test_prompt_goes_on_where_it_stops_to_agree(make_rig: MakeRig, common: int) -> None:
    rig = make_rig(one_pool())
    rig.kv.close(rig.prefilled(tokens(48), "A").sequence)
    opened = rig.kv.open(prompt(common, 30), "A", chunk=4)
    assert (opened.cached_tokens, opened.length) == (common, common + 4)
    assert rig.kv.stats()["pools"]["A"]["tokens_copied"] == common % 16
    rig.kv.grow(opened.sequence, 20)
    assert rig.length(opened.sequence) == common + 24


def test_the_last_token_of_a_prompt_is_never_copied_either(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    rig.kv.close(rig.prefilled(tokens(48), "A").sequence)
    for count in (1, 8, 17, 48):
        assert rig.kv.open(tokens(count), "A", wait=False).cached_tokens == count - 1


def test_pools_that_do_not_ask_for_it_share_whole_pages_only(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(least=0))
    rig.kv.close(rig.prefilled(tokens(48), "A").sequence)
    assert rig.kv.open(prompt(40, 8), "A").cached_tokens == 32
    assert rig.kv.stats()["pools"]["A"]["tokens_copied"] == 0


@pytest.mark.parametrize(("common", "cached"), [(36, 32), (37, 37)])
def test_too_short_an_agreement_is_not_worth_a_copy(make_rig: MakeRig, common: int, cached: int) -> None:
    rig = make_rig(one_pool(least=5))
    rig.kv.close(rig.prefilled(tokens(48), "A").sequence)
    assert rig.kv.open(prompt(common, 30), "A").cached_tokens == cached


def test_the_page_that_agrees_furthest_is_found_among_many(make_rig: MakeRig) -> None:
    """All begin with the same system prompt of less than a page."""
    rig = make_rig(one_pool(num_pages=64))
    for own in range(20):
        rig.kv.close(rig.prefilled(np.append(prompt(3 + own % 7, 1, 1000 * own + 7), tokens(20, 100 * own)), "A").sequence)
        rig.ack("A")
    assert rig.kv.open(prompt(9, 30), "A").cached_tokens == 9
    assert rig.kv.open(prompt(20, 30), "A").cached_tokens == 9
    assert rig.kv.open(np.append(prompt(4, 1, 1000 * 8 + 7), tokens(30, 800)), "A").cached_tokens == 16


@pytest.mark.parametrize("other", [{"tenant": b"red"}, {"extra": b"lora"}])
def test_tenants_and_extras_copy_nothing_from_each_other(make_rig: MakeRig, other: dict[str, bytes]) -> None:
    rig = make_rig(one_pool())
    rig.kv.close(rig.prefilled(tokens(48), "A").sequence)
    assert rig.kv.open(prompt(40, 8), "A", **other).cached_tokens == 0
    rig.prefilled(tokens(32), "A", wait=False, **other)
    assert rig.kv.open(prompt(20, 8), "A", wait=False, **other).cached_tokens == 20


def test_source_is_not_evicted_before_all_workers_have_copied_it(make_rig: MakeRig) -> None:
    """Not in the step that asks for the copy, and not later until that step is acknowledged: it counts as used just now."""
    rig = make_rig(one_pool(num_pages=4))
    rig.kv.close(rig.prefilled(tokens(32), "A").sequence)
    rig.ack("A")
    reply = rig.kv.step(opens=[Open(prompt(20, 5), "A", chunk=1), Open(tokens(32, 900), "A", chunk=32)])
    assert reply.opened[0].cached_tokens == 20
    assert reply.error("open", 1).code == "out_of_pages"
    reply = rig.kv.step(opens=[Open(tokens(32, 900), "A", chunk=32)])
    assert reply.error("open", 0).code == "out_of_pages"
    rig.ack("A")
    assert rig.kv.open(tokens(32, 900), "A", chunk=32).length == 32


def test_page_that_this_step_evicts_is_not_copied_from(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    rig.kv.close(rig.prefilled(tokens(32), "A").sequence)
    rig.ack("A")
    reply = rig.kv.step(opens=[Open(tokens(48, 900), "A", chunk=48), Open(prompt(31, 1), "A")])
    assert reply.opened[0].length == 48
    assert reply.opened[1].cached_tokens == 16  # one page is left of it, and no page is free for a copy


def test_prompt_that_finds_no_page_for_the_copy_does_without(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=3))
    rig.prefilled(tokens(48), "A")
    rig.kv.step()
    opened = rig.kv.open(prompt(40, 3), "A")
    assert (opened.cached_tokens, opened.length) == (32, 32)


def test_copied_tokens_count_as_written_once_acknowledged_and_become_shareable(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    rig.kv.close(rig.prefilled(tokens(32), "A").sequence)
    opened = rig.kv.open(prompt(20, 12), "A", chunk=40)
    [written] = rig.state.sequences[opened.sequence].written.values()
    assert written == 16
    rig.write(opened.sequence)
    rig.kv.step()
    assert rig.kv.open(prompt(20, 13), "A").cached_tokens == 32
    assert rig.kv.open(tokens(33), "A").cached_tokens == 32


def test_the_copy_is_an_instruction_of_the_step_and_survives_nothing_else() -> None:
    manager = KVManager(one_pool(), checked=True)
    worker = manager.join("A0", "A", "bf16")
    first = manager.open(tokens(32), "A", chunk=32).sequence
    manager.ack(worker, manager.state.version, ids=[first], tokens=[32])
    seen: list[EventBatch] = []
    manager.subscribe(lambda batch, data: seen.append(batch))
    opened = manager.open(prompt(20, 5), "A")
    [copied] = [event for event in seen[0].events if isinstance(event, ev.PagesCopied)]
    source, target = int(manager.state.tables.pages_of(first)[1]), int(manager.state.tables.pages_of(opened.sequence)[1])
    assert (copied.sources.tolist(), copied.targets.tolist(), copied.tokens.tolist()) == ([source], [target], [4])


def test_threshold_is_checked() -> None:
    with pytest.raises(InvalidValue, match=r"pool\.partial_match"):
        PoolConfig("A", 4, partial_match=-1)


keys = st.lists(st.integers(0, 3), min_size=6, max_size=6)


@settings(deadline=None)
@given(st.lists(keys, unique_by=tuple, max_size=40), st.lists(st.integers(0, 3), max_size=6), st.data())
def test_neighbours_agree_furthest(children: list[list[int]], wanted: list[int], data: st.DataObject) -> None:
    """Against a scan of all, with some taken away again; token ids of several bytes, so that their order as bytes is not their own."""
    node, neighbours = Node(None, b"", b""), Neighbours()
    spread = np.array([1, 258, 65_536, 70_000], "<i4")
    packed = [spread[key].tobytes() for key in children]
    for key in packed:
        neighbours.add(node, key)
    gone = data.draw(st.lists(st.sampled_from(packed), unique=True)) if packed else []
    for key in gone:
        neighbours.remove(node, key)
    left = [key for key in packed if key not in gone]
    rest = spread[wanted].tobytes()
    best = max(
        (next((n for n in range(len(wanted)) if key[4 * n : 4 * n + 4] != rest[4 * n : 4 * n + 4]), len(wanted)) for key in left), default=0
    )
    assert max((agreement(key, rest) for key in neighbours.near(node, rest)), default=0) == best
    assert (node in neighbours.keys) == bool(left)
