"""Small traces in both formats, made up here: nothing of the public ones is copied into the repository."""

from __future__ import annotations

import json
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


@pytest.fixture
def write_trace(tmp_path: Path) -> WriteTrace:
    def write(rows: Sequence[dict[str, Any]]) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
