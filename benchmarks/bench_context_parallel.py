"""Decode of one batch on one card and spread over all cards of a host, merged by NCCL: milliseconds a layer, by CUDA graph replay.

    python3 benchmarks/bench_context_parallel.py [--heads 128]

512 + 64, bf16, page 64, random tables. Each answer is compared with one card's first. The slowest rank's median of 30 replays.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measure import median, print_header

from kvmanager.attention import LatentLayout, MLABackend, PageMemory, merge_across_ranks, part_of
from kvmanager.attention.compare import assert_close, make_problem

REPLAYS = 30
SHAPES = ((8, 131072), (1, 131072), (64, 8192))  # batch, tokens of each


def slowest_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of the slowest rank; all ranks call it."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    slowest = torch.tensor([median(times)], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def bench(batch: int, tokens: int, heads: int, rank: int, ranks: int, device: torch.device) -> None:
    problem = make_problem(LatentLayout(512, 64, 1, 64), [tokens] * batch, [1] * batch, heads, device, seed=3, written=True)
    q = problem.q[0]
    local = PageMemory(problem.memory.layout, -(-problem.memory.num_pages // ranks), device)
    mine = problem.memory.pages[rank::ranks]
    local.pages[: len(mine)] = mine
    part = part_of(problem.tables, ranks, rank)
    single, spread = (
        MLABackend(memory, heads, problem.scale, max_tokens=batch, max_batch=batch, max_pages=problem.memory.num_pages)
        for memory in (problem.memory, local)
    )
    single_plan = single.plan(problem.tables, problem.query_lens)
    plan = spread.plan(part.tables, problem.query_lens, stores=part.stores)
    want = single.decode(single_plan, 0, q)
    out, lse = merge_across_ranks(*spread.decode(plan, 0, q))
    assert_close(out, lse, want[0].double(), want[1].double())
    one = slowest_ms(lambda: single.decode(single_plan, 0, q))
    alone = slowest_ms(lambda: spread.decode(plan, 0, q))
    both = slowest_ms(lambda: merge_across_ranks(*spread.decode(plan, 0, q)))
    own = slowest_ms(lambda: merge_across_ranks(*spread.decode(plan, 0, q), heads="own"))
    if rank == 0:
        print(
            f"{batch:>3} x {heads} x {tokens:>6}  one card {one:.4f} ms  {ranks} cards {both:.4f} ms ({one / both:.2f} x), "
            f'heads="own" {own:.4f} ms ({one / own:.2f} x), a part without the merge {alone:.4f} ms',
            flush=True,
        )


def work(rank: int, ranks: int, store: str, heads: int) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=ranks, device_id=device)
    if rank == 0:
        print_header()
    for batch, tokens in SHAPES:
        bench(batch, tokens, heads, rank, ranks, device)
        torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    options = parser.parse_args()
    ranks = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, str(Path(folder, "store")), options.heads), nprocs=ranks)


if __name__ == "__main__":
    main()
