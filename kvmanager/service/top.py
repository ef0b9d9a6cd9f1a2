"""`kvmanager top`: what a running manager is doing, again and again."""

from __future__ import annotations

import json
import time
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from kvmanager.errors import KVError
from kvmanager.service.client import KVClient

__all__ = ["look", "show"]

PAGE_STATES = (("used", "green"), ("cached", "blue"), ("quarantined", "yellow"), ("free", "bright_black"))
BAR_CELLS = 30
Frame = dict[str, Any]


def look(client: KVClient, handoffs: int) -> Frame:
    """One look at a manager: `stats`, `workers` and the oldest handoffs, and when it was."""
    return {"time": time.time(), "stats": client.stats(), "workers": client.workers(), "handoffs": client.handoffs(handoffs)}


def bar(pages: dict[str, int], cells: int = BAR_CELLS) -> Text:
    """Pages of a pool by state, so many characters wide. A state with any page has at least one character while there is room."""
    text, left, pages_left = Text(), cells, pages["total"]
    for state, colour in PAGE_STATES:
        width = min(left, max(round(left * pages[state] / pages_left), 1)) if pages[state] else 0
        text.append("━" * width, style=colour)
        left, pages_left = left - width, pages_left - pages[state]
    return text


def pools_table(stats: dict[str, Any]) -> Table:
    table = Table(
        "pool",
        "group",
        Column("pages", max_width=BAR_CELLS),
        *(f"[{colour}]{state}" for state, colour in PAGE_STATES),
        "total",
        box=None,
        pad_edge=False,
    )
    for heading in ("sequences", "workers"):
        table.add_column(heading, justify="right")
    for name, pool in stats["pools"].items():
        pages = pool["pages"]
        live = f"{len(pool['workers'])}" + (f" [red]+{len(pool['fenced'])} fenced" if pool["fenced"] else "")
        if pool["draining"]:
            live += " [yellow]drained" if pool["drained"] else " [yellow]draining"
        counts = [f"{pages[state]:,}" for state, _ in PAGE_STATES]
        table.add_row(Text(name), Text(pool["group"]), bar(pages), *counts, f"{pages['total']:,}", f"{pool['sequences']:,}", live)
    return table


def workers_table(workers: list[dict[str, Any]]) -> Table:
    table = Table("worker", "name", "pool", box=None, pad_edge=False)
    for heading in ("acknowledged", "behind", "lease left"):
        table.add_column(heading, justify="right")
    for each in workers:
        lease = Text("fenced", style="red") if each["fenced"] else Text(f"{each['lease_left_ms'] / 1000:.1f} s")
        table.add_row(str(each["worker"]), Text(each["name"]), Text(each["pool"]), f"{each['acked']:,}", f"{each['behind']:,}", lease)
    return table


def links_table(workers: list[dict[str, Any]]) -> Table:
    """Who reaches whose pages by what, and why by that."""
    table = Table("puller", "pages of", "transport", Column("because", overflow="fold"), box=None, pad_edge=False)
    for each in workers:
        for link in each["links"]:
            table.add_row(*(Text(text) for text in (each["name"], link["name"], link["transport"], link["reason"])))
    return table


def moved_table(pools: dict[str, Any]) -> Table:
    """What handoffs have moved into each pool, and what they did not have to. Bytes are unknown until a worker has said what a page takes."""
    table = Table("handoffs into", box=None, pad_edge=False)
    for heading in ("pages moved", "bytes", "pages spared", "bytes"):
        table.add_column(heading, justify="right")
    for name, pool in pools.items():
        if pool["pages_moved"] or pool["pages_spared"]:
            cells = [f"{pool[f'pages_{kind}']:,}|{pool[f'bytes_{kind}'] if pool['page_bytes'] else '?'}" for kind in ("moved", "spared")]
            row = [part for cell in cells for part in cell.split("|")]
            table.add_row(Text(name), *(f"{int(part):,}" if part.isdigit() else part for part in row))
    return table


def handoffs_table(handoffs: list[dict[str, Any]]) -> Table:
    table = Table("handoff", "sequence", Column("state", min_width=10), "from", "to", "by", box=None, pad_edge=False)
    for heading in ("tokens", "pages", "of them shared", "failed tries", "age"):
        table.add_column(heading, justify="right")
    for each in handoffs:
        table.add_row(
            *(str(each["handoff"]), str(each["sequence"]), each["state"]),
            *(Text(each[name] or "-") for name in ("source", "target", "transport")),
            *(f"{each[name]:,}" for name in ("tokens", "pages", "pages_shared", "failed", "age")),
        )
    return table


def screen(frame: Frame, before: Frame | None) -> Group:
    """One frame for people; `before` gives the rate of versions."""
    stats = frame["stats"]
    head = f"epoch {stats['epoch']}  version {stats['version']:,}"
    if before is not None and before["stats"]["epoch"] == stats["epoch"]:
        steps, seconds = stats["version"] - before["stats"]["version"], frame["time"] - before["time"]
        head += f"  {steps / max(seconds, 1e-3):,.0f} versions a second"
    head += f"  {len(stats['handoffs']):,} handoffs under way"
    parts: list[Any] = [Text(head, style="bold")]
    if wrong := stats.get("journal", {}).get("wrong"):
        parts.append(Text(f"journal: {wrong}", style="red"))
    parts += [Text(), pools_table(stats), Text(), workers_table(frame["workers"])]
    for more in (links_table(frame["workers"]), moved_table(stats["pools"])):
        if more.row_count:
            parts += [Text(), more]
    if frame["handoffs"]:
        parts += [Text(), handoffs_table(frame["handoffs"])]
    return Group(*parts)


def show(client: KVClient, *, interval_s: float, count: int, handoffs: int, as_json: bool) -> None:
    """Look `count` times (0: until interrupted), `interval_s` apart. A manager that does not answer is said to, and asked again.

    Raises the KVError of the first look: there is nothing to show then.
    """
    before, frame, looks = None, look(client, handoffs), 1
    if as_json:
        click.echo(json.dumps(frame))
        while looks != count:
            time.sleep(interval_s)
            click.echo(json.dumps(look(client, handoffs)))
            looks += 1
        return
    console = Console()
    if count == 1:
        console.print(screen(frame, None))
        return
    with Live(screen(frame, None), console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while looks != count:
            time.sleep(interval_s)
            looks += 1
            try:
                before, frame = frame, look(client, handoffs)
                live.update(screen(frame, before), refresh=True)
            except KVError as error:
                silent = f"{time.time() - frame['time']:.0f} s ago, since then: {error}"
                live.update(Group(Text(f"last answer {silent}", style="red"), screen(frame, before)), refresh=True)
