"""Queries are answered from what is there: they change nothing, are not logged, and a bad one costs its sender an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import BadMessage
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
