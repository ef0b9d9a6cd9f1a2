"""Decode attention on one GPU: checks each shape against the float64 reference, then times it beside the peers that are there.

    python3 benchmarks/bench_decode.py [SHAPE ...]

A SHAPE is batch x heads x KV length, then any of: r (ragged), qN (N query tokens, causal), dRANK+ROPE, pPAGE, and e4m3 or fp8_ds_mla (how
latents are stored); such as 128x16x4096r or 32x128x4096q4 or 128x128x4096d256+32p32 or 128x16x8192fp8_ds_mla. Times one call (all splits and the merge) by graph replay over layers whose latents don't fit the L2
cache, beside the peers (peers.py); the plan is outside and timed by itself. Floor: the larger of latent, query and output bytes over
memory bandwidth (the better of copying and reading: decode mostly reads) and FLOPs over the matmul rate, all measured in the same run.
Times are those of a burst on a rested card; those of sustained work, against the sustained matmul rate, are in brackets.
The table goes to benchmarks/results/, or to the folder that $KVMANAGER_RESULTS names.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from typing import Any

import torch
from measure import COLD_BYTES, Times, multiplying, print_header, rested_ms
from peers import flashinfer, flashmla, flashmla_all_slots
from result_files import write_results

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention, make_problem
from kvmanager.attention.layout import LatentLayout

SHAPES = [
    "128x128x4096", "128x128x8192r", "128x128x32768r", "8x128x16384", "64x16x8192", "128x16x4096r", "1x128x4096", "1x16x65536",
    "32x128x4096q4", "128x16x4096q4", "128x128x4096d256+32", "128x128x4096d512+32", "128x128x4096p16", "128x128x4096p32", "64x16x8192p16",
    "128x8x4096", "128x40x4096", "128x96x4096", "128x16x8192", "128x16x8192e4m3", "128x16x8192fp8_ds_mla", "64x32x8192fp8_ds_mla",
    "64x128x4096fp8_ds_mla",
]  # fmt: skip
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(r?)(?:q(\d+))?(?:d(\d+)\+(\d+))?(?:p(\d+))?(e4m3|fp8_ds_mla)?")
FORMATS: dict[str | None, dict[str, Any]] = {
    None: {},
    "e4m3": {"dtype": "float8_e4m3fn", "scales": (0.002,)},
    "fp8_ds_mla": {"dtype": "fp8_ds_mla"},
}


def problem_of(shape: str) -> tuple[Problem, int]:
    """A problem of one of the shapes above, written, over layers enough that they don't fit the L2 cache; and its query tokens a sequence."""
    match = SHAPE.fullmatch(shape)
    if match is None:
        raise SystemExit(f"shape: expected BATCHxHEADSxLENGTH, then r, qN, dRANK+ROPE, pPAGE, FORMAT as needed, got {shape}")
    batch, heads, mean = (int(match[index]) for index in (1, 2, 3))
    query_len, rank, rope, page_size = (int(match[index] or default) for index, default in ((5, 1), (6, 512), (7, 64), (8, 64)))
    lengths = [mean] * batch
    if match[4]:
        lengths = (
            torch.normal(float(mean), mean / 2, (batch,), generator=torch.Generator().manual_seed(0)).clamp(64, 2 * mean).int().tolist()
        )
    layout = LatentLayout(rank, rope, 1, page_size, **FORMATS[match[9]])
    num_layers = max(1, min(32, -(-COLD_BYTES // (sum(lengths) * layout.slot_bytes))))
    layout = dataclasses.replace(layout, num_layers=num_layers)
    return make_problem(layout, lengths, [query_len] * batch, heads, "cuda", written=True), query_len


def backend_of(problem: Problem, **options: bool | int) -> MLABackend:
    """A backend whose limits just hold the problem."""
    lengths, tokens = problem.tables.lengths.tolist(), sum(problem.query_lens)
    max_pages = sum(-(-length // problem.memory.layout.page_size) for length in lengths)
    heads = problem.q.shape[2]
    return MLABackend(problem.memory, heads, problem.scale, max_tokens=tokens, max_batch=len(lengths), max_pages=max_pages, **options)  # type: ignore[arg-type]


def bench(shape: str, bandwidth: float, matmul: Times) -> dict[str, object]:
    problem, query_len = problem_of(shape)
    layout, heads, lengths, batch = problem.memory.layout, problem.q.shape[2], problem.tables.lengths.tolist(), problem.tables.batch
    num_layers = layout.num_layers
    backend = backend_of(problem)
    graph_batch = batch if query_len == 1 else None
    attend = backend.decode if query_len == 1 else backend.prefill
    plan = backend.plan(problem.tables, problem.query_lens, graph_batch=graph_batch)
    started = time.perf_counter()
    for _ in range(10):
        plan = backend.plan(problem.tables, problem.query_lens, graph_batch=graph_batch)
    plan_ms = (time.perf_counter() - started) * 100
    check_attention(problem, num_layers - 1, *attend(plan, num_layers - 1, problem.q[num_layers - 1]))

    layers = [index % num_layers for index in range(max(8, num_layers))]
    calls = {"ours": [lambda layer=layer: attend(plan, layer, problem.q[layer]) for layer in layers]}
    for name, find in (("FlashMLA", flashmla), ("FlashMLA-listed", flashmla_all_slots), ("FlashInfer", flashinfer)):
        if (peer := find(problem, query_len)) is not None:
            calls[name] = [lambda layer=layer, peer=peer: peer(layer) for layer in layers]  # type: ignore[misc]
    times = {name: rested_ms(rival) for name, rival in calls.items()}
    num_bytes = sum(lengths) * layout.slot_bytes + batch * query_len * heads * (layout.entry + layout.kv_lora_rank) * 2
    flops = sum(lengths) * query_len * heads * 2 * (layout.entry + layout.kv_lora_rank)
    floor = Times(*(max(num_bytes / bandwidth / 1e6, flops / rate / 1e9) for rate in matmul))
    ours = times["ours"]
    row: dict[str, object] = {"shape": shape, "kernel": backend.kernel, "floor_ms": floor.burst, "sustained_floor_ms": floor.sustained}
    line = f"{shape:>20}  {backend.kernel}  floor {floor.burst:.4f} ms"
    for name, time_ms in times.items():
        line += f"  {name} {time_ms.burst:.4f} ms {floor.burst / time_ms.burst:6.1%} [{floor.sustained / time_ms.sustained:6.1%}]"
        row |= {f"{name}_ms": time_ms.burst, f"{name}_sustained_ms": time_ms.sustained}
    print(
        f"{line}  {num_bytes / ours.burst / 1e6:6,.0f} GB/s  {flops / ours.burst / 1e9:4.0f} TFLOP/s  plan {plan_ms:.2f} ms on the host",
        flush=True,
    )
    return {**row, "gb_s": num_bytes / ours.burst / 1e6, "tflop_s": flops / ours.burst / 1e9, "plan_ms": plan_ms}


def main() -> None:
    copy, read, _ = print_header()
    print("bf16, random tables, page-major; 512 + 64, page 64, 1 query token unless said; each shape checked against float64 first")
    product, flops = multiplying()
    matmul = Times(*(flops / ms / 1e9 for ms in rested_ms([product] * 8)))
    print(f"bf16 matmul on a rested card {matmul.burst:,.0f} TFLOP/s, sustained {matmul.sustained:,.0f}", flush=True)
    del product
    rows: list[dict[str, Any]] = []
    for shape in sys.argv[1:] or SHAPES:
        rows.append(bench(shape, max(copy, read), matmul))
        torch.cuda.empty_cache()
    ceilings = {"copy_gb_s": copy, "read_gb_s": read, "matmul_tflop_s": matmul.burst, "sustained_matmul_tflop_s": matmul.sustained}
    write_results("decode", rows, **ceilings)


if __name__ == "__main__":
    main()
