"""Thousands of random steps against a model that shares no code with the state machine; see kvmanager.simulator for what is checked."""

from __future__ import annotations

from collections import Counter

import pytest

from kvmanager.machine.apply import apply
from kvmanager.machine.batch import decode_batch
from kvmanager.machine.snapshot import state_digest
from kvmanager.manager import new_state
from kvmanager.simulator import Driver, live_through

SEEDS = range(100, 130)
STEPS = 500
_seen: Counter[str] = Counter()


@pytest.mark.parametrize("seed", SEEDS)
def test_nobody_reads_another_ones_tokens_and_every_page_comes_home(seed: int) -> None:
    """Rules 1, 2, 4 and 6, and one log with many readers: after each command the books, the model's and those of a replayed and of a
    reloaded state agree; at the end, when faults are over, each pool is free or cached from end to end."""
    _seen.update(live_through(seed, STEPS).model.seen)


def test_the_days_were_eventful() -> None:
    """A driver that never gets anywhere would be satisfied with anything: every event, and every road of a handoff, has been taken."""
    if not _seen:  # run alone, or on another worker of pytest-xdist than the days
        for seed in SEEDS[:8]:
            _seen.update(live_through(seed, STEPS).model.seen)
    expected = (
        "SequenceOpened SequencesGrown GrownAgain GrownFurther TokensAppended PagesPublished SequenceClosed PagesEvicted PagesReleased IndexDropped "
        "WorkerJoined WorkerAcked SequencesWritten WorkerFenced WorkerDead HandoffBegun HandoffSealed HandoffReserving HandoffMoving "
        "HandoffPulled HandoffResident HandoffAborted HandoffEnded HandoffReserved HandoffFailed moving_reserved aborted_reserved "
        "ClientAnswered SequencesTruncated SequenceForked PagesCopied "
        "PromptEnqueued PromptsDequeued PinBegun PinsEnded QuotaSet TenantFlushed flushed_pages within_a_quota "
        "placed waited cached deduplicated moving_shared moving_regathered moving_converted aborted_prefilling aborted_reserving aborted_moving"
    )
    missing = [name for name in expected.split() if not _seen[name]]
    assert not missing, f"never happened: {missing}; seen: {_seen}"


def test_a_log_read_from_its_first_byte_gives_the_same_state_at_every_version() -> None:
    """What a journal or a new replica reads much later, batch by batch, from bytes alone."""
    driver = Driver(7)
    log: list[tuple[bytes, str]] = []
    driver.manager.subscribe(lambda batch, data: log.append((data, state_digest(driver.manager.state))))
    base = driver.load()
    driver.run(300)
    for data, digest in log:
        apply(base, decode_batch(data))
        assert state_digest(base) == digest
    assert len(log) > 100


def test_the_same_seed_writes_the_same_log() -> None:
    """Nothing in the state machine depends on a clock, on addresses or on the order of a set."""

    def log(seed: int) -> list[bytes]:
        driver, batches = Driver(seed), []
        driver.manager.subscribe(lambda batch, data: batches.append(data))
        driver.run(150)
        return batches

    assert log(3) == log(3)
    assert new_state(Driver(3).config, 1)[1] == new_state(Driver(3).config, 1)[1]
