"""Caller: one request at a time from a simulated process to the manager, repeated under its number until a reply comes, as KVClient does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from kvmanager.errors import KVError
from kvmanager.service import wire
from kvmanager.simulator.world import Network, World

__all__ = ["Caller"]

RESEND_US = 30_000


class Caller:
    """client   its id; a process that starts anew takes another one
    name     of its end of the link
    serve    the manager's end: takes a request's bytes and a way back
    """

    def __init__(self, world: World, network: Network, client: int, name: str, serve: Callable[..., None]) -> None:
        self.world, self.network = world, network
        self.client, self.name, self.serve = client, name, serve
        self.number = 0
        self.alive = True
        self._waiting: deque[tuple[dict[str, Any], Callable[[dict[str, Any] | KVError], None]]] = deque()
        self._sent: tuple[int, bytes, Callable[[dict[str, Any] | KVError], None]] | None = None

    @property
    def idle(self) -> bool:
        return self._sent is None and not self._waiting

    def ask(self, body: dict[str, Any], answered: Callable[[dict[str, Any] | KVError], None]) -> None:
        self._waiting.append((body, answered))
        self._next()

    def _next(self) -> None:
        if self._sent is None and self._waiting and self.alive:
            body, answered = self._waiting.popleft()
            self.number += 1
            self._sent = self.number, wire.encode_request(self.client, self.number, body), answered
            self._send(self.number)

    def _send(self, number: int) -> None:
        if self.alive and self._sent is not None and self._sent[0] == number:
            self.network.send(self.name, "manager", self.serve, self._sent[1], self.name, self.on_reply)
            self.world.after(RESEND_US, self._send, number)

    def on_reply(self, data: bytes) -> None:
        if not self.alive or self._sent is None:
            return
        number, reply = wire.decode_reply(data)
        if number != self._sent[0]:
            return  # the late reply to a request that was repeated
        answered, self._sent = self._sent[2], None
        answered(reply)
        self._next()

    def die(self) -> None:
        self.alive = False
