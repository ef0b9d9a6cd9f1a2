"""`kvmanager demo`: three processes serve a DeepSeek-V3-shaped model, and the result is compared with transformers."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvmanager.errors import KVError
from kvmanager.examples.engine.checkpoint import make_checkpoint, make_prompts
from kvmanager.examples.engine.compare import Verdict, against_single_process, against_transformers
from kvmanager.examples.engine.engine import Engine, EngineConfig
from kvmanager.examples.engine.model import read_config
from kvmanager.examples.engine.request import Request

__all__ = ["main", "serve_prompts"]

PAGE_STATES = ("free", "used", "cached", "quarantined")


def serve_prompts(
    engine: Engine, prompts: list[list[int]], new_tokens: int, *, kill_decode_after: int = 0, on_turn: Any = lambda requests: None
) -> tuple[list[Request], dict[str, int]]:
    """Serve all prompts to the end; gives the requests and the most pages in use at once in each pool.

    kill_decode_after: once so many tokens are there, SIGKILL the decode worker that has the most sequences (0: never).
    """
    requests = [engine.submit(prompt, new_tokens) for prompt in prompts]
    peak: dict[str, int] = {}
    looked_at = 0.0
    while not engine.idle:
        engine.turn()
        on_turn(requests)
        if time.monotonic() - looked_at > 0.05:
            looked_at = time.monotonic()
            for name, pool in engine.client.stats()["pools"].items():
                peak[name] = max(peak.get(name, 0), pool["pages"]["used"])
        if kill_decode_after and sum(len(request.generated) for request in requests) >= kill_decode_after:
            kill_decode_after = 0
            running = [request.pool for request in requests if request.pool.startswith("decode")]
            engine.fleet.kill(max(running or ["decode0"], key=running.count))
    return requests, peak


def pages_at_rest(engine: Engine, timeout_s: float = 5) -> dict[str, dict[str, int]]:
    """Pages by state of each live pool once every acknowledgement has come in; of a dead pool as they are."""
    deadline = time.monotonic() + timeout_s
    while True:
        pages = {name: pool["pages"] for name, pool in engine.client.stats()["pools"].items()}
        if all(each["used"] == 0 and each["quarantined"] == 0 for each in pages.values()) or time.monotonic() > deadline:
            return pages
        engine.turn()


def _per_request(requests: list[Request], verdict: Verdict) -> list[dict[str, Any]]:
    return [
        {
            "request": request.number,
            "prompt_tokens": len(request.prompt),
            "cached_tokens": request.cached_tokens,
            "pages_moved": request.pages_moved,
            "pages_shared": request.pages_shared,
            "first_token_ms": round((request.first_token - request.submitted) * 1000, 1),
            "tokens_per_s": round((len(request.generated) - 1) / max(1e-9, request.finished - request.first_token), 1),
            "preempted": request.preempted,
            "lost": request.lost,
            "equal": equal,
            "error": request.error,
        }
        for request, equal in zip(requests, verdict.equal, strict=True)
    ]


def _print_tables(console: Console, rows: list[dict[str, Any]], pages: dict[str, dict[str, int]], peak: dict[str, int]) -> None:
    table = Table(title="requests", title_justify="left")
    names = ("", "prompt\ntokens", "cached\ntokens", "pages\nmoved", "pages\nshared", "first\nms", "tokens\n/s", "again", "equal")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        again = row["preempted"] + row["lost"]
        cells = [row["request"], row["prompt_tokens"], row["cached_tokens"], row["pages_moved"], row["pages_shared"]]
        cells += [row["first_token_ms"], row["tokens_per_s"], again or "", "yes" if row["equal"] else row["error"] or "NO"]
        table.add_row(*map(str, cells))
    console.print(table)
    table = Table(title="pools at the end", title_justify="left")
    for name in ("pool", "pages", "most used", *PAGE_STATES):
        table.add_column(name, justify="right")
    for name, states in pages.items():
        table.add_row(name, str(states["total"]), str(peak.get(name, 0)), *(str(states[state]) for state in PAGE_STATES))
    console.print(table)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Path(), help="Your own DeepSeek-V2/V3 checkpoint directory. Default: a small one is made.")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), help="Where the workers compute.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: float32 on the CPU, bfloat16 on CUDA.")
@click.option("--prefill-workers", default=1)
@click.option("--decode-workers", default=1)
@click.option("--page-size", default=16, help="Token slots a page: a multiple of 16 in 16..128.")
@click.option("--decode-page-size", default=0, help="The same for decode workers; 0: as --page-size.")
@click.option("--prefill-pages", default=256, help="Pages of each prefill worker's pool.")
@click.option("--decode-pages", default=256, help="Pages of each decode worker's pool.")
@click.option("--chunk-tokens", default=64, help="Prompt tokens a prefill step computes at most.")
@click.option("--requests", default=12, type=click.IntRange(1), help="How many prompts; two of three share a long prefix.")
@click.option("--new-tokens", default=48, type=click.IntRange(1), help="Tokens generated for each.")
@click.option("--seed", default=0, help="Of weights and prompts.")
@click.option("--kill-decode-after", default=0, metavar="N", help="SIGKILL a decode worker once N tokens are there (0: never).")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(
    model: str | None,
    device: str,
    dtype: str | None,
    prefill_workers: int,
    decode_workers: int,
    page_size: int,
    decode_page_size: int,
    prefill_pages: int,
    decode_pages: int,
    chunk_tokens: int,
    requests: int,
    new_tokens: int,
    seed: int,
    kill_decode_after: int,
    as_json: bool,
) -> None:
    """A manager, prefill workers and decode workers serve a DeepSeek-V3-shaped model; the text is compared with transformers' own.

    The manager owns the pages and publishes block tables; prefill workers write latents; pages move to decode workers, which write one
    token a step and run split-KV decode on them. Exit code 1 if anything differs, 2 for wrong use.
    """
    console = Console(stderr=as_json, highlight=False)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    if kill_decode_after and decode_workers < 2:
        decode_workers = 2  # somebody has to take over
    torch.set_num_threads(1)  # the workers want the other cores, and threads that spin while they wait would take them
    try:
        with ExitStack() as stack:
            if model is None:
                directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvmanager-model-")))
                console.print(f"making a small DeepSeek-V3 checkpoint (seed {seed})")
                make_checkpoint(directory, seed)
            else:
                directory = Path(model)
            vocab = int(read_config(directory)["vocab_size"])
            prompts = make_prompts(seed, vocab, requests, sharing=max(1, requests * 2 // 3) if requests > 1 else 0)
            config = EngineConfig(
                directory,
                device,
                dtype,
                prefill_workers,
                decode_workers,
                page_size,
                prefill_pages,
                decode_pages,
                chunk_tokens,
                keep_logits=dtype != "float32",
                keep_latents=dtype == "float32",
                decode_page_size=decode_page_size,
            )
            _run(console, config, prompts, new_tokens, kill_decode_after, as_json)
    except KVError as error:
        click.echo(f"kvmanager demo: {error}", err=True)
        sys.exit(2)
    except RuntimeError as error:
        click.echo(f"kvmanager demo: {error}", err=True)
        sys.exit(1)


def _run(console: Console, config: EngineConfig, prompts: list[list[int]], new_tokens: int, kill_decode_after: int, as_json: bool) -> None:
    workers = ", ".join(pool.name for pool in config.pools())
    console.print(f"starting a manager and workers {workers} on {config.device} in {config.dtype}")
    with Engine(config, on_event=lambda text: console.print(f"[yellow]{text}[/yellow]")) as engine:
        columns = (
            TextColumn("serving"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens, {task.fields[stages]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("tokens", total=len(prompts) * new_tokens, stages="")

            def on_turn(requests: list[Request]) -> None:
                stages = [request.stage.value for request in requests]
                text = ", ".join(f"{stages.count(stage)} {stage}" for stage in dict.fromkeys(stages))
                progress.update(task, completed=sum(len(request.generated) for request in requests), stages=text)

            requests, peak = serve_prompts(engine, prompts, new_tokens, kill_decode_after=kill_decode_after, on_turn=on_turn)
        pages = pages_at_rest(engine)
    leaked = {name: each for name, each in pages.items() if each["used"] or each["quarantined"]}
    console.print("comparing with transformers")
    finished = [request for request in requests if not request.error]
    if config.dtype == "float32":
        verdict = against_transformers(config.model, finished)
    else:
        verdict = against_single_process(config.model, finished, config.device, getattr(torch, config.dtype), config.page_size)
    outcome = dict(zip((request.number for request in finished), verdict.equal, strict=True))
    verdict = Verdict([outcome.get(request.number, False) for request in requests], verdict.lines)
    rows = _per_request(requests, verdict)
    good = all(verdict.equal) and not leaked
    if as_json:
        click.echo(json.dumps({"requests": rows, "pages": pages, "most_used": peak, "verdict": verdict.lines, "good": good}))
    else:
        _print_tables(console, rows, pages, peak)
        for line in verdict.lines:
            console.print(line, soft_wrap=True)
        for request in requests:
            if request.error:
                console.print(f"request {request.number} failed: {request.error}")
        if leaked:
            console.print(f"pages that did not come home: {leaked}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
