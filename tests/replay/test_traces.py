"""Reading traces: what each format says, which tokens stand for it, and what a broken line gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmanager.errors import InvalidValue
from kvmanager.replay.traces import TokensOf, read_trace
from tests.replay.conftest import WriteTrace, request

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def test_mooncake_lines_become_requests(write_trace: WriteTrace) -> None:
    found = read_trace(write_trace([request(0, [7, 9], 1000, 3), request(41, [7, 12, 2**60], 1025, 0)]))
    assert [(each.number, each.at_ms, each.input_length, each.output_length) for each in found] == [(0, 0, 1000, 3), (1, 41, 1025, 0)]
    assert [each.blocks.tolist() for each in found] == [[0, 1], [0, 2, 3]]  # dense, in order of appearance


def test_equal_ids_are_equal_tokens_and_nothing_else_is(write_trace: WriteTrace) -> None:
    """All that a prefix index sees of a prompt: also for the first tokens of a block that another prompt has whole."""
    one, two = read_trace(write_trace([request(0, [5, 6, 7], 1100), request(0, [5, 8, 7])]))
    first, second = TokensOf.prompt(one, 1100), TokensOf.prompt(two, 1536)
    assert first.dtype == np.int32 and first.min() >= 0
    assert np.array_equal(first[:512], second[:512])
    assert not (first[512:1024] == second[512:1024]).any()
    assert np.array_equal(first[1024:1100], second[1024:1100])
    assert len(np.unique(np.concatenate([first, second[512:1024]]))) == 1100 + 512
    assert len(TokensOf.prompt(two, 1537)) == 1537 and len(TokensOf.prompt(two, 512)) == 512


def test_generated_tokens_differ_between_requests(write_trace: WriteTrace) -> None:
    one, two = read_trace(write_trace([request(0, [5]), request(0, [5])]))
    assert np.array_equal(TokensOf.output(one, 3, 9), TokensOf.output(one, 0, 9)[3:])
    assert not np.isin(TokensOf.output(one, 0, 2000), TokensOf.output(two, 0, 2000)).any()


def test_azure_lines_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_bytes((AZURE + "2023-11-16 18:15:46.6805900,1025,44\r\n2023-11-16 18:15:47.9305899,9,109\r\n").encode())
    found = read_trace(path)
    assert [(each.at_ms, each.input_length, each.output_length, each.blocks.tolist()) for each in found] == [
        (0, 1025, 44, [0, 1, 2]),
        (1249, 9, 109, [3]),
    ]


def test_limit_reads_no_further(write_trace: WriteTrace) -> None:
    path = write_trace([request(0, [1]), request(1, [2])])
    path.write_text(path.read_text() + "garbage\n")
    assert len(read_trace(path, limit=2)) == 2


LINE = request(3, [1, 2])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "trace.jsonl:2: expected a JSON object, got"),
        ("[1]", "trace.jsonl:2: expected a JSON object, got list"),
        ("[" * 100_000, "trace.jsonl:2: expected a JSON object, got"),
        ({"timestamp": -1}, "trace.jsonl:2: timestamp: expected an int in 0.."),
        ({"timestamp": 1.5}, "trace.jsonl:2: timestamp: expected an int in 0.."),
        ({"input_length": 0}, "trace.jsonl:2: input_length: expected an int in 1..1048576, got 0"),
        ({"input_length": True}, "trace.jsonl:2: input_length: expected an int in 1..1048576, got True"),
        ({"input_length": 2**40}, "trace.jsonl:2: input_length: expected an int in 1..1048576, got 1099511627776"),
        ({"output_length": "5"}, "trace.jsonl:2: output_length: expected an int in 0..1048576, got '5'"),
        ({"output_length": ...}, "trace.jsonl:2: output_length: expected an int in 0..1048576, got nothing"),
        ({"hash_ids": [1]}, "trace.jsonl:2: hash_ids: expected 2 ids for 1024 tokens, got 1 ids"),
        ({"hash_ids": ...}, "trace.jsonl:2: hash_ids: expected 2 ids for 1024 tokens, got NoneType"),
        ({"hash_ids": [1, "2"]}, "trace.jsonl:2: hash_ids: expected an int in"),
        ({"hash_ids": [1, 2**65]}, "trace.jsonl:2: hash_ids: expected an int in"),
        (" " * (2 << 20), "trace.jsonl:2: expected at most 1048576 characters a line, got more"),
    ],
    ids=lambda value: str(value)[:60] if "expected" in str(value) else "",
)
def test_a_broken_mooncake_line_is_named(write_trace: WriteTrace, line: str | dict[str, Any], expected: str) -> None:
    path = write_trace([LINE])
    if isinstance(line, dict):
        line = json.dumps({key: value for key, value in {**LINE, **line}.items() if value is not ...})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InvalidValue) as caught:
        read_trace(path)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (AZURE + "yesterday,4,4\n", "azure.csv:2: TIMESTAMP: expected a time such as"),
        (AZURE + "2023-11-16 18:15:46,4\n", "azure.csv:2: expected 3 fields, got 2"),
        (AZURE + "2023-11-16 18:15:46,0,4\n", "azure.csv:2: ContextTokens: expected an int in 1..1048576, got 0"),
        (AZURE + "2023-11-16 18:15:46,4,4\n2023-11-16 18:15:46+00:00,4,4\n", "azure.csv:3: TIMESTAMP: expected a time such as"),
        (AZURE + "2023-11-16 18:15:46,4,4\n2023-11-16 18:15:45,4,4\n", "azure.csv:3: TIMESTAMP: expected a time not before"),
        (AZURE + "2023-11-16 18:15:46,4,4.5\n", "azure.csv:2: GeneratedTokens: expected an int in 0..1048576, got '4.5'"),
        (AZURE + f"2023-11-16 18:15:46,4,{'9' * 5000}\n", "azure.csv:2: GeneratedTokens: expected an int in"),
        (AZURE + "2023-11-16 18:15:46,4,\u0665\n", "azure.csv:2: GeneratedTokens: expected an int in"),
        (AZURE, "azure.csv: expected at least one request, got none"),
        ("", "azure.csv:1: expected a JSON object a line (Mooncake), or a first line TIMESTAMP,"),
        ("a,b,c\n1,2,3\n", "azure.csv:1: expected a JSON object a line (Mooncake), or a first line TIMESTAMP,"),
    ],
    ids=lambda value: str(value)[:60] if "expected" in str(value) else "",
)
def test_a_broken_azure_line_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidValue) as caught:
        read_trace(path)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("kind", ["missing", "folder", "bytes"])
def test_a_file_that_is_no_text_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "trace"
    if kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InvalidValue, match=f"{path}: expected a readable trace, got"):
        read_trace(path)
