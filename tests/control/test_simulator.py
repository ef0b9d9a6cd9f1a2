"""The whole system in one thread, faults and all; see kvmanager.simulator."""

from __future__ import annotations

import pytest

from kvmanager.simulator.hunt import live

STEPS = 1500


@pytest.mark.parametrize("seed", range(8))
def test_every_seed_lives_through_its_faults_and_comes_to_rest(seed: int) -> None:
    outcome = live(seed, STEPS)
    assert not outcome.error, outcome.trace


def test_without_faults_nobody_is_fenced() -> None:
    outcome = live(3, STEPS, faults=())
    assert not outcome.error, outcome.trace
    assert outcome.steps >= STEPS and not outcome.seen["WorkerFenced"]
