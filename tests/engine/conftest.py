"""Small checkpoints and transformers' answers for them, made once a test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROMPT_TOKENS = (1, 5, 16, 33, 100, 257)  # 16 is a page of the tests, 33 two pages and a token, 257 sixteen pages and a token
NEW_TOKENS = 32


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """These models are so small that a second thread gains nothing and, on a busy machine, spins for seconds at every barrier."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(**config): directory of a small checkpoint; the same config gives the same directory, which no test may change."""
    pytest.importorskip("transformers")
    from kvmanager.examples.engine.checkpoint import make_checkpoint

    made: dict[str, Path] = {}

    def make(**config: Any) -> Path:
        key = repr(sorted(config.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), **config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Random prompts of 1, 5, 16, 33, 100 and 257 tokens."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 512, tokens).tolist() for tokens in PROMPT_TOKENS]


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """reference(**config): transformers' own model of that checkpoint, float32, loaded once."""
    from kvmanager.examples.engine.oracle import Reference

    made: dict[Path, Any] = {}

    def make(**config: Any) -> Any:
        directory = checkpoint(**config)
        if directory not in made:
            made[directory] = Reference(directory)
        return made[directory]

    return make


@pytest.fixture(scope="session")
def expected(reference: Callable[..., Any], prompts: list[list[int]]) -> Callable[..., list[list[int]]]:
    """expected(**config): the 32 greedy tokens of transformers' `generate` after each of `prompts`."""
    made: dict[int, list[list[int]]] = {}

    def make(**config: Any) -> list[list[int]]:
        model = reference(**config)
        if id(model) not in made:
            made[id(model)] = model.generate(prompts, NEW_TOKENS)
        return made[id(model)]

    return make
