"""Server: a KVManager behind sockets. All IO of the manager process lives here and in `wire`.

A bad message costs its sender an error reply. The order is the manager's: apply, publish, then reply, so whoever got a reply can
wait for that version and be sure that it comes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from typing import Any

import msgpack
import zmq

from kvmanager.errors import BadMessage, InvalidValue, JournalFailed, KVError
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.command_wire import command_from_wire
from kvmanager.machine.queries import is_query
from kvmanager.manager import KVManager
from kvmanager.service import wire

__all__ = ["Server"]

TICK_SECONDS = 0.001  # leases and waits are in milliseconds: looking at them after every request would find nothing new


def _check_free(address: str) -> None:
    """Raises InvalidValue for an ipc path that somebody listens at, or that is no socket: libzmq would unlink either and bind."""
    path = address.removeprefix("ipc://")
    if path == address or path == "*":
        return
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise InvalidValue("address", "a path that is free", f"{path}, which is a file of another kind")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except BlockingIOError:
        pass  # its backlog is full: somebody listens
    except OSError:
        return  # nothing there, or left behind by a process that was killed
    raise InvalidValue("address", "an address that nobody serves", address)


def _unlink(address: str) -> None:
    if address.startswith("ipc://"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(address.removeprefix("ipc://"))


class Server:
    """Serves `manager` at two addresses: requests (ROUTER) and publications (PUB).

    address, publish  ipc://PATH (made with mode 0600) or loopback tcp://HOST:PORT, port * takes a free one
    max_queue         batches queued for a slow subscriber before it is cut off; it comes back by snapshot

    Raises InvalidValue for an address it will not bind, or cannot. `run()` serves until `stop()`; `start()` does so in a thread.
    """

    def __init__(self, manager: KVManager, *, address: str, publish: str, max_queue: int = 10_000) -> None:
        wire.check_address(address)
        wire.check_address(publish)
        self.manager = manager
        self._context = zmq.Context()
        self.address = ""
        try:
            self._router = self._bind(zmq.ROUTER, address, max_queue)
            self.address = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
            self._publisher = self._bind(zmq.PUB, publish, max_queue)
        except InvalidValue:
            _unlink(self.address)
            self._context.destroy(0)
            raise
        self.publish = self._publisher.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._quiet_since = 0.0
        self.bad_messages = 0
        manager.subscribe(self._on_batch)

    def _bind(self, kind: int, address: str, max_queue: int) -> zmq.Socket[bytes]:
        bound = self._context.socket(kind)
        bound.setsockopt(zmq.MAXMSGSIZE, self.manager.config.message_bytes_max)
        bound.setsockopt(zmq.SNDHWM, max_queue)
        bound.setsockopt(zmq.RCVHWM, max_queue)
        bound.setsockopt(zmq.LINGER, 0)
        bound.setsockopt(zmq.IPV6, address.startswith("tcp://["))
        mask = os.umask(0o177)  # an ipc socket is a file: for its owner alone
        try:
            _check_free(address)
            bound.bind(address)
        except zmq.ZMQError as error:
            raise InvalidValue("address", "an address that can be bound", f"{address}: {error}") from None
        finally:
            os.umask(mask)
        return bound

    # --- life ----------------------------------------------------------------------------------------------------------------

    def start(self) -> Server:
        """Serve in a thread of this process; `close()` ends it."""
        self._thread = threading.Thread(target=self.run, name="kvmanager-server", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask `run` to return; safe from a signal handler or another thread."""
        self._stopping.set()

    def close(self) -> None:
        """Stop, and close all sockets. A second time does nothing: the addresses may be another server's by then."""
        if self._router.closed:
            return
        self.stop()
        if self._thread is not None:
            self._thread.join(10)
        self.manager.unsubscribe(self._on_batch)
        _unlink(self.address)  # first: once the sockets are closed, somebody else may bind these paths
        _unlink(self.publish)
        self._router.close(0)
        self._publisher.close(0)
        self._context.term()

    def run(self) -> None:
        """Serve until `stop()`, or until the journal takes nothing more: whoever started the process can start another, and that recovers."""
        self._router.setsockopt(zmq.RCVTIMEO, min(self.manager.config.heartbeat_ms, 50))
        ticked = 0.0
        self._heartbeat()
        while not self._stopping.is_set():
            with contextlib.suppress(zmq.Again):  # nothing for a while
                # Waiting in recv itself: whatever this thread did between an answer and its next wait would hold that answer back, for
                # libzmq sends it from a thread of its own.
                self._on_request(self._router.recv_multipart())
            now = time.monotonic()
            if now - ticked >= TICK_SECONDS:
                ticked = now
                with contextlib.suppress(JournalFailed):  # a full disk: leases end once there is room; whoever asks for something is told
                    self.manager.tick()
            if self.manager.journal is not None and self.manager.journal.broken:
                return
            if (now - self._quiet_since) * 1000 >= self.manager.config.heartbeat_ms:
                self._heartbeat()

    # --- requests ------------------------------------------------------------------------------------------------------------

    def _on_request(self, frames: list[bytes]) -> None:
        number = 0
        try:
            if len(frames) != 2:
                raise BadMessage(f"request: expected 1 frame, got {len(frames) - 1}")
            client, number, message = wire.decode_request(frames[1])
            reply = wire.encode_ok(number, self._answer(client, number, message))
            if len(reply) > self.manager.config.message_bytes_max:  # the client would drop the connection, and never know why
                raise InvalidValue("reply", f"at most {self.manager.config.message_bytes_max} bytes", f"{len(reply)} bytes")
        except KVError as error:
            self.bad_messages += isinstance(error, BadMessage)
            reply = wire.encode_error(number, error)
        with contextlib.suppress(zmq.Again, zmq.ZMQError):  # gone, or not reading: its loss alone
            self._router.send_multipart([frames[0], reply], zmq.NOBLOCK)

    def _answer(self, client: int, number: int, message: dict[str, Any]) -> bytes:
        kind = message.get("t")
        if kind == "hello":
            self._heartbeat()  # proves to a new subscriber that its subscription is live
            hello = {"publish": self.publish, "epoch": self.manager.state.epoch, "message_bytes_max": self.manager.config.message_bytes_max}
            return msgpack.packb(hello)
        if is_query(message) or kind == "batches":
            return msgpack.packb(self.manager.query(message))
        return self.manager.execute(command_from_wire(message), client, number)

    # --- publications --------------------------------------------------------------------------------------------------------

    def _on_batch(self, batch: EventBatch, data: bytes) -> None:
        send = self._publisher.send
        send(wire.BATCH_TOPIC, zmq.SNDMORE)
        send(wire.encode_version(batch.version), zmq.SNDMORE)
        send(data)
        self._quiet_since = time.monotonic()

    def _heartbeat(self) -> None:
        state = self.manager.state
        body = wire.encode_heartbeat(state.epoch, state.version, state.tables.digest())
        self._publisher.send_multipart([wire.HEARTBEAT_TOPIC, wire.encode_version(state.version), body])
        self._quiet_since = time.monotonic()
