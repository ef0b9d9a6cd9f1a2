"""The `kvmanager` command as a process: what it serves, how it ends, and what a user reads who got something wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmanager
from kvmanager.service.client import KVClient
from kvmanager.worker.follower import Follower
from kvmanager.worker.replica import Replica

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "kvmanager.cli"]
SECONDS_MAX = 60
Serve = Callable[..., "Serving"]
Run = Callable[..., subprocess.CompletedProcess[str]]


class Serving:
    """`kvmanager serve` as a process that has said where it can be reached."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            self.said.append(line.rstrip("\n"))
            if line.startswith("requests at "):
                self.address, self.publish = line.removeprefix("requests at ").rstrip("\n").split(", event batches at ")
                return
        _, error = process.communicate(timeout=SECONDS_MAX)
        pytest.fail(f"serve ended: {error}")

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """(exit code, standard error) after a signal."""
        self.process.send_signal(number)
        _, error = self.process.communicate(timeout=SECONDS_MAX)
        return self.process.returncode, error


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A runtime folder of the test's own, so that default addresses are nobody else's."""
    (tmp_path / "run").mkdir(mode=0o700)
    return {**os.environ, "PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(tmp_path / "run")}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    """run(*args): `kvmanager` with these arguments, to its end."""

    def call(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *args], check=False, capture_output=True, text=True, timeout=SECONDS_MAX, cwd=tmp_path, env={**environment, **env}
        )

    return call


@pytest.fixture
def serve(environment: dict[str, str], tmp_path: Path) -> Iterator[Serve]:
    """serve(*args): a running `kvmanager serve`; killed with the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*args: str) -> Serving:
        processes.append(
            subprocess.Popen(
                [*COMMAND, "serve", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
            )
        )
        return Serving(processes[-1])

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def at(tmp_path: Path) -> list[str]:
    return ["--address", f"ipc://{tmp_path}/req", "--publish", f"ipc://{tmp_path}/pub"]


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that an unusable invocation prints."""
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stdout, done.stderr[-2000:])
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvmanager: "), done.stderr
    return lines[0]


# --- serve and stats -------------------------------------------------------------------------------------------------------------


def test_serve_and_stats_with_options(serve: Serve, run: Run, tmp_path: Path) -> None:
    """DESIGN's first example: pools on the command line; a client opens, stats shows it; SIGTERM ends it with 0 and takes its files."""
    serving = serve(
        "--pool", "name=prefill,num_pages=100,page_size=16", "--pool", "name=decode,num_pages=50,group=g,workers=2", *at(tmp_path)
    )
    assert serving.said[:2] == [
        "pool prefill: 100 pages of 16 tokens, group default, 1 worker(s)",
        "pool decode: 50 pages of 64 tokens, group g, 2 worker(s)",
    ]
    assert (serving.address, serving.publish) == (f"ipc://{tmp_path}/req", f"ipc://{tmp_path}/pub")
    with KVClient(serving.address) as client:
        client.join("w0", "prefill", "bf16")
        client.open([1] * 17, "prefill", chunk=17)
        done = run("stats", "--json", "--address", serving.address)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        assert found == client.stats()
        assert found["pools"]["prefill"]["pages"] == {"free": 98, "used": 2, "cached": 0, "quarantined": 0, "total": 100}
        assert found["pools"]["prefill"]["workers"] == {"1": "w0"} and found["pools"]["decode"]["group"] == "g"
        done = run("stats", "--address", serving.address)
        assert (
            done.returncode == 0
            and "pool prefill: 98 free, 2 used, 0 cached, 0 quarantined of 100 pages; 1 sequences, 1 workers" in done.stdout
        )
    assert serving.end() == (0, "")
    assert not (tmp_path / "req").exists() and not (tmp_path / "pub").exists()


CONFIG = """
lease_ms = 5000
heartbeat_ms = 20

[[pools]]
name = "main"
num_pages = 33
page_size = 32
"""


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_serve_with_a_config_file_at_default_addresses(kind: str, serve: Serve, run: Run, tmp_path: Path) -> None:
    """Nothing but the file: the addresses lie in a folder of this user alone, and `stats` finds them. --pool adds to the file's pools."""
    path = tmp_path / f"manager.{kind}"
    path.write_text(
        CONFIG if kind == "toml" else json.dumps({"pools": [{"name": "main", "num_pages": 33, "page_size": 32}], "heartbeat_ms": 20})
    )
    serving = serve("--config", str(path), "--pool", "name=more,num_pages=7")
    folder = tmp_path / "run" / f"kvmanager-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(each.name for each in folder.iterdir()) == ["log", "requests"]
    assert {each.stat().st_mode & 0o777 for each in folder.iterdir()} == {0o600}
    found = json.loads(run("stats", "--json").stdout)
    assert {name: pool["pages"]["total"] for name, pool in found["pools"].items()} == {"main": 33, "more": 7}
    assert found["pools"]["main"]["page_size"] == 32
    assert serving.end(signal.SIGINT) == (0, "")
    assert list(folder.iterdir()) == []


def test_restart_is_another_epoch(serve: Serve, tmp_path: Path) -> None:
    """Rule 3: nothing is kept over a restart, so a replica must not take the next manager's versions for the last one's. Also after
    SIGKILL, whose socket files are replaced."""
    arguments = ["--pool", "name=main,num_pages=9", *at(tmp_path)]
    first = serve(*arguments)
    with KVClient(first.address, resend_ms=100) as client:
        follower = Follower(client, Replica())
        try:
            before = follower.replica.epoch
            client.join("w0", "main", "bf16")
            first.end(signal.SIGKILL)
            assert (tmp_path / "req").exists()
            serve(*arguments)
            while follower.replica.epoch == before:
                assert follower.poll(SECONDS_MAX * 1000), "nothing heard"
            assert follower.replica.epoch > before and follower.replica.version == 1 and follower.replica.peers == {}
        finally:
            follower.close()


def test_second_serve_at_the_same_address_is_refused(serve: Serve, run: Run, tmp_path: Path) -> None:
    """Two managers of one address would both believe to own the pages; the first goes on."""
    serving = serve("--pool", "name=main,num_pages=9", *at(tmp_path))
    assert "address: expected an address that nobody serves" in refused(run("serve", "--pool", "name=main,num_pages=9", *at(tmp_path)))
    with KVClient(serving.address) as client:
        assert client.stats()["version"] == 1
    assert serving.end() == (0, "")


def test_top_shows_pools_workers_and_handoffs(serve: Serve, run: Run) -> None:
    serving = serve("--pool", "name=prefill,num_pages=8,page_size=16", "--pool", "name=decode,num_pages=8,page_size=16")
    with KVClient(serving.address) as client:
        for pool in ("prefill", "decode"):
            client.join(f"{pool}-0", pool, "layout")
        sequence = client.open(list(range(40)), "prefill", chunk=40).sequence
        handoff = client.hand_off(sequence, "decode")
        done = run("top", "--json", "--count", "2", "--interval", "0.05", "--address", serving.address)
        assert done.returncode == 0, done.stderr
        first, second = map(json.loads, done.stdout.splitlines())
        assert first["stats"] == second["stats"] == client.stats()
        assert [(each["name"], each["pool"], each["fenced"]) for each in first["workers"]] == [
            ("prefill-0", "prefill", False),
            ("decode-0", "decode", False),
        ]
        assert [(each["handoff"], each["sequence"], each["state"], each["source"], each["target"]) for each in first["handoffs"]] == [
            (handoff, sequence, "prefilling", "prefill", "decode")
        ]
        shown = run("top", "--count", "1", "--address", serving.address)
        assert shown.returncode == 0, shown.stderr
        for text in ("prefill-0", "decode-0", "prefilling", "1 handoffs under way", "3"):
            assert text in shown.stdout
    assert serving.end()[0] == 0


def test_top_and_inspect_show_by_what_pages_come_and_how_many_bytes(serve: Serve, run: Run, tmp_path: Path) -> None:
    pools = [f"name={name},num_pages=8,page_size=16" for name in ("prefill", "decode")]
    serving = serve("--pool", pools[0], "--pool", pools[1], "--journal", str(tmp_path / "journal"))
    with KVClient(serving.address) as client:
        source, target = (client.join(f"{pool}-0", pool, "layout", page_bytes=1000) for pool in ("prefill", "decode"))
        opened = client.open(list(range(40)), "prefill", chunk=40)
        client.ack(source, client.stats()["version"], ids=[opened.sequence], tokens=[40])
        handoff = client.hand_off(opened.sequence, "decode")
        client.ack(target, 1, links=[(source, "shm", "both in this host's memory")])
        shown = run("top", "--count", "1", "--address", serving.address).stdout
        for text in ("moving", "because", "shm", "both in this host's memory"):
            assert text in shown
        client.ack(target, client.stats()["version"], pulled=[handoff])
        shown = run("top", "--count", "1", "--address", serving.address).stdout
        assert "handoffs into" in shown
        assert "3,000" in shown
        inspected = run("inspect", str(tmp_path / "journal"))
        assert "decode-0 reaches pages of prefill-0 by shm: both in this host's memory" in inspected.stdout, inspected.stderr
    assert serving.end()[0] == 0


def test_stats_of_nobody_is_one_line(run: Run, tmp_path: Path) -> None:
    """ManagerUnreachable, in words."""
    line = refused(run("stats", "--address", f"ipc://{tmp_path}/nobody"))
    assert f"manager at ipc://{tmp_path}/nobody: expected a reply within 2000 ms, got none" in line


# --- wrong use -------------------------------------------------------------------------------------------------------------------

POOL = '[[pools]]\nname = "main"\nnum_pages = 64\n'
BAD_FILES = {
    "syntax": ("a.toml", "lease_ms = 5\npools = = 5", ["readable TOML or JSON", "line 2"]),
    "syntax-json": ("a.json", '{"pools": ', ["readable TOML or JSON", "line 1"]),
    "binary": ("a.toml", b"\xff\xfe\x00", ["readable TOML or JSON"]),
    "deep": ("a.json", "[" * 100_000, ["readable TOML or JSON"]),
    "deep-toml": ("a.toml", "a = " + "[" * 100_000, ["readable TOML or JSON"]),
    "list-at-top": ("a.json", "[1]", ["a table at the top", "got list"]),
    "empty": ("a.toml", "", ["pools: expected at least one"]),
    "no-pools": ("a.toml", "lease_ms = 5000\n", ["pools: expected at least one"]),
    "pools-a-number": ("a.toml", "pools = 5\n", ["config.pools", "list"]),
    "pools-of-numbers": ("a.toml", "pools = [5]\n", ["config.pools[0]: expected a table, got 5"]),
    "page-size-20": (
        "a.toml",
        POOL + "page_size = 2000\n",
        ["config.pools[0]: pool.page_size: expected an int in 1..1024, got 2000"],
    ),
    "page-size-float": ("a.toml", POOL + "page_size = 64.0\n", ["pool.page_size: expected an int in 1..1024", "got 64.0"]),
    "unknown-key": ("a.toml", "page_sise = 16\n" + POOL, ["config.page_sise: expected one of", "lease_ms", "got an unknown key"]),
    "unknown-key-of-a-pool": ("a.toml", POOL + "page_sise = 16\n", ["config.pools[0].page_sise: expected one of", "page_size"]),
    "missing-key": ("a.toml", '[[pools]]\nname = "main"\n', ["config.pools[0]: expected all required keys (name, num_pages)"]),
    "num-pages-0": ("a.toml", POOL.replace("64", "0"), ["pool.num_pages: expected an int in 1..2147483647, got 0"]),
    "num-pages-text": ("a.toml", POOL.replace("64", '"64"'), ["pool.num_pages: expected an int in 1..2147483647, got '64'"]),
    "name-twice": ("a.toml", POOL + POOL, ["pools: expected distinct names, got main"]),
    "name-newline": ("a.toml", POOL.replace("main", "a\\nb"), ["pool.name: expected printable text"]),
    "lease-0": ("a.toml", "lease_ms = 0\n" + POOL, ["lease_ms: expected an int in 10..86400000, got 0"]),
    "lease-a-date": ("a.toml", "lease_ms = 2026-01-01\n" + POOL, ["lease_ms: expected an int in 10..86400000"]),
}


@pytest.mark.parametrize(("name", "text", "says"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_config_is_one_line_with_file_field_and_limit(
    name: str, text: str | bytes, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 3: a bad config file gets a typed error that names file, field and limit; exit code 2, no traceback."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(in_process(capsys, "serve", "--config", str(path), *at(tmp_path)))
    for words in (str(path), *says):
        assert words in line, line
    assert not (tmp_path / "req").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param([], "pools: expected at least one", id="no-pool"),
        pytest.param(["--pool", "main"], "--pool: expected KEY=VALUE", id="no-equals"),
        pytest.param(["--pool", "name=a,num_pages=5\nx"], "--pool: expected KEY=VALUE|num_pages", id="newline"),
        pytest.param(["--pool", "name=a,num_pages=²"], "pool.num_pages: expected an int", id="superscript"),
        pytest.param(["--pool", "name=a,num_pages=--5"], "pool.num_pages: expected an int", id="two-minuses"),
        pytest.param(["--pool", f"name=a,num_pages={'9' * 5000}"], "pool.num_pages: expected an int", id="5000-digits"),
        pytest.param(
            ["--pool", "name=a,num_pages=64,page_size=2000"], "pool.page_size: expected an int in 1..1024, got 2000", id="page-size"
        ),
        pytest.param(["--pool", "name=a,pages=64"], "config.pools[0].pages: expected one of", id="unknown-key"),
        pytest.param(["--pool", "name=a,num_pages=5", "--lease-ms", "1"], "lease_ms: expected an int in 10..86400000, got 1", id="lease"),
        pytest.param(["--pool", "name=a,num_pages=5", "--address", "tcp://0.0.0.0:1"], "address: expected ipc://PATH", id="address"),
        pytest.param(["--pool", "name=a,num_pages=5", "--publish", "tcp://*:1"], "address: expected ipc://PATH", id="publish"),
        pytest.param(
            ["--pool", "name=a,num_pages=5", "--address", "ipc:///no/such/folder/x"],
            "address: expected an address that can be bound",
            id="no-folder",
        ),
    ],
)
def test_bad_option_is_one_line_with_field_and_limit(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 3, on the command line. What the shell gave wrong is shown, never a traceback."""
    line = refused(in_process(capsys, "serve", *at(tmp_path), *arguments))  # the last --address counts
    assert any(words in line for words in says.split("|")), line
    assert not (tmp_path / "req").exists() and not (tmp_path / "pub").exists()


@pytest.mark.parametrize("path", ["missing.toml", "."], ids=["missing", "folder"])
def test_config_that_is_no_file_is_one_line(path: str, run: Run, tmp_path: Path) -> None:
    """As a process, once: the operating system's own words, and the path."""
    line = refused(run("serve", "--config", str(tmp_path / path)))
    assert f"config file {tmp_path / path}: expected readable TOML or JSON" in line


def test_bad_config_of_a_process_leaves_no_traceback(run: Run, tmp_path: Path) -> None:
    """The same as in_process() sees it, through `python -m kvmanager.cli`."""
    (tmp_path / "a.toml").write_text(POOL + "page_size = 2000\n")
    line = refused(run("serve", "--config", str(tmp_path / "a.toml")))
    assert line == f"kvmanager: {tmp_path}/a.toml: config.pools[0]: pool.page_size: expected an int in 1..1024, got 2000"


def test_default_folder_that_others_can_write_to_is_refused(run: Run, tmp_path: Path) -> None:
    """In a shared /tmp somebody else may have made the folder first, and would own the sockets in it."""
    folder = tmp_path / "run" / f"kvmanager-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert "address: expected a folder" in refused(run("stats"))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert "address: expected a folder" in refused(run("stats"))
    assert "address: expected a folder" in refused(run("stats", XDG_RUNTIME_DIR=str(tmp_path / "none")))


# --- help ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["--help"], ["serve", "stats", "demo"], id="kvmanager"),
        pytest.param(["-h"], ["serve", "stats", "demo"], id="short"),
        pytest.param(
            ["serve", "--help"], ["--config", "--pool", "--address", "--publish", "--lease-ms", "--journal", "ManagerConfig"], id="serve"
        ),
        pytest.param(["stats", "--help"], ["--json", "--address"], id="stats"),
        pytest.param(["top", "--help"], ["--json", "--interval", "--count"], id="top"),
        pytest.param(["inspect", "--help"], ["JOURNAL", "--at", "--page", "--sequence", "--pool", "--json"], id="inspect"),
    ],
)
def test_help_says_everything(arguments: list[str], says: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """DESIGN, public surface: --help of every command."""
    done = in_process(capsys, *arguments)
    assert done.returncode == 0 and all(words in done.stdout for words in says), done.stdout


def test_help_of_the_demo_is_its_own(run: Run) -> None:
    """Passed on to the example, or a line that says what to install."""
    done = run("demo", "--help")
    if done.returncode == 2:
        assert "pip install 'kvmanager[demo]'" in refused(done)
    else:
        assert done.returncode == 0 and "kvmanager demo" in done.stdout and "--model" in done.stdout, done.stderr[-2000:]


def test_every_command_has_a_help_test() -> None:
    """A new command gets its line above, or in the tests of its own."""
    from kvmanager.cli import main

    assert sorted(main.commands) == ["demo", "inspect", "replay", "serve", "simulate", "stats", "top"]


def test_version_is_the_package_s(run: Run) -> None:
    """As a process: what a bug report begins with."""
    done = run("--version")
    assert done.returncode == 0 and done.stdout == f"kvmanager, version {kvmanager.__version__}\n"


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a process would print and return, without the time it takes to start one. Only for what ends by itself."""
    from kvmanager.cli import main

    try:
        main(list(arguments), prog_name="kvmanager")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(list(arguments), code, out, err)
