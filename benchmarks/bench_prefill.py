"""Prefill over cached latents on one GPU: the absorbed kernel beside expanded heads, projections included in both; and where they cross.

    python3 benchmarks/bench_prefill.py [--heads 128] [--contexts 0,4096,16384,131072] [--tokens 64,...,8192] [--libraries cudnn,flash]

DeepSeek-V3's dimensions, bf16, page 64, one sequence. Each shape is checked against float64 on some of its tokens and heads first. Percent: of
the matmul rate of the same run, by each path's own operations, so that a path may be faster at a lower percent. CUDA graph replay. The numbers go
to benchmarks/results/, or to the folder that $KVMANAGER_RESULTS names.
"""

from __future__ import annotations

import argparse

import torch
from measure import graph_of, median, print_header, replay_ms
from result_files import write_results

from kvmanager.attention import LongPrefill, MLABackend, reference
from kvmanager.attention.compare import EXPANDED_LSE, EXPANDED_OUT, Heads, Problem, make_heads, make_problem
from kvmanager.attention.layout import LatentLayout

RANK, ROPE, NOPE, V = 512, 64, 128, 128
TOKENS = (64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
LONGEST, LONGEST_TOKENS = 131072, 1024  # no more query tokens at the longest context
CHECKED_HEADS = 4


def operations(heads: int, tokens: int, context: int) -> tuple[float, float]:
    """FLOPs of the absorbed and of the expanded path."""
    seen = tokens * context + tokens * (tokens + 1) / 2
    projections = 2.0 * heads * RANK * (NOPE + V)
    absorbed = 2.0 * heads * (2 * RANK + ROPE) * seen + projections * tokens
    return absorbed, 2.0 * heads * (NOPE + ROPE + V) * seen + projections * (context + tokens)


def check(problem: Problem, heads: Heads, scale: float, out: torch.Tensor, lse: torch.Tensor) -> None:
    tokens = problem.query_lens[0]
    latent = reference.gather_latent(problem.memory.layer(0), problem.tables, 0)
    some = slice(0, CHECKED_HEADS)
    for token in {0, tokens // 2, tokens - 1}:
        seen = latent[: len(latent) - tokens + token + 1]
        at = slice(token, token + 1)
        want, want_lse = reference.attend_expanded(
            heads.q_nope[at, some], heads.q_pe[at, some], seen, heads.w_uk[some], heads.w_uv[some], scale
        )
        error = float((out[at, some].double() - want).norm() / want.norm())
        lse_error = float((lse[at, some].double() - want_lse).abs().max())
        if not (error <= EXPANDED_OUT and lse_error <= EXPANDED_LSE):
            raise AssertionError(f"token {token} of {tokens}: out off by {error:.1e}, lse by {lse_error:.1e}")


def bench(tokens: int, context: int, num_heads: int, libraries: list[str], matmul: float) -> dict[str, float]:
    """Milliseconds of each path."""
    problem = make_problem(LatentLayout(RANK, ROPE, 1, 64), [context + tokens], [tokens], num_heads, "cuda", seed=1, written=True)
    heads, scale = make_heads(problem, NOPE, V), (NOPE + ROPE) ** -0.5
    backend = MLABackend(problem.memory, num_heads, scale, max_tokens=tokens, max_batch=1, max_pages=problem.memory.num_pages)
    plan = backend.plan(problem.tables, problem.query_lens)
    times: dict[str, float] = {}
    for name in ["absorbed", *libraries]:
        prefill = LongPrefill(backend, NOPE, V, library=libraries[0] if name == "absorbed" else name)
        path = prefill.run_absorbed if name == "absorbed" else prefill.run
        check(problem, heads, scale, *path(plan, 0, *heads.tail(0)))
        graph = graph_of([lambda path=path: path(plan, 0, *heads.tail(0))])  # type: ignore[misc]
        first = replay_ms(graph, 1, 1)[0]
        times[name] = median(replay_ms(graph, 1, 15 if first < 5 else 3))
        del graph, prefill, path
        torch.cuda.empty_cache()
    absorbed, expanded = operations(num_heads, tokens, context)
    cells = [
        f"{name} {ms:9.3f} ms {(absorbed if name == 'absorbed' else expanded) / ms / 1e9 / matmul:4.0%} of matmul"
        for name, ms in times.items()
    ]
    best = min(times[name] for name in libraries)
    print(f"{context:>7} + {tokens:>5}  {'  '.join(cells)}  expanded {times['absorbed'] / best:5.2f} x", flush=True)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--contexts", default="0,4096,16384,131072")
    parser.add_argument("--libraries", default="cudnn,flash")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    options = parser.parse_args()
    _, _, matmul = print_header()
    libraries = options.libraries.split(",")
    several = [int(text) for text in options.tokens.split(",")]
    rows: list[dict[str, float]] = []
    for context in (int(text) for text in options.contexts.split(",")):
        tried = [tokens for tokens in several if context < LONGEST or 256 <= tokens <= LONGEST_TOKENS]
        times = {tokens: bench(tokens, context, options.heads, libraries, matmul) for tokens in tried}
        rows += [{"context": context, "tokens": tokens, **each} for tokens, each in times.items()]
        for name in libraries:
            slower = [tokens for tokens in tried if times[tokens][name] >= times[tokens]["absorbed"]]
            faster = [tokens for tokens in tried if tokens > max(slower, default=0)]
            print(
                f"  context {context}, {options.heads} heads: {name} is faster from {faster[0] if faster else 'none of these'} query tokens"
            )
    write_results(f"prefill-{options.heads}-heads", rows, heads=options.heads, matmul_tflop_s=matmul)


if __name__ == "__main__":
    main()
