"""Decode of sequences that share a prefix: read once for all of them, and once for each, in one run on one GPU.

    python3 benchmarks/bench_cascade.py [SHAPE ...]

A SHAPE is batch x heads x KV length, then what is shared: sLATENTS (none without it), gN (in N groups), and e4m3 or fp8_ds_mla (how latents are
stored); such as 64x16x18432s16384 or 64x16x18432s16384g2. Each is checked against the float64 reference first, both ways, then timed by graph replay,
merge included, plan outside, over layers that don't fit the L2 cache: bursts on a rested card, the better of two turns.

"once" is the backend as it is by default; where its cost model leaves rows apart, "forced" shows what grouping them would have taken. The floor is
that of work read once: the larger of unique latent, query and output bytes over memory bandwidth and FLOPs over the matmul rate of the same run.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bench_decode import FORMATS
from measure import COLD_BYTES, Times, multiplying, print_header, rested_ms
from result_files import write_results

from kvmanager.attention import shared_prefix, staging
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention, make_problem, share_pages
from kvmanager.attention.layout import LatentLayout

SHAPES = [
    "64x16x18432s16384", "64x16x18432s16384g2", "64x128x18432s16384", "128x16x4096", "128x128x4096",
    "64x8x18432s16384", "64x40x18432s16384", "8x16x18432s16384", "64x16x3072s1024", "128x16x8192s4096g16", "16x16x131072s129024",
    "32x64x34816s32768",
    "64x16x18432s16384fp8_ds_mla", "64x16x18432s16384e4m3",
]  # fmt: skip
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(?:s(\d+))?(?:g(\d+))?(e4m3|fp8_ds_mla)?")
TURNS = 2


def problem_of(shape: str) -> tuple[Problem, int, int]:
    """The problem, latents that are shared, and groups."""
    match = SHAPE.fullmatch(shape)
    if match is None:
        raise SystemExit(f"shape: expected BATCHxHEADSxLENGTH, then sLATENTS, gN, FORMAT as needed, got {shape}")
    batch, heads, length = (int(match[index]) for index in (1, 2, 3))
    shared, groups = int(match[4] or 0), int(match[5] or 1)
    layout = LatentLayout(512, 64, 1, 64, **FORMATS[match[6]])
    unique = groups * shared + batch * (length - shared)
    layout = replace(layout, num_layers=max(1, min(8, -(-COLD_BYTES // (unique * layout.slot_bytes)))))
    problem = make_problem(layout, [length] * batch, [1] * batch, heads, "cuda", written=True)
    rows = batch // groups
    if shared:
        problem = share_pages(problem, [(first, rows, shared // 64) for first in range(0, batch, rows)])
    return problem, shared, groups


def backend_of(problem: Problem, share: bool) -> MLABackend:
    batch = problem.tables.batch
    pages = sum(-(-length // 64) for length in problem.tables.lengths.tolist())
    return MLABackend(problem.memory, problem.q.shape[2], problem.scale, batch, batch, pages, share_prefixes=share)


def bench(shape: str, bandwidth: float, matmul: Times) -> dict[str, Any]:
    problem, shared, groups = problem_of(shape)
    layout, heads, batch = problem.memory.layout, problem.q.shape[2], problem.tables.batch
    length, num_layers = int(problem.tables.lengths[0]), layout.num_layers
    layers = [index % num_layers for index in range(max(8, num_layers))]
    calls: dict[str, list[Callable[[], object]]] = {}
    kinds = {"apart": False, "once": True}
    model = shared_prefix.gain, staging.WORTH
    found, plan_us, kernel = 0, 0.0, ""
    while kinds:
        name, share = kinds.popitem()
        backend = backend_of(problem, share)
        kernel = backend.kernel
        if name == "forced":
            shared_prefix.gain, staging.WORTH = (lambda shape, rows, tiles: float(rows * tiles)), float("inf")
        plan = backend.plan(problem.tables, problem.query_lens, graph_batch=batch)
        assert plan.device is not None
        if name == "once":
            found = len(plan.device.groups)
            times = []
            for _ in range(30):
                start = time.perf_counter()
                plan = backend.plan(problem.tables, problem.query_lens, graph_batch=batch)
                times.append(time.perf_counter() - start)
            plan_us = sorted(times)[len(times) // 2] * 1e6
            if shared and not found:
                kinds["forced"] = True
        shared_prefix.gain, staging.WORTH = model
        check_attention(problem, num_layers - 1, *backend.decode(plan, num_layers - 1, problem.q[num_layers - 1]))
        calls[name] = [lambda layer=layer, plan=plan, own=backend: own.decode(plan, layer, problem.q[layer]) for layer in layers]  # type: ignore[misc]
    best = dict.fromkeys(calls, Times(float("inf"), float("inf")))
    for _ in range(TURNS):
        for name, some in calls.items():
            best[name] = Times(*map(min, best[name], rested_ms(some)))
    ends = batch * heads * (layout.entry + layout.kv_lora_rank) * 2
    unique = (groups * shared + batch * (length - shared)) * layout.slot_bytes + ends
    flops = batch * length * heads * 2 * (layout.entry + layout.kv_lora_rank)
    floor = max(unique / bandwidth / 1e6, flops / matmul.burst / 1e9)
    apart_floor = max((batch * length * layout.slot_bytes + ends) / bandwidth / 1e6, flops / matmul.burst / 1e9)
    row: dict[str, Any] = {
        "shape": shape,
        "kernel": kernel,
        "floor_ms": floor,
        "apart_floor_ms": apart_floor,
        "groups": found,
        "plan_us": plan_us,
    }
    line = f"{shape:>27}  {kernel}  floor {floor:.4f} ms (apart {apart_floor:.4f})"
    for name, ms in sorted(best.items()):
        line += f"  {name} {ms.burst:.4f} ms [{ms.sustained:.4f}]"
        row |= {f"{name}_ms": ms.burst, f"{name}_sustained_ms": ms.sustained}
        if name != "apart":
            line += f" {best['apart'].burst / ms.burst:.2f} x"
    print(f"{line}  of floor {floor / best['once'].burst:.0%}  {found} groups  plan {plan_us:.0f} us", flush=True)
    return row


def main() -> None:
    copy, read, _ = print_header()
    product, flops = multiplying()
    matmul = Times(*(flops / ms / 1e9 for ms in rested_ms([product] * 8)))
    print(
        f"bf16 matmul on a rested card {matmul.burst:,.0f} TFLOP/s, sustained {matmul.sustained:,.0f}; 512 + 64, page 64, bf16 unless said"
    )
    del product
    rows = []
    ceilings = {"copy_gb_s": copy, "read_gb_s": read, "matmul_tflop_s": matmul.burst}
    for shape in sys.argv[1:] or SHAPES:
        rows.append(bench(shape, max(copy, read), matmul))
        torch.cuda.empty_cache()
        write_results("cascade", rows, **ceilings)


if __name__ == "__main__":
    main()
