"""The example engine on two devices: prefill on one and decode on the other, against prefill and decode together on each.

    python3 benchmarks/bench_disaggregation.py TRACE                          # two GPUs
    python3 benchmarks/bench_disaggregation.py TRACE --devices cpu,cpu --small  # anywhere, to see that it runs

TRACE is a recorded one in Mooncake's format. Its first requests arrive in their order and with their gaps, shortened so that all come
within --seconds; prompts and outputs are --scale times shorter, and prompts share what they shared. Both engines get the same requests.
Time to first token counts from a request's arrival, waiting included; time between tokens is each gap within a request, the handoff
included. Answers are compared: in bfloat16 other batch shapes may turn a near tie.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from kvmanager.examples.engine.checkpoint import make_checkpoint
from kvmanager.examples.engine.engine import Engine, EngineConfig
from kvmanager.examples.engine.request import Request, Stage
from kvmanager.replay.traces import TokensOf, TracedRequest, read_trace

LARGE = {
    "vocab_size": 4096, "hidden_size": 2048, "num_hidden_layers": 8, "first_k_dense_replace": 8, "intermediate_size": 5504,
    "num_attention_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 131072,
}  # fmt: skip
SMALL: dict[str, Any] = {"first_k_dense_replace": 4}
WARM_UP = 4  # requests before the clock starts, of tokens that no other has


class Arrival(NamedTuple):
    """One request to come: when, its prompt, and how many tokens to generate."""

    after_s: float
    prompt: list[int]
    new_tokens: int


def arrivals_of(traced: list[TracedRequest], scale: int, seconds: float, vocab: int) -> list[Arrival]:
    """The same lengths divided by `scale`, the same gaps in `seconds` altogether. Blocks that were shared are shared."""
    first, last = traced[0].at_ms, traced[-1].at_ms
    stretch = seconds / max(last - first, 1)
    found = []
    for each in traced:
        length, new_tokens = max(each.input_length // scale, 1), max(each.output_length // scale, 2)
        numbers = TokensOf.prompt(each, each.input_length)[::scale][:length].astype(np.int64)
        prompt = ((numbers * 2654435761 % 2**32 >> 12) % vocab).tolist()  # scattered, so that blocks stay different in a small vocabulary
        found.append(Arrival((each.at_ms - first) * stretch, prompt, new_tokens))
    return found


def serve(config: EngineConfig, arrivals: list[Arrival], say: Any) -> list[Request]:
    """Run all arrivals through an engine of its own; gives the requests, over. Raises SystemExit if one failed."""
    with Engine(config, on_event=say) as engine:
        rng = np.random.default_rng(1)
        longest = max(len(each.prompt) for each in arrivals)
        for _ in range(WARM_UP):
            engine.submit(rng.integers(0, 256, longest).tolist(), 4)
        while not engine.idle:
            engine.turn()
        begun, requests = time.monotonic(), []
        while len(requests) < len(arrivals) or not engine.idle:
            while len(requests) < len(arrivals) and time.monotonic() - begun >= arrivals[len(requests)].after_s:
                each = arrivals[len(requests)]
                request = engine.submit(each.prompt, each.new_tokens)
                request.submitted = begun + each.after_s  # a late turn is no excuse
                requests.append(request)
            ahead = arrivals[len(requests)].after_s + begun - time.monotonic() if len(requests) < len(arrivals) else 1.0
            engine.scheduler.turn(timeout_ms=max(0, min(20, int(ahead * 1000))))
    for request in requests:
        if request.stage is not Stage.FINISHED or len(request.generated) != request.max_new_tokens:
            raise SystemExit(f"request {request.number} ended as {request.stage.value}: {request.error}")
    return requests


def figures(requests: list[Request]) -> dict[str, Any]:
    """Times in milliseconds of one run."""
    first = np.array([each.token_times[0] - each.submitted for each in requests]) * 1e3
    gaps = np.concatenate([np.diff(each.token_times) for each in requests]) * 1e3
    last = np.array([each.finished - each.submitted for each in requests]) * 1e3
    span = max(each.finished for each in requests) - min(each.submitted for each in requests)
    result: dict[str, Any] = {
        name: {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}
        for name, values in (("first_token_ms", first), ("between_tokens_ms", gaps), ("whole_ms", last))
    }
    result["tokens_a_second"] = sum(len(each.generated) for each in requests) / span
    result["cached_tokens"] = sum(each.cached_tokens for each in requests)
    result["pages_moved"] = sum(each.pages_moved for each in requests)
    result["pages_shared"] = sum(each.pages_shared for each in requests)
    result["preempted"] = sum(each.preempted for each in requests)
    result["first_token_all_ms"], result["between_tokens_all_ms"] = first.tolist(), gaps.tolist()
    return result


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Distribution of both times in both runs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, name, label in (
        (axes[0], "first_token_all_ms", "time to first token"),
        (axes[1], "between_tokens_all_ms", "time between tokens"),
    ):
        for run, result in results.items():
            values = np.sort(result[name])
            axis.plot(values, np.linspace(0, 100, len(values)), label=run)
        axis.set_xscale("log")
        axis.set_xlabel(f"{label}, ms")
        axis.set_ylabel("percent of them at most")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


@click.command(help=__doc__.partition("\n\n")[0] if __doc__ else None)
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--devices", default="cuda:0,cuda:1", show_default=True, help="Two, comma separated.")
@click.option("--requests", "count", default=150, show_default=True, help="So many of the trace's first.")
@click.option("--scale", default=4, show_default=True, help="Prompts and outputs are so many times shorter.")
@click.option("--seconds", default=30.0, show_default=True, help="In which all of them arrive.")
@click.option("--chunk", default=2048, show_default=True, help="Prompt tokens a step at most.")
@click.option("--pages", default=8192, show_default=True, help="Pages of 64 tokens of each pool.")
@click.option("--small", is_flag=True, help="The demo's tiny model in float32.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Draw them here (PNG; needs matplotlib).")
def main(
    trace: Path, devices: str, count: int, scale: int, seconds: float, chunk: int, pages: int, small: bool, json_path: Path | None,
    plot_path: Path | None,
) -> None:  # fmt: skip
    two = tuple(devices.split(","))
    if len(two) != 2:
        raise click.BadParameter("two, comma separated", param_hint="--devices")
    shape = SMALL if small else LARGE
    vocab = shape.get("vocab_size", 512)
    arrivals = arrivals_of(read_trace(trace, count), scale, seconds, vocab)
    prompts, outputs = [len(each.prompt) for each in arrivals], [each.new_tokens for each in arrivals]
    click.echo(
        f"{len(arrivals)} requests in {seconds:.0f} s; prompts {np.median(prompts):.0f} tokens at the median, {max(prompts)} at most;"
        f" outputs {np.median(outputs):.0f} and {max(outputs)}"
    )
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder, "model"), **shape)
        base = EngineConfig(
            model, dtype="float32" if small else "bfloat16", page_size=64, prefill_pages=pages, decode_pages=pages, chunk_tokens=chunk,
            lease_ms=60_000, devices=two,
        )  # fmt: skip
        configs = {
            "prefill | decode": base,
            "together on each": replace(base, prefill_workers=0, decode_workers=0, mixed_workers=2),
        }
        answers = {}
        for name, config in configs.items():
            begun = time.monotonic()
            requests = serve(config, arrivals, click.echo)
            results[name] = figures(requests)
            answers[name] = [request.generated for request in requests]
            click.echo(f"{name}: {time.monotonic() - begun:.0f} s, starting included")
    same = sum(map(lambda one, other: one == other, *answers.values()))
    click.echo(f"{same} of {len(arrivals)} answers are the same in both\n")
    for name, result in results.items():
        click.echo(
            f"{name:18}"
            + "".join(
                f"  {title} {result[key]['p50']:7.1f} p50 {result[key]['p99']:7.1f} p99 ms"
                for title, key in (("first token", "first_token_ms"), ("between tokens", "between_tokens_ms"))
            )
            + f"  {result['tokens_a_second']:7.0f} tokens/s  {result['pages_moved']} pages moved, {result['pages_shared']} shared"
        )
    about = {
        "date": date.today().isoformat(),
        "devices": _names(two),
        "requests": count,
        "scale": scale,
        "seconds": seconds,
        "chunk": chunk,
    }
    if json_path:
        kept = {name: {key: value for key, value in result.items() if "_all_" not in key} for name, result in results.items()}
        json_path.write_text(json.dumps({**about, "same_answers": same, "results": kept}, indent=1) + "\n")
    if plot_path:
        plot(results, f"example engine on {about['devices']}: {count} requests in {seconds:.0f} s, lengths / {scale}", plot_path)


def _names(devices: tuple[str, ...]) -> str:
    import torch

    return ", ".join(torch.cuda.get_device_name(each) if each.startswith("cuda") else each for each in devices)


if __name__ == "__main__":
    main()
