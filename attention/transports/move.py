"""Which bytes go where, as plain integers: the only description of a transfer that every transport reads.

    source page 7 (64 slots)  [---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----]     one page of 64 slots is four
    target pages 20 to 23     [--- 20 ----]--- 21 ----]--- 22 ----]--- 23 ----]     of 16: four segments

A segment lies within one source page and one target page. Per layer it is one run of bytes; where both sides take whole pages of equal
size, the runs of consecutive layers touch and a segment is one run for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmanager.errors import InvalidValue
from kvmanager.tables import div_ceil

__all__ = ["MOVE_PAGES_MAX", "Move", "Runs", "page_ids", "plan_move"]

MOVE_PAGES_MAX = 1 << 20  # pages of either side in one move


@dataclass(frozen=True, slots=True)
class Runs:
    """Contiguous bytes: length[i] bytes at source[i] of one memory to target[i] of the other. All int64 [n]."""

    source: np.ndarray
    target: np.ndarray
    length: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Token slots to copy, of layers first_layer up to (not including) end_layer. Made by `plan_move`, checked there.

    segments           int64 [n, 5]: source page, first slot in it, target page, first slot in it, number of slots
    row                int64 [n]: which of the source pages given to `plan_move` a segment belongs to
    source_pages       int64 [rows]: those pages
    source_page_size, target_page_size   slots of a page
    """

    segments: np.ndarray
    row: np.ndarray
    source_pages: np.ndarray
    target_pages: np.ndarray
    first_layer: int
    end_layer: int
    source_page_size: int
    target_page_size: int

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def whole(self) -> bool:
        """Every segment is a whole page on both sides: its layers form one run."""
        return self.source_page_size == self.target_page_size and bool((self.segments[:, 4] == self.source_page_size).all())

    def num_bytes(self, slot_bytes: int) -> int:
        return int(self.segments[:, 4].sum()) * self.num_layers * slot_bytes

    def runs(self, num_layers: int, slot_bytes: int) -> Runs:
        """As bytes from the first of either memory, both page-major with `num_layers` layers. Runs that touch on both sides are joined."""
        source_page, source_slot, target_page, target_slot, slots = self.segments.T
        if self.whole:
            source = (source_page * num_layers + self.first_layer) * (self.source_page_size * slot_bytes)
            target = (target_page * num_layers + self.first_layer) * (self.target_page_size * slot_bytes)
            length = np.full(len(source), self.num_layers * self.source_page_size * slot_bytes, np.int64)
        else:
            layers = np.arange(self.first_layer, self.end_layer, dtype=np.int64)[None, :]
            source = (((source_page[:, None] * num_layers + layers) * self.source_page_size + source_slot[:, None]) * slot_bytes).ravel()
            target = (((target_page[:, None] * num_layers + layers) * self.target_page_size + target_slot[:, None]) * slot_bytes).ravel()
            length = np.repeat(slots * slot_bytes, self.num_layers)
        if len(source) < 2:
            return Runs(source, target, length)
        ends = (source[1:] != source[:-1] + length[:-1]) | (target[1:] != target[:-1] + length[:-1])
        first = np.flatnonzero(np.concatenate([[True], ends]))
        return Runs(source[first], target[first], np.add.reduceat(length, first))


def _distinct(ids: np.ndarray) -> bool:
    """Whether no id occurs twice, by marking rather than sorting: a tenth of the time."""
    if len(ids) < 2:
        return True
    seen = np.zeros(int(ids.max()) + 1, bool)
    seen[ids] = True
    return int(np.count_nonzero(seen)) == len(ids)


def page_ids(field: str, ids: Sequence[int] | np.ndarray, num_pages: int, low: int = 0) -> np.ndarray:
    """`ids` as int64 [n], each from `low` to num_pages - 1, or InvalidValue."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidValue(field, "a list of page ids", f"{array.dtype} of shape {array.shape}")
    if array.size > MOVE_PAGES_MAX:
        raise InvalidValue(field, f"at most {MOVE_PAGES_MAX} page ids", array.size)
    array = array.astype(np.int64)
    if array.size and (array.min() < low or array.max() >= num_pages):
        raise InvalidValue(field, f"page ids from {low} to {num_pages - 1}", int(array.min() if array.min() < low else array.max()))
    return array


def plan_move(
    source_pages: np.ndarray,
    target_pages: np.ndarray,
    source_page_size: int,
    target_page_size: int,
    num_layers: int,
    *,
    tokens: int | None = None,
    source_skip: int = 0,
    target_skip: int = 0,
    layers: tuple[int, int] | None = None,
) -> Move:
    """Plan to copy `tokens` consecutive tokens from one list of pages to another.

    source_pages, target_pages   int64, checked page ids; pages of one sequence, in order; targets distinct
    tokens        how many; by default as many as fit both lists, in whole pages if the page sizes are equal
    source_skip   slots of the first source page that come before them (a shared prefix may end within a page of the other size)
    target_skip   the same of the first target page
    layers        (first, end); all by default

    Raises InvalidValue if either list has too few pages, or more than the tokens need.
    """
    first, end = (0, num_layers) if layers is None else layers
    if isinstance(first, bool) or isinstance(end, bool) or not 0 <= first < end <= num_layers:
        raise InvalidValue("layers", f"(first, end) with 0 <= first < end <= {num_layers}", f"({first}, {end})")
    for name, skip, size in (("source_skip", source_skip, source_page_size), ("target_skip", target_skip, target_page_size)):
        if not 0 <= skip < size:
            raise InvalidValue(name, f"0 to {size - 1}", skip)
    sizes = source_page_size, target_page_size
    room = tuple(max(0, len(pages) * size - skip) for pages, size, skip in
                 ((source_pages, source_page_size, source_skip), (target_pages, target_page_size, target_skip)))  # fmt: skip
    if tokens is None:
        tokens = room[0] if source_page_size == target_page_size else min(room)
    if not 0 <= tokens <= room[0]:
        raise InvalidValue("src_page_ids", f"pages for {tokens} tokens", f"{len(source_pages)} of {source_page_size}")
    if tokens > room[1]:
        raise InvalidValue("dst_page_ids", f"pages for {tokens} tokens", f"{len(target_pages)} of {target_page_size}")
    for name, pages, size, skip in (
        ("src_page_ids", source_pages, source_page_size, source_skip),
        ("dst_page_ids", target_pages, target_page_size, target_skip),
    ):
        needed = div_ceil(skip + tokens, size) if tokens else 0
        if len(pages) != needed:
            raise InvalidValue(name, f"{needed} ids of pages of {size} slots for {tokens} tokens", len(pages))
    if not _distinct(target_pages):
        raise InvalidValue("dst_page_ids", "distinct page ids", "some twice")
    if sizes[0] == sizes[1] and not source_skip and not target_skip and tokens == room[0]:  # whole pages, the common case: no cutting
        segments = np.zeros((len(source_pages), 5), np.int64)
        segments[:, 0], segments[:, 2], segments[:, 4] = source_pages, target_pages, source_page_size
        return Move(segments, np.arange(len(segments)), source_pages, target_pages, first, end, source_page_size, target_page_size)
    # A segment ends wherever a page of either side does.
    cuts = [np.arange(size - skip, tokens, size, dtype=np.int64) for size, skip in zip(sizes, (source_skip, target_skip), strict=True)]
    start = np.unique(np.concatenate([np.zeros(1 if tokens else 0, np.int64), *cuts]))
    slots = np.diff(np.concatenate([start, [tokens]])) if len(start) else start
    row, source_slot = np.divmod(start + source_skip, source_page_size)
    column, target_slot = np.divmod(start + target_skip, target_page_size)
    segments = np.stack([source_pages[row], source_slot, target_pages[column], target_slot, slots], axis=1)
    return Move(segments, row, source_pages, target_pages, first, end, source_page_size, target_page_size)
