"""Host: the manager's process in the simulated system. It does what `server` does, on simulated sockets and a simulated clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack

from kvmanager import wire
from kvmanager.commands import Command, Tick, command_from_wire
from kvmanager.config import ManagerConfig
from kvmanager.errors import KVError
from kvmanager.events import EventBatch
from kvmanager.manager import KVManager
from kvmanager.simulator.world import Network, World

__all__ = ["Host"]

TICK_US = 50_000
HEARTBEAT_US = 200_000


class Host:
    """watch      called with every batch, its bytes, and the command and client that it came from
    subscribers  name of the link -> where publications go
    """

    def __init__(
        self, world: World, network: Network, config: ManagerConfig, watch: Callable[[EventBatch, bytes, Command, int], None]
    ) -> None:
        self.world, self.network, self.config, self.watch = world, network, config, watch
        self.skew_ms = 1000
        self.subscribers: dict[str, Callable[[bytes, bytes], None]] = {}
        self.refused = 0
        self._doing: tuple[Command, int] = Tick(), KVManager.CLIENT
        self._quiet_since = 0
        self.manager = KVManager(config, clock=self.clock)
        self.manager.subscribe(self._on_batch)
        self._tick()

    def clock(self) -> int:
        return self.world.now_us // 1000 + self.skew_ms

    def _tick(self) -> None:
        rng = self.world.rng
        if self.world.faults.happens("clock", rng):
            self.skew_ms += rng.choice((-10_000, -500, 300, 900, 1500, 20_000))
        self._doing = Tick(), KVManager.CLIENT
        self.manager.tick()
        if self.world.now_us - self._quiet_since >= HEARTBEAT_US:
            self._heartbeat()
        self.world.after(TICK_US, self._tick)

    # --- requests ---

    def serve(self, data: bytes, link: str, answer: Callable[[bytes], None]) -> None:
        client, number, message = wire.decode_request(data)
        try:
            reply = wire.encode_ok(number, self._answer(client, number, message))
        except KVError as error:
            self.refused += 1
            reply = wire.encode_error(number, error)
        self.network.send("manager", link, answer, reply)

    def _answer(self, client: int, number: int, message: dict[str, Any]) -> bytes:
        kind = message["t"]
        if kind == "hello":
            self._heartbeat()
            return msgpack.packb({"epoch": self.manager.state.epoch})
        if kind == "tables":
            return msgpack.packb({"tables": self.manager.tables_snapshot()})
        command = command_from_wire(message)
        self._doing = command, client
        version = self.manager.state.version
        try:
            return self.manager.execute(command, client, number)
        except KVError:
            if self.manager.state.version != version:
                raise AssertionError("a refused command made a version") from None
            raise

    # --- publications ---

    def _on_batch(self, batch: EventBatch, data: bytes) -> None:
        self.watch(batch, data, *self._doing)
        self._publish(wire.BATCH_TOPIC, data)

    def _heartbeat(self) -> None:
        state = self.manager.state
        self._publish(wire.HEARTBEAT_TOPIC, wire.encode_heartbeat(state.epoch, state.version, state.tables.digest()))

    def _publish(self, topic: bytes, data: bytes) -> None:
        for link, deliver in self.subscribers.items():
            self.network.send("log", link, deliver, topic, data)
        self._quiet_since = self.world.now_us
