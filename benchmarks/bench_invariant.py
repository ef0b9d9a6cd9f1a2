"""What batch_invariant costs: decode with the free schedule beside pieces of several lengths, on one GPU.

    python3 benchmarks/bench_invariant.py [SHAPE ...]

SHAPE as in bench_decode.py. Every time is of one call, merge included and plan outside, by graph replay over layers that don't fit the L2
cache; each is checked against the float64 reference first. Times are bursts on a rested card, the two schedules one after the other; the last
column is the default length of a piece. The table goes to benchmarks/results/, or to the folder that $KVMANAGER_RESULTS names.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from pathlib import Path

import torch
import triton
from bench_decode import SHAPES, backend_of, problem_of
from measure import graph_of, median, replay_ms

from kvmanager.attention.backend import MLABackend
from kvmanager.attention.compare import Problem, check_attention
from kvmanager.attention.options import Options, piece_tokens

PIECES = (512, 1024, 2048, 4096)


def burst_ms(problem: Problem, backend: MLABackend, query_len: int) -> float:
    graph_batch = problem.tables.batch if query_len == 1 else None
    attend = backend.decode if query_len == 1 else backend.prefill
    plan = backend.plan(problem.tables, problem.query_lens, graph_batch=graph_batch)
    layers = problem.memory.layout.num_layers
    check_attention(problem, layers - 1, *attend(plan, layers - 1, problem.q[layers - 1]))
    order = [index % layers for index in range(max(8, layers))]
    graph = graph_of([lambda layer=layer: attend(plan, layer, problem.q[layer]) for layer in order])
    time.sleep(0.2)
    return median(replay_ms(graph, len(order), 15))


def main() -> None:
    card, day = torch.cuda.get_device_name(), datetime.datetime.now(datetime.UTC).date().isoformat()
    print(f"card {card}  torch {torch.__version__}  triton {triton.__version__}; ms, and times the free schedule")
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
        print(f"{line}   {default}", flush=True)
        rows.append(row)
    folder = Path(os.environ.get("KVMANAGER_RESULTS") or Path(__file__).with_name("results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"invariant-{card.replace(' ', '-')}-{day}.json"
    path.write_text(
        json.dumps({"date": day, "card": card, "torch": torch.__version__, "triton": triton.__version__, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
