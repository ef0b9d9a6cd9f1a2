"""Who may share a page: equal tenant, equal extra key, equal tokens up to the page's end, and written by every worker (rule 4)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.machine.commands import Open
from kvmanager.pages.prefix import PrefixIndex
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]


def one_pool(num_pages: int = 16, workers: int = 1) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("A", num_pages, page_size=16, workers=workers),))


def test_page_is_invisible_until_every_worker_has_written_it(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(workers=2))
    first, second = rig.workers["A"]
    opened = rig.kv.open(tokens(33), "A", chunk=33)
    assert rig.kv.open(tokens(33), "A", wait=False).cached_tokens == 0
    rig.write(opened.sequence, only=first)
    assert rig.kv.open(tokens(33), "A", wait=False).cached_tokens == 0
    rig.write(opened.sequence, only=second)
    found = rig.kv.open(tokens(33), "A")
    assert found.cached_tokens == 32
    assert rig.table(found.sequence) == rig.table(opened.sequence)[:2]


def test_partly_written_prompt_shares_its_written_pages_only(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    [worker] = rig.workers["A"]
    opened = rig.kv.open(tokens(48), "A", chunk=48)
    rig.kv.ack(worker, rig.version, ids=[opened.sequence], tokens=[31])
    assert rig.kv.open(tokens(48), "A", wait=False).cached_tokens == 16
    rig.kv.ack(worker, rig.version, ids=[opened.sequence], tokens=[32])
    assert rig.kv.open(tokens(48), "A").cached_tokens == 32


@pytest.mark.parametrize(
    ("count", "cached"),
    [(1, 0), (15, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32), (48, 32), (49, 48), (60, 48)],
)
def test_last_prompt_token_is_never_taken_from_the_cache(make_rig: MakeRig, count: int, cached: int) -> None:
    """Somebody has to compute its logits, and that takes at least one token to run."""
    rig = make_rig(one_pool())
    rig.prefilled(tokens(48), "A")
    opened = rig.kv.open(tokens(count), "A", chunk=100)
    assert (opened.cached_tokens, opened.length) == (cached, count)


@pytest.mark.parametrize("place", [0, 15, 16, 31])
def test_sharing_needs_every_token_up_to_the_end_of_the_page(make_rig: MakeRig, place: int) -> None:
    rig = make_rig(one_pool())
    rig.prefilled(tokens(40), "A")
    other = tokens(40)
    other[place] += 1
    assert rig.kv.open(other, "A").cached_tokens == place // 16 * 16


def test_pages_of_a_run_are_compared_to_the_last_token_not_only_found(make_rig: MakeRig) -> None:
    """A run of pages is one node; the search inside it must end at the first unequal token, wherever it is."""
    rig = make_rig(one_pool(num_pages=64))
    rig.prefilled(tokens(16 * 20 + 1), "A")
    for page in range(20):
        other = tokens(16 * 20 + 1)
        other[16 * page + 15] = 9999
        assert rig.kv.open(other, "A").cached_tokens == 16 * page


def test_equality_decides_where_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that all hash alike still find only what is equal."""

    class Colliding(bytes):
        def __hash__(self) -> int:
            return 7

        def __eq__(self, other: object) -> bool:
            return bytes.__eq__(self, other) is True

        def __getitem__(self, item: slice) -> Colliding:  # type: ignore[override]
            return Colliding(bytes.__getitem__(self, item))

        def __add__(self, other: bytes) -> Colliding:
            return Colliding(bytes.__add__(self, other))

    index = PrefixIndex(16, 16)
    texts = [Colliding(tokens(32, 100 * each).tobytes()) for each in range(5)]
    for number, text in enumerate(texts):
        index.publish(index.enter(b""), text, np.array([2 * number, 2 * number + 1], np.int32), 1, 0)
    for number, text in enumerate(texts):
        assert index.match(b"", text, 2).pages().tolist() == [2 * number, 2 * number + 1]
    assert index.match(b"", Colliding(tokens(32, 7).tobytes()), 2).pages().tolist() == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tenant": b"red"}, {"tenant": b"blue"}),
        ({"tenant": b"red"}, {}),
        ({"extra": b"lora-1"}, {"extra": b"lora-2"}),
        ({"tenant": b"ab", "extra": b"c"}, {"tenant": b"a", "extra": b"bc"}),  # a plain concatenation would take them for the same
        ({"tenant": b"ab"}, {"extra": b"ab"}),
    ],
    ids=["tenants", "tenant-and-none", "extras", "border-moved", "tenant-as-extra"],
)
def test_tenants_and_extras_never_share(make_rig: MakeRig, one: dict[str, bytes], other: dict[str, bytes]) -> None:
    rig = make_rig(one_pool())
    rig.prefilled(tokens(33), "A", **one)
    assert rig.kv.open(tokens(33), "A", **other).cached_tokens == 0
    assert rig.kv.open(tokens(33), "A", **one).cached_tokens == 32


def test_pools_never_share(make_rig: MakeRig) -> None:
    rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16))))
    rig.prefilled(tokens(33), "A")
    assert rig.kv.open(tokens(33), "B").cached_tokens == 0


def test_same_prompt_twice_at_once_becomes_one_copy_and_both_stay_valid(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    reply = rig.kv.step(opens=[Open(tokens(40), "A", chunk=40), Open(tokens(40), "A", chunk=40, wait=False)])
    one, two = (each.sequence for each in reply.opened)
    assert not set(rig.table(one)) & set(rig.table(two))
    rig.write(one, two)
    rig.tick()  # two that attach the same page at once cannot both be decided against an index that has neither
    assert rig.table(one)[:2] == rig.table(two)[:2]
    assert rig.table(one)[2] != rig.table(two)[2]
    assert rig.counts("A").quarantined == 2  # the spare copy: a step in flight may be reading it
    rig.ack("A")
    counts = rig.counts("A")
    assert (counts.used, counts.quarantined) == (4, 0)
    rig.kv.step(grow=[one, two], grow_counts=[20, 30])
    assert [rig.length(each) for each in (one, two)] == [60, 70]
    rig.kv.close(one)
    assert rig.counts("A").used == 5
    rig.kv.close(two)
    rig.ack("A")
    assert (rig.counts("A").cached, rig.counts("A").free) == (2, 14)


def test_decoded_tokens_are_shared_once_their_ids_are_known(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool())
    opened = rig.prefilled(tokens(10), "A")
    rig.kv.grow(opened.sequence, 10)
    rig.write(opened.sequence)
    assert rig.kv.open(tokens(20), "A").cached_tokens == 0
    rig.kv.append_tokens(opened.sequence, tokens(5, 10))
    assert rig.kv.open(tokens(20), "A", wait=False).cached_tokens == 0
    rig.kv.append_tokens(opened.sequence, tokens(5, 15))
    rig.tick()
    assert rig.kv.open(tokens(20), "A").cached_tokens == 16


def test_eviction_takes_leaves_first_and_the_oldest_first(make_rig: MakeRig) -> None:
    """A page in the middle of a prefix is worth nothing without those before it, and the longest unused goes first."""
    rig = make_rig(one_pool(num_pages=6))
    old, new = tokens(32, 0), tokens(32, 500)
    for prompt in (old, new):
        rig.kv.close(rig.prefilled(prompt, "A").sequence)
        rig.ack("A")
    assert rig.counts("A").cached == 4
    rig.kv.open(tokens(48, 900), "A", chunk=48)  # two free pages, one from the end of the oldest
    state = rig.state
    assert state.pool("A").counts().cached == 3
    namespace = b"\0\0\0\0"
    assert [len(state.pool("A").prefix.match(namespace, each.tobytes(), 9).pages()) for each in (old, new)] == [1, 2]
    rig.kv.open(tokens(16, 950), "A", chunk=16)
    state = rig.state
    assert [len(state.pool("A").prefix.match(namespace, each.tobytes(), 9).pages()) for each in (old, new)] == [0, 2]


def test_use_makes_a_cached_prefix_young_again(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    for prompt in (tokens(32, 0), tokens(32, 500)):
        rig.kv.close(rig.prefilled(prompt, "A").sequence)
    rig.kv.close(rig.kv.open(tokens(33, 0), "A").sequence)  # the older one is asked for
    rig.ack("A")
    rig.kv.open(tokens(32, 900), "A", chunk=32)
    prefix = rig.state.pool("A").prefix
    assert len(prefix.match(b"\0\0\0\0", tokens(32, 0).tobytes(), 9).pages()) == 2
    assert len(prefix.match(b"\0\0\0\0", tokens(32, 500).tobytes(), 9).pages()) == 0


def test_page_in_use_is_never_evicted(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    opened = rig.prefilled(tokens(33), "A")
    for _ in range(3):
        rig.ack("A")
        reply = rig.kv.step(opens=[Open(tokens(32, 900), "A", chunk=32)])
        assert reply.error("open", 0).code == "out_of_pages"
    assert rig.kv.open(tokens(33), "A").cached_tokens == 32
    assert len(rig.table(opened.sequence)) == 3


def test_pages_that_a_step_shares_are_not_evicted_by_the_same_step(make_rig: MakeRig) -> None:
    rig = make_rig(one_pool(num_pages=4))
    rig.kv.close(rig.prefilled(tokens(32), "A").sequence)
    rig.ack("A")
    reply = rig.kv.step(opens=[Open(tokens(33), "A"), Open(tokens(64, 900), "A", chunk=48)])
    assert reply.opened[0].cached_tokens == 32
    assert reply.error("open", 1).code == "out_of_pages"
