"""What a step's plan takes on the host, and how many bytes it sends: `backend.plan`, from tables to the copy that is under way.

    python3 benchmarks/bench_plan.py

A decode step of a captured graph, page 64, random page ids, on one GPU; no kernel runs. Median and least of 100 plans, one at a time: the copy of
one is over before the next begins.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from measure import median, print_header

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.tables import BatchTables

SHAPES = ((256, 131072, 16), (256, 131072, 128), (256, 4096, 128), (128, 4096, 16), (64, 18432, 16), (1, 4096, 128))
RESERVED = 2  # entries of a row past its length


def tables_of(batch: int, length: int, reserved: int) -> BatchTables:
    counts = -(-length // 64) + reserved
    ids = np.random.default_rng(0).permutation(batch * counts).astype(np.int32)
    return BatchTables(1, 64, np.full(batch, length, np.int32), ids, np.arange(batch + 1) * counts)


def main() -> None:
    print_header()
    for batch, length, heads in SHAPES:
        for options in ({}, {"batch_invariant": True}):
            for reserved in (0, RESERVED):
                tables = tables_of(batch, length, reserved)
                memory = PageMemory(LatentLayout(128, 32, 1, 64), len(tables.page_ids), "cuda")
                backend = MLABackend(memory, heads, 0.1, batch, batch, len(tables.page_ids), **options)
                query_lens, times = [1] * batch, []
                for _ in range(100):
                    start = time.perf_counter()
                    backend.plan(tables, query_lens, graph_batch=batch)
                    times.append((time.perf_counter() - start) * 1e6)
                    torch.cuda.synchronize()
                name = f"{batch} x {heads} x {length}"
                print(
                    f"{name:>18}  reserved {reserved}  {options or 'free'}: {median(times):.0f} us, least {min(times):.0f} us", flush=True
                )
                del backend, memory


if __name__ == "__main__":
    main()
