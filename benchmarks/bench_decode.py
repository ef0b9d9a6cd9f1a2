"""Decode attention on one GPU: checks each shape against the float64 reference, then times it.

    python3 benchmarks/bench_decode.py [SHAPE ...]      a SHAPE is batch x heads x KV length, such as 128x128x4096 or 128x16x4096r (ragged)

Times one decode call (all splits and the merge) by graph replay over layers whose latents don't fit the L2 cache; the plan is outside and
timed by itself. Floor: the larger of latent, query and output bytes over memory bandwidth (the better of copying and reading: decode mostly
reads) and FLOPs over the matmul rate, all measured in the same run.
"""

from __future__ import annotations

import re
import sys
import time

import torch
from measure import COLD_BYTES, graph_ms, print_header

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import check_attention, make_problem
from kvmanager.attention.layout import LatentLayout

SHAPES = [
    "128x128x4096", "128x128x8192r", "128x128x32768r", "8x128x16384", "1x128x4096", "64x16x8192", "128x16x4096r", "1x16x65536",
]  # fmt: skip


def bench(shape: str, bandwidth: float, matmul: float) -> None:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(r?)", shape)
    if match is None:
        raise SystemExit(f"shape: expected BATCHxHEADSxLENGTH with an r behind for ragged, got {shape}")
    batch, heads, mean = (int(match[index]) for index in (1, 2, 3))
    lengths = [mean] * batch
    if match[4]:
        lengths = (
            torch.normal(float(mean), mean / 2, (batch,), generator=torch.Generator().manual_seed(0)).clamp(64, 2 * mean).int().tolist()
        )
    layout = LatentLayout(512, 64, 1)
    num_layers = max(1, min(32, -(-COLD_BYTES // (sum(lengths) * layout.slot_bytes))))
    layout = LatentLayout(512, 64, num_layers)
    problem = make_problem(layout, lengths, [1] * batch, heads, "cuda", written=True)
    backend = MLABackend(
        problem.memory, heads, problem.scale, max_tokens=batch, max_batch=batch, max_pages=sum(-(-n // 64) for n in lengths)
    )
    plan = backend.plan(problem.tables, problem.query_lens, graph_batch=batch)
    started = time.perf_counter()
    for _ in range(10):
        plan = backend.plan(problem.tables, problem.query_lens, graph_batch=batch)
    plan_ms = (time.perf_counter() - started) * 100
    check_attention(problem, num_layers - 1, *backend.decode(plan, num_layers - 1, problem.q[num_layers - 1]))

    layers = [index % num_layers for index in range(max(8, num_layers))]
    ms = graph_ms([lambda layer=layer: backend.decode(plan, layer, problem.q[layer]) for layer in layers])  # type: ignore[misc]
    num_bytes = sum(lengths) * layout.slot_bytes + batch * heads * (layout.entry + layout.kv_lora_rank) * 2
    flops = sum(lengths) * heads * 2 * (layout.entry + layout.kv_lora_rank)
    floor = max(num_bytes / bandwidth / 1e6, flops / matmul / 1e9)
    print(
        f"{shape:>16}  floor {floor:.4f} ms  decode {ms:.4f} ms  {floor / ms:5.1%} of floor"
        f"  {num_bytes / ms / 1e6:6,.0f} GB/s  {flops / ms / 1e9:5.0f} TFLOP/s  plan {plan_ms:.2f} ms on the host",
        flush=True,
    )


def main() -> None:
    copy, read, matmul = print_header()
    print("512 + 64, bf16, page 64, random tables, page-major; each shape checked against float64 first")
    for shape in sys.argv[1:] or SHAPES:
        bench(shape, max(copy, read), matmul)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
