"""Queries are answered from what is there: they change nothing, are not logged, and a bad one costs its sender an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import BadMessage, InvalidValue
from kvmanager.manager import KVManager
from tests.control.conftest import Rig, tokens

MakeRig = Callable[[ManagerConfig], Rig]
CONFIG = ManagerConfig(pools=(PoolConfig("A", 8, page_size=16),))


def test_queries_change_nothing_and_are_not_logged(make_rig: MakeRig) -> None:
    rig = make_rig(CONFIG)
    rig.prefilled(tokens(40), "A")
    before, version = rig.kv.snapshot(), rig.version
    assert rig.kv.stats()["pools"]["A"]["pages"]["used"] == 3
    rig.kv.tables_snapshot()
    assert rig.kv.snapshot() == before and rig.version == version


@pytest.mark.parametrize("message", [{}, {"t": 5}, {"t": "nothing"}, {"t": None}, {"t": ["stats"]}, {"t": b"stats"}], ids=repr)
def test_what_is_no_query_is_refused_by_name(message: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match=r"^query: expected t to be one of stats, snapshot"):
        KVManager(CONFIG).query(message)


def test_workers_and_handoffs_are_listed(make_rig: MakeRig) -> None:
    """What `kvmanager top` shows: how far behind each worker is, and which handoffs have not ended, oldest first."""
    rig = make_rig(ManagerConfig(pools=(PoolConfig("A", 8, page_size=16), PoolConfig("B", 8, page_size=16))))
    sequence = rig.prefilled(tokens(40), "A").sequence
    handoff = rig.kv.hand_off(sequence, "B")
    rig.kv.step()
    workers = rig.kv.workers()
    assert [each["pool"] for each in workers] == ["A", "B"] and not any(each["fenced"] for each in workers)
    assert all(each["behind"] == rig.version - each["acked"] for each in workers)
    assert all(0 < each["lease_left_ms"] <= rig.config.lease_ms for each in workers)
    listed = rig.kv.handoffs()
    assert [(each["handoff"], each["sequence"], each["source"], each["target"]) for each in listed] == [(handoff, sequence, "A", "B")]
    assert listed[0]["tokens"] == 40 and listed[0]["pages"] == 3 and listed[0]["age"] >= 1
    with pytest.raises(InvalidValue, match=r"^handoffs\.limit: expected"):
        rig.kv.handoffs(0)
