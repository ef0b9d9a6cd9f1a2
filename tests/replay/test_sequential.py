"""Sequential replay is leaf-first LRU to the page: compared with a simulator of the rules that shares no code with the manager."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvmanager.replay.sequential import SequentialRun
from kvmanager.replay.traces import TracedRequest, read_trace
from tests.replay.conftest import WriteTrace, conversations, request

PAGE_SIZES = (1, 16, 100, 512, 1024)
Page = tuple[tuple[int, ...], int]


class NaiveCache:
    """The rules as a dict: a page is the ids of all blocks up to its end and its place; nothing is fast."""

    def __init__(self, capacity: int, page_size: int) -> None:
        self.capacity, self.page_size = capacity, page_size
        self.last_used: dict[Page, int] = {}
        self.now = self.evictions = 0

    def pages_of(self, request: TracedRequest) -> list[Page]:
        ids, size = request.blocks.tolist(), self.page_size
        return [(tuple(ids[: ((number + 1) * size - 1) // 512 + 1]), number) for number in range(request.input_length // size)]

    def serve(self, request: TracedRequest, queue: Sequence[TracedRequest] = ()) -> int:
        """Pages hit. Pages that the queue would use go last, those whose first user stands farthest back before the others."""
        self.now += 1
        own = self.pages_of(request)
        wanted: dict[Page, int] = {}
        for place, waiting in enumerate(queue):
            for key in self.pages_of(waiting):
                wanted.setdefault(key, place)

        def order(key: Page) -> tuple[int, ...]:
            return (1, -wanted[key], -key[1]) if key in wanted else (0, self.last_used[key], -key[1])

        hits = next((at for at, key in enumerate(own) if key not in self.last_used), len(own))
        self.last_used.update(dict.fromkeys(own, self.now))
        while len(self.last_used) > self.capacity:
            others = [key for key, used in self.last_used.items() if used != self.now]
            oldest = min(others, key=order)
            # By these rules it has nothing resident below it: whoever used or wants a page uses those above it, too.
            assert not any(key[1] == oldest[1] + 1 and key[0][: len(oldest[0])] == oldest[0] for key in self.last_used)
            del self.last_used[oldest]
            self.evictions += 1
        return hits


def hits_of(requests: Sequence[TracedRequest], pages: int, page_size: int, queue: int = 0) -> tuple[list[int], int]:
    """(pages hit by each request, pages evicted)"""
    run = SequentialRun(requests, pages=pages, page_size=page_size, queue=queue)
    hits, before = [], 0
    for _ in run.run():
        hits.append(run.meter.counts.pages_hit - before)
        before = run.meter.counts.pages_hit
    assert run.meter.counts.too_large == 0
    assert run.meter.manager.stats()["pools"]["pool"]["pages"]["used"] == 0
    return hits, run.meter.counts.evictions


def compare(requests: Sequence[TracedRequest], page_size: int, capacities: Sequence[int], queue: int = 0) -> None:
    largest = max(each.input_length // page_size for each in requests)
    for capacity in capacities:
        naive = NaiveCache(largest + 1 + capacity, page_size)
        expected = [naive.serve(each, requests[at + 1 : at + 1 + queue]) for at, each in enumerate(requests)]
        assert hits_of(requests, naive.capacity, page_size, queue) == (expected, naive.evictions), f"{naive.capacity} pages"


@st.composite
def traces(draw: st.DrawFn, block_max: int = 5, tails: Sequence[int] = (512, 512, 511, 312, 101, 16, 1)) -> list[TracedRequest]:
    """Prompts that continue others at any block, repeat them, or begin anew; `tails` are the tokens of their last block."""
    prompts: list[tuple[list[int], int]] = []
    fresh = iter(range(10**6))
    for _ in range(draw(st.integers(2, 24))):
        ids: list[int] = []
        if prompts and draw(st.integers(0, 4)):
            earlier = prompts[draw(st.integers(0, len(prompts) - 1))][0]
            ids = earlier[: draw(st.integers(0, len(earlier)))]
        room = block_max - len(ids)
        ids = ids + [next(fresh) for _ in range(draw(st.integers(0 if ids else 1, max(room, 0 if ids else 1))))]
        prompts.append((ids, (len(ids) - 1) * 512 + draw(st.sampled_from(tails))))
    return [TracedRequest(number, 0, length, 0, np.array(ids, np.int64)) for number, (ids, length) in enumerate(prompts)]


@given(traces(), st.sampled_from([512, 512, 1024, 100]))
@hypothesis_settings(max_examples=30)
def test_every_request_hits_what_leaf_first_lru_hits(requests: list[TracedRequest], page_size: int) -> None:
    """The reference's rules, at capacities from the largest prompt (and the page its last token would need) up to no limit."""
    compare(requests, page_size, (0, 1, 2, 5, 13, 10_000))


@given(traces(block_max=1, tails=(1, 2, 7, 16, 17, 31, 32, 40, 63)), st.sampled_from([1, 16]))
@hypothesis_settings(max_examples=30)
def test_every_request_hits_what_leaf_first_lru_hits_with_small_pages(requests: list[TracedRequest], page_size: int) -> None:
    compare(requests, page_size, (0, 1, 3, 10, 100))


@given(traces(), st.sampled_from([512, 1024, 100]), st.integers(1, 8))
@hypothesis_settings(max_examples=30)
def test_every_request_hits_what_lru_that_spares_the_queue_hits(requests: list[TracedRequest], page_size: int, queue: int) -> None:
    compare(requests, page_size, (0, 1, 2, 5, 13), queue)


@pytest.mark.parametrize("queue", [1, 16, 64])
def test_knowing_the_queue_never_hits_less(write_trace: WriteTrace, queue: int) -> None:
    """On traces of conversations; a hint that is always true must not do harm."""
    for seed in range(3):
        requests = read_trace(write_trace(conversations(seed, 80, people=20)))
        for pages in (13, 30, 80):
            without, with_queue = (sum(hits_of(requests, pages, 512, known)[0]) for known in (0, queue))
            assert with_queue >= without, f"seed {seed}, {pages} pages"


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_any_page_size_counts_whole_pages(write_trace: WriteTrace, page_size: int) -> None:
    """Two prompts of 1,300 tokens that share their first 1,024, then the first again."""
    path = write_trace([request(0, [1, 2, 3], 1300), request(1, [1, 2, 4], 1300), request(2, [1, 2, 3], 1300)])
    hits, evictions = hits_of(read_trace(path), 4000, page_size)
    assert hits == [0, 1024 // page_size, 1300 // page_size]
    assert evictions == 0


def test_a_prompt_that_fills_the_pool_is_refused_and_counted(write_trace: WriteTrace) -> None:
    """It could not run: the token after its whole pages has no page. The others are unharmed."""
    run = SequentialRun(read_trace(write_trace([request(0, [1, 2]), request(0, [1, 2, 3, 4]), request(0, [1, 2])])), pages=4, page_size=512)
    assert list(run.run()) == [1, 2, 3]
    assert (run.meter.counts.too_large, run.meter.counts.pages_hit, run.meter.counts.pages_whole) == (1, 2, 4)


def test_the_longest_prompt_is_replayed(write_trace: WriteTrace) -> None:
    rows = [request(0, range(2048)), request(0, range(2048))]
    assert hits_of(read_trace(write_trace(rows)), 1025, 1024) == ([0, 1024], 0)


TRACES = os.environ.get("KVMANAGER_TRACES", "")


@pytest.mark.skipif(not TRACES, reason="KVMANAGER_TRACES names no folder with the public traces")
@pytest.mark.parametrize(("pages", "hits"), [(10_000, 62_005), (171_000, 105_592)])
def test_the_conversation_trace_gives_the_reference_figures(pages: int, hits: int) -> None:
    run = SequentialRun(read_trace(Path(TRACES) / "conversation_trace.jsonl"), pages=pages, page_size=512)
    for _ in run.run():
        pass
    assert (run.meter.counts.pages_hit, run.meter.counts.pages_whole) == (hits, 276_491)


@pytest.mark.skipif(not TRACES, reason="KVMANAGER_TRACES names no folder with the public traces")
@pytest.mark.parametrize(("pages", "queue", "ratio"), [(10_000, 256, 0.267), (3_000, 1000, 0.29)])
def test_the_queue_saves_as_much_as_the_reference_does(pages: int, queue: int, ratio: float) -> None:
    run = SequentialRun(read_trace(Path(TRACES) / "conversation_trace.jsonl"), pages=pages, page_size=512, queue=queue)
    for _ in run.run():
        pass
    assert run.meter.counts.pages_hit / run.meter.counts.pages_whole >= ratio
