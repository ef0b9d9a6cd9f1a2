"""Batches: one version's events together, and the bytes that are written, published and read back.

An event is `[code, *fields]` in msgpack; arrays are little-endian bytes. A code or a field that a reader does not know is an error, never
skipped: skipping would make it diverge silently. So a new meaning gets a new event, and fields are never added to an old one.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import msgpack
import numpy as np

from kvmanager.errors import BadMessage, InvariantBroken
from kvmanager.machine import events as ev

__all__ = ["EVENTS", "EventBatch", "decode_batch", "encode_batch", "same_batch", "unpack"]

I32 = np.dtype("<i4")
I64 = np.dtype("<i8")
# Up to this size a message is unpacked without a look ahead: arrays in arrays that lie about their lengths can claim a few megabytes at most.
SMALL_BYTES = 1024
PACKER_BYTES = 1 << 20

# The code is the place in this list: append only.
EVENTS: tuple[type, ...] = (
    ev.PoolAdded,
    ev.WorkerJoined,
    ev.WorkerAcked,
    ev.SequencesWritten,
    ev.WorkerFenced,
    ev.WorkerDead,
    ev.SequenceOpened,
    ev.SequencesGrown,
    ev.GrownAgain,
    ev.TokensAppended,
    ev.PagesPublished,
    ev.SequenceClosed,
    ev.PagesEvicted,
    ev.PagesReleased,
    ev.IndexDropped,
    ev.HandoffBegun,
    ev.HandoffSealed,
    ev.HandoffReserving,
    ev.HandoffMoving,
    ev.HandoffPulled,
    ev.HandoffResident,
    ev.HandoffAborted,
    ev.HandoffEnded,
    ev.ClientAnswered,
    ev.ClientForgotten,
    ev.StateRestored,
    ev.PoolRestored,
    ev.WorkerRestored,
    ev.NodesRestored,
    ev.LruRestored,
    ev.SequenceRestored,
    ev.HandoffRestored,
    ev.ClientRestored,
    ev.EpochBegun,
    ev.LivesRestored,
    ev.InFlightRestored,
    ev.GrownFurther,
    ev.PromptEnqueued,
    ev.PromptsDequeued,
    ev.PolicyRestored,
    ev.SequencesTruncated,
    ev.SequenceForked,
    ev.PagesCopied,
    ev.SequenceMarksRestored,
    ev.PinBegun,
    ev.PinsEnded,
    ev.ArrivalsRestored,
    ev.QuotaSet,
    ev.TenantFlushed,
    ev.AccountRestored,
    ev.ExtrasNamed,
    ev.CountersRestored,
    ev.HandoffReserved,
    ev.HandoffFailed,
    ev.PoolDraining,
    ev.PoolDrained,
    ev.HandoffStreaming,
    ev.LayersWritten,
    ev.LinkChosen,
    ev.PageBytesTold,
)
_CODE = {cls: code for code, cls in enumerate(EVENTS, 1)}


# For each event: the types of its row on the wire ([code, *fields]), and which of the fields are arrays of what.
_DTYPES: dict[Any, np.dtype] = {ev.Ints32: I32, ev.Ints64: I64}
_KINDS = {cls: tuple(get_type_hints(cls, include_extras=True).values()) for cls in EVENTS}
_ROWS = {cls: [int, *(bytes if kind in _DTYPES else kind for kind in kinds)] for cls, kinds in _KINDS.items()}
_make: Any = tuple.__new__  # a NamedTuple of fields that were checked
_ARRAYS = {cls: [(at, _DTYPES[kind]) for at, kind in enumerate(kinds, 1) if kind in _DTYPES] for cls, kinds in _KINDS.items()}
_READERS = {code: (cls, _ROWS[cls], [(at, dtype, dtype.itemsize) for at, dtype in _ARRAYS[cls]]) for cls, code in _CODE.items()}


class EventBatch(NamedTuple):
    """One version: what happened, when (the manager's clock in ms), in which life of the manager."""

    epoch: int
    version: int
    now_ms: int
    events: list[Any]


def _no_ext(code: int, data: bytes) -> object:
    raise BadMessage(f"message: expected no extension types, got type {code}")


def unpack(data: bytes | memoryview) -> Any:
    """The one msgpack value in `data`. Raises BadMessage. Allocates for what is there, not for what a length field claims."""
    try:
        if len(data) > SMALL_BYTES:
            # A walk that builds nothing: arrays in arrays, each claiming as many items as the whole message has bytes, end here.
            walker = msgpack.Unpacker(max_buffer_size=len(data))
            walker.feed(data)
            walker.skip()
        return msgpack.unpackb(data, raw=False, max_ext_len=0, ext_hook=_no_ext, strict_map_key=True)
    except BadMessage:
        raise
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen kinds; all mean the same here
        raise BadMessage(f"message: {type(error).__name__}: {error}"[:200]) from None


def _pack(event: Any) -> list[Any]:
    """The row of an event. Raises InvariantBroken unless unpacking it gives an equal event: same types, same dtypes, same values.

    So the manager may apply the event itself instead of what its bytes decode to, and still nobody reads another log than it did.
    """
    cls = type(event)
    row = [_CODE[cls], *event]
    for at, dtype in _ARRAYS[cls]:
        value = row[at]
        if type(value) is not np.ndarray or value.ndim != 1 or (value.dtype is not dtype and value.dtype != dtype):
            raise InvariantBroken(f"event {cls.__name__}: expected {dtype.name} [n] as field {at}, got {value!r}"[:200])
        row[at] = value.tobytes()
    if [*map(type, row)] != _ROWS[cls]:
        raise InvariantBroken(f"event {cls.__name__}: expected {_ROWS[cls]}, got {[*map(type, row)]}"[:300])
    return row


def same_batch(one: EventBatch, other: EventBatch) -> bool:
    """Whether they are equal to the last value and dtype."""
    return one[:3] == other[:3] and len(one.events) == len(other.events) and all(map(_same, one.events, other.events))


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    for left, right in zip(one, other, strict=True):
        if type(left) is not type(right):
            return False
        if isinstance(left, np.ndarray):
            if left.dtype != right.dtype or not np.array_equal(left, right):
                return False
        elif left != right:
            return False
    return True


_packer = msgpack.Packer(use_bin_type=True)  # making one takes longer than packing a decode step


def encode_batch(batch: EventBatch) -> bytes:
    global _packer
    data = _packer.pack([batch.epoch, batch.version, batch.now_ms, [_pack(event) for event in batch.events]])
    if len(data) > PACKER_BYTES:
        _packer = msgpack.Packer(use_bin_type=True)  # its buffer stays as large as its largest message
    return data


def decode_batch(data: bytes | memoryview) -> EventBatch:
    """The batch in `data`. Raises BadMessage for anything that is not exactly one."""
    message = unpack(data)
    if type(message) is not list or [*map(type, message)] != [int, int, int, list]:
        raise BadMessage("event batch: expected [epoch, version, now_ms, events]")
    events: list[Any] = []
    for row in message[3]:
        if type(row) is not list or not row or type(row[0]) is not int or not 1 <= row[0] <= len(EVENTS):
            raise BadMessage(f"event: expected [code, *fields] with a code in 1..{len(EVENTS)}")
        cls, kinds, arrays = _READERS[row[0]]
        if [*map(type, row)] != kinds:
            expected, got = ([each.__name__ for each in types] for types in (kinds, map(type, row)))
            raise BadMessage(f"event {cls.__name__}: expected {expected}, got {got}"[:300])
        for at, dtype, item_bytes in arrays:
            if len(row[at]) % item_bytes:
                raise BadMessage(f"event {cls.__name__}: expected bytes of {dtype.name} as field {at}, got {len(row[at])} bytes")
            row[at] = np.frombuffer(row[at], dtype)
        del row[0]
        events.append(_make(cls, row))
    message[3] = events
    return _make(EventBatch, message)
