"""`kvmanager replay`: the command line."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvmanager.errors import InvalidValue
from kvmanager.replay.report import draw_plot, make_report, save_plot
from kvmanager.replay.scheduler import ConcurrentRun, Load
from kvmanager.replay.sequential import SequentialRun
from kvmanager.replay.traces import read_trace

__all__ = ["replay"]

UPDATE_S = 0.1  # between two updates of the progress bar


def _fits_stdout(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


@click.command(context_settings={"show_default": True})
@click.argument("trace", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--pages", required=True, type=click.IntRange(1), metavar="N", help="Pages of each pool.")
@click.option("--page-size", default=64, metavar="P", help="Token slots a page, 1..1024.")
@click.option("--sequential", is_flag=True, help="One request at a time, prompts only: comparable with a cache simulator, to the page.")
@click.option("--queue", default=0, type=click.IntRange(0, 1 << 16), metavar="K", help="Tell the manager the next K prompts in line.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N requests.")
@click.option("--pools", default=1, type=click.IntRange(1, 1024), help="Data-parallel pools of one group.")
@click.option("--placement", default="prefix", help="Who gets a request: prefix (longest match and load) or round_robin.")
@click.option("--batch", default=256, type=click.IntRange(1), help="Sequences that one pool runs at once.")
@click.option("--chunk", default=4096, type=click.IntRange(1, 1 << 24), help="Prompt tokens that one pool computes in a step.")
@click.option("--step-ms", default=50.0, type=click.FloatRange(0.01), help="Simulated duration of a step.")
@click.option("--speed", default=1.0, type=click.FloatRange(1e-6), help="Requests arrive so many times faster than recorded.")
@click.option("--ack-late", default=0, type=click.IntRange(0, 1000), help="Steps by which the simulated workers acknowledge late.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the plot as PNG (matplotlib)."
)
@click.pass_context
def replay(
    ctx: click.Context,
    trace: Path,
    pages: int,
    page_size: int,
    sequential: bool,
    queue: int,
    limit: int | None,
    as_json: bool,
    plot_path: Path | None,
    **load: Any,
) -> None:
    """Run a recorded trace through the manager: hits, evictions, preemptions, time a step, pool use.

    TRACE is a file of the Mooncake format (JSON lines with timestamp, input_length, output_length, hash_ids of 512-token blocks) or the
    Azure format (CSV with TIMESTAMP, ContextTokens, GeneratedTokens). Without --sequential requests arrive as recorded, run many at a
    time and generate their outputs; time and workers are simulated, the manager is the real one.

    \b
    kvmanager replay conversation_trace.jsonl --pages 10000 --page-size 512 --sequential
    kvmanager replay conversation_trace.jsonl --pages 2500 --page-size 512 --pools 4 --placement prefix
    """
    for name, value in load.items():
        asked = ctx.get_parameter_source(name)
        if sequential and asked is not None and asked is not click.core.ParameterSource.DEFAULT:
            raise InvalidValue(f"--{name.replace('_', '-')}", "nothing beside --sequential, which runs one request at a time", value)
    if plot_path is not None and not plot_path.parent.is_dir():
        raise InvalidValue("--plot", "a file in a folder that exists", plot_path)
    requests = read_trace(trace, limit)
    run: SequentialRun | ConcurrentRun
    if sequential:
        run = SequentialRun(requests, pages=pages, page_size=page_size, queue=queue)
    else:
        run = ConcurrentRun(requests, pages=pages, page_size=page_size, load=Load(**load), queue=queue)
    done, complete, start = 0, True, time.perf_counter()
    columns = (
        TextColumn("replaying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # On a terminal only: in a log it would be a line of noise.
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json or not sys.stderr.isatty()) as progress:
        task, updated = progress.add_task("requests", total=len(requests)), start
        try:
            for done in run.run():
                if (now := time.perf_counter()) - updated >= UPDATE_S:
                    progress.update(task, completed=done)
                    updated = now
        except KeyboardInterrupt:  # what is known so far is worth printing; the manager is not asked any more
            complete = False
    settings = {
        "sequential": sequential,
        "pages": pages,
        "page_size": page_size,
        "queue": queue,
        **(asdict(Load()) | ({} if sequential else load)),
    }
    report = make_report(
        trace.name,
        run.meter,
        settings,
        done=done,
        requests=len(requests),
        complete=complete,
        wall_s=time.perf_counter() - start,
        first_token_ms=() if isinstance(run, SequentialRun) else run.first_token_ms,
    )
    unit = "requests" if sequential else "simulated seconds"
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        click.echo("\n".join(report.lines()))
    saved = plot_path is not None and save_plot(
        plot_path, run.meter.series, run.meter.pages_total, unit, report.lines()[0].replace("; ", "\n")
    )
    if plot_path is not None and not saved:
        click.echo(f"kvmanager: {plot_path} was not written: matplotlib is not installed", err=True)
    if not saved and not as_json:
        click.echo("\n".join(draw_plot(run.meter.series, run.meter.pages_total, unit, ascii_only=not _fits_stdout("█░"))))
    if not complete:
        ctx.exit(130)
