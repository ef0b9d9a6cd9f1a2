"""The engine's own channel between scheduler and workers: small msgpack maps over ZMQ. Block tables do not travel here.

scheduler -> worker   run   {"t", "version", "items": [[sequence, first position, token ids int32 bytes, sample?], ...]}
                      ahead {"t", "handoff", "sequence", "position", "token"}   its next step may be run while it is on its way there
                      dump  {"t", "sequence"}      its latents, for comparison with a reference
                      stop  {"t"}
worker -> scheduler   ready   {"t", "pool", "worker", "pid"}
                      done    {"t", "version", "out": [[sequence, next token], ...], "logits": float32 bytes or b"", "ahead": items that had been run before}
                      stale   {"t", "version"}     the step came too late and was not run
                      pulled  {"t", "handoff"}     its pull has ended, well or not: the manager has news
                      latents {"t", "sequence", "data": float32 bytes, "shape"}
                      failed  {"t", "error"}
"""

from __future__ import annotations

from typing import Any

import msgpack
import zmq

__all__ = ["SchedulerChannel", "WorkerChannel"]

MESSAGE_BYTES_MAX = 256 << 20


class SchedulerChannel:
    """The scheduler's end: one ROUTER; a worker's address there is its pool's name."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)

    def send(self, pool: str, message: dict[str, Any]) -> None:
        """To the worker of `pool`; lost if it is gone, which its process's end will tell."""
        self._socket.send_multipart([pool.encode(), msgpack.packb(message)])

    def receive(self, timeout_ms: int) -> list[tuple[str, dict[str, Any]]]:
        """(pool, message) of all that have come, waiting up to `timeout_ms` for the first."""
        found = []
        if self._socket.poll(timeout_ms, zmq.POLLIN):
            while True:
                try:
                    sender, body = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                found.append((sender.decode(), msgpack.unpackb(body)))
        return found

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()


class WorkerChannel:
    """A worker's end."""

    def __init__(self, address: str, pool: str) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, pool.encode())
        self.socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        self.socket.setsockopt(zmq.LINGER, 500)
        self.socket.connect(address)

    def send(self, message: dict[str, Any]) -> None:
        self.socket.send(msgpack.packb(message))

    def receive(self) -> list[dict[str, Any]]:
        """All messages that have come; does not wait."""
        found = []
        while True:
            try:
                found.append(msgpack.unpackb(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return found

    def close(self) -> None:
        self.socket.close()
        self._context.term()
