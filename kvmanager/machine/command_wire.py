"""Commands on the wire: a map `{"t": kind, field: value}`. Unknown fields are ignored (a newer client may send more)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import numpy as np

from kvmanager.arrays import ones
from kvmanager.errors import BadMessage, InvalidValue
from kvmanager.machine.checks import check_list
from kvmanager.machine.commands import Ack, Command, Drain, Enqueue, Flush, HandOff, Join, Open, Pin, SetQuota, Step, Tick, WorkerGone

__all__ = ["command_from_wire", "command_to_wire"]

_KINDS: dict[str, type] = {
    "step": Step,
    "join": Join,
    "ack": Ack,
    "gone": WorkerGone,
    "tick": Tick,
    "quota": SetQuota,
    "flush": Flush,
    "drain": Drain,
}
_ITEMS: dict[str, type] = {
    "opens": Open,
    "enqueue": Enqueue,
    "pin": Pin,
    "hand_off": HandOff,
}  # lists of a step whose items are maps on the wire
_NAMES = {cls: kind for kind, cls in _KINDS.items()}
_FIELDS: dict[type, tuple[str, ...]] = {
    cls: tuple(item.name for item in fields(cls) if item.init) for cls in (*_KINDS.values(), *_ITEMS.values())
}


_DEFAULTS = {cls: {item.name: item.default for item in fields(cls) if item.default not in (MISSING, ())} for cls in _ITEMS.values()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if type(value) is HandOff and value.pool and not value.reserve:  # nor is it streamed then
        return [value.sequence, value.pool]
    if type(value) in _DEFAULTS:
        defaults = _DEFAULTS[type(value)]
        named = ((name, getattr(value, name)) for name in _FIELDS[type(value)])
        return {name: _plain(each) for name, each in named if name not in defaults or each != defaults[name]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_STEADY_FIELDS = ("grow", "grow_counts", "seen", "victims")


def command_to_wire(command: Command) -> dict[str, Any]:
    """The map that `command_from_wire` turns back; empty fields, and those of items that are as by default, are left out."""
    wire: dict[str, Any] = {"t": _NAMES[type(command)]}
    for name in _STEADY_FIELDS if isinstance(command, Step) and command.steady else _FIELDS[type(command)]:
        value = getattr(command, name)
        if value is False or (isinstance(value, (np.ndarray, list, tuple, bytes)) and not len(value)):
            continue
        wire[name] = _plain(value)
    if isinstance(command, Step) and len(command.grow_counts):
        counts = command.grow_counts
        if counts is ones(len(counts)) or (counts == 1).all():
            del wire["grow_counts"]  # the steady decode step
    if isinstance(command, (Step, Join)) and not command.seen:
        del wire["seen"]
    if isinstance(command, Join) and not command.page_bytes:
        del wire["page_bytes"]
    return wire


def command_from_wire(wire: object) -> Command:
    """The command in a decoded message. Raises BadMessage or InvalidValue; allocates nothing that the message did not hold."""
    if not isinstance(wire, Mapping):
        raise BadMessage(f"command: expected a map, got {type(wire).__name__}")
    kind = wire.get("t")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise BadMessage(f"command: expected t to be one of {', '.join(_KINDS)}, got {kind!r}"[:200])
    values = {name: wire[name] for name in _FIELDS[cls] if name in wire}
    if cls is Step:
        for name, item_cls in _ITEMS.items():
            if name in values:
                values[name] = [_item_from_wire(f"step.{name}", item_cls, item) for item in check_list(f"step.{name}", values[name])]
    try:
        return cls(**values)
    except TypeError as error:
        raise BadMessage(f"command {kind}: {error}"[:200]) from None


def _item_from_wire(where: str, cls: type, wire: object) -> Any:
    if cls is HandOff and isinstance(wire, (list, tuple)):
        return wire  # (sequence, pool), checked with the step
    if not isinstance(wire, Mapping):
        raise InvalidValue(where, "maps", type(wire).__name__)
    try:
        return cls(**{name: wire[name] for name in _FIELDS[cls] if name in wire})
    except TypeError as error:
        raise BadMessage(f"{where}: {error}"[:200]) from None
