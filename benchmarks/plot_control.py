"""A picture of what bench_control measured: each row beside its reach and its peers, and what grows with the size of the pool.

python benchmarks/bench_control.py --json > control.json
python benchmarks/plot_control.py control.json docs/performance.png        (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(report: dict[str, Any], reach: list[tuple[str, str, float | None]], path: str) -> None:
    """Write a PNG of a report whose rows are medians."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(name, text.strip(), limit) for name, text, limit in reach if limit is not None and report["rows"].get(name)][::-1]
    scaling = report.get("scaling", {})
    figure, axes = pyplot.subplots(1, 2 if scaling else 1, figsize=(14 if scaling else 8, 6), layout="constrained", squeeze=False)
    left = axes[0][0]
    medians = [report["rows"][name] for name, *_ in rows]
    left.barh(range(len(rows)), medians, color="#4477aa", label="kvmanager, median")
    left.plot([limit for *_, limit in rows], range(len(rows)), "|", color="black", markersize=14, markeredgewidth=2, label="reach")
    for peer, mark in (("vLLM", "o"), ("SGLang Rust", "D")):
        found = [(report["peers"].get(name, {}).get(peer), place) for place, (name, *_) in enumerate(rows)]
        points = [(median, place) for median, place in found if median is not None]
        if points:
            left.plot(*zip(*points, strict=True), mark, color="#cc6677", label=f"{peer}, same run")
    left.set_xscale("log")
    left.set_yticks(range(len(rows)), [text for _, text, _ in rows], fontsize=8)
    left.set_xlabel("microseconds on one core (log)")
    left.legend(fontsize=8, loc="lower right")
    left.grid(axis="x", alpha=0.3)
    if scaling:
        right = axes[0][1]
        sizes = [int(name.split()[0].replace(",", "")) for name in scaling]
        for row in next(iter(scaling.values())):
            right.plot(sizes, [scaling[name][row] for name in scaling], "o-", label=row.replace("_", " "))
        right.set_xscale("log")
        right.set_ylim(0, 1.4 * max(max(table.values()) for table in scaling.values()))
        right.set_xlabel("pages in the pool, half of them cached prompts of one page")
        right.set_ylabel("median microseconds")
        right.legend(fontsize=8, loc="upper center", ncols=3)
        right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    from bench_control import REACH

    plot(json.loads(Path(sys.argv[1]).read_text()), REACH, sys.argv[2])
