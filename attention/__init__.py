"""What an engine calls on a worker: the latent layout, page memory and the MLA backend. Names load on first use, so the layout costs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmanager.attention.backend import MLABackend
    from kvmanager.attention.layout import LatentLayout
    from kvmanager.attention.memory import PageMemory, PeerMemory
    from kvmanager.attention.plan import Plan

__all__ = ["LatentLayout", "MLABackend", "PageMemory", "PeerMemory", "Plan"]

_HOMES = {"LatentLayout": "layout", "MLABackend": "backend", "PageMemory": "memory", "PeerMemory": "memory", "Plan": "plan"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
