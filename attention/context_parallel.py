"""Decode with the latents of each sequence spread over ranks: each decodes with all heads over its own part, and their states are merged.

Where a page lives is in its id: page p is page p // ranks of rank p % ranks. So a pool of N pages takes N / ranks on each rank, tables, prefix
sharing and the manager stay as they are, and each rank finds its part of a table by itself. A decode token sees all positions before it,
so which of them a rank holds changes nothing; a rank that holds none gives 0 and -inf, which counts for nothing.

    part = part_of(tables, ranks, rank)                             # host, numpy
    plan = backend.plan(part.tables, [1] * batch, stores=part.stores)
    backend.write(plan, layer, latent)                              # the rank that holds the token's page writes it, the others do not
    out, lse = merge_across_ranks(*backend.decode(plan, layer, q))  # one collective

Decode rows only: several query tokens would need a limit each on every rank. Imports torch.distributed where it is used, and no other transport.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention.states import merge_rows
from kvmanager.errors import InvalidValue
from kvmanager.tables import BatchTables

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RankPart", "merge_across_ranks", "part_of"]

RANKS_MAX = 1024


class RankPart(NamedTuple):
    """What one rank holds of a batch.

    tables  the batch's rows with this rank's pages only, ids of its own memory, and the tokens in them: 0 where it holds none
    stores  bool [batch]: whether the sequence's last token is on this rank
    """

    tables: BatchTables
    stores: np.ndarray


def part_of(tables: BatchTables, ranks: int, rank: int) -> RankPart:
    """The part of a batch's tables that `rank` of `ranks` holds. Raises InvalidValue for ranks out of range and for negative page ids in use.

    Entries behind a length are left out, whatever they are."""
    for field, value, low, high in (("ranks", ranks, 1, RANKS_MAX), ("rank", rank, 0, ranks - 1 if isinstance(ranks, int) else 0)):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise InvalidValue(field, f"an integer from {low} to {high}", value)
    size = tables.page_size
    lengths, starts = np.asarray(tables.lengths).astype(np.int64), np.asarray(tables.page_indptr).astype(np.int64)
    used = -(-lengths // size)
    if (bad := used > np.diff(starts)).any():
        row = int(np.argmax(bad))
        raise InvalidValue("lengths", "tokens that the row's pages hold", f"{int(lengths[row])} in row {row}")
    owner = np.repeat(np.arange(len(lengths)), used)
    entry = np.arange(len(owner), dtype=np.int64) - (np.cumsum(used) - used)[owner]
    ids = np.asarray(tables.page_ids)[starts[owner] + entry].astype(np.int64)
    if (ids < 0).any():
        raise InvalidValue("page_ids", "0 or more", int(ids.min()))
    tokens = np.minimum(lengths[owner] - entry * size, size)  # in each page
    mine = ids % ranks == rank
    held = np.bincount(owner[mine], minlength=len(lengths))
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(held)]).astype(np.int64)
    local = np.bincount(owner[mine], weights=tokens[mine], minlength=len(lengths)).astype(np.int32)  # exact: far below 2**53
    stores = np.zeros(len(lengths), bool)
    stores[owner[mine & (entry == used[owner] - 1)]] = True
    return RankPart(BatchTables(tables.version, size, local, (ids[mine] // ranks).astype(np.int32), indptr), stores)


def merge_across_ranks(
    out: Tensor, lse: Tensor, group: ProcessGroup | None = None, *, heads: Literal["all", "own"] = "all"
) -> tuple[Tensor, Tensor]:
    """The state of all ranks' parts together: out [tokens, heads, width] and lse float32 [tokens, heads] of each rank's part.

    heads  "all": every rank gets every head, by one all-gather
           "own": rank r of R gets heads r * H / R to (r + 1) * H / R, by one all-to-all of 1/R of the bytes: what a tensor-parallel output
           projection wants

    Merged in float32 in the order of the ranks, on each rank alike: the bits depend neither on which message arrives first nor on how the
    collective adds, and with "all" every rank has the same. The group's backend must take the tensors' device (NCCL for CUDA, Gloo for the CPU).
    Collective: all ranks call it, with the same shapes. Never waits for the device; may be captured in a CUDA graph with NCCL.
    """
    import torch.distributed as dist

    if out.ndim != 3 or not out.is_floating_point():
        raise InvalidValue("out", "floats [tokens, heads, width]", f"{out.dtype} {list(out.shape)}")
    if lse.dtype != torch.float32 or lse.shape != out.shape[:2] or lse.device != out.device:
        expected = f"float32 {list(out.shape[:2])} on {out.device}"
        raise InvalidValue("lse", expected, f"{lse.dtype} {list(lse.shape)} on {lse.device}")
    ranks = dist.get_world_size(group)
    tokens, num_heads, width = out.shape
    if heads not in ("all", "own"):
        raise InvalidValue("heads", '"all" or "own"', heads)
    if heads == "own" and num_heads % ranks:
        raise InvalidValue("heads", f'"all": {num_heads} heads are no multiple of {ranks} ranks', heads)
    if (width * out.element_size()) % 4:
        raise InvalidValue("out", "rows of a multiple of 4 bytes", f"{width} of {out.dtype}")
    parts = ranks if heads == "own" else 1
    own_heads = num_heads // parts
    # One message for both: | out of the rows | lse of the rows |, for each rank that gets other rows.
    sent = _Packed(parts, tokens * own_heads, width, out.dtype, out.device)
    sent.outs.view(parts, tokens, own_heads, width).copy_(out.reshape(tokens, parts, own_heads, width).transpose(0, 1))
    sent.lses.view(parts, tokens, own_heads).copy_(lse.reshape(tokens, parts, own_heads).transpose(0, 1))
    got = _Packed(ranks, tokens * own_heads, width, out.dtype, out.device)
    if heads == "all":
        dist.all_gather_into_tensor(got.flat, sent.flat, group)
    else:
        dist.all_to_all_single(got.flat, sent.flat, group=group)
    merged = torch.empty((tokens, own_heads, width), dtype=out.dtype, device=out.device)
    merged_lse = torch.empty((tokens, own_heads), dtype=torch.float32, device=out.device)
    merge_rows(got.outs, got.lses, merged.view(-1, width), merged_lse.view(-1))
    return merged, merged_lse


class _Packed:
    """Messages [parts] of `rows` rows: bytes, and what they mean as views."""

    def __init__(self, parts: int, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        out_bytes = rows * width * dtype.itemsize
        whole = torch.empty((parts, out_bytes + 4 * rows), dtype=torch.uint8, device=device)
        self.flat = whole.view(-1)
        self.outs = whole[:, :out_bytes].view(dtype).unflatten(1, (rows, width))
        self.lses = whole[:, out_bytes:].view(torch.float32)
