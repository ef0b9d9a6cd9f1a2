"""What bench_decode measured, as a roofline (PNG) and as README's table.

    python benchmarks/plot_kernels.py [RESULTS.json] [--png docs/roofline.png] [--readme README.md]

RESULTS: by default the newest decode-*.json of $KVMANAGER_RESULTS, or of benchmarks/results/. The roofs are the memory bandwidth (the better of
copying and reading) and the matmul rate of the same run; a point is a shape. The PNG needs matplotlib; without it that is said, and nothing drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["newest", "plot", "table", "with_table"]

ROOT = Path(__file__).resolve().parents[1]
SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)(r?)(?:q(\d+))?(?:d(\d+)\+(\d+))?(?:p(\d+))?(e4m3|fp8_ds_mla)?")
README_SHAPES = ("128x128x4096", "128x128x8192r", "8x128x16384", "32x128x4096q4", "64x16x8192", "1x16x65536")
MARKERS = re.compile(r"<!-- decode table of (\S+), by benchmarks/plot_kernels\.py -->\n.*?<!-- end of the decode table -->", re.DOTALL)


class Work(NamedTuple):
    """What one call of a shape moves and computes, and its floor by either."""

    num_bytes: float
    flops: float
    bytes_ms: float
    flops_ms: float


def newest(folder: Path) -> Path:
    """The decode results of the latest day; of several of one day those with most shapes, of several such the last by name."""
    runs = [(json.loads(path.read_text()), path) for path in folder.glob("decode-*.json")]
    found = [(results["date"], len(results["rows"]), path.name, path) for results, path in runs]
    if not found:
        raise SystemExit(f"{folder}: expected decode-*.json, found none; benchmarks/bench_decode.py writes them")
    return max(found)[-1]


def work(results: dict[str, Any], row: dict[str, Any]) -> Work:
    num_bytes, flops = row["gb_s"] * row["ours_ms"] * 1e6, row["tflop_s"] * row["ours_ms"] * 1e9
    bandwidth = max(results["copy_gb_s"], results["read_gb_s"])
    return Work(num_bytes, flops, num_bytes / bandwidth / 1e6, flops / results["matmul_tflop_s"] / 1e9)


def words(shape: str) -> str:
    """128x128x8192r as people read it."""
    match = SHAPE.fullmatch(shape)
    if match is None:
        raise SystemExit(f"shape: expected one of bench_decode.py's, got {shape}")
    batch, heads, length, ragged, tokens, rank, rope, page, stored_as = match.groups()
    more = [f"{tokens} query tokens, causal"] if tokens else []
    more += [f"{rank} + {rope}"] if rank else []
    more += [f"page {page}"] if page else []
    more += [stored_as] if stored_as else []
    return ", ".join([f"{batch} x {heads} x {int(length):,}{' ragged' if ragged else ''}", *more])


def table(results: dict[str, Any], shapes: tuple[str, ...] = README_SHAPES) -> str:
    """Lines of Markdown: where it was measured, and a row a shape; raises SystemExit where the results lack one."""
    rows = {row["shape"]: row for row in results["rows"]}
    if missing := [shape for shape in shapes if shape not in rows]:
        raise SystemExit(f"results: expected rows {', '.join(missing)}, got {', '.join(rows)}")
    lines = [
        f"{results['card']}, {results['date']}, torch {results['torch'].split('+')[0]}, Triton {results['triton']}; measured in the same run:",
        f"memory {max(results['copy_gb_s'], results['read_gb_s']):,.0f} GB/s, bf16 matmul {results['matmul_tflop_s']:,.0f} TFLOP/s.",
        "",
        "| batch x heads x KV | ms | of the floor | FlashMLA, ms |",
        "|---|---|---|---|",
    ]
    for shape in shapes:
        row = rows[shape]
        done = work(results, row)
        kind = "FLOPs" if done.flops_ms > done.bytes_ms else "bytes"
        peer = f"{row['FlashMLA_ms']:.3f}" if row.get("FlashMLA_ms") else ""
        lines.append(f"| {words(shape)} | {row['ours_ms']:.3f} | {row['floor_ms'] / row['ours_ms'] * 100:.0f} % ({kind}) | {peer} |")
    return "\n".join(lines)


def with_table(document: str, path: Path) -> str:
    """The document with the table of the results at `path`, named from the root of the repository, between its two markers."""
    name = path.resolve().relative_to(ROOT).as_posix()
    block = f"<!-- decode table of {name}, by benchmarks/plot_kernels.py -->\n{table(json.loads(path.read_text()))}\n<!-- end of the decode table -->"
    changed, count = MARKERS.subn(lambda _: block, document)
    if count != 1:
        raise SystemExit(f"document: expected one pair of markers of the decode table, got {count}")
    return changed


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the roofline of one run: FLOPs a byte against TFLOP/s, both logarithmic; ours, and peers where they ran."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peak, bandwidth = results["matmul_tflop_s"], max(results["copy_gb_s"], results["read_gb_s"]) / 1e3
    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    intensities = [2.0 ** (step / 16) for step in range(16, 16 * 11)]
    axes.plot(
        intensities,
        [min(peak, x * bandwidth) for x in intensities],
        color="black",
        label=f"roof: {bandwidth:.2f} TB/s, {peak:,.0f} TFLOP/s",
    )
    points: dict[str, list[tuple[float, float]]] = {"ours": [], "FlashMLA": [], "FlashInfer": []}
    named: list[tuple[float, float]] = []
    for row in results["rows"]:
        done = work(results, row)
        for name, of_name in points.items():
            if row.get(f"{name}_ms"):
                of_name.append((done.flops / done.num_bytes, done.flops / row[f"{name}_ms"] / 1e9))
        x, y = math.log(done.flops / done.num_bytes), math.log(row["tflop_s"])
        if any(abs(x - other) < 0.4 and abs(y - height) < 0.04 for other, height in named):
            continue  # its name would lie on another's
        named.append((x, y))
        axes.annotate(row["shape"], (done.flops / done.num_bytes, row["tflop_s"]), fontsize=6, xytext=(4, -3), textcoords="offset points")
    for (name, of_name), mark, color in zip(points.items(), ("o", "x", "+"), ("#4477aa", "#cc6677", "#228833"), strict=True):
        if of_name:
            label = "kvmanager" if name == "ours" else f"{name}, same run"
            axes.plot(*zip(*of_name, strict=True), mark, color=color, markersize=5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte (latents, queries and outputs, each once)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"MLA decode, {results['card']}, {results['date']}, torch {results['torch']}, Triton {results['triton']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--readme", type=Path)
    given = parser.parse_args()
    path = given.results or newest(Path(os.environ.get("KVMANAGER_RESULTS") or ROOT / "benchmarks" / "results"))
    results = json.loads(path.read_text())
    print(f"{path.name}: {len(results['rows'])} shapes on {results['card']}")
    if given.readme is not None:
        given.readme.write_text(with_table(given.readme.read_text(), path))
    if given.png is not None:
        if importlib.util.find_spec("matplotlib") is None:
            print(f"{given.png}: not drawn, matplotlib is not installed")
        else:
            plot(results, given.png)


if __name__ == "__main__":
    main()
