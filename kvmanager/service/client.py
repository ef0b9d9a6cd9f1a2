"""KVClient: the same methods as KVManager, carried to a `kvmanager serve` in another process."""

from __future__ import annotations

import secrets
import time
from typing import Any, Self

import zmq

from kvmanager.errors import BadMessage, InvalidValue, JournalFailed, KVError, ManagerUnreachable, StaleEpoch
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import Command, Join, Step
from kvmanager.service import wire
from kvmanager.surface import Surface

__all__ = ["KVClient"]


class KVClient(Surface):
    """A connection to a manager. One thread at a time.

    address     the manager's request address
    timeout_ms  how long to wait for a reply, resending included; then ManagerUnreachable
    resend_ms   a request without a reply is sent again after this long: the manager executes it once, whatever arrives
    message_bytes_max   the longest message to send or to take; the manager's own bound holds as well

    Raises InvalidValue for an address it will not connect to, or cannot.
    """

    def __init__(self, address: str, *, timeout_ms: int = 10_000, resend_ms: int = 2_000, message_bytes_max: int = 64 << 20) -> None:
        super().__init__()
        self.address = wire.check_address(address)
        self.timeout_ms = timeout_ms
        self.resend_ms = resend_ms
        self.client_id = secrets.randbits(62) + 2  # 1 is the embedding program's
        self._number = 0
        self._seen = 1  # version of the newest reply; the first is in every log
        self._context = zmq.Context()
        self._message_bytes_max = message_bytes_max
        self._socket = self._connect()

    def _connect(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.MAXMSGSIZE, self._message_bytes_max)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IPV6, self.address.startswith("tcp://["))
        try:
            socket.connect(self.address)
        except zmq.ZMQError as error:
            socket.close(0)
            self._context.term()
            raise InvalidValue("address", "an address that can be connected to", f"{self.address}: {error}") from None
        return socket

    def disconnect(self) -> None:
        """Close the connection; sequences stay as they are."""
        self._socket.close(0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def hello(self) -> dict[str, Any]:
        """Where the manager publishes, and its epoch; makes it publish a heartbeat at once."""
        return self._ask({"t": "hello"})

    def _execute(self, command: Command) -> dict[str, Any]:
        body = command_to_wire(command)
        if isinstance(command, (Step, Join)):
            body["seen"] = self._seen
        try:
            reply = self._ask(body)
        except StaleEpoch as error:
            # Told once; what is asked from now on is asked by somebody who knows.
            self._seen = error.details.get("version", self._seen)
            raise
        self._seen = max(self._seen, reply["version"])
        return reply

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send until a reply to this very request comes. Raises the error it carries, or ManagerUnreachable.

        A manager whose disk is full is asked again as one that does not answer: it has changed nothing, and may find room in time.
        """
        self._number += 1
        request = wire.encode_request(self.client_id, self._number, body)
        if len(request) > self._message_bytes_max:  # the manager would drop the connection, and never answer
            raise InvalidValue("request", f"at most {self._message_bytes_max} bytes", f"{len(request)} bytes")
        deadline = time.monotonic() + self.timeout_ms / 1000
        failed: JournalFailed | None = None
        while True:
            self._socket.send(request)
            resend = min(deadline, time.monotonic() + self.resend_ms / 1000)
            while (left := resend - time.monotonic()) > 0:
                self._socket.setsockopt(zmq.RCVTIMEO, max(1, int(left * 1000)))
                try:
                    frames = self._socket.recv_multipart()
                except zmq.Again:
                    continue
                if len(frames) != 1:
                    raise BadMessage(f"reply: expected 1 frame, got {len(frames)}")
                number, reply = wire.decode_reply(frames[0])
                if isinstance(reply, JournalFailed) and number == self._number:
                    failed = reply
                elif isinstance(reply, KVError):
                    if number in (self._number, 0):  # 0: it could not even read the number
                        raise reply
                elif number == self._number:
                    return reply
                # otherwise the late reply to a request that was given up or repeated
            if time.monotonic() >= deadline:
                raise failed or ManagerUnreachable(
                    f"manager at {self.address}: expected a reply within {self.timeout_ms} ms, got none", address=self.address
                )
            self._socket.close(0)  # whatever was queued for a manager that is gone must not pile up
            self._socket = self._connect()
