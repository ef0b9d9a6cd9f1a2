"""kvmanager: a paged KV-cache manager service for MLA models.

The control plane lives here and imports neither torch nor triton. `kvmanager.attention` holds what a worker computes with (latent
layout, page memory, plan, MLA backend), `kvmanager.kernels` the Triton kernels under it.
"""

from kvmanager.client import KVClient
from kvmanager.commands import Open
from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.follower import Follower
from kvmanager.manager import KVManager, Opened, Refused, StepReply
from kvmanager.replica import Pull, Replica
from kvmanager.server import Server
from kvmanager.state import Notice
from kvmanager.tables import BatchTables

__version__ = "0.1.0"

__all__ = [
    "BatchTables",
    "Follower",
    "KVClient",
    "KVManager",
    "ManagerConfig",
    "Notice",
    "Open",
    "Opened",
    "PoolConfig",
    "Pull",
    "Refused",
    "Replica",
    "Server",
    "StepReply",
    "__version__",
]
