"""What a step's plan takes on the host, and how many bytes it sends: `backend.plan`, from tables to the copy that is under way.

    python3 benchmarks/bench_plan.py

A decode step of a captured graph, page 64, random page ids, on one GPU; no kernel runs. Two ways to hand the tables over:

    arrays   BatchTables: all page ids go over each time
    rows     Replica.batch_rows with page tables that stay on the device: what changed goes over, and the device makes the work list

and for `rows`: lengths at random (each step some sequences begin a page), all sequences begin one at the same step, or at each step one is closed
and another opened in its place. Every step all sequences grow by a token. Median and least of the plans, one at a time: the copy of one is over
before the next begins. "rows of the replica" is what the replica takes to hand its rows over; "device" what the launch behind the copy takes, and
an empty launch beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from measure import graph_ms, median, print_header
from result_files import write_results

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory
from kvmanager.kernels.step_plan import Sent
from kvmanager.pages.sequences import Tables
from kvmanager.tables import BatchRows

SHAPES = ((256, 131072, 16), (256, 131072, 128), (256, 4096, 128), (128, 4096, 16), (64, 18432, 16), (1, 4096, 128))
RESERVED = 8  # entries of a row past its length
STEPS = 192
ID_BITS = 20


def tables_of(batch: int, length: int, ragged: bool, common: int = 0) -> Tables:
    """Sequences of about `length` tokens, the first `common` of which they share."""
    tables, rng = Tables(), np.random.default_rng(0)
    lengths = length - (rng.integers(0, 64, batch) if ragged else np.full(batch, 63))
    counts = -(-lengths // 64) + RESERVED
    ids = rng.permutation(int(counts.sum())).astype(np.int32)
    ends = np.cumsum(counts)
    for row, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        pages = ids[end - count : end].copy()
        pages[: common // 64] = ids[: common // 64]
        tables.open(1 << ID_BITS | row, 0, int(lengths[row]), pages)
    return tables


def measure(backend: MLABackend, tables: Tables, batch: int, as_rows: bool, churn: bool = False) -> dict[str, list[float]]:
    """Microseconds and bytes of each step but the first eight: in those, what is kept is made."""
    rows, found = np.arange(batch), {"plan": [], "rows": [], "bytes": []}  # type: dict[str, list[float]]
    for step in range(STEPS):
        if churn:
            slot = step % batch
            sequence, length = int(tables.ids[slot]), int(tables.lengths[slot])
            pages = tables.pages_of(sequence)
            tables.close(sequence)
            tables.open((step + 2) << ID_BITS | slot, 0, length, pages)
            rows = rows.copy()
        start = time.perf_counter()
        given = BatchRows(1, 64, tables.lengths.take(rows), rows, tables)
        at = time.perf_counter()
        handed = given if as_rows else given.gathered()
        before = time.perf_counter()
        backend.plan(handed, 1, graph_batch=batch)
        found["plan"].append((time.perf_counter() - before) * 1e6)
        found["rows"].append((at - start) * 1e6)
        found["bytes"].append(backend.plan_bytes)
        torch.cuda.synchronize()
        tables.lengths[rows] += 1
    return {name: values[8:] for name, values in found.items()}


def line(name: str, times: list[float], sent: list[float]) -> dict[str, Any]:
    """Print a row, and give it as results have it."""
    ordered = sorted(times)
    print(
        f"{name:<66} {median(times):7.1f} us, least {ordered[0]:6.1f}, 9 of 10 below {ordered[len(ordered) * 9 // 10]:7.1f}; "
        f"{median(sent):9,.0f} bytes, most {max(sent):9,.0f}",
        flush=True,
    )
    return {"shape": name, "ours_ms": median(times) / 1e3, "least_ms": ordered[0] / 1e3, "bytes": max(sent), "note": f"{max(sent):,} bytes"}


def breakdown(backend: MLABackend, batch: int) -> None:
    """What the calls take of which a plan of rows consists, each alone."""
    assert backend._cuda is not None
    staging = backend._cuda._staging
    ring, sent = staging._ring, Sent(staging._slots_at // 4 - 3 * batch, 0, 0, batch)

    def alone(run: Callable[[], object]) -> Callable[[], object]:
        """With the ring where it was, so that each call does the same."""
        index = ring._index

        def call() -> None:
            ring._index = index
            run()

        return call

    launch = partial(staging._finish, sent, True)
    call: dict[str, Callable[[], object]] = {
        "a numpy addition of 256 numbers": partial(np.add, np.arange(256), 1),
        "waiting for the ring's next buffer": alone(ring.begin),
        "copy and launch as a graph": alone(partial(ring.replay, 4 * sent.first, staging._slots_at, sent, staging._finish)),
        "the copy alone, as a call": alone(partial(ring.send, 4 * sent.first, staging._slots_at)),
        "the launch alone, as a call": launch,
    }
    for name, run in call.items():
        times = []
        for _ in range(200):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e6)
            torch.cuda.synchronize()
        print(f"    {name:<62} {median(times):7.1f} us, least {min(times):6.1f}")
    tiny = torch.zeros(1, device="cuda")
    print(
        f"    device: the launch {graph_ms([launch] * 200) * 1e3:.2f} us, an empty one {graph_ms([lambda: tiny.add_(0)] * 200) * 1e3:.2f} us",
        flush=True,
    )


def backend_of(batch: int, length: int, heads: int, **options: Any) -> MLABackend:
    width = -(-length // 64) + RESERVED
    memory = PageMemory(LatentLayout(128, 32, 1, 64), batch * width, "cuda")
    return MLABackend(memory, heads, 0.1, batch, batch, batch * width, sequence_pages=width, resident_rows=batch, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the first two shapes alone")
    arguments = parser.parse_args()
    print_header()
    rows = []
    for batch, length, heads in SHAPES[:2] if arguments.short else SHAPES:
        name = f"{batch} x {heads} x {length}"
        backend = backend_of(batch, length, heads)
        for label, as_rows, ragged, churn in (
            ("arrays", False, True, False),
            ("rows", True, True, False),
            ("rows, all begin a page at once", True, False, False),
            ("rows, one closed and one opened", True, True, True),
        ):
            found = measure(backend, tables_of(batch, length, ragged), batch, as_rows, churn)
            rows.append(line(f"{name}, {label}", found["plan"], found["bytes"]))
            if label == "rows":
                print(f"    rows of the replica {median(found['rows']):.1f} us")
        if batch == 256:
            breakdown(backend, batch)
        del backend
        backend = backend_of(batch, length, heads, batch_invariant=True)
        for label, as_rows in (("arrays", False), ("rows", True)):
            found = measure(backend, tables_of(batch, length, True), batch, as_rows)
            rows.append(line(f"{name}, batch_invariant, {label}", found["plan"], found["bytes"]))
        del backend
    for batch, length, heads, common in ((64, 18432, 16, 16384), (256, 4096, 16, 2048)):
        backend = backend_of(batch, length, heads)
        for label, as_rows in (("arrays", False), ("rows", True)):
            found = measure(backend, tables_of(batch, length, True, common), batch, as_rows)
            rows.append(line(f"{batch} x {heads} x {length}, {common} shared, {label}", found["plan"], found["bytes"]))
        del backend
    write_results("plan", rows)


if __name__ == "__main__":
    main()
