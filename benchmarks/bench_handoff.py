"""How fast pages move between two processes, beside the ceiling of the same machine in the same run. Bytes are checked first.

    python3 benchmarks/bench_handoff.py                 what this machine can do: host memory; NIXL if installed; CUDA if there are cards
    python3 benchmarks/bench_handoff.py host --pages 64 --json out.json

host   shared memory, two processes, random pages           against copying one large block to another with as many threads
nixl   NIXL over UCX on loopback, DRAM                       against NIXL's own Python wrapper with the same descriptors, one post
nixl-cuda   NIXL between the device memories of both cards      against the same copy_
cuda   CUDA IPC from the first card to the last              against copy_ of one contiguous tensor between the same cards

Times are of the whole pull as an engine sees it: begin_pull to settled, on the host's clock. Median of the repeats, and the best.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.memory import PageMemory, PeerMemory
from kvmanager.attention.transports import nixl as nixl_transport
from kvmanager.attention.transports.base import PullState
from kvmanager.worker.environment import worker_environment

V3 = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
REPEATS = 15


def serve(pipe: Any, layout: LatentLayout, num_pages: int, device: str, transports: tuple[str, ...]) -> None:
    """The source's process: random bytes in its pages, sums on request."""
    torch.set_num_threads(1)
    memory = PageMemory(layout, num_pages, device, transports=transports)
    words = memory.pages.view(torch.int64)
    seed = torch.randint(-(2**62), 2**62, (num_pages, 1, 1, 1), device=memory.device)
    for layer in range(layout.num_layers):
        torch.arange(words[0, 0].numel(), device=memory.device, out=words[0, layer].view(-1))
        words[1:, layer] = words[0, layer] * (2 * layer + 1) + seed[1:, 0]
    if memory.device.type == "cuda":
        torch.cuda.synchronize()
    pipe.send(memory.export())
    while (pages := pipe.recv()) is not None:
        pipe.send(memory.checksums(pages))
    memory.close()


@contextmanager
def serving(layout: LatentLayout, num_pages: int, device: str, transports: tuple[str, ...]) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, layout, num_pages, device, transports), daemon=True)
    process.start()
    if not here.poll(120):
        raise SystemExit("the source did not start")
    try:
        yield here, here.recv()
    finally:
        here.send(None)
        process.join(20)
        process.kill()


def times_of(call: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)


def together(calls: list[tuple[str, Callable[[], object]]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Times of several calls, taken in turns so that a noisy machine disturbs all alike."""
    times: dict[str, list[float]] = {name: [] for name, _ in calls}
    for _, call in calls:
        call()
    for _ in range(repeats):
        for name, call in calls:
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(each) for name, each in times.items()}


def pull(memory: PageMemory, peer: PeerMemory, src: np.ndarray, dst: np.ndarray, **options: Any) -> None:
    started = memory.begin_pull(peer, src, dst, **options)
    if started.wait(60) is not PullState.DONE:
        raise SystemExit(f"the pull ended as {started.state.value}: {started.error}")


class Report:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def row(self, section: str, what: str, num_bytes: int, times: list[float], ceiling: float | None, note: str = "") -> float:
        """Print one line; gives GB/s of the median. `ceiling` is the median's GB/s that 100 % means."""
        median, best = times[len(times) // 2], times[0]
        rate = num_bytes / median / 1e9
        share = "" if ceiling is None else f"{rate / ceiling:7.1%}"
        print(
            f"{section:5} {what:58} {median * 1e3:9.3f} ms {rate:8.2f} GB/s {share:>8}  best {num_bytes / best / 1e9:8.2f}  {note}",
            flush=True,
        )
        self.rows.append(
            {"section": section, "what": what, "bytes": num_bytes, "median_s": median, "best_s": best, "gb_s": rate,
             "of_ceiling": None if ceiling is None else rate / ceiling, "note": note}
        )  # fmt: skip
        return rate


def copy_in_threads(target: np.ndarray, source: np.ndarray, threads: int) -> None:
    """memcpy of one large block, a part a thread."""
    parts = np.linspace(0, len(source), threads + 1).astype(int)
    if threads == 1:
        np.copyto(target, source)
        return
    each = [threading.Thread(target=np.copyto, args=(target[low:high], source[low:high])) for low, high in pairwise(parts)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()


def host_threads(
    report: Report, layout: LatentLayout, export: Any, src: np.ndarray, dst: np.ndarray, sums: np.ndarray, threads: int
) -> None:
    count, page_size = len(src), layout.page_size
    memory = PageMemory(layout, count, copy_threads=threads)
    peer = memory.open_peer(export)
    pull(memory, peer, src, dst, expected=sums)  # right, and every page of both sides has been touched
    num_bytes = count * layout.page_bytes
    one, other = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    shared = PageMemory(layout, count)
    ours, theirs = (each.pages.view(torch.uint8).view(-1).numpy() for each in (memory, shared))
    theirs[:] = 1
    times = together(
        [
            ("memcpy", partial(copy_in_threads, other, one, threads)),
            ("shared", partial(copy_in_threads, ours, theirs, threads)),
            ("pull", partial(pull, memory, peer, src, dst)),
            ("verified", partial(pull, memory, peer, src, dst, expected=sums)),
            ("layers", partial(pull, memory, peer, src, dst, layers=(8, 16))),
        ]
    )
    ceiling = report.row("host", f"memcpy of one private block, {threads} threads", num_bytes, times["memcpy"], None)
    report.row("host", f"memcpy of one shared memory segment, {threads} threads", num_bytes, times["shared"], ceiling)
    name = f"{count} random pages of {page_size}, {threads} threads"
    report.row("host", name, num_bytes, times["pull"], ceiling)
    report.row("host", name + ", verified", num_bytes, times["verified"], ceiling)
    report.row("host", name + ", 8 of 61 layers", num_bytes * 8 // 61, times["layers"], ceiling)
    del one, other, ours, theirs
    shared.close()
    memory.close()


def host_pages(report: Report, rng: np.random.Generator, num_pages: int, page_size: int) -> None:
    layout = LatentLayout(**V3, num_layers=61, page_size=page_size)
    count = num_pages * 64 // page_size
    with serving(layout, 2 * count, "cpu", ("shm",)) as (pipe, export):
        src, dst = rng.permutation(2 * count)[:count], rng.permutation(count)
        pipe.send(src)
        sums = pipe.recv()
        for threads in (1, 2):
            host_threads(report, layout, export, src, dst, sums, threads)


def host(report: Report, num_pages: int) -> None:
    rng = np.random.default_rng(0)
    for page_size in (64, 16):
        host_pages(report, rng, num_pages, page_size)
    big, small = (LatentLayout(**V3, num_layers=61, page_size=size) for size in (64, 16))
    with serving(big, num_pages, "cpu", ("shm",)) as (_, export):
        memory = PageMemory(small, num_pages * 4)
        peer = memory.open_peer(export)
        src, dst = rng.permutation(num_pages), rng.permutation(num_pages * 4)
        num_bytes = num_pages * big.page_bytes
        report.row("host", f"{num_pages} pages of 64 regathered into pages of 16, 1 thread", num_bytes,
                   times_of(partial(pull, memory, peer, src, dst)), None)  # fmt: skip
        one_page = times_of(partial(pull, memory, peer, src[:1], dst[:4]), 50)
        report.row("host", "one page of 64 into four of 16, 1 thread", big.page_bytes, one_page, None)
        memory.close()


def nixl_over(report: Report, rng: np.random.Generator, num_pages: int, tls: str) -> None:
    layout = LatentLayout(**V3, num_layers=61)

    if tls:
        os.environ["UCX_TLS"] = tls
    count = num_pages if not tls else max(1, num_pages // 4)
    with serving(layout, 2 * num_pages, "cpu", ("nixl",)) as (pipe, export):
        memory = PageMemory(layout, num_pages, transports=("nixl",))
        peer = memory.open_peer(export)
        src, dst = rng.permutation(2 * num_pages)[:count], rng.permutation(num_pages)[:count]
        pipe.send(src)
        sums = pipe.recv()
        pull(memory, peer, src, dst, expected=sums)
        fields, size = export["transports"]["nixl"], layout.page_bytes
        agent = nixl_transport.api().nixl_agent("alone", nixl_transport.api().nixl_agent_config(backends=["UCX"]))
        base = memory.pages.data_ptr()
        agent.register_memory(agent.get_reg_descs(np.array([[base, num_pages * size, 0]], np.uint64), "DRAM"))
        name = agent.add_remote_agent(fields["metadata"])

        def alone() -> None:
            ours, theirs = np.zeros((2, len(src), 3), np.uint64)
            ours[:, 0], theirs[:, 0] = base + dst * size, fields["address"] + src * size
            ours[:, 1] = theirs[:, 1] = size
            handle = agent.initialize_xfer("READ", agent.get_xfer_descs(ours, "DRAM"), agent.get_xfer_descs(theirs, "DRAM"), name)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise SystemExit(f"NIXL alone: {state}")
            agent.release_xfer_handle(handle)

        memory.pages.zero_()
        alone()
        if (memory.checksums(dst) != sums).any():
            raise SystemExit("NIXL alone: wrong bytes")
        times = together([("alone", alone), ("pull", partial(pull, memory, peer, src, dst))])
        num_bytes = count * size
        what = "tcp" if tls else "as UCX chooses"
        ceiling = report.row("nixl", f"NIXL alone, {count} random pages of 64, {what}", num_bytes, times["alone"], None)
        report.row("nixl", f"{count} random pages of 64, {what}", num_bytes, times["pull"], ceiling)
        memory.close()


def nixl(report: Report, num_pages: int) -> None:
    """Ours against NIXL's own wrapper: the same source, the same target memory, the same descriptors, checked alike."""
    rng = np.random.default_rng(0)
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    for tls in ("", "tcp,cuda_copy" if torch.cuda.is_available() else "tcp"):  # where there are cards NIXL insists on their transport
        nixl_over(report, rng, num_pages, tls)


def plain_copy(report: Report, first: str, last: str, num_bytes: int) -> float:
    """GB/s of copy_ of one contiguous tensor from one card to the other."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=first)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=last)

    def plain() -> None:
        target.copy_(source)
        torch.cuda.synchronize(last)
        torch.cuda.synchronize(first)

    return report.row("cuda", f"copy_ of one contiguous tensor, {first} to {last}", num_bytes, times_of(plain), None)


def nixl_cuda(report: Report, num_pages: int) -> None:
    """NIXL between device memories of one host: what two hosts use, here over whatever UCX finds."""
    rng = np.random.default_rng(0)
    first, last = "cuda:0", f"cuda:{torch.cuda.device_count() - 1}"
    layout = LatentLayout(**V3, num_layers=61)
    num_bytes = num_pages * layout.page_bytes
    ceiling = plain_copy(report, first, last, num_bytes)
    with serving(layout, 2 * num_pages, first, ("nixl",)) as (pipe, export):
        memory = PageMemory(layout, 2 * num_pages, last, transports=("nixl",))
        peer = memory.open_peer(export)
        print(f"      {peer.choice}")
        src, dst = rng.permutation(2 * num_pages)[:num_pages], rng.permutation(2 * num_pages)[:num_pages]
        pipe.send(src)
        sums = pipe.recv()
        memory.pages.zero_()
        torch.cuda.synchronize(last)
        pull(memory, peer, src, dst, expected=sums)
        for mib in (64, 256, 16):
            nixl_transport.PIECE_BYTES = mib << 20
            times = times_of(partial(pull, memory, peer, src, dst))
            report.row("nixl", f"{num_pages} random pages of 64, device memory, pieces of {mib} MiB", num_bytes, times, ceiling)
        memory.close()


def cuda_pages(report: Report, rng: np.random.Generator, num_pages: int, page_size: int, ends: tuple[str, str], ceiling: float) -> None:
    from kvmanager.attention.transports import cuda_ipc
    from kvmanager.kernels import page_pull

    first, last = ends
    layout = LatentLayout(**V3, num_layers=61, page_size=page_size)
    num_bytes = num_pages * 64 // page_size * layout.page_bytes
    count = num_pages * 64 // page_size
    with serving(layout, 2 * count, first, ("cuda_ipc",)) as (pipe, export):
        memory = PageMemory(layout, 2 * count, last)
        peer = memory.open_peer(export)
        print(f"      {peer.choice}")
        src, dst = rng.permutation(2 * count)[:count], rng.permutation(2 * count)[:count]
        pipe.send(src)
        sums = pipe.recv()

        def checked(what: str) -> None:
            memory.pages.zero_()
            torch.cuda.synchronize(last)
            pull(memory, peer, src, dst)
            if (memory.checksums(dst) != sums).any():
                raise SystemExit(f"wrong bytes: {what}")
            report.row("cuda", what, num_bytes, times_of(partial(pull, memory, peer, src, dst)), ceiling)

        name = f"{count} random pages of {page_size}"
        for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8)):
            page_pull.TILES[True] = (block, warps)
            checked(f"{name}, kernel, {block} words, {warps} warps")
        page_pull.TILES[True] = (2048, 8)
        rule, cuda_ipc.COPY_ENGINE_RUN_BYTES = cuda_ipc.COPY_ENGINE_RUN_BYTES, 1
        checked(f"{name}, copy engines")
        cuda_ipc.COPY_ENGINE_RUN_BYTES = rule
        checked(f"{name}, as chosen")
        report.row(
            "cuda", f"{name}, as chosen, verified", num_bytes, times_of(partial(pull, memory, peer, src, dst, expected=sums)), ceiling
        )
        report.row(
            "cuda",
            f"{name}, 8 of 61 layers",
            num_bytes * 8 // 61,
            times_of(partial(pull, memory, peer, src, dst, layers=(8, 16))),
            ceiling,
        )
        streamed = [(low, min(low + 8, 61)) for low in range(0, 61, 8)]

        def stream() -> None:
            for each in [memory.begin_pull(peer, src, dst, layers=layers) for layers in streamed]:
                each.wait(60)

        report.row("cuda", f"{name}, in {len(streamed)} layer groups at once", num_bytes, times_of(stream), ceiling)
        report.row(
            "cuda", f"one page of {page_size}", layout.page_bytes, times_of(partial(pull, memory, peer, src[:1], dst[:1]), 50), ceiling
        )
        started: list[float] = []
        for _ in range(30):
            begin = time.perf_counter()
            going = memory.begin_pull(peer, src, dst)
            started.append(time.perf_counter() - begin)
            going.wait(60)
        report.row("cuda", f"{name}: begin_pull alone, host time", 0, sorted(started), None)
        report.row("cuda", f"{name}: checksums on one card", num_bytes, times_of(lambda: memory.checksums(dst)), None)
        if page_size == 64:
            small = LatentLayout(**V3, num_layers=61, page_size=16)
            into = PageMemory(small, count * 4, last)
            opened = into.open_peer(export)
            four = rng.permutation(count * 4)
            for block in (512, 1024, 2048):
                page_pull.TILES[False] = (block, 4)
                pull(into, opened, src, four, expected=sums)
                times = times_of(partial(pull, into, opened, src, four))
                report.row("cuda", f"{count} pages of 64 into pages of 16, {block} words", num_bytes, times, ceiling)
            page_pull.TILES[False] = (1024, 4)
            into.close()
        memory.close()


def cuda(report: Report, num_pages: int) -> None:
    rng = np.random.default_rng(0)
    first, last = "cuda:0", f"cuda:{torch.cuda.device_count() - 1}"
    ceiling = plain_copy(report, first, last, num_pages * LatentLayout(**V3, num_layers=61).page_bytes)
    for page_size in (64, 16):
        cuda_pages(report, rng, num_pages, page_size, (first, last), ceiling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", choices=[[], "host", "nixl", "cuda", "nixl-cuda"], help="default: all that this machine can do"
    )
    parser.add_argument("--pages", type=int, default=0, help="pages of 64 slots (4.5 MB each); default 64, on cards 512 (32k tokens)")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    parser.add_argument("--plain-memcpy", action="store_true", help="leave glibc's threshold for streaming stores as it is")
    args = parser.parse_args()
    wanted = dict(os.environ) if args.plain_memcpy else worker_environment(os.environ)
    if wanted != dict(os.environ):  # as a worker's process is to be started, ceilings and all
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    torch.set_num_threads(1)
    has_nixl, cards = any(importlib.util.find_spec(name) for name in nixl_transport.MODULES), torch.cuda.device_count()
    sections = args.sections or ["host"] + ["nixl"] * has_nixl + ["cuda"] * bool(cards) + ["nixl-cuda"] * (has_nixl and bool(cards))
    card = torch.cuda.get_device_name() if cards else "none"
    print(
        f"cards {cards} x {card}  cpus {os.cpu_count()}  torch {torch.__version__}  python {platform.python_version()}  load {os.getloadavg()[0]:.1f}"
    )
    report = Report()
    if "host" in sections:
        host(report, args.pages or 64)
    if "nixl" in sections:
        nixl(report, args.pages or 64)
    if "cuda" in sections:
        cuda(report, args.pages or 512)
    if "nixl-cuda" in sections:
        nixl_cuda(report, args.pages or 512)
    if args.json:
        args.json.write_text(json.dumps({"cards": cards, "card": card, "torch": torch.__version__, "rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
