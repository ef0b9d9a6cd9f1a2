"""Follower: keeps a Replica fed from the manager's publications. Subscribe first, then snapshot, then drop what is older."""

from __future__ import annotations

import time

import zmq

from kvmanager.errors import BadMessage, ManagerUnreachable, ReplicaGap, StaleEpoch
from kvmanager.service import wire
from kvmanager.service.client import KVClient
from kvmanager.worker.replica import Replica

__all__ = ["Follower"]


class Follower:
    """A replica and the subscription behind it.

    client   connection used for snapshots
    replica  what to feed
    catch_ups  how often a gap or a restart of the manager was mended with the batches that were missing
    resyncs    how often that was not possible, or a digest differed, and a new snapshot was loaded

    `socket` may be put into the caller's poller; call `poll(0)` when it is readable. Raises ManagerUnreachable.
    """

    def __init__(self, client: KVClient, replica: Replica, *, timeout_ms: int = 10_000) -> None:
        self.client = client
        self.replica = replica
        self.timeout_ms = timeout_ms
        self.catch_ups = 0
        self.resyncs = -1  # the first snapshot is none
        self.heard_at = time.monotonic()
        hello = client.hello()
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.MAXMSGSIZE, hello["message_bytes_max"])
        self.socket.setsockopt(zmq.RCVHWM, 10_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SUBSCRIBE, b"")
        self.socket.setsockopt(zmq.IPV6, hello["publish"].startswith("tcp://["))
        self.socket.connect(hello["publish"])
        try:
            self._synchronise()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()

    def _synchronise(self) -> None:
        """Wait for proof that the subscription is live, then take in what is missing, or a snapshot: nothing newer can have been missed."""
        deadline = time.monotonic() + self.timeout_ms / 1000
        while not self.socket.poll(20, zmq.POLLIN):
            if time.monotonic() > deadline:
                raise ManagerUnreachable(f"manager: expected a publication within {self.timeout_ms} ms, got none")
            self.client.hello()
        if self._catch_up():
            self.catch_ups += 1
            return
        self.replica.load(self.client.tables_snapshot())
        self.resyncs += 1

    def _catch_up(self) -> bool:
        """Feed the batches between what the replica knows and what the manager does; whether the manager still has them."""
        replica = self.replica
        if not replica.epoch or replica.differs:
            return False
        try:
            while batches := self.client.batches_since(replica.epoch, replica.known):
                for data in batches:
                    replica.feed(data)
        except (ReplicaGap, StaleEpoch):
            return False
        return True

    def poll(self, timeout_ms: int = 0) -> bool:
        """Take in whatever has been published, waiting up to `timeout_ms` for the first; whether anything came."""
        if not self.socket.poll(timeout_ms, zmq.POLLIN):
            return False
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self.heard_at = time.monotonic()
            if len(frames) != 3:
                raise BadMessage(f"publication: expected 3 frames, got {len(frames)}")
            topic, _, body = frames
            try:
                if topic == wire.BATCH_TOPIC:
                    self.replica.feed(body)
                else:
                    self.replica.check(*wire.decode_heartbeat(body))
            except ReplicaGap:
                self._synchronise()
