"""kvmanager: a paged KV-cache manager service for MLA models.

The control plane lives here and imports neither torch nor triton. `kvmanager.attention` holds what a worker computes with (latent
layout, page memory, plan, MLA backend), `kvmanager.kernels` the Triton kernels under it.

Names are imported when they are first used: whoever only wants the kernels needs no ZMQ.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmanager.config import ManagerConfig, PoolConfig
    from kvmanager.machine.commands import Enqueue, Open, Pin
    from kvmanager.machine.preview import DryRun
    from kvmanager.machine.state import Notice
    from kvmanager.manager import KVManager
    from kvmanager.service.client import KVClient
    from kvmanager.service.server import Server
    from kvmanager.surface import Opened, Pinned, Refused, StepReply
    from kvmanager.tables import BatchRows, BatchTables
    from kvmanager.worker.follower import Follower
    from kvmanager.worker.replica import Pull, Replica

__version__ = "0.1.0"

__all__ = [
    "BatchRows",
    "BatchTables",
    "DryRun",
    "Enqueue",
    "Follower",
    "KVClient",
    "KVManager",
    "ManagerConfig",
    "Notice",
    "Open",
    "Opened",
    "Pin",
    "Pinned",
    "PoolConfig",
    "Pull",
    "Refused",
    "Replica",
    "Server",
    "StepReply",
    "__version__",
]

_HOME = {
    "BatchRows": "tables",
    "BatchTables": "tables",
    "DryRun": "machine.preview",
    "Enqueue": "machine.commands",
    "Follower": "worker.follower",
    "KVClient": "service.client",
    "KVManager": "manager",
    "ManagerConfig": "config",
    "Notice": "machine.state",
    "Open": "machine.commands",
    "Opened": "surface",
    "Pin": "machine.commands",
    "Pinned": "surface",
    "PoolConfig": "config",
    "Pull": "worker.replica",
    "Refused": "surface",
    "Replica": "worker.replica",
    "Server": "service.server",
    "StepReply": "surface",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kvmanager' has no attribute {name!r}")
    return getattr(import_module(f"kvmanager.{_HOME[name]}"), name)
