"""Traces: files of recorded requests, without any prompt text.

Two formats, told apart by their first line:

    Mooncake   a JSON object a line: timestamp (ms), input_length, output_length, hash_ids. An id stands for 512 tokens *and* all that
               come before them; the last block of a prompt may be partial.
    Azure      CSV with TIMESTAMP, ContextTokens, GeneratedTokens. It says nothing of prefixes, so no two prompts share any.

Prompts are made up: equal ids become equal tokens, different ids different ones, which is all that a prefix index can see of a prompt.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kvmanager.config import check_int
from kvmanager.errors import InvalidValue
from kvmanager.tables import div_ceil

__all__ = ["BLOCK_TOKENS", "TOKENS_MAX", "TokensOf", "TracedRequest", "read_trace"]

BLOCK_TOKENS = 512  # what one id of a Mooncake trace stands for
TOKENS_MAX = 1 << 20  # of one prompt, and of one output
LINE_CHARS_MAX = 1 << 20
AT_MS_MAX = 1 << 53
AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BLOCKS_MAX = 1 << 21  # different blocks of one trace: prompts use token ids below 2**30, outputs those above
_HALF = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class TracedRequest:
    """One request. `blocks` are numbers of 512-token blocks, dense from 0 in the order in which the trace first names them."""

    number: int
    at_ms: int
    input_length: int
    output_length: int
    blocks: np.ndarray


class TokensOf:
    """Token ids for blocks and outputs: a function of the numbers alone, so every run and every machine replays the same prompts."""

    _offsets = np.arange(BLOCK_TOKENS, dtype=np.int64)

    @classmethod
    def prompt(cls, request: TracedRequest, length: int) -> np.ndarray:
        """int32 [length]: the prompt's first tokens. May be one longer than the prompt: then its last token is one of no block."""
        tokens = request.blocks[:, None] * BLOCK_TOKENS + cls._offsets
        row = tokens.astype("<i4").ravel()[: request.input_length]
        if length > request.input_length:
            row = np.append(row, np.int32(0))
        return row[:length]

    @staticmethod
    def output(request: TracedRequest, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: generated tokens, no other request's. A trace does not say which later prompt repeats them."""
        return (_HALF + (request.number * 8191 + np.arange(start, stop)) % _HALF).astype("<i4")


def _number(where: str, row: dict[str, Any], field: str, low: int, high: int) -> int:
    if field not in row:
        raise InvalidValue(f"{where}: {field}", f"an int in {low}..{high}", "nothing")
    return check_int(f"{where}: {field}", row[field], low, high)


def _mooncake(name: str, lines: Iterator[str]) -> Iterator[TracedRequest]:
    numbers: dict[int, int] = {}
    count = 0
    for line_number, line in enumerate(lines, 1):
        where = f"{name}:{line_number}"
        if len(line) > LINE_CHARS_MAX:
            raise InvalidValue(where, f"at most {LINE_CHARS_MAX} characters a line", "more")
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidValue(where, "a JSON object", str(error)) from None
        if not isinstance(row, dict):
            raise InvalidValue(where, "a JSON object", type(row).__name__)
        at_ms = _number(where, row, "timestamp", 0, AT_MS_MAX)
        input_length = _number(where, row, "input_length", 1, TOKENS_MAX)
        output_length = _number(where, row, "output_length", 0, TOKENS_MAX)
        ids, blocks = row.get("hash_ids"), div_ceil(input_length, BLOCK_TOKENS)
        if not isinstance(ids, list) or len(ids) != blocks:
            got = f"{len(ids)} ids" if isinstance(ids, list) else type(ids).__name__
            raise InvalidValue(f"{where}: hash_ids", f"{blocks} ids for {input_length} tokens", got)
        for each in ids:
            check_int(f"{where}: hash_ids", each, -(2**63), 2**64)
        if len(numbers) + len(ids) > BLOCKS_MAX:
            raise InvalidValue(f"{where}: hash_ids", f"at most {BLOCKS_MAX} different ids in a trace", "more")
        dense = np.array([numbers.setdefault(each, len(numbers)) for each in ids], np.int64)
        yield TracedRequest(count, at_ms, input_length, output_length, dense)
        count += 1


def _azure(name: str, lines: Iterator[str]) -> Iterator[TracedRequest]:
    start: datetime | None = None
    blocks_before = count = 0
    for line_number, row in enumerate(csv.reader(lines), 1):
        where = f"{name}:{line_number}"
        if line_number == 1 or not row:
            continue
        if len(row) != len(AZURE_FIELDS):
            raise InvalidValue(where, f"{len(AZURE_FIELDS)} fields", len(row))
        try:
            at = datetime.fromisoformat(row[0])
            start = at if start is None else start
            at_ms = (at - start) // timedelta(milliseconds=1)
        except (ValueError, TypeError):  # TypeError: one time with a zone, one without
            raise InvalidValue(f"{where}: TIMESTAMP", "a time such as 2023-11-16 18:15:46.6805900", repr(row[0])[:80]) from None
        values = {field: int(text) if re.fullmatch("[0-9]{1,18}", text) else text for field, text in zip(AZURE_FIELDS, row, strict=True)}
        input_length = _number(where, values, "ContextTokens", 1, TOKENS_MAX)
        output_length = _number(where, values, "GeneratedTokens", 0, TOKENS_MAX)
        blocks = div_ceil(input_length, BLOCK_TOKENS)
        if at_ms < 0:
            raise InvalidValue(f"{where}: TIMESTAMP", "a time not before the first line's", row[0])
        if blocks_before + blocks > BLOCKS_MAX:
            raise InvalidValue(where, f"a trace of at most {BLOCKS_MAX * BLOCK_TOKENS} prompt tokens", "more")
        yield TracedRequest(count, at_ms, input_length, output_length, np.arange(blocks_before, blocks_before + blocks))
        blocks_before += blocks
        count += 1


def read_trace(path: Path, limit: int | None = None) -> list[TracedRequest]:
    """The first `limit` requests of a file in either format. Raises InvalidValue naming the file, the line and the field."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(LINE_CHARS_MAX + 1)
            file.seek(0)
            lines = iter(lambda: file.readline(LINE_CHARS_MAX + 1), "")
            if first.lstrip().startswith("{"):
                reader = _mooncake(path.name, lines)
            elif tuple(first.strip().split(",")) == AZURE_FIELDS:
                reader = _azure(path.name, lines)
            else:
                expected = f"a JSON object a line (Mooncake), or a first line {','.join(AZURE_FIELDS)} (Azure)"
                raise InvalidValue(f"{path.name}:1", expected, repr(first[:80]))
            found = list(islice(reader, limit))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidValue(str(path), "a readable trace", str(error)) from None
    if not found:
        raise InvalidValue(path.name, "at least one request", "none")
    return found
