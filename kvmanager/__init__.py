"""kvmanager: a paged KV-cache manager service for MLA models.

The control plane lives here and imports neither torch nor triton. `kvmanager.attention` holds what a worker computes with (latent
layout, page memory, plan, MLA backend), `kvmanager.kernels` the Triton kernels under it.

Names are imported when they are first used: whoever only wants the kernels needs no ZMQ.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmanager.client import KVClient
    from kvmanager.commands import Enqueue, Open, Pin
    from kvmanager.config import ManagerConfig, PoolConfig
    from kvmanager.follower import Follower
    from kvmanager.manager import KVManager, Opened, Pinned, Refused, StepReply
    from kvmanager.preview import DryRun
    from kvmanager.replica import Pull, Replica
    from kvmanager.server import Server
    from kvmanager.state import Notice
    from kvmanager.tables import BatchTables

__version__ = "0.1.0"

__all__ = [
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
    "BatchTables": "tables",
    "DryRun": "preview",
    "Enqueue": "commands",
    "Follower": "follower",
    "KVClient": "client",
    "KVManager": "manager",
    "ManagerConfig": "config",
    "Notice": "state",
    "Open": "commands",
    "Opened": "manager",
    "Pin": "commands",
    "Pinned": "manager",
    "PoolConfig": "config",
    "Pull": "replica",
    "Refused": "manager",
    "Replica": "replica",
    "Server": "server",
    "StepReply": "manager",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'kvmanager' has no attribute {name!r}")
    return getattr(import_module(f"kvmanager.{_HOME[name]}"), name)
