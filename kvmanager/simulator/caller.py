"""Caller: one request at a time from a simulated process to the manager, repeated under its number until a reply comes, as KVClient does.

A manager whose disk is full is asked again as one that does not answer. Whoever has no more patience gives a request up, and does not know
then whether it was carried out, or will be: a late copy may still be under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from kvmanager.errors import JournalFailed, KVError, ManagerUnreachable
from kvmanager.service import wire
from kvmanager.simulator.world import Network, World

__all__ = ["Caller"]

RESEND_US = 30_000


class Caller:
    """client   its id; a process that starts anew takes another one
    name     of its end of the link
    serve    the manager's end: takes a request's bytes and a way back

    What is asked is answered with a reply, the error it carries, or ManagerUnreachable once `patience_us` have passed (0: never).
    """

    def __init__(self, world: World, network: Network, client: int, name: str, serve: Callable[..., None]) -> None:
        self.world, self.network = world, network
        self.client, self.name, self.serve = client, name, serve
        self.number = 0
        self.alive = True
        self.given_up = 0
        self._waiting: deque[tuple[dict[str, Any], Callable[[dict[str, Any] | KVError], None], int]] = deque()
        self._sent: tuple[int, bytes, Callable[[dict[str, Any] | KVError], None]] | None = None

    @property
    def idle(self) -> bool:
        return self._sent is None and not self._waiting

    def ask(self, body: dict[str, Any], answered: Callable[[dict[str, Any] | KVError], None], patience_us: int = 0) -> None:
        self._waiting.append((body, answered, patience_us))
        self._next()

    def _next(self) -> None:
        if self._sent is None and self._waiting and self.alive:
            body, answered, patience_us = self._waiting.popleft()
            self.number += 1
            self._sent = self.number, wire.encode_request(self.client, self.number, body), answered
            if patience_us:
                self.world.after(patience_us, self._give_up, self.number)
            self._send(self.number)

    def _send(self, number: int) -> None:
        if self.alive and self._sent is not None and self._sent[0] == number:
            self.network.send(self.name, "manager", self.serve, self._sent[1], self.name, self.on_reply)
            self.world.after(RESEND_US, self._send, number)

    def on_reply(self, data: bytes) -> None:
        if not self.alive or self._sent is None:
            return
        number, reply = wire.decode_reply(data)
        if number == self._sent[0] and not isinstance(reply, JournalFailed):
            self._settle(reply)
        # otherwise the late reply to a request that was repeated or given up

    def _settle(self, reply: dict[str, Any] | KVError) -> None:
        assert self._sent is not None
        answered, self._sent = self._sent[2], None
        answered(reply)
        self._next()

    def _give_up(self, number: int) -> None:
        if self.alive and self._sent is not None and self._sent[0] == number:
            self.given_up += 1
            self._settle(ManagerUnreachable("no reply in time"))

    def die(self) -> None:
        self.alive = False
