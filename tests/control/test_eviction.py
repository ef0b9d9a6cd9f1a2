"""Which cached pages give way: priorities, least recent use, the waiting queue; against a model made of lists, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmanager import Enqueue, KVManager, ManagerConfig, Open, PoolConfig
from kvmanager.errors import InvalidValue, KVError, OutOfPages, TooMany, Unknown
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.pages.eviction import PRIORITY_MAX, PRIORITY_MIN
from tests.control.conftest import Rig

PAGE = 16
Path = tuple[int, ...]  # a page and everything before it: one number a page


def text(*pages: int) -> list[int]:
    """Whole pages of one token id each, and one token more: the last is never taken from the cache."""
    return [number for number in pages for _ in range(PAGE)] + [9]


def small(pages: int = 8, **more: Any) -> ManagerConfig:
    return ManagerConfig(pools=(PoolConfig("p", pages, page_size=PAGE),), **more)


@dataclass
class Cache:
    """What is cached, as a list in order of use, oldest first. A page goes if nothing cached continues it."""

    order: list[Path] = field(default_factory=list)  # nobody holds these
    held: list[list[Path]] = field(default_factory=list)
    priority: dict[Path, int] = field(default_factory=dict)
    queue: list[tuple[int, list[Path]]] = field(default_factory=list)
    pages: dict[int, Path] = field(default_factory=dict)

    def rank(self, path: Path) -> int | None:
        """Place in the queue of the nearest prompt that would use this page."""
        return next((place for place, (_, paths) in enumerate(self.queue) if path in paths), None)

    def victim(self) -> Path:
        held = {path for paths in self.held for path in paths}
        leaves = [path for path in self.order if not any(each[:-1] == path for each in [*self.order, *held])]
        free = [path for path in leaves if self.rank(path) is None]
        if free:
            return min(free, key=lambda path: self.priority[path])  # min gives the first of equals: the oldest
        return max(leaves, key=lambda path: self.rank(path) or 0)

    def evict(self, page: int) -> None:
        expected, got = self.victim(), self.pages.pop(page)
        assert got == expected, f"evicted {got}, the model {expected}; {self}"
        self.order.remove(got)
        del self.priority[got]

    def hold(self, paths: list[Path], priority: int) -> None:
        self.held.append(paths)
        self.order = [path for path in self.order if path not in paths]
        for path in paths:
            self.priority[path] = max(priority, self.priority.get(path, PRIORITY_MIN))

    def release(self, paths: list[Path]) -> None:
        self.held.remove(paths)
        self.order += [path for path in reversed(paths) if not any(path in each for each in self.held)]

    def dequeue(self, number: int) -> None:
        [(_, paths)] = [item for item in self.queue if item[0] == number]
        self.queue = [item for item in self.queue if item[0] != number]
        again = [path for path in reversed(paths) if path in self.order and self.rank(path) is None]
        self.order = [path for path in self.order if path not in again] + again


def paths_of(pages: list[int]) -> list[Path]:
    return [tuple(pages[: count + 1]) for count in range(len(pages))]


PROMPTS = st.lists(st.integers(1, 3), min_size=1, max_size=4)
DAYS = st.lists(
    st.one_of(
        *[st.tuples(st.just("open"), PROMPTS, st.integers(-1, 1), st.booleans(), st.booleans())] * 3,
        st.tuples(st.just("close"), st.integers(0, 9)),
        st.tuples(st.just("enqueue"), PROMPTS, st.booleans()),
        st.tuples(st.just("dequeue"), st.integers(0, 9)),
        st.tuples(st.just("reload")),
    ),
    min_size=20,
    max_size=60,
)


@settings(deadline=None, max_examples=300)
@given(day=DAYS)
def test_pages_go_in_the_order_of_the_model(day: list[tuple[Any, ...]]) -> None:
    """Priority, then least recent use; what waiting prompts would use last, the farthest first; children before parents. Exactly."""
    config = small(7)
    kv = KVManager(config, clock=lambda: 0, checked=True)
    worker = kv.join("w", "p", "bf16")
    cache, opened, waiting = Cache(), {}, {}

    def follow(batch: EventBatch, data: bytes) -> None:
        for event in batch.events:
            if isinstance(event, ev.PagesEvicted):
                for page in event.pages.tolist():
                    cache.evict(page)

    kv.subscribe(follow)
    for action, *rest in day:
        if action == "open":
            pages, priority, from_queue, stays = rest
            waiter = next((number for number, each in waiting.items() if each == pages), 0) if from_queue else 0
            matched = [path for path in paths_of(pages) if path in cache.pages.values()]
            kept, cache.held = cache.held, [*cache.held, matched]  # what it shares is not evicted for it
            order, cache.order = cache.order, [path for path in cache.order if path not in matched]
            try:
                made = kv.open(text(*pages), "p", chunk=1 << 20, priority=priority, waiting=waiter, wait=False)
            except OutOfPages:
                cache.held, cache.order = kept, order
                continue
            cache.held = kept
            cache.order = [path for path in order if path in cache.pages.values()]
            assert made.cached_tokens == len(matched) * PAGE
            if waiter:
                cache.hold(matched, priority)
                cache.dequeue(waiter)
                cache.held.remove(matched)
                del waiting[waiter]
            table = kv.state.tables.pages_of(made.sequence).tolist()
            kv.ack(worker, kv.state.version, ids=[made.sequence], tokens=[made.length])
            cache.pages.update(zip(kv.state.tables.pages_of(made.sequence).tolist(), paths_of(pages), strict=False))
            assert len(table) == len(pages) + 1
            cache.hold(paths_of(pages), priority)
            opened[made.sequence] = pages
            if not stays:
                kv.close(made.sequence)
                cache.release(paths_of(opened.pop(made.sequence)))
        elif action == "close" and opened:
            sequence = list(opened)[rest[0] % len(opened)]
            kv.close(sequence)
            cache.release(paths_of(opened.pop(sequence)))
        elif action == "enqueue":
            number = kv.enqueue(text(*rest[0]), "p", front=rest[1])
            cache.queue.insert(0 if rest[1] else len(cache.queue), (number, paths_of(rest[0])))
            waiting[number] = rest[0]
        elif action == "dequeue" and waiting:
            number = list(waiting)[rest[0] % len(waiting)]
            kv.dequeue(number)
            cache.dequeue(number)
            del waiting[number]
        elif action == "reload":
            digest = state_digest(kv.state)
            kv.state = load_snapshot(config, snapshot(kv.state))
            assert state_digest(kv.state) == digest
        kv.ack(worker, kv.state.version)
        counts = kv.state.pool("p").counts()
        assert counts.cached == len(cache.order)


# --- by hand, on both surfaces ---------------------------------------------------------------------------------------------------


def finished(rig: Rig, *pages: int, **more: Any) -> None:
    """A prompt that was computed and closed: its pages are cached and may be evicted."""
    opened = rig.prefilled(text(*pages), "p", **more)
    rig.kv.close(opened.sequence)
    rig.ack("p")


def cached(rig: Rig, *pages: int) -> int:
    """How many leading pages of a prompt are cached."""
    state = rig.state
    data = np.array(text(*pages), "<i4").tobytes()
    return state.pool("p").prefix.match(b"\0\0\0\0", data, len(pages)).page_count()


@pytest.fixture
def rig(make_rig: Callable[[ManagerConfig], Rig]) -> Rig:
    return make_rig(small(6))


def test_lower_priorities_go_first_whatever_was_used_last(rig: Rig) -> None:
    """FEATURES.md b, priority per request."""
    finished(rig, 1, priority=1)
    finished(rig, 2)
    finished(rig, 3, priority=-1)
    rig.kv.open([9] * 4 * PAGE, "p", chunk=1 << 20)
    assert [cached(rig, each) for each in (1, 2, 3)] == [1, 1, 0]


def test_a_page_keeps_the_highest_priority_that_anyone_gave(rig: Rig) -> None:
    """An opener of low priority that passes by must not throw away what another one wanted to keep."""
    finished(rig, 1, priority=3)
    finished(rig, 2)
    finished(rig, 1, priority=-3)
    rig.kv.open([9] * 5 * PAGE, "p", chunk=1 << 20)
    assert [cached(rig, each) for each in (1, 2)] == [1, 0]


def test_a_parent_is_kept_by_a_child_of_higher_priority(rig: Rig) -> None:
    finished(rig, 1, 2)
    finished(rig, 1, 2, 3, priority=5)
    finished(rig, 4)
    rig.kv.open([9] * 3 * PAGE, "p", chunk=1 << 20)
    assert cached(rig, 1, 2, 3) == 3
    assert cached(rig, 4) == 0


def test_pages_that_waiting_prompts_would_use_are_spared(rig: Rig) -> None:
    """FEATURES.md, demand 4: nobody has it."""
    finished(rig, 1, 2)
    finished(rig, 3)
    rig.kv.enqueue(text(1, 5), "p")
    rig.kv.open([9] * 5 * PAGE, "p", chunk=1 << 20)
    assert cached(rig, 1) == 1
    assert cached(rig, 3) == 0


def test_pages_that_are_published_later_are_spared_too(rig: Rig) -> None:
    """Two waiting requests share a new prefix: the first computes it, and it must be there for the second."""
    rig.kv.enqueue(text(1, 2, 5), "p")
    finished(rig, 1, 2, 7)
    finished(rig, 3)
    rig.kv.open([9] * 4 * PAGE, "p", chunk=1 << 20)
    assert cached(rig, 1, 2, 7) == 2
    assert cached(rig, 3) == 0


def test_the_hint_is_no_promise_the_farthest_go_first(rig: Rig) -> None:
    """A full queue refuses nobody."""
    finished(rig, 1)
    finished(rig, 2)
    rig.kv.enqueue(text(1), "p")
    rig.kv.enqueue(text(2), "p")
    rig.kv.open([9] * 5 * PAGE, "p", chunk=1 << 20)
    assert [cached(rig, each) for each in (1, 2)] == [1, 0]


def test_front_of_the_queue(rig: Rig) -> None:
    """A preempted request comes back before all others."""
    finished(rig, 1)
    finished(rig, 2)
    rig.kv.enqueue(text(1), "p")
    rig.kv.enqueue(text(2), "p", front=True)
    rig.kv.open([9] * 5 * PAGE, "p", chunk=1 << 20)
    assert [cached(rig, each) for each in (1, 2)] == [0, 1]


def test_an_open_takes_its_prompt_out_of_the_queue(rig: Rig) -> None:
    waiting = rig.kv.enqueue(text(1), "p")
    assert list(rig.state.waiting) == [waiting]
    rig.kv.open(text(1), "p", waiting=waiting)
    assert not rig.state.waiting
    rig.kv.open(text(2), "p", waiting=waiting)  # a hint that is gone is no reason to refuse anything


def test_a_refused_open_goes_on_waiting(rig: Rig) -> None:
    waiting = rig.kv.enqueue(text(1, 2, 3), "p")
    rig.kv.open([9] * 5 * PAGE, "p", chunk=1 << 20)
    with pytest.raises(OutOfPages):
        rig.kv.open(text(1, 2, 3), "p", chunk=1 << 20, waiting=waiting)
    assert list(rig.state.waiting) == [waiting]


def test_other_tenants_pages_are_not_spared(rig: Rig) -> None:
    finished(rig, 1)
    finished(rig, 2)
    rig.kv.enqueue(text(1), "p", tenant=b"other")
    rig.kv.open([9] * 5 * PAGE, "p", chunk=1 << 20)
    assert [cached(rig, each) for each in (1, 2)] == [0, 1]


def test_a_prompt_for_a_group_spares_its_pages_in_each_pool(make_rig: Callable[[ManagerConfig], Rig]) -> None:
    pools = tuple(PoolConfig(name, 4, page_size=PAGE, group="g") for name in "pq")
    rig = make_rig(ManagerConfig(pools=pools))
    for pool in "pq":
        for page in (1, 2):
            rig.kv.close(rig.prefilled(text(page), pool).sequence)
        rig.ack(pool)
    rig.kv.enqueue(text(1), group="g")
    for pool in "pq":
        rig.kv.open([9] * 3 * PAGE, pool, chunk=1 << 20)
        state = rig.state
        left = [state.pool(pool).prefix.match(b"\0\0\0\0", np.array(text(page), "<i4").tobytes(), 1).page_count() for page in (1, 2)]
        assert left == [1, 0]


def test_the_queue_is_bounded_in_prompts_and_in_tokens(make_rig: Callable[[ManagerConfig], Rig]) -> None:
    rig = make_rig(small(waiting_max=2, waiting_tokens_max=40))
    reply = rig.kv.step(enqueue=[Enqueue([1] * 10, "p"), Enqueue([1] * 31, "p"), Enqueue([1] * 30, "p"), Enqueue([1], "p")])
    first, _, second, _ = reply.queued
    assert [bool(each) for each in reply.queued] == [True, False, True, False]
    assert [type(item.error) for item in reply.refused] == [TooMany, TooMany]
    assert rig.kv.step(dequeue=[first], enqueue=[Enqueue([1] * 10, "p")]).queued[0] > second


def test_step_takes_prompts_out_before_it_puts_others_in(rig: Rig) -> None:
    first = rig.kv.enqueue([1], "p")
    reply = rig.kv.step(dequeue=[first, first, 77], enqueue=[Enqueue([2], "p"), Enqueue([3], "nowhere")])
    assert [(item.kind, item.index, type(item.error)) for item in reply.refused] == [
        ("dequeue", 1, Unknown),
        ("dequeue", 2, Unknown),
        ("enqueue", 1, Unknown),
    ]
    assert list(rig.state.waiting) == [reply.queued[0]]


def test_lost_memory_leaves_the_queue_as_it_is(rig: Rig) -> None:
    """The prompts still wait; what they would have used has to be computed again, and is spared again then."""
    finished(rig, 1, 2)
    waiting = rig.kv.enqueue(text(1, 2), "p")
    rig.die(rig.workers["p"][0])
    rig.workers["p"] = [rig.kv.join("w", "p", "bf16")]
    assert list(rig.state.waiting) == [waiting]
    finished(rig, 1, 2)
    finished(rig, 3)
    rig.kv.open([9] * 4 * PAGE, "p", chunk=1 << 20)
    assert cached(rig, 1, 2) == 2


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Open([1], "p", priority=PRIORITY_MAX + 1), "open.priority"),
        (lambda: Open([1], "p", priority=PRIORITY_MIN - 1), "open.priority"),
        (lambda: Open([1], "p", priority=True), "open.priority"),
        (lambda: Open([1], "p", waiting=-1), "open.waiting"),
        (lambda: Enqueue([], "p"), "enqueue.tokens"),
        (lambda: Enqueue([-1], "p"), "enqueue.tokens"),
        (lambda: Enqueue([1]), "enqueue.pool"),
        (lambda: Enqueue([1], "p", group="g"), "enqueue.group"),
        (lambda: Enqueue([1], "p", tenant=b"x" * 300), "enqueue.tenant"),
        (lambda: Enqueue([1], "p", front=1), "enqueue.front"),
    ],
)
def test_malformed_values_name_their_field(make: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        make()
    assert caught.value.field == field


def test_too_long_a_prompt_does_not_wait(make_rig: Callable[[ManagerConfig], Rig]) -> None:
    rig = make_rig(small(sequence_tokens_max=20))
    with pytest.raises(KVError, match="at most 20 tokens, got 21"):
        rig.kv.enqueue([1] * 21, "p")
