"""The `kvmanager simulate` command: seeds in, verdicts out. What it prints to stdout depends on its arguments alone."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvmanager.simulator.crew import Job, outcomes
from kvmanager.simulator.faults import FAULTS, parse_faults
from kvmanager.simulator.hunt import Outcome, command_line

__all__ = ["simulate"]

# Of what has been seen, what all seeds together had of it is in the last line.
SUMMED = {
    "restart": "restarts of the manager",
    "HandoffBegun": "handoffs",
    "HandoffStreaming": "of them streamed",
    "moving_streamed": "streamed to their end",
    "pulled_early": "early pulls",
    "ran_ahead": "steps run ahead",
    "ahead_taken": "of them taken",
}


class _Seeds(click.ParamType):
    """A number of seeds, or FIRST..LAST; gives (first or None, count)."""

    name = "seeds"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int | None, int]:
        if isinstance(value, tuple):
            return value
        first, dots, last = str(value).partition("..")
        if first.isdecimal() and (last.isdecimal() if dots else not last):
            begin, count = (int(first), int(last) - int(first) + 1) if dots else (None, int(first))
            if count > 0:
                return begin, count
        self.fail(f"expected a number of seeds or FIRST..LAST, got {value!r}", param, ctx)


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
@click.option("--seeds", type=_Seeds(), default="1", show_default=True, help="How many seeds, or FIRST..LAST.")
@click.option("--steps", type=click.IntRange(1), default=20_000, show_default=True, help="Commands executed before everything heals.")
@click.option("--faults", default="all", show_default=True, help=f"all, none, or some of {','.join(FAULTS)}. Each seed draws from these.")
@click.option("--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Begin no seed after so many. Default: no limit.")
@click.option("--journals", type=click.Path(file_okay=False), default="simulate-journals", show_default=True, help="For failing runs.")
@click.option("--shorten/--no-shorten", "shortens", default=True, help="Look for the shortest command that fails.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON for each seed, and one at the end.")
def simulate(
    seed: int | None,
    seeds: tuple[int | None, int],
    steps: int,
    faults: str,
    jobs: int,
    minutes: float | None,
    journals: str,
    shortens: bool,
    as_json: bool,
) -> None:
    """Live through a faulty day of a whole deployment, from a seed, and check every promise.

    \b
    kvmanager simulate --seed 7 --steps 20000
    kvmanager simulate --seeds 500 --jobs 4 --faults loss,dup,kill,crash
    kvmanager simulate --seeds 1000..4999 --steps 3000 --jobs 32 --minutes 20

    A manager with its journal, clients, workers and the network between them live in one thread on simulated time. A seed lives through
    the same history on every machine. Exit code 1 if anything was violated; the shortest command found that shows it is printed.
    """
    allowed = parse_faults(faults)
    begin, count = seeds
    if begin is not None and seed is not None:
        raise click.UsageError("--seed: expected no first seed beside --seeds FIRST..LAST")
    first = next((each for each in (begin, seed) if each is not None), secrets.randbelow(1 << 31))
    if not as_json:
        many = f"seeds {first} to {first + count - 1}" if count > 1 else f"seed {first}"
        click.echo(f"{many}, {steps} steps, faults: {','.join(allowed) or 'none'}")
    work = [Job(each, steps, allowed, shortens) for each in range(first, first + count)]
    began = time.monotonic()
    deadline = began + minutes * 60 if minutes is not None else float("inf")
    lived, done, failed, seen = 0, 0, [], Counter[str]()
    columns = TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and count > 1)) as progress:
        task = progress.add_task("", total=count)
        for outcome in outcomes(work, jobs, deadline):
            progress.advance(task)
            lived += 1
            done += outcome.steps
            seen.update({name: outcome.seen[name] for name in SUMMED})
            if outcome.error:
                failed.append(outcome)
            _report(outcome, as_json, Path(journals))
    if as_json:
        seeds_failed = [each.seed for each in failed]
        sums = {name: seen[name] for name in SUMMED}
        total = {"seeds": lived, "steps": done, "failed": seeds_failed, "restarts": seen["restart"], "seen": sums, "not_run": count - lived}
        click.echo(json.dumps(total))
    else:
        _sum_up(lived, count - lived, done, seen, failed)
    click.echo(f"{done / (time.monotonic() - began):.0f} steps a second", err=True)
    if failed:
        sys.exit(1)


def _sum_up(lived: int, not_run: int, done: int, seen: Counter[str], failed: list[Outcome]) -> None:
    left = f", {not_run} not run in time" if not_run else ""
    what = "".join(f", {seen[name]} {words}" for name, words in SUMMED.items() if seen[name])
    click.echo(f"{done} steps of {lived} seed{'s' * (lived != 1)}{left}{what}, {len(failed)} with a violation")
    if len(failed) > 1:
        for outcome in failed:
            click.echo(f"  {command_line(outcome)}  # {' '.join(outcome.error.split())[:100]}")


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
