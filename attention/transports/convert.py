"""Pages of one format made into pages of another on their way: byte for byte what a write of the same latents would have put there.

The source's pages are read as they are, into a staging buffer that is a memory of a few of its pages; their sums are taken there, of the bytes
that arrived; then the target's worker encodes them into its own pages. Over CUDA IPC without sums one kernel does it all, straight from the peer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.torch_path import encode
from kvmanager.attention.transports.move import Move

__all__ = ["STAGING_BYTES", "StagedPart", "convert_pages", "new_staging", "staged_pages", "staged_parts"]

STAGING_BYTES = 64 << 20  # of one peer's pages that wait to be converted, at most: or two pages, if they are larger


def staged_pages(layout: LatentLayout) -> int:
    """How many of a source's pages a staging buffer holds."""
    return max(2, STAGING_BYTES // layout.page_bytes)


def new_staging(layout: LatentLayout, num_pages: int, device: torch.device) -> Tensor:
    """[num_pages, num_layers, page_size, storage_width]"""
    shape = (num_pages, layout.num_layers, layout.page_size, layout.storage_width)
    return torch.empty(shape, dtype=getattr(torch, layout.storage_dtype), device=device)


class StagedPart(NamedTuple):
    """Some source pages of a move, by way of staged ones, which are numbered from 0 and as large: segments [n, 5] as a Move has them.

    read       from the source into staged pages, each slot at its place
    converted  from there into the target's pages
    row        int64 [n]  row of the move that each is of
    """

    read: np.ndarray
    converted: np.ndarray
    row: np.ndarray

    @property
    def summed(self) -> np.ndarray:
        """[n, 4]: which staged slots there are then, as `sum_segments` takes them."""
        return self.read[:, [2, 3, 4, 1]]


def staged_parts(move: Move, num_pages: int) -> Iterator[StagedPart]:
    """A move in parts of at most so many source pages, in order."""
    for first in range(0, len(move.source_pages), num_pages):
        part = (move.row >= first) & (move.row < first + num_pages)
        row, segments = move.row[part], move.segments[part]
        read, converted = segments.copy(), segments.copy()
        read[:, 2], read[:, 3], converted[:, 0] = row - first, segments[:, 1], row - first
        yield StagedPart(read, converted, row)


def convert_pages(
    source: Tensor, source_size: int, target: Tensor, layout: LatentLayout, segments: np.ndarray | Tensor, layers: tuple[int, int]
) -> None:
    """Encode token slots into pages of `layout`.

    source    [any, num_layers, source_size, entry], contiguous, of a format that `layout` converts
    target    [num_pages, num_layers, page_size, storage_width], contiguous, on the same device
    segments  [n, 5]: source page, its first slot, target page, its first slot, slots; for CUDA int32 on the device
    layers    (first, end)

    On CUDA one launch in the current stream, which nothing here waits for."""
    if source.device.type == "cuda":
        assert isinstance(segments, Tensor)
        convert_from(source.data_ptr(), source_size, target, layout, segments, layers)
        return
    first, end = layers
    theirs, ours = source.view(len(source), layout.num_layers, source_size, -1), target.view(torch.uint8)
    steps = [(first, end)] if len(set(layout.scales)) < 2 else [(layer, layer + 1) for layer in range(first, end)]
    for page, slot, target_page, target_slot, slots in segments.tolist():
        for low, high in steps:
            rows = encode(theirs[page, low:high, slot : slot + slots].flatten(0, 1), target.dtype, layout.scale_of(low))
            place = ours[target_page, low:high, target_slot : target_slot + slots]
            place.copy_(rows.view(torch.uint8).view(place.shape))


def convert_from(address: int, source_size: int, target: Tensor, layout: LatentLayout, segments: Tensor, layers: tuple[int, int]) -> None:
    """The same from an address that the target's card can read. int32 segments on that card; launches in the current stream."""
    from kvmanager.kernels.latent_formats import view_pages
    from kvmanager.kernels.page_pull import convert_pages as launch

    launch(
        address,
        view_pages(target, layout.kv_lora_rank),
        _inverse(layout, str(target.device)),
        segments,
        source_page_size=source_size,
        first_layer=layers[0],
        end_layer=layers[1],
    )


@lru_cache(maxsize=16)
def _inverse(layout: LatentLayout, device: str) -> Tensor:
    """What each layer's values are multiplied by before they are rounded: float32 [num_layers]."""
    return torch.tensor([1.0 / layout.scale_of(layer) for layer in range(layout.num_layers)], dtype=torch.float32, device=device)
