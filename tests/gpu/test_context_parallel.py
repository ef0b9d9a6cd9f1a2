"""Context-parallel decode on two cards over NCCL. Skipped with fewer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

if torch.cuda.device_count() < 2:
    pytest.skip("fewer than two cards", allow_module_level=True)


def test_two_cards_equal_one_and_each_other(tmp_path: Path) -> None:
    """Each rank compares with float64 and with one card that holds everything, 131,072 tokens and 20 runs among it; both print the same bits."""
    command = [sys.executable, str(ROOT / "tests/attention/rank_worker.py"), str(tmp_path / "store"), "2", "cuda"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen([*command, str(rank)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert len({output.split()[-1] for output in outputs}) == 1
