"""What an engine calls on a worker: the latent layout, page memory and the MLA backend. Names load on first use, so the layout costs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmanager.attention.backend import MLABackend
    from kvmanager.attention.context_parallel import RankPart, merge_across_ranks, part_of
    from kvmanager.attention.layout import LatentLayout
    from kvmanager.attention.long_prefill import LongPrefill
    from kvmanager.attention.memory import PageMemory, PeerMemory
    from kvmanager.attention.plan import Plan
    from kvmanager.attention.states import merge_states

__all__ = [
    "LatentLayout",
    "LongPrefill",
    "MLABackend",
    "PageMemory",
    "PeerMemory",
    "Plan",
    "RankPart",
    "merge_across_ranks",
    "merge_states",
    "part_of",
]

_HOMES = {
    "LatentLayout": "layout",
    "LongPrefill": "long_prefill",
    "MLABackend": "backend",
    "PageMemory": "memory",
    "PeerMemory": "memory",
    "Plan": "plan",
    "RankPart": "context_parallel",
    "merge_across_ranks": "context_parallel",
    "merge_states": "states",
    "part_of": "context_parallel",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
