"""The `kvmanager` command."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import signal
import stat
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import click

from kvmanager import __version__
from kvmanager.config import ManagerConfig, config_from_mapping
from kvmanager.errors import InvalidValue, KVError
from kvmanager.log.inspect_journal import inspect
from kvmanager.log.journal import FSYNC, Journal
from kvmanager.manager import KVManager
from kvmanager.replay.command import replay
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server
from kvmanager.service.top import show
from kvmanager.simulator.command import simulate

__all__ = ["default_address", "load_config", "main"]


def default_address(name: str) -> str:
    """ipc:// address in a folder that belongs to this user alone."""
    folder = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"kvmanager-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise InvalidValue("address", f"a folder {folder} of this user", str(error)) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InvalidValue("address", f"a folder {folder} that this user alone can write to", "one that others own or can write to")
    return f"ipc://{folder}/{name}"


def load_config(path: str) -> dict[str, Any]:
    """The mapping in a TOML or JSON file. Raises InvalidValue naming the file and what is wrong where."""
    try:
        text = Path(path).read_text()
        found = json.loads(text) if path.endswith(".json") else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # both parsers' errors are ValueErrors with line and column
        raise InvalidValue(f"config file {path}", "readable TOML or JSON", str(error)) from None
    if not isinstance(found, dict):
        raise InvalidValue(f"config file {path}", "a table at the top", type(found).__name__)
    return found


def _parse_pool(text: str) -> dict[str, Any]:
    pool: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise InvalidValue("--pool", "KEY=VALUE,... such as name=main,num_pages=1024", repr(text))
        key, value = key.strip(), value.strip()
        pool[key] = int(value) if re.fullmatch("-?[0-9]{1,18}", value) and key not in ("name", "group", "layout") else value
    return pool


def _build_config(config_path: str | None, pools: tuple[str, ...], lease_ms: int | None) -> ManagerConfig:
    """The config that a file and options make. Raises InvalidValue naming the file, the key and the limit."""
    values = load_config(config_path) if config_path else {}
    try:
        if pools:
            listed = values.get("pools", [])
            if not isinstance(listed, list):
                raise InvalidValue("config.pools", "a list of tables", type(listed).__name__)
            values["pools"] = [*listed, *map(_parse_pool, pools)]
        if lease_ms is not None:
            values["lease_ms"] = lease_ms
        if not values.get("pools"):
            raise InvalidValue("config.pools", "at least one: --pool name=main,num_pages=1024, or [[pools]] in --config", "none")
        return config_from_mapping(values)
    except InvalidValue as error:
        if not config_path:
            raise
        raise InvalidValue(f"{config_path}: {error.field}", str(error.details["expected"]), error.details["got"]) from None


class _Group(click.Group):
    """Typed errors become one line and exit code 2, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KVError as error:
            click.echo(f"kvmanager: {error}", err=True)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmanager")
def main() -> None:
    """A paged KV-cache manager service for MLA models."""


@main.command()
@click.option("--config", "config_path", type=click.Path(), help="TOML or JSON file: [[pools]] tables and the bounds of ManagerConfig.")
@click.option(
    "--pool", "pools", multiple=True, metavar="KEY=VALUE,...", help="A pool: name, num_pages, page_size, group, workers. Repeatable."
)
@click.option("--address", help="Where requests are answered: ipc://PATH or tcp:// on loopback. Default: a folder of this user.")
@click.option("--publish", help="Where event batches are published.")
@click.option("--lease-ms", type=int, help="Silence after which a worker is fenced.")
@click.option("--journal", type=click.Path(), help="Folder of the journal: sequences, prefixes and pages outlive a restart.")
@click.option("--fsync", type=click.Choice(FSYNC), default="never", show_default=True, help="never: killed processes; others: lost hosts.")
@click.option(
    "--segments-kept", type=click.IntRange(1, 1 << 20), default=2, show_default=True, help="Files of the journal to keep, for inspect."
)
def serve(
    config_path: str | None,
    pools: tuple[str, ...],
    address: str | None,
    publish: str | None,
    lease_ms: int | None,
    journal: str | None,
    fsync: str,
    segments_kept: int,
) -> None:
    """Run a manager that owns pages and publishes block tables.

    \b
    kvmanager serve --pool name=prefill,num_pages=4096 --pool name=decode,num_pages=4096
    """
    config = _build_config(config_path, pools, lease_ms)
    # Without a journal nothing is kept over a restart, so the next life must never look like this one: replicas tell them apart by the epoch.
    epoch = time.time_ns() // 1_000_000
    manager = KVManager(config, epoch=epoch, journal=Journal(journal, fsync=fsync, segments_kept=segments_kept) if journal else None)
    server = Server(manager, address=address or default_address("requests"), publish=publish or default_address("log"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    for pool in config.pools:
        click.echo(f"pool {pool.name}: {pool.num_pages} pages of {pool.page_size} tokens, group {pool.group}, {pool.workers} worker(s)")
    if manager.recovered is not None:
        click.echo(f"journal {journal}: {manager.recovered.summary()}")
    click.echo(f"requests at {server.address}, event batches at {server.publish}")
    gc.collect()
    gc.freeze()  # what came back from a journal may be a million index nodes: later collections need not look through them
    try:
        server.run()
    finally:
        server.close()
        broken = manager.journal.broken if manager.journal is not None else ""
        manager.disconnect()
    if broken:
        click.echo(f"kvmanager: journal {journal}: {broken}", err=True)
        sys.exit(1)


@main.command()
@click.option("--address", help="The manager's request address. Default: a folder of this user.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def stats(address: str | None, as_json: bool) -> None:
    """Show pages of each pool by state, workers and handoffs of a running manager."""
    with KVClient(address or default_address("requests"), timeout_ms=2_000) as client:
        found = client.stats()
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"epoch {found['epoch']}, version {found['version']}, {len(found['handoffs'])} handoffs under way")
    if wrong := found.get("journal", {}).get("wrong"):
        click.echo(f"journal: {wrong}")
    for name, pool in found["pools"].items():
        pages = pool["pages"]
        counts = ", ".join(f"{pages[state]} {state}" for state in ("free", "used", "cached", "quarantined"))
        fenced = f", {len(pool['fenced'])} fenced" if pool["fenced"] else ""
        click.echo(
            f"pool {name}: {counts} of {pages['total']} pages; {pool['sequences']} sequences, {len(pool['workers'])} workers{fenced}"
        )


@main.command()
@click.option("--address", help="The manager's request address. Default: a folder of this user.")
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, help="Seconds between looks.")
@click.option("--count", type=click.IntRange(0), default=0, help="Look so many times; 0, the default, is until interrupted.")
@click.option("--handoffs", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The oldest so many are listed.")
@click.option("--json", "as_json", is_flag=True, help="One line for each look, for programs.")
def top(address: str | None, interval: float, count: int, handoffs: int, as_json: bool) -> None:
    """Watch a running manager: pools, workers, handoffs."""
    with KVClient(address or default_address("requests"), timeout_ms=2_000) as client, contextlib.suppress(KeyboardInterrupt):
        show(client, interval_s=interval, count=count, handoffs=handoffs, as_json=as_json)


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Serve a small model with a manager, prefill and decode workers, and compare with transformers."""
    try:
        from kvmanager.examples.engine.demo import main as run_demo
    except ModuleNotFoundError as error:
        click.echo(f"kvmanager: the demo needs {error.name}: pip install 'kvmanager[demo]'", err=True)
        ctx.exit(2)
    sys.exit(run_demo(ctx.args, standalone_mode=True, prog_name="kvmanager demo"))


main.add_command(replay)
main.add_command(inspect)
main.add_command(simulate)


if __name__ == "__main__":
    main(prog_name="kvmanager")
