"""What every benchmark here shares: the card's two ceilings, timing by graph replay, and the line that says where it ran."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
import triton

COLD_BYTES = 256 * 2**20  # rotate inputs over at least this much, several times any L2 cache


def graph_ms(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median milliseconds a call, by replaying one CUDA graph of all `calls`."""
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    torch.cuda.synchronize()
    times = []
    for index in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def copy_gb_s() -> float:
    """Bytes read plus bytes written a second by a large device copy, in GB/s."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    ms = graph_ms([lambda: target.copy_(source)] * 4)
    return 2 * source.numel() * 4 / ms / 1e6


def read_gb_s() -> float:
    """Bytes read a second by a large device sum, in GB/s."""
    source = torch.randn((2**14, 2**16), device="cuda")
    ms = graph_ms([lambda: source.sum(1)] * 4)
    return source.numel() * 4 / ms / 1e6


def matmul_tflop_s() -> float:
    """bf16 matrix product of 8,192 x 8,192 x 8,192 on random data, in TFLOP/s."""
    a, b = (torch.randn((8192, 8192), device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    ms = graph_ms([lambda: torch.mm(a, b, out=out)] * 8)
    return 2 * 8192**3 / ms / 1e9


def print_header() -> tuple[float, float, float]:
    """Print card and versions; gives the ceilings copy and read (GB/s) and matmul (TFLOP/s), measured now."""
    copy, read, matmul = copy_gb_s(), read_gb_s(), matmul_tflop_s()
    print(
        f"card {torch.cuda.get_device_name()}  torch {torch.__version__}  triton {triton.__version__}  python {platform.python_version()}"
    )
    print(f"ceilings of this run: copy {copy:,.0f} GB/s, read {read:,.0f} GB/s, bf16 matmul {matmul:,.0f} TFLOP/s", flush=True)
    return copy, read, matmul
