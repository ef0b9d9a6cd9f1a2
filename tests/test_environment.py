"""The environment of a worker's process, and that the C library takes it."""

import os
import platform
import subprocess
from pathlib import Path

import pytest

from kvmanager.worker.environment import STREAMING_BYTES, worker_environment

NAME = "glibc.cpu.x86_non_temporal_threshold"
LOADER = Path("/lib64/ld-linux-x86-64.so.2")


def test_threshold_is_added_to_what_is_there_and_replaces_none() -> None:
    ours = f"{NAME}={STREAMING_BYTES:#x}"
    assert worker_environment({"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": ours}
    assert worker_environment({"GLIBC_TUNABLES": "glibc.malloc.check=0"})["GLIBC_TUNABLES"] == f"glibc.malloc.check=0:{ours}"
    theirs = {"GLIBC_TUNABLES": f"{NAME}=0x800000"}
    assert worker_environment(theirs) == theirs
    assert worker_environment(worker_environment(theirs)) == theirs


@pytest.mark.skipif(platform.machine() != "x86_64" or not LOADER.exists(), reason="not x86 with glibc")
def test_c_library_takes_it() -> None:
    listed = subprocess.run(
        [LOADER, "--list-tunables"], check=False, env=worker_environment(os.environ), capture_output=True, text=True, timeout=20
    )
    if listed.returncode or NAME not in listed.stdout:
        pytest.skip("this C library does not list its tunables")
    line = next(line for line in listed.stdout.splitlines() if line.startswith(NAME))
    assert f": {STREAMING_BYTES:#x} " in line
