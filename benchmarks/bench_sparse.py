"""Attention to listed slots on one GPU: checks each shape against the float64 reference, then times it.

    python3 benchmarks/bench_sparse.py

2,048 slots a token, drawn at random from sequences of 8,192. Floor: the listed latents, queries and outputs over memory bandwidth (the better of
copying and reading), or FLOPs over the matmul rate, measured in the same run.
"""

from __future__ import annotations

from typing import Any

import torch
from bench_decode import FORMATS
from measure import graph_ms, print_header
from peers import flashmla_listed
from result_files import write_results

from kvmanager.attention import reference
from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import assert_close, make_problem
from kvmanager.attention.layout import LatentLayout

TOPK = 2048
NUM_LAYERS = 2


def bench(tokens: int, heads: int, stored_as: str | None, bandwidth: float, matmul: float) -> dict[str, Any]:
    layout = LatentLayout(512, 64, NUM_LAYERS, **FORMATS[stored_as])
    problem = make_problem(layout, [8192] * tokens, [1] * tokens, heads, "cuda", written=True)
    pages = [-(-int(length) // layout.page_size) for length in problem.tables.lengths]
    backend = MLABackend(problem.memory, heads, problem.scale, max_tokens=tokens, max_batch=tokens, max_pages=sum(pages))
    plan = backend.plan(problem.tables, problem.query_lens)
    read = (~problem.unread).flatten().nonzero().flatten()
    lists = [read[torch.randint(0, len(read), (tokens, TOPK))].int().cuda() for _ in range(4)]
    out, lse = backend.attend_selected(plan, 1, problem.q[1], lists[1])  # what the peer's second call takes
    for token in (0, tokens - 1):
        latent = reference.read_latent(reference.select(problem.memory.layer(1), lists[1][token]), 512, layout.scale_of(1))
        want = reference.attend(problem.q[1, token : token + 1], latent, 512, problem.scale, causal=False)
        assert_close(out[token : token + 1], lse[token : token + 1], *want)

    def ours(index: int) -> None:
        backend.attend_selected(plan, index % NUM_LAYERS, problem.q[index % NUM_LAYERS], lists[index])

    ms = graph_ms([lambda index=index: ours(index) for index in range(len(lists))])  # type: ignore[misc]
    num_bytes = tokens * TOPK * layout.slot_bytes + tokens * heads * 1088 * 2
    flops = tokens * TOPK * heads * 2176
    floor = max(num_bytes / bandwidth / 1e6, flops / matmul / 1e9)
    row = {"shape": f"{tokens}x{heads}, {TOPK:,} slots, {layout.dtype}", "floor_ms": floor, "ours_ms": ms}
    if (peer := flashmla_listed(problem, lists)) is not None:
        theirs, _ = peer(1)  # type: ignore[misc]
        out, lse = backend.attend_selected(plan, 1, problem.q[1], lists[1])
        assert_close(theirs[:, 0].float(), lse, out.float(), lse)
        row["FlashMLA_ms"] = graph_ms([lambda index=index: peer(index) for index in range(len(lists))])  # type: ignore[misc]
    print(
        f"{tokens:>4} x {heads:>3} heads  {layout.dtype:>13}  floor {floor:.4f} ms  {ms:.4f} ms {floor / ms:6.1%}"
        f"  {num_bytes / ms / 1e6:6,.0f} GB/s  {flops / ms / 1e9:4.0f} TFLOP/s"
        + (f"  FlashMLA {row['FlashMLA_ms']:.4f} ms" if "FlashMLA_ms" in row else ""),
        flush=True,
    )
    return row


def main() -> None:
    copy, read, matmul = print_header()
    rows = []
    for tokens, heads in ((128, 16), (64, 128), (4, 16), (4, 128)):
        for stored_as in FORMATS:
            rows.append(bench(tokens, heads, stored_as, max(copy, read), matmul))
            torch.cuda.empty_cache()
    write_results("sparse", rows, copy_gb_s=copy, read_gb_s=read, matmul_tflop_s=matmul)


if __name__ == "__main__":
    main()
