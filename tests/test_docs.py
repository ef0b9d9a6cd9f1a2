"""Documents are executed: what README and docs/ tell people to run is run here."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_blocks_run_in_order(path: Path, run_python: Callable[..., object]) -> None:
    """All blocks of one document as one program, in a process of its own."""
    run_python("\n".join(blocks(path, "python")), cwd=ROOT, pythonpath=ROOT)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_documents_exist(path: Path) -> None:
    named = re.findall(r"`((?:docs|tests|examples|benchmarks|kernels|attention|kvmanager)/[\w./-]*)`", path.read_text())
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_readme_has_the_table_of_the_results_it_names() -> None:
    """Written by `python benchmarks/plot_kernels.py RESULTS --readme README.md`; a number changed by hand, or a file that changed, shows."""
    spec = importlib.util.spec_from_file_location("plot_kernels", ROOT / "benchmarks" / "plot_kernels.py")
    assert spec is not None and spec.loader is not None
    plot_kernels = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot_kernels)
    readme = (ROOT / "README.md").read_text()
    named = plot_kernels.MARKERS.search(readme)
    assert named is not None
    assert readme == plot_kernels.with_table(readme, ROOT / named[1])
