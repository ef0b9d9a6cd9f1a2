"""One import name a file, and a wheel that holds all three folders under `kvmanager` and nothing beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("attention", "examples", "kernels")


def python_files(folder: str) -> set[str]:
    """Every .py of a top-level folder as the distribution names it: kvmanager/kernels/mla_decode.py."""
    prefix = "" if folder == "kvmanager" else "kvmanager/"
    found = set()
    for directory, _, files in os.walk(ROOT / folder):  # does not follow the symlinks in kvmanager/
        found |= {prefix + Path(directory, file).relative_to(ROOT).as_posix() for file in files if file.endswith(".py")}
    return found


def module_names(files: Iterable[str]) -> list[str]:
    """Import names of the files of a distribution; a __main__.py is left out, since importing it runs it."""
    dotted = (file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in sorted(files))
    return [name for name in dotted if not name.endswith("__main__")]


def all_python_files() -> set[str]:
    return set().union(*(python_files(folder) for folder in ("kvmanager", *LINKS)))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory, run_python: Callable[..., str]) -> dict[str, Path]:
    """A wheel, an sdist, and a wheel built from that sdist: made by the build backend itself in a copy of the tree, with no network."""
    work = tmp_path_factory.mktemp("build")
    copy = work / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy)
    for name in ("kvmanager", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"

    def made(kind: str, source: Path, into: str) -> Path:
        (work / into).mkdir()
        return work / into / run_python(build, kind, str(work / into), cwd=source).split()[-1]

    sdist = made("sdist", copy, "sdist")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and newer
        archive.extractall(work / "unpacked")
    (unpacked,) = (work / "unpacked").iterdir()
    return {"wheel": made("wheel", copy, "wheel"), "sdist": sdist, "wheel of the sdist": made("wheel", unpacked, "wheel2")}


def test_kernels_and_examples_are_namespace_packages() -> None:
    """A regular package ./kernels would shadow Hugging Face's of that name whenever the repository root is on sys.path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "examples" / "__init__.py").exists()


@pytest.mark.parametrize("name", LINKS)
def test_folder_stands_under_kvmanager_as_a_relative_symlink(name: str) -> None:
    link = ROOT / "kvmanager" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert link.resolve() == ROOT / name


def test_git_keeps_the_symlinks_as_symlinks() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    names = [f"kvmanager/{name}" for name in LINKS]
    listed = subprocess.run(["git", "ls-files", "--stage", "--", *names], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if not listed:
        pytest.skip("nothing is committed yet")
    assert [(line.split()[0], line.split("\t")[1]) for line in listed.splitlines()] == [("120000", name) for name in names]


def test_nothing_lies_at_the_top_but_what_belongs_there() -> None:
    """Notes and logs of whoever worked here are not part of the project."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    if not listed:
        pytest.skip("nothing is committed yet")
    folders = {".ci", "benchmarks", "docs", "kvmanager", "tests", *LINKS}
    files = {
        ".gitignore",
        "CHANGELOG.md",
        "LICENSE",
        "MANIFEST.in",
        "Makefile",
        "README.md",
        "constraints-oldest.txt",
        "constraints.txt",
        "pyproject.toml",
    }
    assert {name.split("/")[0] for name in listed} <= folders | files


def test_no_file_is_loaded_under_two_names(run_python: Callable[..., str]) -> None:
    """Two names would mean two copies of a class, and an `except` that does not catch. All of kvmanager is imported, the examples too."""
    code = """
import importlib, json, os, sys
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
names = {}
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and os.path.realpath(file).startswith(tuple(sys.argv[2:])):
        names.setdefault(os.path.realpath(file), []).append(name)
print(json.dumps(names))
"""
    wanted = module_names(all_python_files())
    folders = [f"{ROOT / name}{os.sep}" for name in ("kvmanager", *LINKS)]
    names = json.loads(run_python(code, json.dumps(wanted), *folders, cwd=ROOT, pythonpath=ROOT).splitlines()[-1])
    assert {file: under for file, under in names.items() if len(under) != 1} == {}
    assert {under[0] for under in names.values()} == set(wanted)


@pytest.mark.parametrize("kind", ["wheel", "wheel of the sdist"])
def test_wheel_holds_everything_under_kvmanager_and_nothing_beside_it(distributions: dict[str, Path], kind: str) -> None:
    with zipfile.ZipFile(distributions[kind]) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert {name for name in inside if name.endswith(".py")} == all_python_files()
    assert {name.split("/")[0] for name in inside} == {"kvmanager"}
    assert "kvmanager/py.typed" in inside
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name]
    for folder in ("kernels", "attention", "examples/engine"):
        assert any(name.startswith(f"kvmanager/{folder}/") for name in inside), folder


def test_sdist_holds_real_files(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    wanted = all_python_files() | {"kvmanager/py.typed", "LICENSE", "pyproject.toml"}
    assert wanted <= members.keys()
    assert [name for name in wanted if not members[name].isfile()] == []
    assert [name for name, member in members.items() if member.issym() or member.islnk()] == []


def test_unpacked_wheel_imports_without_the_repository(
    distributions: dict[str, Path], tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """The command, the kernels and the backend all load from the wheel, and `import kernels` still means somebody else's package."""
    site = tmp_path / "site"
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        archive.extractall(site)
    code = """
import importlib, importlib.util, json, os, sys
for name in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    place = module.__file__ or list(module.__path__)[0]
    assert os.path.realpath(place).startswith(os.path.realpath(sys.argv[2]) + os.sep), (name, place)
for name in ("kernels", "attention", "examples"):
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or [])]
    assert not any(place.startswith((sys.argv[2] + os.sep, sys.argv[3] + os.sep)) for place in places), (name, places)
"""
    wanted = module_names(python_files("kvmanager") | python_files("kernels") | python_files("attention"))
    run_python(code, json.dumps(wanted), str(site), str(ROOT), cwd=tmp_path, pythonpath=site)
