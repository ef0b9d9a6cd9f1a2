"""TokenIds: the known token ids of one sequence, whose cached prefix is not copied.

A prompt of 32,768 tokens that is found in the index would cost as many bytes again, and the time to copy them. The runs of the index
nodes it was opened on are bytes that never change, so they are kept as they are; only what comes after them is the sequence's own.
Behaves like the bytearray of little-endian int32 that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

__all__ = ["TokenIds"]


class TokenIds:
    __slots__ = ("_head", "_head_size", "_tail")

    def __init__(self, head: Sequence[bytes], tail: bytes) -> None:
        self._head = tuple(head)
        self._head_size = sum(map(len, self._head)) if head else 0
        self._tail = bytearray(tail)

    def __len__(self) -> int:
        return self._head_size + len(self._tail)

    def __bytes__(self) -> bytes:
        return b"".join((*self._head, self._tail))

    def __getitem__(self, part: slice) -> bytes:
        start, stop, step = part.indices(self._head_size + len(self._tail))
        if start >= self._head_size and step == 1:  # the usual case: what is not in the index yet
            return bytes(self._tail[start - self._head_size : max(stop - self._head_size, 0)])
        return bytes(self)[part]

    def __iadd__(self, data: bytes) -> Self:
        self._tail += data
        return self

    def __delitem__(self, part: slice) -> None:
        """Only the end can be forgotten: `del tokens[n:]`."""
        start, stop, step = part.indices(len(self))
        if stop != len(self) or step != 1:
            raise ValueError(f"token ids: expected a slice up to the end, got {part}")
        if start < self._head_size:
            self._tail = bytearray(bytes(self)[:start])
            self._head, self._head_size = (), 0
        else:
            del self._tail[start - self._head_size :]

    def upto(self, size: int) -> TokenIds:
        """The first `size` bytes as another's token ids; what is shared stays shared."""
        if size < self._head_size:
            return TokenIds((), bytes(self)[:size])
        return TokenIds(self._head, bytes(self._tail[: size - self._head_size]))
