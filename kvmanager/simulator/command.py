"""The `kvmanager simulate` command: seeds in, verdicts out. What it prints to stdout depends on its arguments alone."""

from __future__ import annotations

import json
import multiprocessing
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvmanager.simulator.faults import FAULTS, parse_faults
from kvmanager.simulator.hunt import Outcome, command_line, live, shorten

__all__ = ["simulate"]


def _live(job: tuple[int, int, tuple[str, ...]]) -> Outcome:
    return live(*job)


def _outcomes(work: list[tuple[int, int, tuple[str, ...]]], jobs: int) -> Iterator[Outcome]:
    """In the order of the seeds, whoever is ready first."""
    if jobs == 1:
        yield from map(_live, work)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_live, work)


def _write_journal(folder: Path, outcome: Outcome) -> Path:
    """The journal as the failing run left it, for `kvmanager inspect`."""
    place = folder / f"seed-{outcome.seed}"
    place.mkdir(parents=True, exist_ok=True)
    for name, data in outcome.journal.items():
        (place / name).write_bytes(data)
    (place / "trace.txt").write_text(f"{command_line(outcome)}\n\n{outcome.trace}")
    return place


@click.command()
@click.option("--seed", type=click.IntRange(0), help="The first seed. Default: a random one, which is printed.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many seeds, one after the other.")
@click.option("--steps", type=click.IntRange(1), default=20_000, show_default=True, help="Commands executed before everything heals.")
@click.option("--faults", default="all", show_default=True, help=f"all, none, or some of {','.join(FAULTS)}. Each seed draws from these.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option("--journals", type=click.Path(file_okay=False), default="simulate-journals", show_default=True, help="For failing runs.")
@click.option("--shorten/--no-shorten", "shortens", default=True, help="Look for the shortest command that fails.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each seed, and one at the end.")
def simulate(seed: int | None, seeds: int, steps: int, faults: str, jobs: int, journals: str, shortens: bool, as_json: bool) -> None:
    """Live through a faulty day of a whole deployment, from a seed, and check every promise.

    \b
    kvmanager simulate --seed 7 --steps 20000
    kvmanager simulate --seeds 500 --jobs 4 --faults loss,dup,kill,crash

    A manager with its journal, clients, workers and the network between them live in one thread on simulated time. A seed lives through
    the same history on every machine. Exit code 1 if anything was violated; the shortest command found that shows it is printed.
    """
    allowed = parse_faults(faults)
    first = secrets.randbelow(1 << 31) if seed is None else seed
    if not as_json:
        many = f"seeds {first} to {first + seeds - 1}" if seeds > 1 else f"seed {first}"
        click.echo(f"{many}, {steps} steps, faults: {','.join(allowed) or 'none'}")
    work = [(each, steps, allowed) for each in range(first, first + seeds)]
    done, failed, began = 0, [], time.monotonic()
    columns = TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and seeds > 1)) as progress:
        task = progress.add_task("", total=seeds)
        for outcome in _outcomes(work, jobs):
            progress.advance(task)
            done += outcome.steps
            if outcome.error:
                outcome = shorten(outcome) if shortens else outcome
                failed.append(outcome)
            _report(outcome, as_json, Path(journals))
    if as_json:
        click.echo(json.dumps({"seeds": seeds, "steps": done, "failed": [each.seed for each in failed]}))
    else:
        click.echo(f"{done} steps of {seeds} seed{'s' * (seeds > 1)}, {len(failed)} with a violation")
    click.echo(f"{done / (time.monotonic() - began):.0f} steps a second", err=True)
    if failed:
        sys.exit(1)


def _report(outcome: Outcome, as_json: bool, journals: Path) -> None:
    place = _write_journal(journals, outcome) if outcome.error else None
    if as_json:
        click.echo(json.dumps({**outcome.summary(), **({"journal": str(place)} if place is not None else {})}))
    elif place is None:
        drawn = ", ".join(f"{name} {chance:g}" for name, chance in outcome.chances.items() if chance) or "none"
        click.echo(
            f"seed {outcome.seed}: {outcome.steps} steps, {outcome.simulated_s:.3f} s, digest {outcome.digest[:16]}, faults: {drawn}"
        )
    else:
        click.echo(f"seed {outcome.seed}: VIOLATED at step {outcome.steps}: {outcome.error}")
        click.echo(f"  reproduce: {command_line(outcome)}")
        click.echo(f"  journal:   {place}")
