"""The one table of `make gpu-bench`: of one card and day, every kind that was measured then, peers beside ours."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def result_files() -> ModuleType:
    spec = importlib.util.spec_from_file_location("result_files", BENCHMARKS / "result_files.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(folder: Path, kind: str, card: str, date: str, *rows: dict[str, object]) -> None:
    head = {"card": card, "date": date, "torch": "2", "triton": "3"}
    (folder / f"{kind}-{card.replace(' ', '-')}-{date}.json").write_text(json.dumps(head | {"rows": rows}))


def test_rows_of_one_run_stand_in_one_table(result_files: ModuleType, tmp_path: Path) -> None:
    put(tmp_path, "decode", "card A", "2026-01-01", {"shape": "old", "floor_ms": 1, "ours_ms": 2})
    put(tmp_path, "decode", "card A", "2026-01-02", {"shape": "1x2x3", "floor_ms": 0.5, "ours_ms": 1.0, "FlashMLA_ms": 1.5})
    put(tmp_path, "write", "card A", "2026-01-02", {"shape": "128 tokens", "ours_ms": 0.25, "note": "no floor"})
    put(tmp_path, "write", "card B", "2026-01-02", {"shape": "of another card", "ours_ms": 0.25})
    put(tmp_path, "decode-other", "card A", "2026-01-03", {"shape": "another kind", "ours_ms": 1})
    lines = result_files.table(result_files.newest_run(tmp_path)).splitlines()
    assert lines[0].startswith("card A, 2026-01-02")
    assert [line.split()[0] for line in lines[2:]] == ["decode", "write"]
    assert "1x2x3" in lines[2] and "50.0%" in lines[2] and "FlashMLA 1.5000 (1.50)" in lines[2]
    assert "no floor" in lines[3] and "%" not in lines[3]


def test_folder_without_results_is_named(result_files: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected decode-\*\.json, found none"):
        result_files.newest_run(tmp_path)


def test_recorded_results_make_a_table(result_files: ModuleType) -> None:
    run = result_files.newest_run(BENCHMARKS / "results")
    assert len(result_files.table(run).splitlines()) == 2 + sum(len(results["rows"]) for results in run.values())
