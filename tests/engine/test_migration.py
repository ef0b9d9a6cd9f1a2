"""Requests that decode go on elsewhere, between two of their steps: their tokens are those of a run in which nobody moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvmanager.examples.engine.checkpoint import make_checkpoint
from kvmanager.examples.engine.engine import Engine, EngineConfig
from kvmanager.examples.engine.request import Request, Stage
from tests.engine.test_engine import PAGE, VOCAB, assert_served


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=3)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(31)
    return [rng.integers(0, VOCAB, length).tolist() for length in (1, PAGE, 45, 77)]


def until(engine: Engine, requests: list[Request], done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not done():
        assert time.monotonic() < deadline, [(each.stage, each.pool, each.handoff, len(each.generated)) for each in requests]
        engine.turn()


def test_a_decoding_request_moves_and_its_tokens_are_the_same(checkpoint: Path) -> None:
    """There and back again, in the middle of its text, while others decode on beside it."""
    config = EngineConfig(checkpoint, decode_workers=2, page_size=PAGE, keep_latents=True)
    with Engine(config) as engine:
        still = [engine.submit(prompt, 40) for prompt in prompts()]
        until(engine, still, lambda: engine.idle)
        assert [each.moves for each in still] == [1] * len(still)
    with Engine(config) as engine:
        moved = [engine.submit(prompt, 40) for prompt in prompts()]
        for enough in (5, 15, 25):
            until(engine, moved, lambda enough=enough: all(len(each.generated) > enough or each.over for each in moved))
            for request in moved[::2]:
                if request.stage is Stage.DECODING:
                    engine.scheduler.migrate(request, "decode1" if request.pool == "decode0" else "decode0")
        until(engine, moved, lambda: engine.idle)
        assert min(each.moves for each in moved[::2]) >= 3
        assert [each.generated for each in moved] == [each.generated for each in still]
        assert sum(each.lost + each.preempted for each in moved) == 0
        assert_served(engine, checkpoint, moved)


def test_a_drained_worker_leaves_and_nobody_computes_anything_again(checkpoint: Path) -> None:
    told: list[str] = []
    config = EngineConfig(checkpoint, decode_workers=2, page_size=PAGE, keep_latents=True)
    with Engine(config, on_event=told.append) as engine:
        requests = [engine.submit(prompt, 60) for prompt in prompts()]
        until(engine, requests, lambda: any(each.pool == "decode0" and each.stage is Stage.DECODING for each in requests))
        engine.scheduler.drain("decode0")
        until(engine, requests, lambda: any("decode0 is dead; 0 sequences lost" in text for text in told))
        assert "pool decode0 is empty: its worker leaves" in told
        until(engine, requests, lambda: engine.idle)
        assert sum(each.lost + each.preempted for each in requests) == 0
        assert any(each.moves > 1 for each in requests)
        assert_served(engine, checkpoint, requests)


@pytest.mark.parametrize("chunk_tokens", [256, 32])
def test_prompts_that_are_streamed_while_they_are_computed_give_the_same_tokens(checkpoint: Path, chunk_tokens: int) -> None:
    """In one step, layer by layer, and in chunks; two prompts share a prefix. Pages and text are those of transformers."""
    config = EngineConfig(checkpoint, page_size=PAGE, chunk_tokens=chunk_tokens, keep_latents=True, stream_layers=1)
    with Engine(config) as engine:
        longest = max(prompts(), key=len)
        requests = [engine.submit(prompt, 12) for prompt in (*prompts(), longest[:PAGE] + longest[:40], longest)]
        until(engine, requests, lambda: engine.idle)
        assert all(each.streamed and each.moves == 1 for each in requests)
        assert engine.scheduler.early_pulls > 0
        assert sum(each.lost + each.preempted for each in requests) == 0
        assert_served(engine, checkpoint, requests)


@pytest.mark.parametrize("stream_layers", [0, 1], ids=["whole", "streamed"])
@pytest.mark.parametrize(("page_size", "decode_page_size"), [(64, 16), (16, 64)])
def test_pools_of_different_page_sizes_give_the_same_tokens(
    checkpoint: Path, page_size: int, decode_page_size: int, stream_layers: int
) -> None:
    """Pages are regathered on their way; prompts that begin alike share whole pages of either size, and a decoded text is found by the next turn."""
    config = EngineConfig(
        checkpoint, page_size=page_size, decode_page_size=decode_page_size, chunk_tokens=48, keep_latents=True, stream_layers=stream_layers
    )
    with Engine(config) as engine:
        longest = max(prompts(), key=len)
        first = [engine.submit(prompt, 12) for prompt in (*prompts(), longest + prompts()[2])]
        until(engine, first, lambda: engine.idle)
        again = [engine.submit(longest + longest[:20], 70)]
        until(engine, again, lambda: engine.idle)
        turn = [engine.submit([*again[0].tokens, 1, 2, 3], 5)]
        until(engine, turn, lambda: engine.idle)
        assert again[0].pages_shared == len(longest) // decode_page_size
        written = len(longest) + 20 + 69
        # What the decode worker told of its own tokens, in whole groups of the smallest page, and fills whole pages there.
        assert turn[0].pages_shared >= (written - 16) // decode_page_size > again[0].pages_shared
        requests = [*first, *again, *turn]
        assert [each.pages_moved + each.pages_shared for each in requests] == [
            -(-len(each.prompt) // decode_page_size) for each in requests
        ]
        assert sum(each.lost + each.preempted for each in requests) == 0
        assert_served(engine, checkpoint, requests)


def test_a_decoding_request_moves_between_page_sizes(checkpoint: Path) -> None:
    """From pages of 16 into a pool of 64, where it rests, and back, in the middle of its text: both last pages are partly filled."""
    config = EngineConfig(checkpoint, page_size=64, decode_page_size=16, keep_latents=True)
    with Engine(config) as engine:
        requests = [engine.submit(prompt, 50) for prompt in prompts()]
        until(engine, requests, lambda: all(len(each.generated) > 3 for each in requests))
        for where in ("prefill0", "decode0"):
            for request in requests[::2]:
                engine.scheduler.migrate(request, where)
            until(engine, requests, lambda where=where: all(each.pool == where for each in requests[::2]))
        assert not any(each.over for each in requests[::2])
        until(engine, requests, lambda: engine.idle)
        assert [each.moves for each in requests] == [3, 1, 3, 1]
        assert sum(each.lost + each.preempted for each in requests) == 0
        assert_served(engine, checkpoint, requests)


def test_a_prompt_that_is_streamed_into_a_full_pool_goes_there_later(checkpoint: Path) -> None:
    config = EngineConfig(checkpoint, page_size=PAGE, decode_pages=8, chunk_tokens=32, keep_latents=True, stream_layers=1)
    with Engine(config) as engine:
        requests = [engine.submit(prompt, 12) for prompt in (*prompts(), *prompts())]
        until(engine, requests, lambda: engine.idle)
        assert_served(engine, checkpoint, requests)
