"""Events with fixed and with random fields, and what it means that two are equal."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from kvmanager.machine import events as ev
from kvmanager.machine.batch import EVENTS, EventBatch, encode_batch

GOLDEN = Path(__file__).parent / "golden"
NAMES = [cls.__name__ for cls in EVENTS]


def fields_of(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def sample_event(cls: type) -> Any:
    """The event that golden bytes were made of: no two fields alike, ints of one, two, four and eight bytes."""
    values: list[Any] = []
    for place, (name, kind) in enumerate(fields_of(cls).items()):
        if kind is int:
            values.append((7, 300, 70_000, 2**40 + 1, -2)[place % 5])
        elif kind is str:
            values.append(f"{name} ü")
        elif kind is bytes:
            values.append(bytes([0, 255, place]) + name.encode())
        elif kind is ev.Ints32:
            values.append(np.array([place, -1, 2**31 - 1], np.int32))
        else:
            values.append(np.array([place, -1, 2**63 - 1], np.int64))
    return cls(*values)


def sample_batch(*classes: type) -> EventBatch:
    return EventBatch(3, 2**33, 123_456, [sample_event(cls) for cls in classes])


def random_event(cls: type, rng: random.Random) -> Any:
    def draw(kind: Any) -> Any:
        if kind is int:
            return rng.choice([0, 1, -1, 2**63 - 1, -(2**63), rng.getrandbits(40)])
        if kind is str:
            return "".join(chr(rng.choice([0, 65, 0x7FF, 0x20AC, 0x10FFFF])) for _ in range(rng.randrange(40)))
        if kind is bytes:
            return rng.randbytes(rng.choice([0, 1, 31, 32, 255, 256, 70_000]))
        dtype, bits = (np.int32, 32) if kind is ev.Ints32 else (np.int64, 64)
        return np.array([rng.getrandbits(bits) - 2 ** (bits - 1) for _ in range(rng.choice([0, 1, 63, 65]))], dtype)

    return cls(*map(draw, fields_of(cls).values()))


def equal(left: Any, right: Any) -> bool:
    """Same event, same values, same dtypes."""
    if type(left) is not type(right):
        return False
    for one, other in zip(left, right, strict=True):
        if isinstance(one, np.ndarray):
            if not isinstance(other, np.ndarray) or one.dtype != other.dtype or not np.array_equal(one, other):
                return False
        elif type(one) is not type(other) or one != other:
            return False
    return True


if __name__ == "__main__":  # python -m tests.wire.samples: writes golden bytes of events that have none yet, and changes none
    for event_class in EVENTS:
        path = GOLDEN / f"{event_class.__name__}.bin"
        if not path.exists():
            path.write_bytes(encode_batch(sample_batch(event_class)))
