"""Small traces in both formats, made up here: nothing of the public ones is copied into the repository."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

WriteTrace = Callable[[Sequence[dict[str, Any]]], Path]


def request(at_ms: int, ids: Sequence[int], input_length: int | None = None, output_length: int = 5) -> dict[str, Any]:
    """A line of the Mooncake format; whole blocks unless a length is given."""
    return {
        "timestamp": at_ms,
        "input_length": len(ids) * 512 if input_length is None else input_length,
        "output_length": output_length,
        "hash_ids": list(ids),
    }


def conversations(seed: int, turns: int, people: int = 6) -> list[dict[str, Any]]:
    """People who ask again and again, each prompt continuing the one before; all start with the same block."""
    rng, fresh = random.Random(seed), iter(range(1, 10**6))
    said = [[0] for _ in range(people)]
    rows = []
    for turn in range(turns):
        person = rng.randrange(people)
        said[person] = [*said[person], *(next(fresh) for _ in range(rng.randint(1, 3)))]
        if len(said[person]) > 12:
            said[person] = [0, next(fresh)]
        tail = rng.choice((0, 1, 200))
        rows.append(request(turn * 150, said[person], len(said[person]) * 512 - tail, rng.choice((0, 1, 2, 40, 300))))
    return rows


@pytest.fixture
def write_trace(tmp_path: Path) -> WriteTrace:
    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
