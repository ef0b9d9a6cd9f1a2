"""A prefill worker that lives and computes nothing: what waits for it goes back to the queue, and is computed elsewhere."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np

from kvmanager.examples.engine.checkpoint import make_checkpoint
from kvmanager.examples.engine.engine import Engine, EngineConfig
from tests.engine.test_engine import PAGE, VOCAB, assert_served


def test_a_prompt_whose_worker_stalls_is_computed_by_another(tmp_path: Path) -> None:
    """Within the five seconds after which the manager says so, half of the lease after which the worker would be fenced."""
    checkpoint = make_checkpoint(tmp_path / "model", seed=3)
    config = EngineConfig(checkpoint, prefill_workers=2, page_size=PAGE, keep_latents=True, stream_layers=1, lease_ms=30_000)
    with Engine(config) as engine:
        engine.fleet.kill("prefill0", signal.SIGSTOP)
        request = engine.submit(np.random.default_rng(7).integers(0, VOCAB, 45).tolist(), 12)
        began = time.monotonic()
        while not engine.idle:
            assert time.monotonic() - began < 60
            engine.turn()
            if request.shuns and engine.scheduler.pools["prefill0"].busy:
                engine.fleet.kill("prefill0", signal.SIGCONT)
        assert request.shuns == "prefill0" and request.streamed and request.lost == 0
        assert 5 <= request.first_token - began < 15
        assert_served(engine, checkpoint, [request])
