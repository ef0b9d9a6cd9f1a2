"""`kvmanager replay` as its user sees it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvmanager.cli import main
from kvmanager.replay.meter import SAMPLES_MAX, Series
from kvmanager.replay.report import draw_plot, save_plot
from kvmanager.replay.sequential import SequentialRun
from tests.replay.conftest import WriteTrace, request

ROOT = Path(__file__).resolve().parents[2]
ROWS = [request(0, [1, 2, 3], 1300), request(1000, [1, 2, 4], 1300), request(2000, [1, 2, 3], 1300)]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["replay", *map(str, arguments)])


def test_sequential_prints_the_figures_and_a_plot(write_trace: WriteTrace) -> None:
    done = call(write_trace(ROWS), "--pages", 10, "--page-size", 512, "--sequential")
    assert done.exit_code == 0, done.output
    assert "trace.jsonl: 3 of 3 requests, one request at a time; 10 pages of 512 tokens" in done.output
    assert "4 of 6 whole pages of prompts (0.66667)" in done.output
    assert "2,048 of 3,900 tokens of prompts (0.52513)" in done.output
    assert "2 pages used, 2 used or cached, of 10" in done.output
    assert "3 requests" in done.output.splitlines()[-2] and "pages cached" in done.output.splitlines()[-1]


def test_json_is_one_object_with_everything(write_trace: WriteTrace) -> None:
    done = call(write_trace(ROWS), "--pages", 40, "--pools", 2, "--placement", "round_robin", "--step-ms", 20, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["complete"], found["done"], found["requests"]) == (True, 3, 3)
    assert found["settings"]["pools"] == 2 and found["settings"]["pages_total"] == 80
    assert found["counts"]["tokens_output"] == 15 and found["counts"]["preemptions"] == 0
    assert found["counts"]["pages_hit"] == 20  # the third prompt comes to the pool of the first
    assert found["steps"]["count"] == 16 and found["steps"]["median_us"] > 0
    assert found["latency"]["median_ms"] == 20.0
    assert len(found["use"]["at"]) == len(found["use"]["used"]) == len(found["use"]["cached"]) == 15


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pages", "4", "--page-size", "1025"], "kvmanager: pool.page_size: expected an int in 1..1024, got 1025"),
        (["--pages", str(2**31)], f"kvmanager: pool.num_pages: expected an int in 1..2147483647, got {2**31}"),
        (["--pages", "4", "--placement", "random"], "kvmanager: placement: expected one of prefix, round_robin, got 'random'"),
        (["--pages", "4", "--sequential", "--pools", "2"], "kvmanager: --pools: expected nothing beside --sequential"),
        (["--pages", "4", "--plot", "nowhere/use.png"], "kvmanager: --plot: expected a file in a folder that exists, got nowhere/use.png"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_wrong_use_exits_2_and_names_the_option(write_trace: WriteTrace, arguments: list[str], expected: str) -> None:
    done = call(write_trace(ROWS), *arguments)
    assert done.exit_code == 2 and done.output.startswith(expected), done.output


def test_a_broken_trace_exits_2_and_names_the_line(write_trace: WriteTrace) -> None:
    path = write_trace(ROWS)
    path.write_text(path.read_text() + '{"timestamp": 5}\n')
    done = call(path, "--pages", 10)
    assert (done.exit_code, done.output) == (2, "kvmanager: trace.jsonl:4: input_length: expected an int in 1..1048576, got nothing\n")


def test_ctrl_c_prints_what_is_known_so_far(write_trace: WriteTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SequentialRun.run

    def interrupted(self: SequentialRun) -> Iterator[int]:
        for done in run(self):
            yield done
            if done == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(SequentialRun, "run", interrupted)
    done = call(write_trace(ROWS), "--pages", 10, "--page-size", 512, "--sequential")
    assert done.exit_code == 130
    assert "2 of 3 requests, one request at a time; 10 pages of 512 tokens (interrupted)" in done.output
    assert "2 of 4 whole pages" in done.output


SIGINT_AT_STEP_50 = """
import os, signal, sys
from kvmanager.cli import main
from kvmanager.replay.scheduler import ConcurrentRun
run = ConcurrentRun.run
def interrupted(self):
    for step, done in enumerate(run(self)):
        if step == 50:
            os.kill(os.getpid(), signal.SIGINT)
        yield done
ConcurrentRun.run = interrupted
main(["replay", sys.argv[1], "--pages", "200", "--json"])
"""


def test_sigint_ends_the_process_with_its_report(write_trace: WriteTrace) -> None:
    path = write_trace([request(number * 1000, [number], output_length=200) for number in range(300)])
    command = [sys.executable, "-c", SIGINT_AT_STEP_50, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 130, done.stderr
    found = json.loads(done.stdout)
    assert found["complete"] is False and found["requests"] == 300 and 50 <= found["steps"]["count"] < 60


# --- the plot --------------------------------------------------------------------------------------------------------------------


def test_series_stays_small_and_spans_the_whole_run() -> None:
    series = Series()
    for at in range(100_000):
        series.add(float(at), at, 0)
    assert SAMPLES_MAX // 2 <= len(series.at) <= SAMPLES_MAX
    assert series.at == sorted(series.at) and series.at[0] < 200 and series.at[-1] > 99_800


def test_plot_is_as_high_as_the_pool() -> None:
    series = Series()
    for at in range(73):
        series.add(float(at), 50 if at < 36 else 0, 50 if at < 36 else 20)
    lines = draw_plot(series, 100, "requests", ascii_only=True)
    assert lines[0].strip() == "100 |" + "." * 36
    assert lines[5].strip() == "|" + "#" * 36
    assert lines[9].strip() == "0 |" + "#" * 36 + "." * 36
    assert lines[-2].endswith("72 requests")
    assert draw_plot(Series(), 100, "requests") == []


def test_plot_goes_to_the_terminal_without_matplotlib(write_trace: WriteTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("kvmanager.replay.report.find_spec", lambda name: None)
    done = call(write_trace(ROWS), "--pages", 10, "--sequential", "--page-size", 512, "--plot", tmp_path / "use.png")
    assert done.exit_code == 0 and "use.png was not written: matplotlib is not installed" in done.output
    assert "pages cached" in done.output.splitlines()[-1]


def test_plot_is_written_as_png_with_matplotlib(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    series = Series([0.0, 1.0], [3, 4], [0, 5])
    assert save_plot(tmp_path / "use.png", series, 10, "requests", "title")
    assert (tmp_path / "use.png").read_bytes().startswith(b"\x89PNG")
