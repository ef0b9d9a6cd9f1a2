"""`kvmanager inspect`: what a journal says, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvmanager.errors import InvalidValue, Unknown
from kvmanager.log.history import History, PageWatch, SequenceWatch, describe_sequence, describe_state

__all__ = ["inspect"]

ROWS_MAX = 50  # of open sequences; --json has them all


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, for people only, gone at the end."""
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@click.command()
@click.argument("journal", type=click.Path())
@click.option("--at", type=click.IntRange(0), help="Version to look at. Default: the newest.")
@click.option("--page", type=click.IntRange(0), help="Who held this page, and when.")
@click.option("--sequence", type=click.IntRange(1), help="Block table of this sequence, and what happened to it.")
@click.option("--pool", help="Pool of the page, if there are several.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(journal: str, at: int | None, page: int | None, sequence: int | None, pool: str | None, as_json: bool) -> None:
    """Show the state in a journal at any version, a sequence's block table, or who held a page when.

    Reads only: the manager may be running. Exit code 1 if a record in the middle of the journal is damaged.

    \b
    kvmanager inspect /var/lib/kv --at 1200
    kvmanager inspect /var/lib/kv --page 17 --pool decode
    """
    if page is not None and sequence is not None:
        raise InvalidValue("--page", "--page or --sequence, not both", "both")
    history = History(journal)
    with _progress(Console(stderr=True)) as progress:
        if page is not None:
            body = _page(history, at, page, pool, progress)
        elif sequence is not None:
            body = _sequence(history, at, sequence, progress)
        else:
            body = describe_state(history.replay(at, None, progress))
    state = history.state
    damage = {"text": str(history.damage), **history.damage.details} if history.damage is not None else None
    head = {
        "journal": journal,
        "epoch": state.epoch if state is not None else 0,
        "version": state.version if state is not None else 0,
        "segments": history.segments,
        "torn_bytes": history.torn,
        "damage": damage,
    }
    found = {**head, **body}
    if as_json:
        click.echo(json.dumps(found))
    else:
        _show(found, Console(highlight=False, soft_wrap=True))
    if damage is not None:
        click.get_current_context().exit(1)


def _page(history: History, at: int | None, page: int, pool: str | None, progress: Callable[[int, int], None]) -> dict[str, Any]:
    watch = PageWatch(pool, page)
    history.replay(at, watch, progress)
    if not watch.page_size:
        raise Unknown("pool", pool)
    rows = []
    for interval in watch.intervals:
        holding = interval.holding
        rows.append(
            {
                "kind": holding.kind,
                "id": holding.ident,
                "tokens": list(holding.tokens) if holding.tokens is not None else None,
                "note": holding.note,
                "first": interval.first,
                "end": interval.end,
            }
        )
    return {"pool": watch.pool, "page": page, "page_size": watch.page_size, "held": rows}


def _sequence(history: History, at: int | None, sequence: int, progress: Callable[[int, int], None]) -> dict[str, Any]:
    watch = SequenceWatch(sequence)
    state = history.replay(at, watch, progress)
    is_open = sequence in state.sequences
    found = describe_sequence(state, sequence) if is_open else watch.last
    if found is None:
        raise Unknown("sequence", sequence)
    story = [{"version": version, "what": what} for version, what in watch.story]
    return {**found, "is_open": is_open, "opened_at": watch.opened, "closed_at": watch.closed, "story": story}


# --- for people ------------------------------------------------------------------------------------------------------------------


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("pool", "who", "note", "tenant", "what", "worker", "shared with") else "right"
        )
    return table


def _show(found: dict[str, Any], console: Console) -> None:
    batches = sum(each["batches"] for each in found["segments"])
    console.print(f"epoch {found['epoch']}, version {found['version']} ({batches} batches read in {len(found['segments'])} segment(s))")
    if "held" in found:
        _show_page(found, console)
    elif "table" in found:
        _show_sequence(found, console)
    else:
        _show_state(found, console)
    if found["torn_bytes"]:
        console.print(f"torn tail: {found['torn_bytes']} bytes behind the last whole record (a write that was cut off, or is under way)")
    if found["damage"]:
        console.print(f"DAMAGED: {escape(found['damage']['text'])}\nshown is what lies before it")


def _show_state(found: dict[str, Any], console: Console) -> None:
    for life in found["lives"]:
        console.print(f"continues epoch {life['epoch']}, which ended at version {life['last']}")
    table = _table("pool", "free", "used", "cached", "quarantined", "total", "sequences", "worker")
    for name, pool in found["pools"].items():
        pages = pool["pages"]
        workers = ", ".join(
            f"{escape(each['name'])} ({worker}) acked {each['acked']}{' FENCED' if each['fenced'] else ''}"
            for worker, each in pool["workers"].items()
        )
        counts = [str(pages[key]) for key in ("free", "used", "cached", "quarantined", "total")]
        table.add_row(escape(name), *counts, str(pool["sequences"]), workers or "-")
    console.print(table)
    if found["open"]:
        table = _table("sequence", "pool", "tokens", "pages", "published", "owner", "tenant", "handoff")
        for each in found["open"][:ROWS_MAX]:
            numbers = [str(each[key]) for key in ("length", "pages", "published", "owner")]
            table.add_row(str(each["sequence"]), escape(each["pool"]), *numbers, escape(each["tenant"]) or "-", str(each["handoff"] or "-"))
        console.print(table)
        if len(found["open"]) > ROWS_MAX:
            console.print(f"and {len(found['open']) - ROWS_MAX} more (--json has them all)")
    for pool in found["pools"].values():
        for each in pool["workers"].values():
            for link in each["links"]:
                console.print(
                    f"{escape(each['name'])} reaches pages of {escape(link['name'])} by {escape(link['transport'])}: {escape(link['reason'])}"
                )
    for handoff, state in found["handoffs"].items():
        console.print(f"handoff {handoff}: {state}")


def _show_page(found: dict[str, Any], console: Console) -> None:
    console.print(f"page {found['page']} of pool {escape(found['pool'])}: tokens are positions in the holder's text")
    table = _table("from version", "until", "who", "tokens", "note")
    for each in found["held"]:
        who = {"index": "prefix index", "quarantine": f"quarantine, freed at {each['id']}", "free": "nobody: free"}.get(
            each["kind"], f"{each['kind']} {each['id']}"
        )
        tokens = f"{each['tokens'][0]}..{each['tokens'][1] - 1}" if each["tokens"] else "-"
        note = each["note"] if each["kind"] == "handoff" else f"tenant {each['note']}" if each["note"] else ""
        table.add_row(str(each["first"] or "before"), str(each["end"] or "now"), who, tokens, escape(note))
    console.print(table)


def _show_sequence(found: dict[str, Any], console: Console) -> None:
    state = "open" if found["is_open"] else f"closed at version {found['closed_at']}; its last table"
    tenant = f", tenant {escape(found['tenant'])}" if found["tenant"] else ""
    extra = f", extra key {escape(found['extra'])}" if found["extra"] else ""
    console.print(f"sequence {found['sequence']} of client {found['owner']} in pool {escape(found['pool'])}{tenant}{extra}: {state}")
    written = ", ".join(f"worker {worker} to {tokens}" for worker, tokens in found["written"].items()) or "by nobody yet"
    console.print(f"{found['length']} tokens reserved, {found['tokens_known']} token ids known, written {written}")
    table = _table("tokens", "page", "published", "shared with")
    for each in found["table"]:
        shared = ", ".join(map(str, each["shared_with"])) or "-"
        table.add_row(f"{each['tokens'][0]}..{each['tokens'][1] - 1}", str(each["page"]), "yes" if each["published"] else "no", shared)
    console.print(table)
    for each in found["story"]:
        console.print(f"{each['version']:>12}  {escape(each['what'])}")
