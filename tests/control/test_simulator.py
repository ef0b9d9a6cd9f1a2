"""The whole system in one thread, faults and all; see kvmanager.simulator."""

from __future__ import annotations

import pytest

from kvmanager.simulator.system import simulate

STEPS = 1500


@pytest.mark.parametrize("seed", range(8))
def test_every_seed_lives_through_its_faults_and_comes_to_rest(seed: int) -> None:
    simulate(seed, STEPS)


def test_without_faults_nothing_is_ever_refused_for_good() -> None:
    system = simulate(3, STEPS, faults=())
    assert system.watch.commands >= STEPS
    assert not system.model.seen["WorkerFenced"]
