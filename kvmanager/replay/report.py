"""What a replay found, for people and for programs, and the plot of pool use over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from kvmanager.errors import InvalidValue
from kvmanager.replay.meter import Meter, Series

__all__ = ["Report", "draw_plot", "make_report", "save_plot"]

PLOT_COLUMNS = 72
PLOT_ROWS = 10


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


def _times(durations_us: Sequence[float]) -> dict[str, float]:
    """count, and median, mean and 99th percentile in microseconds"""
    if not len(durations_us):
        return {"count": 0, "median_us": 0.0, "mean_us": 0.0, "p99_us": 0.0}
    median, p99 = np.percentile(durations_us, [50, 99])
    return {
        "count": len(durations_us),
        "median_us": round(float(median), 1),
        "mean_us": round(float(np.mean(durations_us)), 1),
        "p99_us": round(float(p99), 1),
    }


@dataclass(frozen=True, slots=True)
class Report:
    """One replay. `settings` is what was asked for, `counts` are those of `meter.Counts`, with ratios; times are the manager's alone."""

    trace: str
    complete: bool
    done: int
    requests: int
    settings: dict[str, Any]
    counts: dict[str, Any]
    steps: dict[str, float]
    acks: dict[str, float]
    manager_s: float
    wall_s: float
    latency: dict[str, float] = field(default_factory=dict)
    use: dict[str, list[Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text, without the plot."""
        counts, settings = self.counts, self.settings
        speed = "arriving as recorded" if settings["speed"] == 1 else f"arriving {settings['speed']:g} times as fast as recorded"
        how = "one request at a time" if settings["sequential"] else speed
        pools = f"{settings['pools']} pools of " if settings["pools"] > 1 else ""
        head = f"{self.trace}: {self.done:,} of {self.requests:,} requests, {how}; {pools}{settings['pages']:,} pages of"
        rows = [
            ("pages hit", f"{counts['pages_hit']:,} of {counts['pages_whole']:,} whole pages of prompts ({counts['page_ratio']:.5f})"),
            ("tokens hit", f"{counts['tokens_hit']:,} of {counts['tokens_prompt']:,} tokens of prompts ({counts['token_ratio']:.5f})"),
            ("evictions", f"{counts['evictions']:,} pages"),
            ("peak use", f"{counts['used_peak']:,} pages used, {counts['held_peak']:,} used or cached, of {settings['pages_total']:,}"),
            ("preemptions", f"{counts['preemptions']:,}, {counts['tokens_again']:,} tokens computed again"),
        ]
        if counts["too_large"]:
            rows.append(("too large", f"{counts['too_large']:,} requests refused: longer than their pool"))
        if counts["waits"]:
            rows.append(("waits", f"{counts['waits']:,} times a request in line waited for a prefix that another was computing"))
        rows += [
            ("a step", "{median_us:,.0f} us median, {mean_us:,.0f} mean, {p99_us:,.0f} p99 ({count:,} steps)".format(**self.steps)),
            ("an ack", "{median_us:,.0f} us median, {mean_us:,.0f} mean, {p99_us:,.0f} p99 ({count:,} acks)".format(**self.acks)),
        ]
        if self.latency:
            rows.append(("first token", "{median_ms:,.0f} ms median, {p99_ms:,.0f} p99, simulated".format(**self.latency)))
        rows.append(("took", f"{self.wall_s:.1f} s, {self.manager_s:.1f} s of it in the manager"))
        title = f"{head} {settings['page_size']} tokens" + ("" if self.complete else " (interrupted)")
        return [title, *(f"  {name:<12} {text}" for name, text in rows)]


def make_report(
    trace: str,
    meter: Meter,
    settings: dict[str, Any],
    *,
    done: int,
    requests: int,
    complete: bool,
    wall_s: float,
    first_token_ms: Sequence[float] = (),
) -> Report:
    counts = asdict(meter.counts)
    counts["page_ratio"] = _ratio(meter.counts.pages_hit, meter.counts.pages_whole)
    counts["token_ratio"] = _ratio(meter.counts.tokens_hit, meter.counts.tokens_prompt)
    latency = {}
    if len(first_token_ms):
        median, p99 = np.percentile(first_token_ms, [50, 99])
        latency = {"median_ms": round(float(median), 1), "p99_ms": round(float(p99), 1)}
    series = meter.series
    return Report(
        trace,
        complete,
        done,
        requests,
        {**settings, "pages_total": meter.pages_total},
        counts,
        _times(meter.step_us),
        _times(meter.ack_us),
        round((sum(meter.step_us) + sum(meter.ack_us)) / 1e6, 3),
        round(wall_s, 3),
        latency,
        {"at": [round(at, 3) for at in series.at], "used": list(series.used), "cached": list(series.cached)},
    )


def draw_plot(series: Series, pages_total: int, unit: str, *, ascii_only: bool = False) -> list[str]:
    """Lines for a terminal: pages used and cached over time, the whole pool high."""
    if not series.at:
        return []
    used_mark, cached_mark = "#." if ascii_only else "█░"
    at = np.array(series.at)
    columns = np.minimum((at / (at[-1] or 1.0) * PLOT_COLUMNS).astype(int), PLOT_COLUMNS - 1)
    levels = np.zeros((PLOT_COLUMNS, 2))
    known = 0
    for column in range(PLOT_COLUMNS):
        chosen = np.flatnonzero(columns == column)
        if len(chosen):
            levels[column] = np.mean(np.array(series.used)[chosen]), np.mean((np.array(series.used) + series.cached)[chosen])
        elif column:
            levels[column] = levels[column - 1]  # nothing was noted in this stretch of time: still as before
        known = column
    lines = []
    for row in range(PLOT_ROWS, 0, -1):
        height = (row - 0.5) / PLOT_ROWS * pages_total
        marks = "".join(used_mark if used > height else cached_mark if held > height else " " for used, held in levels[: known + 1])
        label = f"{pages_total:>10,}" if row == PLOT_ROWS else f"{0:>10}" if row == 1 else " " * 10
        lines.append(f"{label} |{marks}")
    lines.append(" " * 11 + "+" + "-" * PLOT_COLUMNS)
    lines.append(f"{'':>12}0{f'{at[-1]:,.0f} {unit}':>{PLOT_COLUMNS - 1}}")
    lines.append(f"{'':>12}{used_mark} pages used  {cached_mark} pages cached")
    return lines


def save_plot(path: Path, series: Series, pages_total: int, unit: str, title: str) -> bool:
    """Write the plot with matplotlib; False where that is not installed. Raises InvalidValue if the file cannot be written."""
    if find_spec("matplotlib") is None:
        return False
    figure = import_module("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(series.at, series.used, series.cached, labels=["used", "cached"], colors=["#2f6f9f", "#c9dbe8"])
    axes.set(xlabel=unit, ylabel="pages", ylim=(0, pages_total), title=title)
    axes.margins(x=0)
    axes.legend(loc="upper left")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib has no format for
        raise InvalidValue("--plot", "a file that can be written, such as use.png", str(error)) from None
    return True
