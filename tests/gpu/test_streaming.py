"""A prompt moves to its decode worker while it is computed, on a GPU: what arrives is what the device wrote, not what was launched.

The processes of the example engine, prefill on the first card and decode on the last, which may be the same one. Its decode worker checks every
latent of every layer: a step that is told before the device has run it moves pages that are not written yet.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, chunk", [(16384, 4096), (3000, 4096)])
def test_latents_of_every_chunk_and_layer_arrive_as_they_were_written(tokens: int, chunk: int, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench_streaming.py", "--tokens", str(tokens), "--chunk", str(chunk), "--layers", "20"]
    command += ["--repeats", "2", "--json", str(tmp_path / "rows.json")]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, check=False, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["moved when whole", "streamed", "streamed, from layer 0"]
