"""Every kernel without a GPU, under the newest Triton and under 3.6: it compiles for sm_90a, keeps its accumulators in registers and its
matrix products in flight."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("compile_kernels.py")
OLDEST = Path(os.environ.get("KVMANAGER_TRITON_OLDEST") or ROOT / ".venv" / "triton-oldest")  # made by `make test`
SHARED_BYTES_MAX = 227 * 1024  # what a program on Hopper may have
PROCESSES = 2


class Limit(NamedTuple):
    """Bytes that a kernel may spill, and the stores that do it, under the oldest and under the newest Triton."""

    oldest: tuple[int, int]
    newest: tuple[int, int]


# Nothing in the Hopper kernels that decode uses. Where pages are smaller than a tile,
# arguments are put away on entry, and by the eight-bit one a word or two where a tile that is not full ends an item.
# "placed": arguments put away where partitions begin, and a few words where a tile that is not full ends an item. 70 stores were in the loop
# of the first Hopper kernel, and cost 9 %.
LIMITS = {
    "hopper": Limit((0, 0), (44, 2)),
    "hopper placed": Limit((124, 9), (284, 40)),
    "hopper_fp8": Limit((36, 9), (108, 8)),
    "hopper_fp8 page 64": Limit((0, 0), (0, 0)),
    "decode": Limit((156, 39), (452, 82)),
    "sparse": Limit((460, 62), (648, 136)),
    "checksum": Limit((48, 12), (0, 0)),
}
FAMILIES = {
    "hopper": 18,
    "hopper_fp8": 6,
    "decode": 7,
    "sparse": 6,
    "write": 16,
    "merge": 6,
    "state": 2,
    "copy": 1,
    "checksum": 1,
    "pull": 2,
    "plan": 2,
    "convert": 2,
}


def limit_of(launch: str) -> Limit:
    words = launch.split()
    for name, limit in sorted(LIMITS.items(), reverse=True):  # the longer of two names first
        family, *more = name.split()
        if words[0] == family and " ".join(more) in launch:
            return limit
    return Limit((0, 0), (0, 0))


def compiled(cache: Path, site: Path | None) -> list[dict[str, Any]]:
    """The program's lines, by two processes; site: a folder with another Triton."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join([str(site), *places] if site else places), "OMP_NUM_THREADS": "1"}
    more = ["--all"] if os.environ.get("KVMANAGER_COMPILE_ALL") else []
    commands = [
        [sys.executable, str(PROGRAM), *more, "--share", f"{index}/{PROCESSES}", "--cache", str(cache)] for index in range(PROCESSES)
    ]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for command in commands
    ]
    lines = []
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        lines += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return lines


@pytest.mark.parametrize("version", ["newest", "oldest"])
@pytest.mark.timeout(7200 if os.environ.get("KVMANAGER_COMPILE_ALL") else 900)
def test_kernels_compile_without_spills_and_without_serialised_products(version: str, pytestconfig: pytest.Config) -> None:
    """A serialised wgmma (C7514) costs half. All pairs of the Hopper kernels' parameters; KVMANAGER_COMPILE_ALL=1: all combinations.

    What was compiled before, from the same source, is in pytest's cache."""
    site = OLDEST if version == "oldest" else None
    if site is not None and not (site / "triton").is_dir():
        pytest.skip(f"no Triton in {site}: `make test` puts the oldest supported one there where there is a wheel of it")
    if site is None and importlib.util.find_spec("triton.experimental.gluon") is None:
        pytest.skip("no Triton with Gluon here")
    pytest_cache = getattr(pytestconfig, "cache", None)  # none under -p no:cacheprovider
    lines = compiled(pytest_cache.mkdir("compiled-kernels") if pytest_cache else ROOT / ".pytest_cache" / "d" / "compiled-kernels", site)
    counts = Counter(line["launch"].split()[0] for line in lines)
    assert all(counts[family] >= least for family, least in FAMILIES.items()), counts
    assert {line["triton"].startswith("3.6.") for line in lines} == {version == "oldest"}
    wrong = []
    for line in lines:
        spilled_max, stores_max = getattr(limit_of(line["launch"]), version)
        family = line["launch"].split()[0]
        products, fetches, arrivals = {"hopper": (50, 7, 11), "hopper_fp8": (136, 10, 7)}.get(family, (0, 0, 0))
        if (
            line["warnings"]
            or line["spilled"] > spilled_max
            or line["STL"] > stores_max
            or line["shared"] > SHARED_BYTES_MAX
            or line["HGMMA"] < products
            or line["UTMALDG"] < fetches
            or line["arrivals"] < arrivals
            or line["loose"]
        ):
            wrong.append(f"{line}, of which at most {spilled_max} bytes may spill, by {stores_max} stores")
    assert not wrong, "\n".join(wrong)
