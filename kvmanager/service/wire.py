"""Bytes on the wire: requests and replies (ROUTER/DEALER), event batches and heartbeats (PUB).

    request    msgpack map {"c": client, "n": number, "t": kind, ...}      a command, "hello" or a query (kvmanager.machine.queries)
    reply      msgpack map {"n": number, "ok": bytes} or {"n": number, "err": [code, text, details]}
    batch      frames "kv" | version u64 big-endian | msgpack of kvmanager.machine.events
    heartbeat  frames "hb" | version u64 big-endian | msgpack [epoch, version, digest of the tables]

No pickle, no extension types, no object hooks; every field is typed and bounded before it is used.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import Any, NamedTuple

import msgpack

from kvmanager.config import check_int
from kvmanager.errors import BadMessage, InvalidValue, KVError, error_from_wire
from kvmanager.machine.batch import unpack

__all__ = [
    "BATCH_TOPIC",
    "HEARTBEAT_TOPIC",
    "Heartbeat",
    "check_address",
    "decode_heartbeat",
    "decode_reply",
    "decode_request",
    "encode_error",
    "encode_heartbeat",
    "encode_ok",
    "encode_request",
    "encode_version",
]

BATCH_TOPIC = b"kv"
HEARTBEAT_TOPIC = b"hb"
INT64_MAX = 2**63 - 1
IPC_BYTES_MAX = 100  # a Unix socket's path ends at about 107 bytes
DEPTH_MAX = 8  # requests need 4


class Heartbeat(NamedTuple):
    epoch: int
    version: int
    digest: bytes


def check_address(address: str) -> str:
    """An address this project binds or connects to without keys: ipc:// or loopback tcp://. Raises InvalidValue."""
    if isinstance(address, str) and address.isprintable() and len(address.encode()) <= 6 + IPC_BYTES_MAX:
        # ipc://@NAME is Linux's abstract namespace, where no file mode keeps others out.
        if address.startswith("ipc://") and address[6:7] not in ("", "@"):
            return address
        found = re.fullmatch(r"tcp://(\[[0-9a-fA-F:]+\]|[^:/]+):([0-9]{1,5}|\*)", address)
        if found and (found[2] == "*" or int(found[2]) <= 65535):
            host = found[1].strip("[]")
            try:
                if host == "localhost" or ipaddress.ip_address(host).is_loopback:
                    return address
            except ValueError:
                pass
    raise InvalidValue("address", f"ipc://PATH (at most {IPC_BYTES_MAX} bytes) or tcp:// on a loopback address", repr(address)[:120])


def _check_depth(value: Any, left: int) -> None:
    """Before anything shows such a value in an error text: repr() of a thousand lists in lists is a RecursionError."""
    if left < 0:
        raise BadMessage(f"message: expected at most {DEPTH_MAX} lists and maps in each other")
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (list, dict)):
            _check_depth(item, left - 1)


def encode_request(client: int, number: int, body: dict[str, Any]) -> bytes:
    return msgpack.packb({"c": client, "n": number, **body}, use_bin_type=True)


def decode_request(data: bytes) -> tuple[int, int, dict[str, Any]]:
    """(client, number, map). Raises BadMessage or InvalidValue."""
    message = unpack(data)
    if not isinstance(message, dict):
        raise BadMessage(f"request: expected a map, got {type(message).__name__}")
    _check_depth(message, DEPTH_MAX - 1)
    return check_int("request.c", message.get("c"), 2, INT64_MAX), check_int("request.n", message.get("n"), 1, INT64_MAX), message


def encode_ok(number: int, reply: bytes) -> bytes:
    return msgpack.packb({"n": number, "ok": reply}, use_bin_type=True)


def encode_error(number: int, error: KVError) -> bytes:
    return msgpack.packb({"n": number, "err": [error.code, error.text[:1000], error.details]}, use_bin_type=True)


def decode_reply(data: bytes) -> tuple[int, dict[str, Any] | KVError]:
    """(number, decoded reply or the error it carries). Raises BadMessage."""
    message = unpack(data)
    number = message.get("n") if isinstance(message, dict) else None
    if type(number) is not int:
        raise BadMessage("reply: expected a map with a number n")
    if "err" in message:
        error = message["err"]
        if not isinstance(error, list) or len(error) != 3 or not isinstance(error[2], dict):
            raise BadMessage("reply: expected err to be [code, text, details]")
        if not (isinstance(error[0], str) and isinstance(error[1], str) and {type(key) for key in error[2]} <= {str}):
            raise BadMessage("reply: expected err to be [code, text, details]")
        details = {key: value for key, value in error[2].items() if key not in ("self", "text")}  # names of KVError's own arguments
        return number, error_from_wire(error[0], error[1], details)
    data = message.get("ok")
    body = unpack(data) if isinstance(data, bytes) else None
    if not isinstance(body, dict):
        raise BadMessage("reply: expected ok to hold a map")
    return number, body


def encode_version(version: int) -> bytes:
    return struct.pack(">Q", version)


def encode_heartbeat(epoch: int, version: int, digest: bytes) -> bytes:
    return msgpack.packb([epoch, version, digest], use_bin_type=True)


def decode_heartbeat(data: bytes) -> Heartbeat:
    message = unpack(data)
    if not isinstance(message, list) or [type(item) for item in message] != [int, int, bytes]:
        raise BadMessage("heartbeat: expected [epoch, version, digest]")
    return Heartbeat(*message)
