"""Files of results, and one table of them.

    python3 benchmarks/result_files.py [--folder FOLDER]

Prints what the programs of `make gpu-bench` measured on one card and day, the newest there is: floor, ours, percent of the floor, and who ran beside
it, a row a shape. A file is <kind>-<card>-<date>.json in $KVMANAGER_RESULTS or benchmarks/results/: a head (date, card, torch, triton,
ceilings) and `rows`, each with `shape`, `ours_ms` (cascade: `once_ms`), `floor_ms` where there is one, and <name>_ms of others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "newest_run", "results_folder", "table", "write_results"]

# What `make gpu-bench` runs, in the order of the table: which of a row's times is ours, and which are shown beside it
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "decode": ("ours", ("FlashMLA", "FlashMLA-listed", "FlashInfer")),
    "sparse": ("ours", ("FlashMLA",)),
    "cascade": ("once", ("apart",)),
    "write": ("ours", ("index_copy", "empty")),
    "plan": ("ours", ()),
}


def results_folder() -> Path:
    """Where results go to; made if it is not there."""
    folder = Path(os.environ.get("KVMANAGER_RESULTS") or Path(__file__).with_name("results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(kind: str, rows: list[dict[str, Any]], **more: object) -> Path:
    """Write a file of results of the card in use; `more` goes into its head. A file of the same kind, card and day is replaced."""
    import torch
    import triton

    card, day = torch.cuda.get_device_name(), datetime.datetime.now(datetime.UTC).date().isoformat()
    head = {"date": day, "card": card, "torch": torch.__version__, "triton": triton.__version__, **more}
    path = results_folder() / f"{kind}-{card.replace(' ', '-')}-{day}.json"
    path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    return path


def newest_run(folder: Path) -> dict[str, dict[str, Any]]:
    """Kind -> results, of the card and day of the newest decode results; raises SystemExit where there are none."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for kind in KINDS:
        for path in sorted(folder.glob(f"{kind}-*.json")):
            results = json.loads(path.read_text())
            if path.name == f"{kind}-{results.get('card', '').replace(' ', '-')}-{results.get('date')}.json":
                found.setdefault((results["date"], results["card"]), {})[kind] = results
    runs = [key for key, kinds in found.items() if "decode" in kinds]
    if not runs:
        raise SystemExit(f"{folder}: expected decode-*.json, found none; `make gpu-bench` writes them")
    return found[max(runs)]


def table(run: dict[str, dict[str, Any]]) -> str:
    """One table of a run's results, in the order of KINDS."""
    first = next(iter(run.values()))
    lines = [f"{first['card']}, {first['date']}, torch {first['torch']}, Triton {first['triton']}; times in ms, of the floor in percent"]
    lines += [f"{'':>7}  {'shape':>30} {'floor':>9} {'ours':>9} {'%':>6}  beside it, and its time by ours"]
    for kind, (own, others) in KINDS.items():
        for row in run.get(kind, {}).get("rows", []):
            floor, ours = row.get("floor_ms"), row[f"{own}_ms"]
            line = f"{kind:>7}  {row['shape']:>30} {floor:9.4f}" if floor else f"{kind:>7}  {row['shape']:>30} {'':>9}"
            line += f" {ours:9.4f} " + (f"{floor / ours:6.1%}" if floor else f"{'':>6}")
            for name in others:
                if other := row.get(f"{name}_ms"):
                    line += f"  {name} {other:.4f} ({other / ours:.2f})"
            lines.append(line + (f"  {row['note']}" if row.get("note") else ""))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="by default $KVMANAGER_RESULTS, or benchmarks/results/")
    run = newest_run(parser.parse_args().folder or results_folder())
    print(table(run))
    if missing := [kind for kind in KINDS if kind not in run]:
        print(f"not measured on that card and day: {', '.join(missing)}")


if __name__ == "__main__":
    main()
