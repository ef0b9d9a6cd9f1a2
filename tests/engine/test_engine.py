"""The engine end to end: real processes, real sockets, real kills; compared with transformers' own `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from kvmanager.errors import InvalidValue
from kvmanager.examples.engine.checkpoint import make_checkpoint
from kvmanager.examples.engine.compare import against_transformers
from kvmanager.examples.engine.demo import pages_at_rest, serve_prompts
from kvmanager.examples.engine.engine import Engine, EngineConfig
from kvmanager.examples.engine.oracle import Reference
from kvmanager.examples.engine.request import Request, Stage
from kvmanager.machine.batch import decode_batch
from kvmanager.machine.events import WorkerJoined

PAGE = 16
VOCAB = 512


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=2)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def assert_served(engine: Engine, checkpoint: Path, requests: list[Request]) -> None:
    """Every request finished with transformers' tokens and latents, and every page is free or cached (rule 1)."""
    pages = pages_at_rest(engine)
    assert all(each["used"] == 0 and each["quarantined"] == 0 for each in pages.values()), pages
    assert all(each["free"] + each["cached"] == each["total"] for each in pages.values()), pages
    assert [request.error for request in requests] == [""] * len(requests)
    verdict = against_transformers(checkpoint, requests)
    assert all(verdict.equal), verdict.lines


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    """One prefill and one decode worker with room to spare; shared by the tests that harm nobody."""
    with Engine(EngineConfig(checkpoint, page_size=PAGE, keep_latents=True)) as running:
        yield running


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 100])
def test_text_and_latents_equal_transformers(engine: Engine, checkpoint: Path, length: int) -> None:
    """One token, one page and one page +- 1: where a page is reserved, written, sealed and moved differs in each."""
    requests, _ = serve_prompts(engine, [prompt(length, length)], 20)
    assert requests[0].pages_moved == -(-length // PAGE)
    assert_served(engine, checkpoint, requests)


def test_one_new_token_needs_no_decode_worker(engine: Engine, checkpoint: Path) -> None:
    requests, _ = serve_prompts(engine, [prompt(40, 40)], 1)
    assert requests[0].pages_moved == 0
    assert_served(engine, checkpoint, requests)


def test_the_same_prompt_twice_at_once(engine: Engine, checkpoint: Path) -> None:
    """Both are computed, or the second shares what the first has written by then; one copy stays either way."""
    before = pages_at_rest(engine)["decode0"]["cached"]
    same = prompt(70, 7)
    requests, _ = serve_prompts(engine, [same, list(same)], 10)
    assert requests[0].generated == requests[1].generated
    assert_served(engine, checkpoint, requests)
    assert pages_at_rest(engine)["decode0"]["cached"] == before + 70 // PAGE


@pytest.mark.parametrize("shared", [2 * PAGE, 2 * PAGE + 5], ids=["on-a-page-border", "off-it"])
def test_prefix_hit(engine: Engine, checkpoint: Path, shared: int) -> None:
    """Whole pages are shared, on both sides; the rest of the prefix is computed again."""
    first = prompt(shared, 100 + shared)
    serve_prompts(engine, [first + prompt(9, 1)], 4)
    requests, _ = serve_prompts(engine, [first + prompt(30, 2)], 12)
    assert requests[0].cached_tokens == 2 * PAGE
    assert requests[0].pages_shared == 2
    assert_served(engine, checkpoint, requests)


def test_a_repeated_prompt_computes_at_least_its_last_token(engine: Engine, checkpoint: Path) -> None:
    again = prompt(3 * PAGE, 300)
    serve_prompts(engine, [again], 4)
    requests, _ = serve_prompts(engine, [again], 4)
    assert requests[0].cached_tokens == 2 * PAGE
    assert_served(engine, checkpoint, requests)


def test_the_next_turn_shares_generated_text(engine: Engine, checkpoint: Path) -> None:
    """What the decode worker wrote is published there; a longer prompt that continues it does not move those pages again."""
    first = prompt(PAGE, 400)
    requests, _ = serve_prompts(engine, [first], 2 * PAGE + 2)
    follow_up = first + requests[0].generated + prompt(5, 401)
    requests, _ = serve_prompts(engine, [follow_up], 6)
    assert requests[0].pages_shared >= 2
    assert_served(engine, checkpoint, requests)


def test_workers_that_prefill_and_decode_in_the_same_steps(checkpoint: Path) -> None:
    """What bench_disaggregation compares with: no page moves, prompts take turns with running sequences, and the text is the same."""
    config = EngineConfig(
        checkpoint, prefill_workers=0, decode_workers=0, mixed_workers=2, page_size=PAGE, chunk_tokens=32, keep_latents=True
    )
    with Engine(config) as engine:
        requests, _ = serve_prompts(engine, [prompt(20 * number + 1, number) for number in range(8)], 12)
        assert {request.pool for request in requests} == {"mixed0", "mixed1"}
        assert sum(request.pages_moved for request in requests) == 0
        assert_served(engine, checkpoint, requests)


def test_devices_are_named_for_each_worker_or_for_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"^devices: expected one for each of 2 workers, or none, got 1$"):
        EngineConfig(tmp_path, devices=("cpu",))


def test_layer_0_is_bitwise_transformers_cache_after_the_move(checkpoint: Path) -> None:
    """Alone and in transformers' own chunks (the whole prompt, then one token a step) the same rows are computed in the same shapes: the
    bytes in the decode worker's pages are then the very bits that transformers caches, so a swapped or stale slot cannot hide."""
    config = EngineConfig(checkpoint, page_size=PAGE, chunk_tokens=256, keep_latents=True)
    with Engine(config) as engine:
        (request,), _ = serve_prompts(engine, [prompt(77, 77)], 12)
    assert request.latents is not None
    shape, data = request.latents
    ours = torch.from_numpy(np.frombuffer(data, "<f4").reshape(shape).copy())
    theirs = Reference(checkpoint).cache(request.prompt)
    assert shape[1] == 77 + 11
    assert torch.equal(ours[0, :77], theirs[0])
    torch.testing.assert_close(ours[:, :77], theirs, atol=5e-5, rtol=0)


def test_a_pool_too_small_for_all_preempts_and_every_text_is_the_same(checkpoint: Path) -> None:
    """Requests give way, come back and are computed again; nothing is lost, nothing leaks."""
    config = EngineConfig(checkpoint, page_size=PAGE, prefill_pages=9, decode_pages=9, chunk_tokens=32, keep_latents=True)
    with Engine(config) as engine:
        requests, _ = serve_prompts(engine, [prompt(20 + 9 * number, 500 + number) for number in range(6)], 40)
        assert sum(request.preempted for request in requests) > 0
        assert_served(engine, checkpoint, requests)


def test_a_request_that_can_never_fit_is_refused_at_once(engine: Engine) -> None:
    with pytest.raises(InvalidValue, match=r"prompt: expected 1\.\.4096 tokens"):
        engine.submit(prompt(4090, 1), 20)
    with pytest.raises(InvalidValue, match="prompt"):
        engine.submit([], 20)


def test_what_fits_is_counted_in_slots_of_the_smaller_pool(tmp_path: Path) -> None:
    """Not in pages: 20 pages of 64 hold more than 40 of 16."""
    config = EngineConfig(tmp_path, page_size=64, decode_page_size=16, prefill_pages=20, decode_pages=40)
    assert [(pool.name, pool.page_size, pool.num_pages) for pool in config.pools()] == [("prefill0", 64, 20), ("decode0", 16, 40)]
    assert config.tokens_max == 40 * 16
    with pytest.raises(InvalidValue, match=r"^decode_page_size: expected a multiple of 16 from 16 to 128, got 20$"):
        EngineConfig(tmp_path, decode_page_size=20)


def _serve_until(engine: Engine, requests: list[Request], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, [request.stage for request in requests]
        engine.turn()


@pytest.mark.parametrize("victim", ["decode", "prefill"])
def test_killed_worker_costs_nobody_an_answer(checkpoint: Path, victim: str) -> None:
    """SIGKILL in mid-run: it is reaped, so known dead; its pages come home and its requests end elsewhere with equal text."""
    told: list[str] = []
    config = EngineConfig(checkpoint, prefill_workers=2, decode_workers=2, page_size=PAGE, chunk_tokens=32, keep_latents=True)
    with Engine(config, on_event=told.append) as engine:
        requests = [engine.submit(prompt(30 + 11 * number, 600 + number), 30) for number in range(8)]
        stage = Stage.DECODING if victim == "decode" else Stage.PREFILLING
        _serve_until(engine, requests, lambda: any(each.pool == f"{victim}0" and each.stage is stage for each in requests))
        engine.fleet.kill(f"{victim}0")
        _serve_until(engine, requests, lambda: engine.idle)
        assert any(f"{victim}0 is dead" in text for text in told)
        assert sum(request.lost for request in requests) > 0
        assert_served(engine, checkpoint, requests)
        dead = engine.client.stats()["pools"][f"{victim}0"]
        assert dead["workers"] == {} and dead["pages"]["free"] == dead["pages"]["total"]


@pytest.mark.parametrize("stage", [Stage.PREFILLING, Stage.DECODING])
def test_killed_manager_comes_back_and_nobody_computes_anything_again(checkpoint: Path, stage: Stage) -> None:
    """SIGKILL: the next process has the sequences and pages of the last one, workers and scheduler go on; the text is the same."""
    with Engine(EngineConfig(checkpoint, page_size=PAGE, chunk_tokens=32, keep_latents=True)) as engine:
        requests = [engine.submit(prompt(30 + 11 * number, 650 + number), 30) for number in range(6)]
        epochs = [engine.client.stats()["epoch"]]
        for more in (2, 9) if stage is Stage.DECODING else (2,):
            _serve_until(
                engine, requests, lambda more=more: any(each.stage is stage and len(each.generated) >= more - 2 for each in requests)
            )
            engine.fleet.kill("manager")
            _serve_until(engine, requests, lambda: engine.client.stats()["epoch"] != epochs[-1])
            epochs.append(engine.client.stats()["epoch"])
        _serve_until(engine, requests, lambda: engine.idle)
        assert epochs == sorted(set(epochs))
        assert sum(request.lost + request.preempted for request in requests) == 0
        assert_served(engine, checkpoint, requests)


def test_frozen_worker_is_fenced_then_killed_and_its_requests_end_elsewhere(checkpoint: Path) -> None:
    """SIGSTOP: silence alone frees nothing. The lease ends, its sequences are lost, and its pages come back once it is known dead."""
    import signal

    config = EngineConfig(checkpoint, decode_workers=2, page_size=PAGE, lease_ms=1500, keep_latents=True)
    with Engine(config) as engine:
        requests = [engine.submit(prompt(30 + 11 * number, 700 + number), 30) for number in range(4)]
        _serve_until(engine, requests, lambda: any(each.pool == "decode0" and each.stage is Stage.DECODING for each in requests))
        engine.fleet.kill("decode0", signal.SIGSTOP)
        _serve_until(engine, requests, lambda: engine.idle)
        assert sum(request.lost for request in requests) > 0
        _serve_until(engine, requests, lambda: not engine.client.stats()["pools"]["decode0"]["fenced"])
        assert_served(engine, checkpoint, requests)


def _hide_memory(engine: Engine, pool: str) -> None:
    """Make a live worker's pages impossible to open, as they are in the moment after its death."""
    joined = [each for each in decode_batch(engine.client.tables_snapshot()).events if isinstance(each, WorkerJoined)]
    export = next(msgpack.unpackb(each.memory) for each in joined if each.name == pool)
    Path("/dev/shm", export["transports"]["shm"]["name"]).unlink()


def test_pages_that_cannot_be_opened_cost_a_retry_not_the_decode_worker(checkpoint: Path) -> None:
    """The source's memory may vanish between the plan and the pull. The puller lives on; the request is computed again elsewhere."""
    config = EngineConfig(checkpoint, prefill_workers=2, page_size=PAGE, keep_latents=True)
    with Engine(config) as engine:
        _hide_memory(engine, "prefill0")
        requests, _ = serve_prompts(engine, [prompt(60 + number, 900 + number) for number in range(3)], 8)
        assert sum(request.pull_failures for request in requests) > 0
        assert [name for name, pool in engine.client.stats()["pools"].items() if not pool["workers"]] == []
        served = [request for request in requests if not request.error]
        assert all(
            "handoff failed 3 times: worker decode0, 3 tries: pages of prefill0" in request.error for request in requests if request.error
        )
        assert_served(engine, checkpoint, served)


def test_pages_that_can_never_be_opened_fail_the_request_with_the_reason(checkpoint: Path) -> None:
    """Bounded: three attempts, then an error that says what and where; everything comes home."""
    with Engine(EngineConfig(checkpoint, page_size=PAGE)) as engine:
        _hide_memory(engine, "prefill0")
        requests, _ = serve_prompts(engine, [prompt(40, 950)], 8)
        assert requests[0].stage is Stage.FAILED
        assert (
            "handoff failed 3 times: worker decode0, 3 tries: pages of prefill0: name: expected the shared memory of a live peer"
            in requests[0].error
        )
        pages = pages_at_rest(engine)
        assert all(each["used"] == 0 and each["quarantined"] == 0 for each in pages.values()), pages


def test_without_any_decode_worker_left_requests_fail_with_the_reason(checkpoint: Path) -> None:
    with Engine(EngineConfig(checkpoint, page_size=PAGE)) as engine:
        requests = [engine.submit(prompt(30, 800), 200)]
        _serve_until(engine, requests, lambda: requests[0].stage is Stage.DECODING)
        engine.fleet.kill("decode0")
        _serve_until(engine, requests, lambda: engine.idle)
        assert requests[0].stage is Stage.FAILED and requests[0].error == "no decode worker is left"
        pages = pages_at_rest(engine)
        assert all(each["used"] == 0 and each["quarantined"] == 0 for each in pages.values())


def test_workers_that_cannot_start_say_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RuntimeError, match=r"ended before it was ready(.|\n)*config\.json"):
        Engine(EngineConfig(tmp_path))
