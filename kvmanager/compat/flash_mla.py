"""FlashMLA's decode interface: `from kvmanager.compat.flash_mla import flash_mla_with_kvcache, get_mla_metadata`.

Owns nothing: attention/flash_mla.py does, and torch is loaded when a name of it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmanager.attention.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("kvmanager.attention.flash_mla"), name)
