"""Extra keys of token ranges (an image hash, an adapter): pages are shared only up to where they begin to differ (rule 4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, TooMany
from kvmanager.machine.commands import Open
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.manager import KVManager
from kvmanager.pages.extras import describe
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
PAGE = 16
IMAGE = 7  # what stands for every patch of every image


def one_pool(num_pages: int = 32, **more: int) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=PAGE),), **more)


def with_image(before: int = 20, patches: int = 40, after: int = 10) -> np.ndarray:
    return np.concatenate([tokens(before, 100), np.full(patches, IMAGE, np.int32), tokens(after, 300)])


def test_text_before_the_image_is_shared_and_the_image_is_not(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    prompt = with_image(before=36)
    first = rig.prefilled(prompt, "A", extras=[(b"cat", 36, 76)])
    other = rig.kv.open(prompt, "A", extras=[(b"dog", 36, 76)])
    assert other.cached_tokens == 32
    assert rig.table(other.sequence) == rig.table(first.sequence)[:2]
    assert rig.kv.open(prompt, "A").cached_tokens == 32


def test_same_image_at_the_same_place_is_shared_to_the_end(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    prompt = with_image()
    rig.prefilled(prompt, "A", extras=[(b"cat", 20, 60)])
    assert rig.kv.open(prompt, "A", extras=[(b"cat", 20, 60)]).cached_tokens == 64


@pytest.mark.parametrize(
    "extras",
    [
        [],
        [(b"cat", 20, 59)],
        [(b"cat", 21, 60)],
        [(b"cat2", 20, 60)],
        [(b"cat", 20, 40), (b"cat", 40, 60)],
        [(b"cat", 20, 60), (b"cat", 20, 60)],
        [(b"cat", 20, 60), (b"lora", 21, 60)],
    ],
    ids=["none", "shorter", "later", "other key", "in two", "twice", "one more"],
)
def test_whatever_differs_in_an_extra_key_is_not_shared(make_rig: MakeRig, extras: list[tuple[bytes, int, int]]) -> None:
    rig = make_rig(one_pool())
    prompt = with_image()
    rig.prefilled(prompt, "A", extras=[(b"cat", 20, 60)])
    assert rig.kv.open(prompt, "A", extras=extras).cached_tokens == 16


def test_order_of_the_ranges_does_not_matter(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    keys = [(b"cat", 20, 60), (b"adapter", 5, 70)]
    rig.prefilled(with_image(), "A", extras=keys)
    assert rig.kv.open(with_image(), "A", extras=keys[::-1]).cached_tokens == 64


def test_key_of_one_tenant_says_nothing_to_another(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    rig.prefilled(with_image(), "A", tenant=b"red", extras=[(b"cat", 20, 60)])
    assert rig.kv.open(with_image(), "A", tenant=b"blue", extras=[(b"cat", 20, 60)]).cached_tokens == 0


def test_decoded_tokens_after_an_image_are_shared_in_the_next_turn(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    prompt = with_image(after=4)  # 64 tokens
    opened = rig.prefilled(prompt, "A", extras=[(b"cat", 20, 60)])
    rig.kv.grow(opened.sequence, PAGE)
    rig.kv.append_tokens(opened.sequence, tokens(PAGE, 900))
    rig.write(opened.sequence)
    rig.kv.close(opened.sequence)
    turn = np.concatenate([prompt, tokens(PAGE + 1, 900)])
    assert rig.kv.open(turn, "A", extras=[(b"cat", 20, 60)]).cached_tokens == 80
    assert rig.kv.open(turn, "A", extras=[(b"dog", 20, 60)]).cached_tokens == 16


def test_equal_images_of_one_step_wait_for_each_other_and_others_do_not(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    asked = [Open(with_image(), "A", extras=[(key, 20, 60)], chunk=100) for key in (b"cat", b"cat", b"dog")]
    reply = rig.kv.step(opens=asked)
    assert [each is not None for each in reply.opened] == [True, False, False]
    assert [each.error.details["tokens"] for each in reply.refused] == [64, 16]  # of the dog's prompt the cat's has the text alone
    assert rig.kv.open(with_image(), "A", extras=[(b"dog", 20, 60)], wait=False).cached_tokens == 0


def test_meanings_go_with_their_last_user(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=5))
    opened = rig.prefilled(with_image(), "A", extras=[(b"cat", 20, 60)])
    assert len(rig.state.extras.uses) == 1
    rig.kv.close(opened.sequence)
    assert len(rig.state.extras.uses) == 1  # cached still
    rig.ack("A")
    rig.kv.open(tokens(80, 5000), "A", chunk=80)
    assert not rig.state.extras.uses
    assert not rig.state.extras.ids


def test_a_key_whose_last_user_goes_in_the_step_that_opens_the_next(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    keys = [(b"cat", 20, 60)]
    opened = rig.kv.open(with_image(), "A", extras=keys)
    reply = rig.kv.step(close=[opened.sequence], opens=[Open(with_image(), "A", extras=keys)])
    assert reply.opened[0] is not None
    rig.write(rig.kv.open(with_image(), "A", extras=keys, chunk=100, wait=False).sequence)
    assert rig.kv.open(with_image(), "A", extras=keys).cached_tokens == 64


def test_truncated_and_forked_sequences_keep_their_keys(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    opened = rig.prefilled(with_image(), "A", extras=[(b"cat", 20, 60)])
    [child] = rig.kv.fork(opened.sequence, 1)
    rig.write(child)
    assert list(rig.state.extras.uses.values()) == [3]  # two sequences and a page
    rig.kv.step(truncate=[(opened.sequence, 20)])  # the image's first token goes
    assert list(rig.state.extras.uses.values()) == [2]
    rig.kv.close(child)
    assert rig.kv.open(with_image(), "A", extras=[(b"cat", 20, 60)]).cached_tokens == 64


def test_pin_and_waiting_prompt_name_the_keys_too(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=32))
    keys = [(b"cat", 20, 60)]
    opened = rig.prefilled(with_image(), "A", extras=keys)
    rig.kv.close(opened.sequence)
    rig.ack("A")
    assert rig.kv.pin(with_image(), "A", extras=[(b"dog", 20, 60)]).tokens == 16
    assert rig.kv.pin(with_image(), "A", extras=keys).tokens == 64
    waiting = rig.kv.enqueue(with_image(), "A", extras=keys)
    assert list(rig.state.extras.uses.values()) == [2]
    assert rig.kv.open(with_image(), "A", extras=keys, waiting=waiting).cached_tokens == 64


def test_explain_knows_the_keys(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    rig.prefilled(with_image(), "A", extras=[(b"cat", 20, 60)])
    for extras, cached, reason in (([(b"cat", 20, 60)], 64, "cached"), ([(b"dog", 20, 60)], 16, "diverges"), ([], 16, "diverges")):
        [found] = rig.kv.explain(with_image(), "A", extras=extras)
        assert (found.cached_tokens, found.reason) == (cached, reason)
        assert reason == "cached" or found.details == {"at": 20}


def test_table_of_keys_is_bounded(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(extras_max=2))
    for key in (b"one", b"two"):
        rig.kv.open(with_image(), "A", extras=[(key, 0, 1)])
    with pytest.raises(TooMany, match="extra keys: expected at most 2"):
        rig.kv.open(with_image(), "A", extras=[(b"three", 0, 1)])
    assert rig.kv.open(with_image(), "A", extras=[(b"two", 0, 1)], wait=False).sequence


@pytest.mark.parametrize(
    "extras",
    [
        "cat",
        [b"cat"],
        [(b"cat", 0)],
        [(b"cat", 0, 0)],
        [(b"cat", 5, 4)],
        [(b"cat", -1, 4)],
        [(b"cat", 60, 71)],
        [(b"cat", True, 4)],
        [(7, 0, 4)],
        [(b"", 0, 4)],
        [(b"x" * 257, 0, 4)],
        [(b"cat", 0, 4)] * 1025,
    ],
)
def test_malformed_ranges_are_refused_by_name(extras: object) -> None:
    with pytest.raises(InvalidValue, match=r"open\.extras"):
        Open(with_image(), "A", extras=extras)


RANGES = st.lists(
    st.tuples(st.sampled_from([b"a", b"b", b"ab"]), st.integers(0, 9), st.integers(1, 4)).map(lambda it: (it[0], it[1], it[1] + it[2])),
    max_size=4,
)


@given(RANGES, RANGES, st.lists(st.integers(0, 1), min_size=14, max_size=14), st.lists(st.integers(0, 1), min_size=14, max_size=14))
def test_descriptions_are_equal_only_for_equal_keys_and_tokens(one: list, other: list, some: list, more: list) -> None:
    left, right = describe(np.array(some), sorted(one)), describe(np.array(more), sorted(other))
    same = sorted(one) == sorted(other) and all(some[start] == more[start] for _, start, _ in one)
    assert (left == right) == same


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_users_of_keys_share_what_they_should(data: st.DataObject) -> None:
    """Against the plain definition: pages agree while tokens agree and so do the ranges that begin in them."""
    config = ManagerConfig(pools=(PoolConfig("A", 64, page_size=4),), extras_max=64, inflight_wait_ms=0)
    kv = KVManager(config, clock=lambda: 0, checked=True)
    worker = kv.join("w", "A", "bf16")
    cached: list[tuple[list[int], list[tuple[bytes, int, int]]]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.lists(st.integers(0, 1), min_size=14, max_size=14))
        keys = sorted(data.draw(RANGES))
        opened = kv.open(prompt, "A", extras=keys, chunk=100)

        def agree(other: tuple[list[int], list[tuple[bytes, int, int]]], prompt: list[int] = prompt, keys: list = keys) -> int:
            pages = 0
            while pages < 3:
                stop = 4 * (pages + 1)
                if other[0][:stop] != prompt[:stop] or [k for k in other[1] if k[1] < stop] != [k for k in keys if k[1] < stop]:
                    break
                pages += 1
            return pages

        assert opened.cached_tokens == 4 * max((agree(each) for each in cached), default=0)
        kv.ack(worker, kv.state.version, ids=[opened.sequence], tokens=[14])
        kv.close(opened.sequence)
        cached.append((prompt, keys))
        again = load_snapshot(config, snapshot(kv.state))
        assert state_digest(again) == state_digest(kv.state)
        assert again.extras.uses == kv.state.extras.uses
