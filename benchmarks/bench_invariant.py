"""What batch_invariant costs: decode with the free schedule beside pieces of several lengths, on one GPU.

    python3 benchmarks/bench_invariant.py [SHAPE ...]

SHAPE as in bench_decode.py. Every time is of one call, merge included and plan outside, by graph replay over layers that don't fit the L2
cache; each is checked against the float64 reference first. Times are bursts on a rested card, the two schedules one after the other, and FlashMLA's
where it is there (peers.py); the last column is the default length of a piece. The table goes to benchmarks/results/, or to the folder that $KVMANAGER_RESULTS names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
import triton
from bench_decode import SHAPES, backend_of, problem_of
from measure import graph_of, median, replay_ms
from peers import flashmla
from result_files import write_results

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention
from kvmanager.attention.options import Options, piece_tokens

PIECES = (512, 1024, 2048, 4096)


def layers_of(problem: Problem) -> list[int]:
    layers = problem.memory.layout.num_layers
    return [index % layers for index in range(max(8, layers))]


def replayed_ms(calls: list[Callable[[], object]]) -> float:
    """Of a burst, on a card that has rested a little."""
    graph = graph_of(calls)
    time.sleep(0.2)
    return median(replay_ms(graph, len(calls), 15))


def burst_ms(problem: Problem, backend: MLABackend, query_len: int) -> float:
    graph_batch = problem.tables.batch if query_len == 1 else None
    attend = backend.decode if query_len == 1 else backend.prefill
    plan = backend.plan(problem.tables, problem.query_lens, graph_batch=graph_batch)
    last = problem.memory.layout.num_layers - 1
    check_attention(problem, last, *attend(plan, last, problem.q[last]))
    return replayed_ms([lambda layer=layer: attend(plan, layer, problem.q[layer]) for layer in layers_of(problem)])  # type: ignore[misc]


def main() -> None:
    print(f"card {torch.cuda.get_device_name()}  torch {torch.__version__}  triton {triton.__version__}; ms, and times the free schedule")
    print(f"{'shape':>20} {'free':>8}" + "".join(f"{f'pieces {tokens}':>18}" for tokens in PIECES) + "   default")
    rows = []
    for shape in sys.argv[1:] or SHAPES:
        problem, query_len = problem_of(shape)
        free = burst_ms(problem, backend_of(problem), query_len)
        default = piece_tokens(Options(batch_invariant=True), problem.q.shape[2])
        row: dict[str, object] = {"shape": shape, "free_ms": free, "default": default}
        line = f"{shape:>20} {free:8.4f}"
        for tokens in PIECES:
            slots = sum(-(-int(length) // tokens) for length in problem.tables.lengths) * -(-problem.q.shape[2] // 64)
            if slots > 40000:  # 5 GB of partial results
                line += f"{'-':>18}"
                continue
            ms = burst_ms(problem, backend_of(problem, batch_invariant=True, invariant_tokens=tokens), query_len)
            row[f"invariant_{tokens}_ms"] = ms
            line += f"{ms:10.4f} ({ms / free:4.2f})"
            torch.cuda.empty_cache()
        if (peer := flashmla(problem, query_len)) is not None:
            row["FlashMLA_ms"] = ms = replayed_ms([lambda layer=layer: peer(layer) for layer in layers_of(problem)])  # type: ignore[misc]
            line += f"   FlashMLA, whose kernel for Hopper has no such mode, {ms:.4f} ({ms / free:.2f})"
        print(f"{line}   default {default}", flush=True)
        rows.append(row)
    write_results("invariant", rows)


if __name__ == "__main__":
    main()
