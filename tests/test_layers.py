"""Imports point down only (docs: the layers table). Read from the syntax tree, so a lazy import inside a function counts too."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = sys.stdlib_module_names

# The state machine: given the same commands it makes the same events in every process, so it sees no socket, clock, file or thread.
STATE_MACHINE = ("kvmanager.machine", "kvmanager.pages")
# Inside the control plane each folder may import those before it, and what stands beside them all.
FOLDERS = ("pages", "machine", "log", "service", "worker", "simulator", "replay")
BESIDE = {"pages": (), "machine": (), "log": (), "service": ("manager", "surface"), "worker": ("manager",)}  # of the programs at the top
OUTSIDE_WORLD = {
    *("asyncio", "concurrent", "multiprocessing", "select", "selectors", "signal", "socket", "socketserver", "ssl", "subprocess"),
    *("threading", "_thread", "queue", "zmq"),
    *("datetime", "time", "random", "secrets", "uuid"),
    *("fileinput", "glob", "io", "mmap", "os", "pathlib", "shutil", "tempfile"),
}
OUTSIDE_CALLS = {"hash", "open", "input"}  # hash() of a string differs from process to process


class Import(NamedTuple):
    name: str  # full name, the imported object's included: kvmanager.kernels.mla_decode.mla_decode
    line: int
    lazy: bool  # inside a function


def imports_of(source: str, module: str) -> list[Import]:
    """Every import in a file: statements anywhere in it (TYPE_CHECKING ones too), and import_module or __import__ of a literal name."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        match node:
            case ast.Import(names=names):
                found.extend(Import(alias.name, node.lineno, lazy) for alias in names)
            case ast.ImportFrom(module=base, names=names, level=level):
                above = module.split(".")[:-level] if level else []
                prefix = ".".join([*above, *([base] if base else [])])
                found.extend(Import(f"{prefix}.{alias.name}", node.lineno, lazy) for alias in names)
            case ast.Call(func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"), args=[first, *_]):
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.append(Import(first.value, node.lineno, lazy))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def top(name: str) -> str:
    return name.partition(".")[0]


def modules_in(folder: str, as_package: str) -> dict[str, Path]:
    """Module name to file, for every .py below a top-level folder; symlinks are not followed. A package is named pkg.__init__ here."""
    names = {}
    for directory, _, files in os.walk(ROOT / folder):
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(directory, file)
                names[".".join([as_package, *path.relative_to(ROOT / folder).with_suffix("").parts])] = path
    return names


CONTROL_PLANE = modules_in("kvmanager", "kvmanager")
KERNELS = modules_in("kernels", "kvmanager.kernels")
ATTENTION = modules_in("attention", "kvmanager.attention")
EXAMPLES = modules_in("examples", "kvmanager.examples")


def each_import(modules: dict[str, Path]) -> Iterator[tuple[str, Import]]:
    for module, path in modules.items():
        for found in imports_of(path.read_text(encoding="utf-8"), module):
            yield f"{path.relative_to(ROOT)}:{found.line} imports {found.name}", found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch.cuda as c", [("torch.cuda", False)]),
        ("from kvmanager import attention, errors", [("kvmanager.attention", False), ("kvmanager.errors", False)]),
        ("from . import pool", [("kvmanager.machine.pool", False)]),
        ("from .pool import Pool", [("kvmanager.machine.pool.Pool", False)]),
        ("def f():\n    import torch", [("torch", True)]),
        ("if TYPE_CHECKING:\n    from torch import Tensor", [("torch.Tensor", False)]),
        ("class A:\n    import torch", [("torch", False)]),
        ("f = lambda: importlib.import_module('torch')", [("torch", True)]),
        ("__import__('triton')", [("triton", False)]),
    ],
)
def test_the_reader_of_imports_misses_none(source: str, expected: list[tuple[str, bool]]) -> None:
    assert [(found.name, found.lazy) for found in imports_of(source, "kvmanager.machine.apply")] == expected


def test_kernels_import_only_torch_and_triton() -> None:
    wrong = [
        text
        for text, found in each_import(KERNELS)
        if top(found.name) not in STDLIB and not under(found.name, "torch", "triton", "kvmanager.kernels")
    ]
    assert KERNELS
    assert not wrong, "\n".join(wrong)


def test_attention_imports_kernels_and_control_plane_but_no_engine() -> None:
    wrong = [
        text
        for text, found in each_import(ATTENTION)
        if top(found.name) not in STDLIB
        and (not under(found.name, "torch", "numpy", "kvmanager") or under(found.name, "kvmanager.examples"))
    ]
    assert ATTENTION
    assert not wrong, "\n".join(wrong)


def test_control_plane_never_imports_the_data_plane() -> None:
    """Not even lazily. Two exceptions: `kvmanager demo` looks the example up when it is called, and kvmanager.compat.flash_mla is another
    name of a module of the data plane (that it loads it on first use only is test_importing_the_control_plane_leaves_torch_out's claim)."""
    above = ("kvmanager.attention", "kvmanager.kernels", "kvmanager.examples", "torch", "triton", "transformers")
    wrong = []
    for module, path in CONTROL_PLANE.items():
        for text, found in each_import({module: path}):
            demo = module == "kvmanager.cli" and found.lazy and under(found.name, "kvmanager.examples")
            adapter = module == "kvmanager.compat.flash_mla" and under(found.name, "kvmanager.attention.flash_mla")
            if under(found.name, *above) and not demo and not adapter:
                wrong.append(text)
    assert CONTROL_PLANE
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_folders_by_their_top_level_names() -> None:
    """`kernels` is another distribution's package: only `kvmanager.kernels` is ours."""
    everything = {**CONTROL_PLANE, **KERNELS, **ATTENTION, **EXAMPLES}
    everything |= modules_in("benchmarks", "benchmarks") | modules_in("tests", "tests")
    wrong = [text for text, found in each_import(everything) if under(found.name, "kernels", "attention", "examples")]
    assert not wrong, "\n".join(wrong)


def module_homes(found: Import) -> set[str]:
    """The control plane's module that an import names, itself or as the home of the imported object; empty if neither."""
    return {found.name, found.name.rpartition(".")[0]} & CONTROL_PLANE.keys()


def state_machine_modules() -> dict[str, Path]:
    """The modules of the folders named above, and whatever of kvmanager they import, and so on."""
    reached: dict[str, Path] = {}
    waiting = sorted(module for module in CONTROL_PLANE if under(module, *STATE_MACHINE))
    while waiting:
        module = waiting.pop()
        reached[module] = CONTROL_PLANE[module]
        for found in imports_of(CONTROL_PLANE[module].read_text(encoding="utf-8"), module):
            waiting.extend(sorted(module_homes(found) - reached.keys() - set(waiting)))
    return reached


def test_state_machine_modules_are_where_this_test_looks() -> None:
    assert {"kvmanager.machine.decide", "kvmanager.machine.apply", "kvmanager.pages.pool"} <= state_machine_modules().keys()


def test_folders_of_the_control_plane_import_downwards_only() -> None:
    """pages, machine, log, service, worker: none knows those after it, nor the programs that put them together."""
    wrong = []
    for place, folder in enumerate(FOLDERS[:5]):
        below = ("errors", "config", "arrays", "tables", *BESIDE[folder], *FOLDERS[: place + 1])
        modules = {module: path for module, path in CONTROL_PLANE.items() if under(module, f"kvmanager.{folder}")}
        assert modules
        for text, found in each_import(modules):
            if under(found.name, "kvmanager") and not under(found.name, *(f"kvmanager.{name}" for name in below)):
                wrong.append(text)
    assert not wrong, "\n".join(wrong)


def test_state_machine_knows_no_socket_clock_file_or_thread() -> None:
    wrong: list[str] = []
    for module, path in state_machine_modules().items():
        where = path.relative_to(ROOT)
        for text, found in each_import({module: path}):
            through_package = top(found.name) == "kvmanager" and not module_homes(found)
            if under(found.name, *OUTSIDE_WORLD) or through_package:  # what kvmanager/__init__.py exports may come from anywhere
                wrong.append(text)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id=name)) if name in OUTSIDE_CALLS:
                    wrong.append(f"{where}:{node.lineno} calls {name}()")
                case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"):
                    wrong.append(f"{where}:{node.lineno} uses numpy.random")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("which", ["package", "every-module"])
def test_importing_the_control_plane_leaves_torch_out(which: str, run_python: Callable[..., str]) -> None:
    """`import kvmanager` and every module of it, the command line included, stay as light as the control plane is."""
    names = ["kvmanager"]
    if which == "every-module":
        names += [module.removesuffix(".__init__") for module in CONTROL_PLANE if not module.endswith(".__main__")]
    heavy = ["torch", "triton", "transformers", "kvmanager.attention", "kvmanager.kernels"]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint([n for n in {heavy} if n in sys.modules])"
    assert run_python(code, cwd=ROOT, pythonpath=ROOT) == "[]\n"
