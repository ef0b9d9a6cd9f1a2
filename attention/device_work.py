"""work.py's lists built on the device, for callers whose lengths are there and must stay there: torch operations, no wait, safe under capture.

The same cuts and the same lists as work.py's free schedule, but that whole sequences are not looked for (`whole_tiles` 0), and that arrays
have the size of the longest lists that there may be. What is left over belongs to no program, and merges of count 0 stand last."""

from __future__ import annotations

import torch
from torch import Tensor

from kvmanager.attention.work import ITEM_FIELDS, MERGE_FIELDS, OVERHEAD_TILES, Shape

__all__ = ["device_work"]

_NOWHERE = 2**62


def device_work(
    shape: Shape, page_stride: int, lengths: Tensor, query_len: int, causal: bool, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """programs, items and merges, int32, for query_len tokens of each sequence; sequence b's pages begin at page_ids[b * page_stride].

    lengths  int32 [batch], device; a negative one counts as 0. A sequence shorter than its query tokens, if causal: the first see nothing
    whole    nothing is cut: a block of rows is one item, whatever else is in the batch, and there are no merges"""
    group = shape.blocks_per_token if query_len == 1 else 1
    lanes = shape.lanes if query_len == 1 else shape.num_programs
    blocks = 1 if query_len == 1 else -(-query_len * shape.num_heads // shape.block_rows)
    num, device = len(lengths) * blocks, lengths.device
    owner = torch.arange(num, device=device) // blocks
    row = (torch.arange(num, device=device) % blocks) * shape.block_rows
    length = lengths.to(torch.int64).clamp(min=0)[owner]
    last_token = ((row + shape.block_rows).clamp(max=query_len * shape.num_heads) - 1) // shape.num_heads
    seen = (length - query_len + last_token + 1).clamp(min=0) if causal and query_len > 1 else length
    tiles = -(-seen // shape.block_tokens)

    # As _cut of work.py: units end to end on a line, one equal share a lane.
    cost = tiles + OVERHEAD_TILES
    ends = torch.cumsum(cost, 0)
    starts, total = ends - cost, ends[-1]
    used = (total // shape.split_tiles_min).clamp(1, lanes)
    share = torch.arange(1, lanes, device=device)
    cut = share * total // used
    unit = torch.searchsorted(ends, cut, right=True).clamp(max=num - 1)
    tile = cut - starts[unit] - OVERHEAD_TILES
    tile = torch.where(tile < shape.split_tiles_min, 0, tile)
    at_end = (tiles[unit] - tile < shape.split_tiles_min) | whole
    place = torch.where(at_end, ends[unit], starts[unit] + tile)
    place = torch.where((share < used) & (place < total), place, _NOWHERE)
    piece = torch.sort(torch.cat([starts, place])).values
    again = torch.cat([piece.new_zeros(1, dtype=torch.bool), piece[1:] == piece[:-1]])
    piece = torch.sort(torch.where(again, _NOWHERE, piece)).values
    is_piece = piece < _NOWHERE
    unit = torch.searchsorted(starts, piece, right=True) - 1
    begin = torch.where(is_piece, piece - starts[unit], 0)
    end = torch.minimum(torch.cat([piece[1:], piece.new_full((1,), _NOWHERE)]) - starts[unit], tiles[unit])
    lane = torch.where(is_piece, torch.searchsorted(place, piece, right=True), lanes)

    # As _work.
    pieces = torch.zeros(num, dtype=torch.int64, device=device).scatter_add_(0, unit, is_piece.long())
    first_piece = torch.cumsum(pieces, 0) - pieces
    split = pieces > 1
    needed = torch.where(split, pieces * group, 0)
    first_partial = torch.cumsum(needed, 0) - needed
    nth = torch.arange(len(piece), device=device) - first_piece[unit]
    member = torch.arange(group, device=device)
    items = torch.empty((len(piece), group, ITEM_FIELDS), dtype=torch.int32, device=device)
    items[:, :, 0] = (owner[unit] * page_stride)[:, None]
    items[:, :, 1] = (owner[unit] * query_len)[:, None]
    items[:, :, 2] = query_len
    items[:, :, 3] = length[unit][:, None]
    items[:, :, 4] = row[unit][:, None] + member * shape.block_rows
    items[:, :, 5] = (begin * shape.block_tokens)[:, None]
    items[:, :, 6] = torch.minimum(end * shape.block_tokens, seen[unit])[:, None]
    partial = (first_partial[unit] + nth)[:, None] + member * pieces[unit][:, None]
    items[:, :, 7] = torch.where(split[unit][:, None], partial, -1)
    flat = items.view(-1, ITEM_FIELDS)
    if group > 1:
        flat = flat[torch.argsort((lane[:, None] * group + member).flatten(), stable=True)]
    loads = torch.zeros(lanes + 1, dtype=torch.int64, device=device).scatter_add_(0, lane, is_piece.long())[:lanes]
    programs = torch.zeros(lanes * group + 1, dtype=torch.int32, device=device)
    programs[1:] = torch.cumsum(loads.repeat_interleave(group, output_size=lanes * group), 0)

    merged = torch.argsort((~split).long(), stable=True)[: 0 if whole else min(num, lanes)]
    merges = torch.zeros((len(merged), group, MERGE_FIELDS), dtype=torch.int32, device=device)
    merges[:, :, 0] = (owner[merged] * query_len)[:, None]
    merges[:, :, 1] = query_len
    merges[:, :, 2] = row[merged][:, None] + member * shape.block_rows
    merges[:, :, 3] = first_partial[merged][:, None] + member * pieces[merged][:, None]
    merges[:, :, 4] = torch.where(split, pieces, 0)[merged][:, None]
    return programs, flat.contiguous(), merges.view(-1, MERGE_FIELDS)
