"""The first decode step begins on layer 0 when layer 0 is there: tokens, logits and pages are those of a run that waits for everything."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from kvmanager.examples.engine.checkpoint import make_checkpoint
from kvmanager.examples.engine.engine import Engine, EngineConfig
from tests.engine.test_engine import PAGE, VOCAB, assert_served


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), seed=3)


def serve(engine: Engine, prompts: list[list[int]], new_tokens: int = 12, one_by_one: bool = True) -> list[list[int]]:
    requests = []
    for prompt in prompts:
        requests.append(engine.submit(prompt, new_tokens))
        deadline = time.monotonic() + 90
        while one_by_one and not engine.idle:
            assert time.monotonic() < deadline
            engine.turn()
    while not engine.idle:
        assert time.monotonic() < deadline
        engine.turn()
    assert sum(each.lost + each.preempted for each in requests) == 0 and all(each.moves == 1 for each in requests)
    return [each.generated for each in requests]


@pytest.mark.parametrize("one_by_one", [True, False], ids=["alone", "together"])
@pytest.mark.parametrize("stream_layers", [0, 1])
def test_tokens_and_pages_are_those_of_transformers(checkpoint: Path, stream_layers: int, one_by_one: bool) -> None:
    """Some fill their last page: a slot for the next token comes with them."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (1, PAGE, 45, 77, 3 * PAGE)]
    config = EngineConfig(checkpoint, page_size=PAGE, keep_latents=True, stream_layers=stream_layers, decode_early=True)
    with Engine(config) as engine:
        serve(engine, prompts, one_by_one=one_by_one)
        assert engine.scheduler.early_tokens <= len(prompts)
        if one_by_one:
            assert engine.scheduler.early_tokens > 0
        assert_served(engine, checkpoint, engine.scheduler.requests)


def test_a_prompt_that_ends_with_its_page_is_decoded_early_too(checkpoint: Path) -> None:
    rng = np.random.default_rng(6)
    config = EngineConfig(checkpoint, page_size=PAGE, keep_latents=True, stream_layers=1, decode_early=True)
    with Engine(config) as engine:
        for _ in range(20):  # each may be overtaken by the pull and the scheduler
            serve(engine, [rng.integers(0, VOCAB, 3 * PAGE).tolist()], 4)
            if engine.scheduler.early_tokens:
                break
        assert engine.scheduler.early_tokens
        assert_served(engine, checkpoint, engine.scheduler.requests)
