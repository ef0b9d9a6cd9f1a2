"""`kvmanager simulate`: a seed says the same everywhere, a violation says how to see it again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvmanager.cli import main
from kvmanager.pages.pool import Pool
from kvmanager.simulator.command import SUMMED
from kvmanager.simulator.crew import Job, outcomes

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
    seen = {name: run["seen"].get(name, 0) for name in SUMMED}
    assert total == {"seeds": 1, "steps": run["steps"], "failed": [], "restarts": run["seen"].get("restart", 0), "seen": seen, "not_run": 0}


def test_a_range_of_seeds_and_a_limit_of_time() -> None:
    """What is not run in time is counted; what is run is what it would have been without a limit."""
    first = simulate("--seeds", "7..9", "--steps", 60, "--faults", "none")
    lines = first.output.splitlines()
    assert lines[0].startswith("seeds 7 to 9, 60 steps") and [line.split()[1] for line in lines[1:4]] == ["7:", "8:", "9:"]
    hurried = simulate("--seeds", "7..100000", "--steps", 60, "--faults", "none", "--minutes", 0.01).output.splitlines()
    assert hurried[1:4] == lines[1:4]
    run, left = (int(word) for word in re.findall(r"of (\d+) seeds, (\d+) not run", hurried[-2])[0])
    assert run >= 3 and run + left == 100_000 - 6


class Ender:
    """Ends the process that unpickles it, as the kernel does when memory runs out."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


def test_a_process_that_ends_costs_its_seed_alone() -> None:
    """And a time limit ends what is under way."""
    jobs = [Job(seed, 40, (), False) for seed in range(5)]
    jobs[1] = jobs[1]._replace(steps=Ender())  # type: ignore[arg-type]
    found = list(outcomes(jobs, 2))
    assert [each.seed for each in found] == [0, 1, 2, 3, 4]
    assert [bool(each.error) for each in found] == [False, True, False, False, False]
    assert "exit code 9" in found[1].error
    assert list(outcomes(jobs, 2, deadline=0)) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--faults", "loss,gremlins"), "gremlins"),
        (("--seed", -1), "--seed"),
        (("--steps", 0), "--steps"),
        (("--jobs", 0), "--jobs"),
        (("--seeds", "9..7"), "FIRST..LAST"),
        (("--seeds", "0"), "FIRST..LAST"),
        (("--seeds", "1..3", "--seed", 2), "--seed"),
        (("--minutes", 0), "--minutes"),
    ],
    ids=["faults", "seed", "steps", "jobs", "range", "no-seeds", "two-firsts", "minutes"],
)
def test_wrong_arguments_are_named(arguments: tuple[object, ...], says: str) -> None:
    done = simulate(*arguments)
    assert done.exit_code == 2 and says in done.output


def test_help_names_every_option_and_fault() -> None:
    help_text = simulate("--help").output
    for word in ("--seed", "--seeds", "--steps", "--faults", "--jobs", "--minutes", "--journals", "--json", "loss", "crash", "torn"):
        assert word in help_text
