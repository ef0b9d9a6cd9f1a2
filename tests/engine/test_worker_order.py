"""What a worker tells of a step comes after the device has run it, whatever the step was asked for."""

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvmanager.examples.engine.worker import Worker


@pytest.mark.parametrize("wants_token", [True, False])
def test_step_is_finished_only_after_the_device_was_waited_for(wants_token: bool) -> None:
    """The middle of a prompt wants no token: taking the largest logit of no row waits for nothing."""
    done: list[str] = []
    worker: Any = object.__new__(Worker)
    worker.replica = SimpleNamespace(
        ready=lambda version: True,
        streaming=list,
        batch_rows=lambda version, sequences: None,
        finish=lambda version, sequences: done.append("finish"),
        ack=lambda: done.append("ack"),
    )
    worker.ahead = SimpleNamespace(take=lambda version, items: {})
    worker.long_prefill = None
    worker.backend = SimpleNamespace(plan=lambda tables, query_lens: None)
    worker.model = SimpleNamespace(forward=lambda *arguments, **options: (done.append("launched"), torch.zeros(1, 8))[1])
    worker.memory = SimpleNamespace(device=torch.device("cpu"), layout=SimpleNamespace(num_layers=2))
    worker.channel = SimpleNamespace(send=lambda message: done.append(message["t"]))
    worker.keep_logits, worker.stream_layers, worker.renew_s, worker.acked_at = False, 0, 1e9, 0.0
    worker.wait_for_device = lambda: done.append("waited")
    worker.runs = deque([{"version": 1, "items": [[7, 0, np.array([1, 2], "<i4").tobytes(), wants_token]]}])
    assert worker.run_next()
    assert done == ["launched", "waited", "finish", "ack", "done"]
