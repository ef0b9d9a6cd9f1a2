"""Managers served over real sockets, and pages' worth of traffic for replicas to follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.manager import KVManager
from kvmanager.service.client import KVClient
from kvmanager.service.server import Server

MakeServer = Callable[..., Server]
Connect = Callable[..., KVClient]


def config(*, num_pages: int = 64, heartbeat_ms: int = 20, partial_match: int = 0, **more: Any) -> ManagerConfig:
    """Two pools, `main` and `other`, of one worker each."""
    pools = tuple(PoolConfig(name, num_pages, 16, partial_match=partial_match) for name in ("main", "other"))
    return ManagerConfig(pools, heartbeat_ms=heartbeat_ms, lease_ms=60_000, **more)


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """make_server(manager=None, address=None, publish=None): a manager that is being served by a thread; ended with the test."""
    servers: list[Server] = []

    def make(manager: KVManager | None = None, *, address: str = "", publish: str = "", **more: Any) -> Server:
        at = f"ipc://{tmp_path}/{len(servers)}"
        manager = manager or KVManager(config(), checked=True)
        server = Server(manager, address=address or f"{at}.req", publish=publish or f"{at}.pub", **more)
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.close()  # a second time does nothing


@pytest.fixture
def connect() -> Iterator[Connect]:
    """connect(server): a client with short patience; disconnected with the test."""
    clients: list[KVClient] = []

    def make(server: Server, **more: Any) -> KVClient:
        clients.append(KVClient(server.address, **{"timeout_ms": 5000, "resend_ms": 200, **more}))
        return clients[-1]

    yield make
    for client in clients:
        client.disconnect()
