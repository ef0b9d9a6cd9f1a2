"""Checks of fields that several commands have. Each returns the value as it is kept, or raises InvalidValue naming the field."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.arrays import as_ids
from kvmanager.errors import InvalidValue

__all__ = ["as_pair", "as_pairs", "check_bytes", "check_list"]


def check_bytes(name: str, value: object, longest: int) -> bytes:
    if isinstance(value, str):
        value = value.encode(errors="surrogatepass")
    if not isinstance(value, bytes) or len(value) > longest:
        raise InvalidValue(name, f"at most {longest} bytes", f"{len(value)} bytes" if isinstance(value, bytes) else type(value).__name__)
    return value


def check_list(name: str, value: object) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InvalidValue(name, "a list", type(value).__name__)
    return list(value)


def as_pair(name: str, value: object) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise InvalidValue(name, "a pair", repr(value)[:80])
    return value[0], value[1]


def as_pairs(name: str, value: object, high: int, default: int | None = None) -> np.ndarray:
    """int64 [n, 2] of (id, number in 1..high) pairs, from an array, a list of pairs or little-endian bytes. With a default, ids alone."""
    if isinstance(value, np.ndarray) and value.ndim == 2 and value.shape[1] == 2:
        value = value.reshape(-1)
    elif isinstance(value, (list, tuple)):
        flat: list[Any] = []
        for number, item in enumerate(value):
            alone = default is not None and isinstance(item, (int, np.integer)) and not isinstance(item, bool)
            flat += (item, default) if alone else as_pair(f"{name}[{number}]", item)
        value = flat
    elif isinstance(value, np.ndarray) and value.ndim == 1 and default is not None:
        value = np.stack([value, np.full_like(value, default)], axis=1).reshape(-1)
    elif not isinstance(value, bytes):
        raise InvalidValue(name, "a list of pairs, or an int array of two columns", type(value).__name__)
    array = as_ids(name, value)
    if len(array) % 2:
        raise InvalidValue(name, "pairs", f"{len(array)} numbers")
    pairs = array.reshape(-1, 2)
    if len(pairs) and pairs[:, 1].max() > high:
        raise InvalidValue(name, f"ints in 1..{high}", int(pairs[:, 1].max()))
    return pairs
