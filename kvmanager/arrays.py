"""Arrays in commands: checked once, then never written. Ids, counts and token ids come in as arrays, lists or little-endian bytes.

What is given out is read-only and shares no memory with what came in, so a command means tomorrow what it meant today.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy as np

from kvmanager.errors import InvalidValue

__all__ = ["INT64_MAX", "as_distinct_ids", "as_ids", "as_ints", "as_tokens", "bytes_of", "ones"]

INT64_MAX = 2**63 - 1
_KINDS: dict[str, np.dtype] = {"<i4": np.dtype("<i4"), "<i8": np.dtype("<i8")}
_HIGHEST = {kind: int(np.iinfo(kind).max) for kind in _KINDS.values()}
_EMPTY = {kind: np.frombuffer(b"", kind) for kind in _KINDS.values()}
_PACK = {
    (kind.itemsize, count): struct.Struct(f"<{count}{'i' if kind.itemsize == 4 else 'q'}").pack
    for kind in _KINDS.values()
    for count in range(1, 65)
}
_KEPT_MAX = 1 << 16  # longest array that is kept to be recognised


def as_ints(name: str, value: object, dtype: str, low: int, high: int) -> np.ndarray:
    """1-D array of ints within low..high, from an array, a sequence of ints or little-endian bytes. Read-only, not aliased."""
    kind = _KINDS[dtype]
    if isinstance(value, bytes):
        if len(value) % kind.itemsize:
            raise InvalidValue(name, f"bytes in multiples of {kind.itemsize}", f"{len(value)} bytes")
        array = np.frombuffer(value, kind)
    elif type(value) is np.ndarray and value.dtype == kind and value.ndim == 1:
        array = np.frombuffer(value.tobytes(), kind)
    elif type(value) is tuple and not value:
        return _EMPTY[kind]
    elif type(value) is list and (data := _packed(value, kind)) is not None:
        array = np.frombuffer(data, kind)
    else:
        array = _from_others(name, value, kind, low, high)
    if len(array):
        smallest = int(np.minimum.reduce(array))
        largest = int(np.maximum.reduce(array)) if array.dtype != kind or high < _HIGHEST[kind] else high
        if smallest < low or largest > high:
            raise InvalidValue(name, f"ints in {low}..{high}", smallest if smallest < low else largest)
    if array.dtype != kind:
        array = np.frombuffer(array.astype(kind).tobytes(), kind)
    return array


def _packed(value: list[object], kind: np.dtype) -> bytes | None:
    """A short list of ints as the bytes of an array, in a quarter of the time that numpy takes; None for anything else."""
    if not 0 < len(value) <= 64 or {*map(type, value)} != {int}:
        return None
    try:
        return _PACK[kind.itemsize, len(value)](*value)
    except struct.error:
        return None  # too large: others say so


def _from_others(name: str, value: object, kind: np.dtype, low: int, high: int) -> np.ndarray:
    if not isinstance(value, (np.ndarray, list, tuple, range)):
        raise InvalidValue(name, "an int array, a list of ints or little-endian bytes", type(value).__name__)
    if isinstance(value, (list, tuple)):
        # Before numpy sees them: it reads True as 1, and of texts makes an array as wide as the longest.
        for item in dict.fromkeys(map(type, value)):
            if item is bool or not issubclass(item, (int, np.integer)):
                raise InvalidValue(name, f"one dimension of ints in {low}..{high}", f"a {item.__name__} among them")
    try:
        array = value if isinstance(value, np.ndarray) else np.array(value, None if len(value) else kind)
    except (ValueError, OverflowError):
        raise InvalidValue(name, f"ints in {low}..{high}", "values that make no int array") from None
    if array.ndim == 1 and not len(array):
        array = np.zeros(0, kind)  # of whatever type: numpy makes empty ones float
    if array.dtype == object or array.dtype.kind not in "iu" or array.ndim != 1:
        shown = "ints beyond 64 bits" if array.dtype == object and array.ndim == 1 else f"{array.dtype} of {array.ndim} dimensions"
        raise InvalidValue(name, f"one dimension of ints in {low}..{high}", shown)
    return np.array(array, array.dtype.newbyteorder("="))


def as_tokens(name: str, value: object) -> np.ndarray:
    """Token ids as int32 [n]; each in 0..2**31-1."""
    return as_ints(name, value, "<i4", 0, 2**31 - 1)


def as_ids(name: str, value: object) -> np.ndarray:
    return as_ints(name, value, "<i8", 1, INT64_MAX)


_last_distinct: tuple[bytes, np.ndarray] = b"", np.zeros(0, np.int64)


def as_distinct_ids(name: str, value: object) -> np.ndarray:
    """Ids, each once. A running batch names the same ones step after step: those found distinct last are known again by their bytes.

    Then the very array of the last time is given, so whoever kept it sees at a glance that nothing has changed.
    """
    global _last_distinct
    data = None
    if type(value) is bytes:
        data = value
    elif type(value) is np.ndarray and value.dtype == np.int64 and value.ndim == 1:
        data = value.tobytes()
    seen, array = _last_distinct
    if data and data == seen:
        return array
    array = as_ids(name, value if data is None else data)
    if len(array) > 1:
        ordered = np.sort(array)
        if (ordered[1:] == ordered[:-1]).any():
            raise InvalidValue(name, "each sequence once", "a sequence twice")
    if len(array) <= _KEPT_MAX:
        _last_distinct = array.tobytes(), array
    return array


def bytes_of(array: np.ndarray) -> bytes:
    """The bytes of an array that was checked here: without a copy, they are what it is made of."""
    base = array.base
    return base if type(base) is bytes and len(base) == array.nbytes else array.tobytes()


def ones(count: int) -> np.ndarray:
    """int64 [count] of 1, read-only; for usual lengths the same array each time."""
    return _kept_ones(count) if count <= _KEPT_MAX else _kept_ones.__wrapped__(count)


@lru_cache(maxsize=16)
def _kept_ones(count: int) -> np.ndarray:
    array = np.ones(count, np.int64)
    array.flags.writeable = False
    return array
