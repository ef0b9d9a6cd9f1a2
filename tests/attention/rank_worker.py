"""One rank of a context-parallel decode: python rank_worker.py STORE RANKS DEVICE RANK. Prints a digest of the bits; fails with what differs.

Every rank makes the whole problem from one seed, so that each can check the merged answer by itself."""

from __future__ import annotations

import hashlib
import sys

import torch
import torch.distributed as dist

from kvmanager.attention import LatentLayout, MLABackend, PageMemory, merge_across_ranks, part_of
from kvmanager.attention.compare import Problem, assert_close, check_attention, make_problem
from kvmanager.tables import BatchTables


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def backend_of(memory: PageMemory, heads: int, scale: float) -> MLABackend:
    return MLABackend(memory, heads, scale, max_tokens=64, max_batch=64, max_pages=8192)


def check(problem: Problem, rank: int, ranks: int) -> str:
    """A step on this rank's part of the pages: the new latents are written by the rank that holds their page, then all are decoded."""
    layout, heads, device = problem.memory.layout, problem.q.shape[2], problem.q.device
    batch = len(problem.query_lens)
    whole = problem.memory
    local = PageMemory(layout, -(-whole.num_pages // ranks), device)
    mine = whole.pages[rank::ranks]
    local.pages.fill_(float("nan"))
    local.pages[: len(mine)] = mine  # before this step: its tokens' slots are NaN
    backend = backend_of(local, heads, problem.scale)
    part = part_of(problem.tables, ranks, rank)
    plan = backend.plan(part.tables, [1] * batch, stores=part.stores)
    backend.write(plan, 0, problem.latent[0])
    state = backend.decode(plan, 0, problem.q[0])
    out, lse = merge_across_ranks(*state)

    single = backend_of(whole, heads, problem.scale)
    whole_plan = single.plan(problem.tables, problem.query_lens)
    single.write(whole_plan, 0, problem.latent[0])
    assert torch.equal(local.pages[: len(mine)].nan_to_num(nan=7.0), whole.pages[rank::ranks].nan_to_num(nan=7.0))
    check_attention(problem, 0, out, lse)  # float64
    alone, alone_lse = single.decode(whole_plan, 0, problem.q[0])
    assert_close(out, lse, alone.double(), alone_lse.double())
    assert torch.isneginf(lse[0]).all() and not out[0].any()  # the row of no tokens

    bits = digest(out, lse)
    for _ in range(19):
        again = merge_across_ranks(*backend.decode(plan, 0, problem.q[0]))
        assert digest(*again) == bits
    if heads % ranks == 0:
        own, own_lse = merge_across_ranks(*state, heads="own")
        part_heads = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        assert torch.equal(own, out[:, part_heads]) and torch.equal(own_lse, lse[:, part_heads])
    return bits


def check_long(rank: int, ranks: int, heads: int) -> str:
    """Two sequences of 131,072: against float64, and nothing waits for the device."""
    layout = LatentLayout(512, 64, 1, 64)
    problem = make_problem(layout, [131072] * 2, [1] * 2, heads, f"cuda:{rank}", seed=5, written=True)
    part = part_of(problem.tables, ranks, rank)
    local = PageMemory(layout, -(-problem.memory.num_pages // ranks), f"cuda:{rank}")
    mine = problem.memory.pages[rank::ranks]
    local.pages[: len(mine)] = mine
    backend = backend_of(local, heads, problem.scale)
    torch.cuda.synchronize()
    plan = backend.plan(part.tables, [1] * 2, stores=part.stores)
    merge_across_ranks(*backend.decode(plan, 0, problem.q[0]))
    torch.cuda.set_sync_debug_mode("error")
    out, lse = merge_across_ranks(*backend.decode(plan, 0, problem.q[0]))
    torch.cuda.set_sync_debug_mode("default")
    check_attention(problem, 0, out, lse)
    return digest(out, lse)


def main() -> None:
    store, ranks, device, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    where = f"cuda:{rank}" if device == "cuda" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    bits = []
    for heads, dtype in ((16, "bfloat16"), (3, "bfloat16"), (4, "float32")) if device == "cpu" else ((128, "bfloat16"), (3, "float16")):
        layout = LatentLayout(512 if device == "cuda" else 64, 64 if device == "cuda" else 32, 1, 16, dtype)  # type: ignore[arg-type]
        problem = make_problem(layout, [0, 1, 2, 15, 16, 17, 33, 300, 3000], [1] * 9, heads, where, seed=heads)
        bits.append(check(problem, rank, ranks))
    if device == "cuda":
        bits.append(check_long(rank, ranks, 128))
    empty = BatchTables(1, 16, problem.tables.lengths[:0], problem.tables.page_ids[:0], problem.tables.page_indptr[:1])
    assert part_of(empty, ranks, rank).tables.batch == 0
    dist.barrier()
    dist.destroy_process_group()
    print("-".join(bits))


if __name__ == "__main__":
    main()
