"""`kvmanager simulate`: a seed says the same everywhere, a violation says how to see it again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvmanager.cli import main
from kvmanager.pages.pool import Pool

ROOT = Path(__file__).resolve().parents[2]


def simulate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["text", "json"])
def test_the_same_arguments_print_the_same_bytes_in_every_process(more: tuple[str, ...]) -> None:
    """To the last byte, digest of everything decided included; hashes of strings differ between the two."""
    command = [sys.executable, "-m", "kvmanager.cli", "simulate", "--seed", "11", "--seeds", "3", "--steps", "600", *more]
    printed = []
    for hash_seed, jobs in (("1", "1"), ("2", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, "--jobs", jobs], capture_output=True, env=environment, timeout=200, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        printed.append(done.stdout)
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) == (4 if more else 5)


def test_the_seed_is_printed_first_even_if_it_was_drawn() -> None:
    first = simulate("--steps", 50).output.splitlines()[0]
    assert first.startswith("seed ") and int(first.split()[1].rstrip(",")) >= 0
    assert simulate("--seed", 5, "--steps", 50, "--faults", "none").output.startswith("seed 5, 50 steps, faults: none\n")


def test_a_violation_gives_the_shortest_command_and_the_journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And exit code 1; the command that it prints fails as well."""
    monkeypatch.setattr(Pool, "put_in_quarantine", lambda self, version, pages, account: self.free.push(pages))
    done = simulate("--seed", 1, "--steps", 2000, "--journals", tmp_path)
    assert done.exit_code == 1 and "VIOLATED" in done.output
    [command] = [line.partition("reproduce:")[2].split() for line in done.output.splitlines() if "reproduce:" in line]
    assert command[:2] == ["kvmanager", "simulate"] and int(command[command.index("--steps") + 1]) < 500
    again = CliRunner().invoke(main, [*command[1:], "--no-shorten", "--journals", str(tmp_path / "again")])
    assert again.exit_code == 1
    assert list((tmp_path / "seed-1").glob("*.kvj")) and "Traceback" in (tmp_path / "seed-1" / "trace.txt").read_text()


def test_json_says_what_happened() -> None:
    done = simulate("--seed", 4, "--steps", 300, "--json")
    run, total = map(json.loads, done.stdout.splitlines())
    assert done.exit_code == 0 and run["ok"] and run["seed"] == 4 and run["steps"] >= 300 and run["seen"]["SequenceOpened"]
    assert total == {"seeds": 1, "steps": run["steps"], "failed": []}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--faults", "loss,gremlins"), "gremlins"),
        (("--seed", -1), "--seed"),
        (("--steps", 0), "--steps"),
        (("--jobs", 0), "--jobs"),
    ],
    ids=["faults", "seed", "steps", "jobs"],
)
def test_wrong_arguments_are_named(arguments: tuple[object, ...], says: str) -> None:
    done = simulate(*arguments)
    assert done.exit_code == 2 and says in done.output


def test_help_names_every_option_and_fault() -> None:
    help_text = simulate("--help").output
    for word in ("--seed", "--seeds", "--steps", "--faults", "--jobs", "--journals", "--json", "loss", "crash", "torn"):
        assert word in help_text
