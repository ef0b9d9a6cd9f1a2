"""`kvmanager demo` as a user runs it: another checkpoint, JSON, wrong use, and exit code 1 when the text differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmanager.examples.engine import oracle
from kvmanager.examples.engine.demo import main


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-m", "kvmanager.cli", "demo", "--device", "cpu", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
    )


def test_a_users_deepseek_v2_checkpoint_is_served_and_compared(checkpoint: Callable[..., Path]) -> None:
    """V2 rotates k_pe in the other order and has no grouped router: all of it comes from the checkpoint."""
    done = run_demo("--model", str(checkpoint(family="deepseek_v2")), "--requests", "4", "--new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["good"] and [row["equal"] for row in found["requests"]] == [True] * 4
    assert found["verdict"][0] == "equal to transformers generate: 4 of 4"


def test_a_difference_ends_with_exit_code_1(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison must be able to fail: here transformers' answer is changed in its last token."""
    honest = oracle.Reference.generate

    def lie(self: oracle.Reference, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return [[*tokens[:-1], (tokens[-1] + 1) % 512] for tokens in honest(self, prompts, max_new_tokens)]

    monkeypatch.setattr(oracle.Reference, "generate", lie)
    arguments = ["--model", str(checkpoint()), "--device", "cpu", "--requests", "2", "--new-tokens", "4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert "equal to transformers generate: 0 of 2" in result.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--page-size", "20"], "page_size: expected a multiple of 16 from 16 to 128, got 20"),
        (["--model", "/nowhere"], "config.json"),
        (["--decode-pages", "2"], "prompt: expected 1..32 tokens"),
        (["--decode-page-size", "64", "--decode-pages", "1"], "prompt: expected 1..64 tokens"),
    ],
    ids=["page-size", "model", "too-small", "one-large-page"],
)
def test_wrong_use_exits_2_and_names_the_field(arguments: list[str], expected: str) -> None:
    done = run_demo(*arguments)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
