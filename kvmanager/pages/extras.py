"""Extra keys of token ranges: an image hash, an adapter for a part of a prompt. What else must be equal, from a certain token on, to share.

A latent depends on every token before it, so a key matters from the first token of its range on, and only there it has to be compared: two
prompts that agree up to and in that token, key and all, have the same key at the same place. So the first token of a range is written
into the prompt as a negative number, an id, that stands for (token id, the ranges that begin there: length and key). Token ids are
never negative. What results is compared, cut, indexed and waited for like any other prompt, and equality stays equality: the table below
knows each id's meaning, gives one meaning one id, and never uses an id again.

An id lives as long as somebody uses it: sequences, waiting prompts and index nodes, counted by its occurrences in their token ids. It goes at
the end of the batch in which the last use went, so that what is decided against the state before the batch still finds it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from kvmanager.errors import InvariantBroken, TooMany
from kvmanager.pages.token_ids import TokenIds

__all__ = ["Extras", "ExtrasDraft", "describe"]

ID_MIN = -(2**31)


def describe(tokens: np.ndarray, ranges: Iterable[tuple[bytes, int, int]]) -> dict[int, bytes]:
    """Meaning of each range's first token, by its place: `ranges` are (key, start, stop), sorted. Injective: lengths lead."""
    found: dict[int, bytes] = {}
    for key, start, stop in ranges:
        before = found.get(start) or struct.pack("<i", int(tokens[start]))
        found[start] = before + struct.pack("<IH", stop - start, len(key)) + key
    return found


class Extras:
    """Which id stands for what, and how often each is used: all pools' and tenants', since an id says nothing outside its namespace."""

    def __init__(self) -> None:
        self.ids: dict[bytes, int] = {}
        self.meanings: dict[int, bytes] = {}
        self.uses: dict[int, int] = {}
        self.next_id = -1  # downwards
        self._unused: dict[int, None] = {}  # since this batch

    def named(self) -> tuple[int, np.ndarray, np.ndarray, bytes]:
        """All of them, for a snapshot: the fields of `ExtrasNamed`."""
        ids = sorted(self.meanings)
        meanings = [self.meanings[each] for each in ids]
        sizes = np.array([len(each) for each in meanings], np.int32)
        return self.next_id, np.array(ids, np.int32), sizes, b"".join(meanings)

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def name(self, next_id: int, ids: np.ndarray, sizes: np.ndarray, meanings: bytes) -> None:
        """New ids and what they mean: the fields of `ExtrasNamed`."""
        at = 0
        for extra_id, size in zip(ids.tolist(), sizes.tolist(), strict=True):
            meaning = meanings[at : at + size]
            self.ids[meaning], self.meanings[extra_id], self.uses[extra_id] = extra_id, meaning, 0
            self._unused[extra_id] = None
            at += size
        self.next_id = next_id

    def count(self, tokens: bytes | bytearray | TokenIds, by: int) -> None:
        """Token ids that are used once more (by = 1), or once less (-1). Next to nothing while there are no extra keys at all."""
        if not self.uses:
            return
        array = np.frombuffer(bytes(tokens), "<i4")
        for extra_id in array[array < 0].tolist():
            left = self.uses.get(extra_id, 0) + by
            if left < 0 or extra_id not in self.uses:
                raise InvariantBroken(f"extra key {extra_id}: used {left} times")
            self.uses[extra_id] = left
            if left == 0:
                self._unused[extra_id] = None

    def sweep(self) -> None:
        """At the end of a batch: forget what nobody uses any more."""
        for extra_id in self._unused:
            if not self.uses[extra_id]:
                del self.uses[extra_id]
                del self.ids[self.meanings.pop(extra_id)]
        self._unused = {}


class ExtrasDraft:
    """Ids that a command being decided has found or would give. A prompt that is refused in the end leaves a gap in the numbers, no more."""

    def __init__(self, extras: Extras, limit: int) -> None:
        self.extras = extras
        self.limit = limit
        self.fresh: dict[bytes, int] = {}
        self.logged: dict[bytes, None] = {}

    def write_in(self, tokens: np.ndarray, ranges: Sequence[tuple[bytes, int, int]]) -> np.ndarray:
        """`tokens` with the first token of each range replaced by its id. Raises TooMany."""
        if not ranges:
            return tokens
        written = tokens.copy()
        for place, meaning in describe(tokens, ranges).items():
            written[place] = self._id(meaning)
        return written

    def _id(self, meaning: bytes) -> int:
        found = self.extras.ids.get(meaning) or self.fresh.get(meaning)
        if found is None:
            found = self.extras.next_id - len(self.fresh)
            if len(self.extras.ids) + len(self.fresh) >= self.limit or found < ID_MIN:
                raise TooMany("extra keys", self.limit)
            self.fresh[meaning] = found
        return found

    def to_name(self, written: np.ndarray) -> tuple[int, np.ndarray, np.ndarray, bytes] | None:
        """The ids in a prompt that is taken are named before it: the fields of `ExtrasNamed`, or None if all of them are known."""
        if len(self.logged) == len(self.fresh):
            return None
        used = dict.fromkeys(written[written < 0].tolist())
        new = [(extra_id, meaning) for meaning, extra_id in self.fresh.items() if extra_id in used and meaning not in self.logged]
        if not new:
            return None
        self.logged.update(dict.fromkeys(meaning for _, meaning in new))
        sizes = np.array([len(meaning) for _, meaning in new], np.int32)
        ids = np.array([extra_id for extra_id, _ in new], np.int32)
        return self.extras.next_id - len(self.fresh), ids, sizes, b"".join(meaning for _, meaning in new)
