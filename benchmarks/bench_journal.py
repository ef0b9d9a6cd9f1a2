"""What the journal costs: appending a decode step, syncing, a snapshot of a large pool, and coming back.

Each row checks the answer before it is timed (recovered state by digest). Files lie in a temporary folder; `--folder` puts them on the
disk that counts: fsync is its speed, not this program's.

    python benchmarks/bench_journal.py [--quick] [--json] [--folder DIR]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.log.history import History, PageWatch
from kvmanager.log.journal import FSYNC, Journal
from kvmanager.log.recovery import recover
from kvmanager.machine.batch import encode_batch
from kvmanager.machine.commands import Open
from kvmanager.machine.snapshot import snapshot, state_digest
from kvmanager.manager import KVManager

BATCH = 256
PAGE = 64


def expect(condition: object, text: str) -> None:
    if not condition:
        raise SystemExit(f"bench_journal: wrong answer, not timed: {text}")


def bench_append(folder: Path, fsync: str, count: int) -> dict[str, float]:
    """One decode step of 256 sequences, 4 of which cross a page: bytes as they are published, appended on their own."""
    data = step_bytes()
    journal = Journal(str(folder / f"append-{fsync}"), fsync=fsync, segment_bytes=1 << 40)
    journal.recover()
    journal.start(0, b"\x94\x01\x00\x00\x90", bytes(32))
    times = []
    for version in range(1, count + 1):
        began = time.perf_counter_ns()
        journal.append(version, data, time.monotonic_ns() // 1_000_000)
        times.append((time.perf_counter_ns() - began) / 1000)
    journal.close()
    return {"median_us": statistics.median(times), "mean_us": statistics.fmean(times), "record_bytes": len(data) + 24}


def step_bytes() -> bytes:
    """A decode step's batch in the manager's own bytes."""
    manager = KVManager(ManagerConfig((PoolConfig("main", 4 * BATCH, PAGE),)))
    manager.join("w0", "main", "bf16")
    ids = []
    for number in range(BATCH):
        # One in 64 ends its page with the first step, and needs another with the second.
        opened = manager.open(np.full(PAGE - 1 if number % 64 == 0 else 10, number, np.int32), "main", chunk=PAGE)
        ids.append(opened.sequence)
    manager.step(grow=ids)
    taken: list[bytes] = []
    manager.subscribe(lambda batch, data: taken.append(data))
    manager.step(grow=ids)
    expect(len(taken) == 1 and manager.state.pools[0].used == BATCH + 4, "four pages for one step")
    return taken[0]


def bench_step(folder: Path, repeats: int) -> dict[str, float]:
    """A whole decode step of an embedded manager, decided, applied and answered, with a journal and without, in turns."""
    median: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(3):
        for name, found in median.items():
            journal = Journal(str(folder / f"step-{turn}")) if name == "with" else None
            manager = KVManager(ManagerConfig((PoolConfig("main", 100_000, PAGE),), lease_ms=86_400_000), journal=journal)
            manager.join("w0", "main", "bf16")
            ids = np.array([manager.open(np.full(10, each, np.int32), "main", chunk=10).sequence for each in range(BATCH)])
            times = []
            for _ in range(repeats):
                began = time.perf_counter_ns()
                manager.step(grow=ids)
                times.append((time.perf_counter_ns() - began) / 1000)
            found.append(statistics.median(times))
            manager.disconnect()
    return {f"{name}_us": min(found) for name, found in median.items()}


def bench_recovery(folder: Path, num_pages: int, steps: int, prompt_pages: int, page: int) -> dict[str, float]:
    """A pool full of cached prompts of `prompt_pages` pages each, no two alike, a snapshot of it, then decode steps; the process ends and
    the next one comes back."""
    where = str(folder / f"recovery-{prompt_pages}")
    bounds = ManagerConfig((PoolConfig("main", num_pages, page),), lease_ms=86_400_000)
    now = [0]
    manager = KVManager(bounds, clock=lambda: now[0], journal=Journal(where, segment_bytes=1 << 40))
    worker = manager.join("w0", "main", "bf16")
    length, number = prompt_pages * page, 0
    texts = min(steps // 4, 40 * PAGE)  # steps after which one text ends and another begins
    reserve = BATCH * (2 + texts // page + 2) * 2
    at_once = 1 if prompt_pages > 1 else 2048
    while manager.state.pools[0].counts().free > reserve + at_once * prompt_pages:
        prompts = [np.arange(length, dtype=np.int32) + number + each for each in range(at_once)]
        opened = manager.step(opens=[Open(each, "main", chunk=length) for each in prompts]).opened
        sequences = [each.sequence for each in opened if each is not None]
        manager.ack(worker, manager.state.version, ids=sequences, tokens=[length] * at_once)
        manager.step(close=sequences)
        number += at_once
    manager.ack(worker, manager.state.version)
    expect(manager.state.pools[0].counts().cached == number * prompt_pages, "cached pages")
    ids = [manager.open(np.full(10, -1 - each, np.int64).astype(np.int32) & 0x7FFFFFFF, "main", chunk=10).sequence for each in range(BATCH)]
    manager.ack(worker, manager.state.version)
    began = time.perf_counter()
    data = encode_batch(snapshot(manager.state))
    built = time.perf_counter() - began
    began = time.perf_counter()
    expect(manager.compact(), "a new segment")
    compacted = time.perf_counter() - began
    done = 0
    while done < steps:
        manager.step(grow=ids)
        done += 1
        if done % texts == 0:  # texts end, others begin: the pool does not grow for ever
            manager.step(close=ids)
            manager.ack(worker, manager.state.version)
            ids = [manager.open(np.full(10, each, np.int32), "main", chunk=10).sequence for each in range(BATCH)]
            manager.ack(worker, manager.state.version)
    digest, version = state_digest(manager.state), manager.state.version
    manager.disconnect()
    times = []
    for _ in range(3):
        journal = Journal(where)
        began, worked = time.perf_counter(), time.process_time()
        recovered = recover(bounds, journal)
        times.append((time.perf_counter() - began, time.process_time() - worked))
        expect(recovered is not None and recovered.state.version == version, "the version")
        expect(recovered is not None and state_digest(recovered.state) == digest, "the digest")
        journal.close()
        if len(times) < 3:
            del recovered
            gc.collect()
    expect(recovered is not None, "something")
    only = snapshot_only(bounds, where)
    began = time.perf_counter()
    History(where).replay(None, PageWatch("main", 5))
    page_history = time.perf_counter() - began
    return {
        "pages": num_pages,
        "prompt_pages": prompt_pages,
        "page_size": page,
        "steps": steps,
        "batches": recovered.records if recovered is not None else 0,
        "journal_mb": sum(each.stat().st_size for each in Path(where).iterdir()) / 1e6,
        "snapshot_mb": len(data) / 1e6,
        "snapshot_build_s": built,
        "compact_s": compacted,
        "recovery_s": statistics.median(wall for wall, _ in times),
        "recovery_cpu_s": statistics.median(cpu for _, cpu in times),
        "of_which_snapshot_s": only,
        "page_history_s": page_history,
    }


def snapshot_only(bounds: ManagerConfig, where: str) -> float:
    """How long loading the newest segment's snapshot takes without the batches behind it."""
    from kvmanager.log.journal import Segment, segment_names
    from kvmanager.machine.batch import decode_batch
    from kvmanager.machine.snapshot import load_snapshot

    name = segment_names(os.listdir(where))[-1]
    began = time.perf_counter()
    load_snapshot(bounds, decode_batch(bytes(Segment(name, Path(where, name).read_bytes()).snapshot)))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--folder", help="where the files go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvmanager-bench-", dir=options.folder) as name:
        folder = Path(name)
        counts = {"never": 2_000 if options.quick else 100_000, "group": 2_000 if options.quick else 20_000, "always": 200}
        report: dict[str, Any] = {"append": {fsync: bench_append(folder, fsync, counts[fsync]) for fsync in FSYNC}}
        report["step"] = bench_step(folder, 300 if options.quick else 3000)
        size = (20_000, 1_000) if options.quick else (1_000_000, 100_000)
        report["recovery"] = [bench_recovery(folder, *size, prompt_pages, page) for prompt_pages, page in ((128, PAGE), (1, 16))]
    if options.json:
        print(json.dumps(report))
        return
    print("append of a decode step (256 sequences, 4 crossing a page), us")
    for fsync, row in report["append"].items():
        print(f"  fsync {fsync:7} median {row['median_us']:8.1f}   mean {row['mean_us']:8.1f}   record {row['record_bytes']} bytes")
    row = report["step"]
    print(
        f"decode step, nobody crossing, decided, applied and answered: {row['without_us']:.1f} us, with a journal {row['with_us']:.1f} us"
    )
    for row in report["recovery"]:
        print_recovery(row)


def print_recovery(row: dict[str, float]) -> None:
    prompts = f"full of prompts of {row['prompt_pages']} pages of {row['page_size']} tokens, no two alike"
    print(
        f"restart: pool of {row['pages']:,} pages {prompts}; {row['steps']:,} decode steps behind the snapshot ({row['journal_mb']:.0f} MB)"
    )
    print(
        f"  recovery {row['recovery_s']:.2f} s ({row['recovery_cpu_s']:.2f} s of work), {row['of_which_snapshot_s']:.2f} s of it the snapshot of {row['snapshot_mb']:.0f} MB"
    )
    print(f"  a new segment takes {row['compact_s']:.2f} s, {row['snapshot_build_s']:.2f} s of it building the snapshot")
    print(f"  one page's history {row['page_history_s']:.2f} s")


if __name__ == "__main__":
    main()
