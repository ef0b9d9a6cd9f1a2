"""Reading an announcement field by field: it comes off the wire."""

from __future__ import annotations

from typing import Any

from kvmanager.errors import InvalidValue

__all__ = ["BYTES_MAX", "bytes_field", "int_field", "map_field", "text_field"]

BYTES_MAX = 2**46  # of one memory
TEXT_MAX = 256
_MISSING: Any = object()


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    value: Any = fields.get(name, _MISSING)
    if type(value) is not kind:
        raise InvalidValue(name, f"{kind.__name__} in a memory export", type(value).__name__)
    return value


def int_field(fields: dict[str, Any], name: str, low: int = 0, high: int = BYTES_MAX) -> int:
    value: int = _field(fields, name, int)
    if not low <= value <= high:
        raise InvalidValue(name, f"{low} to {high}", value)
    return value


def text_field(fields: dict[str, Any], name: str) -> str:
    value: str = _field(fields, name, str)
    if len(value) > TEXT_MAX:
        raise InvalidValue(name, f"at most {TEXT_MAX} characters", len(value))
    return value


def bytes_field(fields: dict[str, Any], name: str, high: int) -> bytes:
    value: bytes = _field(fields, name, bytes)
    if len(value) > high:
        raise InvalidValue(name, f"at most {high} bytes", len(value))
    return value


def map_field(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value: dict[str, Any] = _field(fields, name, dict)
    return value
