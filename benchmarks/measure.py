"""What every benchmark here shares: the card's two ceilings, timing by graph replay, and the line that says where it ran."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

COLD_BYTES = 256 * 2**20  # rotate inputs over at least this much, several times any L2 cache


def graph_of(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all `calls`, after a run of each outside of it."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.synchronize()
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph, num_calls: int, replays: int) -> list[float]:
    """Milliseconds a call of each replay but the first two."""
    times = []
    for index in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / num_calls)
    return times


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def graph_ms(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median milliseconds a call, by replaying one CUDA graph of all `calls`."""
    return median(replay_ms(graph_of(calls), len(calls), replays))


class Times(NamedTuple):
    """Milliseconds a call: `burst` is the median of 15 replays on a card that has rested, `sustained` of the end of half a second's work."""

    burst: float
    sustained: float


def rested_ms(calls: list[Callable[[], object]]) -> Times:
    """Both, because they differ: at its power limit an H200 runs matrix products a tenth slower than it starts them."""
    graph = graph_of(calls)
    time.sleep(0.5)
    burst = median(replay_ms(graph, len(calls), 15))
    times: list[float] = []
    until = time.perf_counter() + 0.5
    while time.perf_counter() < until:
        times += replay_ms(graph, len(calls), 8)
    return Times(burst, median(times[len(times) // 2 :]))


def copying() -> tuple[Callable[[], object], float]:
    """A large device copy, and the bytes it reads and writes."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel() * 4


def reading() -> tuple[Callable[[], object], float]:
    """A large device sum, and the bytes it reads."""
    source = torch.randn((2**14, 2**16), device="cuda")
    return lambda: source.sum(1), source.numel() * 4.0


def multiplying() -> tuple[Callable[[], object], float]:
    """A bf16 matrix product of 8,192 x 8,192 x 8,192 on random data, and its FLOPs."""
    a, b = (torch.randn((8192, 8192), device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * 8192**3


def print_header() -> tuple[float, float, float]:
    """Print card and versions; gives the ceilings copy and read (GB/s) and matmul (TFLOP/s), measured now."""
    (copy, copy_bytes), (read, read_bytes), (matmul, flops) = copying(), reading(), multiplying()
    ceilings = (
        copy_bytes / graph_ms([copy] * 4) / 1e6,
        read_bytes / graph_ms([read] * 4) / 1e6,
        flops / graph_ms([matmul] * 8) / 1e9,
    )
    print(
        f"card {torch.cuda.get_device_name()}  torch {torch.__version__}  triton {triton.__version__}  python {platform.python_version()}"
    )
    print(
        f"ceilings at the start: copy {ceilings[0]:,.0f} GB/s, read {ceilings[1]:,.0f} GB/s, bf16 matmul {ceilings[2]:,.0f} TFLOP/s",
        flush=True,
    )
    return ceilings
