"""Many requests at a time: everything ends, nothing leaks, memory pressure preempts, placement by prefix finds more than round robin."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from kvmanager.errors import InvalidValue
from kvmanager.replay.scheduler import ConcurrentRun, Load
from kvmanager.replay.traces import TracedRequest, read_trace
from tests.replay.conftest import WriteTrace, conversations, request


def replay(requests: list[TracedRequest], pages: int, page_size: int = 64, queue: int = 0, **load: Any) -> ConcurrentRun:
    run = ConcurrentRun(requests, pages=pages, page_size=page_size, load=Load(**load), queue=queue)
    done = list(run.run())
    assert done == sorted(done) and done[-1] == len(requests)
    return run


def at_rest(run: ConcurrentRun) -> bool:
    """All sequences are closed; what they held is cached, or on its way home."""
    pools = run.meter.manager.stats()["pools"].values()
    return all(pool["sequences"] == 0 and pool["pages"]["used"] == 0 for pool in pools)


@pytest.mark.parametrize(
    ("pages", "load"),
    [
        (2000, {}),
        (120, {}),
        (120, {"ack_late": 3}),
        (102, {"speed": 20.0, "chunk": 300}),
        (110, {"pools": 3, "speed": 10.0, "ack_late": 1}),
        (130, {"batch": 1}),
        (102, {"queue": 5, "speed": 20.0, "pools": 2, "ack_late": 2}),
        (120, {"queue": 100, "batch": 2, "speed": 20.0}),
    ],
    ids=str,
)
def test_every_request_generates_its_output_and_every_page_comes_home(write_trace: WriteTrace, pages: int, load: dict[str, Any]) -> None:
    requests = read_trace(write_trace(conversations(1, 60)))
    run = replay(requests, pages, **load)
    counts = run.meter.counts
    assert at_rest(run)
    assert not run.meter.manager.state.waiting
    assert counts.tokens_output == sum(each.output_length for each in requests)
    assert counts.tokens_prompt == sum(each.input_length for each in requests)
    assert counts.pages_whole == sum(each.input_length // 64 for each in requests)
    assert counts.used_peak <= pages * load.get("pools", 1) and counts.too_large == 0
    assert len(run.first_token_ms) == sum(each.output_length > 0 for each in requests)


def test_short_memory_preempts_and_long_memory_does_not(write_trace: WriteTrace) -> None:
    requests = read_trace(write_trace(conversations(2, 60)))
    short, long = replay(requests, 102, speed=20.0), replay(requests, 5000, speed=20.0)
    assert short.meter.counts.preemptions > 0 and short.meter.counts.evictions > 0
    assert long.meter.counts.preemptions == long.meter.counts.evictions == long.meter.counts.tokens_again == 0
    assert long.meter.counts.pages_hit > short.meter.counts.pages_hit
    assert len(long.meter.step_us) < len(short.meter.step_us)


def test_the_same_trace_gives_the_same_counts(write_trace: WriteTrace) -> None:
    requests = read_trace(write_trace(conversations(3, 40)))
    one, two = (replay(requests, 120, pools=2, speed=8.0, ack_late=1) for _ in range(2))
    assert asdict(one.meter.counts) == asdict(two.meter.counts)
    assert one.meter.series == two.meter.series
    assert one.meter.manager.snapshot() == two.meter.manager.snapshot()


def test_placement_by_prefix_hits_more_than_round_robin(write_trace: WriteTrace) -> None:
    """A person's next prompt finds the last one only in the pool where that was computed."""
    requests = read_trace(write_trace(conversations(4, 150, people=13)))
    hits = {name: replay(requests, 1000, pools=4, placement=name).meter.counts.pages_hit for name in ("prefix", "round_robin")}
    assert hits["prefix"] > hits["round_robin"] * 1.3


def test_a_request_larger_than_its_pool_is_refused_alone(write_trace: WriteTrace) -> None:
    """At the door, or when its output outgrows the pool; the others run."""
    rows = [request(0, [1, 2], output_length=3), request(0, list(range(10, 20))), request(0, [3], output_length=5000)]
    run = replay(read_trace(write_trace(rows)), 40)
    assert (run.meter.counts.too_large, run.done) == (2, 3)
    assert at_rest(run)


def test_a_prefix_that_is_being_computed_is_waited_for(write_trace: WriteTrace) -> None:
    """The second prompt comes to the head of the line while the first has its last pages to compute: it waits one step for them."""
    run = replay(read_trace(write_trace([request(0, range(8), 3996), request(0, [*range(8), 9])])), 200, chunk=512)
    assert run.meter.counts.waits == 1
    assert run.meter.counts.pages_hit == 3996 // 64


def test_knowing_the_line_saves_pages_under_overload(write_trace: WriteTrace) -> None:
    requests = read_trace(write_trace(conversations(6, 150, people=13)))
    hits = [replay(requests, 200, queue=queue, speed=100.0, batch=4).meter.counts.pages_hit for queue in (0, 100)]
    assert hits[1] > hits[0]


def test_an_idle_stretch_costs_no_steps(write_trace: WriteTrace) -> None:
    run = replay(read_trace(write_trace([request(0, [1]), request(3_600_000, [2])])), 40)
    assert len(run.meter.step_us) < 20 and run.now_ms > 3_600_000


def test_load_is_checked(write_trace: WriteTrace) -> None:
    requests = read_trace(write_trace([request(0, [1])]))
    with pytest.raises(InvalidValue, match="--batch: expected at most 524238 sequences in all pools, got 600000"):
        ConcurrentRun(requests, pages=4, page_size=64, load=Load(pools=2, batch=300_000), queue=100)
    with pytest.raises(InvalidValue, match="placement: expected one of prefix, round_robin, got 'random'"):
        ConcurrentRun(requests, pages=4, page_size=64, load=Load(placement="random"))
