"""Clients that fall silent: their sequences end with their lease, and their news does not pile up."""

from __future__ import annotations

from dataclasses import replace

import msgpack
import numpy as np
import pytest

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import InvalidValue, TooMany
from kvmanager.log.files import MemoryFiles
from kvmanager.machine.clients import NOTICES_MAX, tell
from kvmanager.machine.commands import Command, Open, Step, Tick
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.machine.state import Client, Notice
from kvmanager.manager import KVManager
from tests.control.journaled import Life

CONFIG = ManagerConfig(
    (PoolConfig("A", 12, 16), PoolConfig("B", 12, 16)), client_lease_ms=1000, clients_max=4, lease_ms=10_000_000, sequences_max=16
)


class House:
    """A manager whose clients are numbers."""

    def __init__(self, config: ManagerConfig = CONFIG) -> None:
        self.now = 0
        self.kv = KVManager(config, clock=lambda: self.now, checked=True)
        self.workers = [self.kv.join(f"{pool.name}0", pool.name, "bf16") for pool in config.pools]
        self.numbers: dict[int, int] = {}

    def send(self, client: int, command: Command) -> dict:
        self.numbers[client] = self.numbers.get(client, 0) + 1
        return msgpack.unpackb(self.kv.execute(command, client, self.numbers[client]), strict_map_key=False)

    def open(self, client: int, pool: str = "A", tokens: int = 20) -> int:
        prompt = np.full(tokens, client, np.int32)
        return self.send(client, Step(opens=[Open(prompt, pool, chunk=tokens)]))["opened"][0][0]

    def settle(self) -> None:
        """The workers have seen and finished everything."""
        state = self.kv.state
        for pool, worker in enumerate(self.workers):
            mine = [each.sequence_id for each in state.sequences.values() if each.pool == pool]
            self.kv.ack(worker, state.version, ids=mine, tokens=[state.tables.length(each) for each in mine])


def test_sequences_of_a_silent_client_are_closed_with_its_lease() -> None:
    """A scheduler that was killed; its pages come home, those of others stay. Whoever says anything lives on."""
    house = House()
    dead, alive = house.open(10), house.open(11)
    house.settle()
    for _ in range(4):
        house.now += 400
        house.send(11, Step())  # what KVClient.touch sends
        house.kv.tick()
    assert list(house.kv.state.sequences) == [alive] and 10 not in house.kv.state.clients
    house.settle()
    house.kv.tick()
    counts = house.kv.state.pool("A").counts()
    assert (counts.used, counts.cached, counts.quarantined) == (2, 1, 0), "what it had written stays shareable"
    refused = house.send(11, Step(close=[dead]))["refused"]
    assert refused[0][2] == "unknown"


def test_a_lease_is_as_long_as_it_says() -> None:
    house = House()
    sequence = house.open(10)
    version = house.kv.state.version
    house.now += 1000
    house.kv.tick()
    assert sequence in house.kv.state.sequences and house.kv.state.version == version
    house.now += 1
    house.kv.tick()
    assert sequence not in house.kv.state.sequences


def test_its_handoff_is_aborted_first() -> None:
    house = House()
    sequence = house.open(10)
    house.settle()
    house.send(10, Step(hand_off=[(sequence, "B")]))
    house.now += 1001
    house.kv.tick()
    assert not house.kv.state.sequences
    house.settle()
    house.settle()
    house.kv.tick()
    assert not house.kv.state.handoffs
    for pool in house.kv.state.pools:
        assert pool.counts().used == pool.counts().quarantined == 0


def test_the_embedding_program_has_no_lease_and_neither_has_anybody_without_the_option() -> None:
    house = House()
    own = house.kv.open([1] * 20, "A", chunk=20).sequence
    house.now += 100_000
    house.kv.tick()
    assert own in house.kv.state.sequences
    house = House(replace(CONFIG, client_lease_ms=0))
    sequence = house.open(10)
    house.now += 10**6
    house.kv.tick()
    assert sequence in house.kv.state.sequences


def test_whoever_sends_the_tick_is_alive() -> None:
    house = House()
    sequence = house.open(10)
    house.now += 5000
    house.send(10, Tick())
    assert sequence in house.kv.state.sequences and 10 in house.kv.state.clients


def test_a_full_table_forgets_nobody_who_has_sequences_open() -> None:
    """Else they would never end. Without leases the one idle longest is forgotten, as ever."""
    house = House()
    for client in (10, 11):
        house.open(client)
    house.send(12, Step())
    house.send(13, Step())  # 1, 10, 11 and 12 are there: the embedding program has nothing open, so it goes
    assert sorted(house.kv.state.clients) == [10, 11, 12, 13]
    house.open(13)
    house.open(14)
    assert sorted(house.kv.state.clients) == [10, 11, 13, 14]
    digest = state_digest(house.kv.state)
    with pytest.raises(TooMany, match="clients"):
        house.send(15, Step())
    assert state_digest(house.kv.state) == digest
    house.now += 1001
    house.send(15, Tick())
    assert list(house.kv.state.clients) == [15] and not house.kv.state.sequences


def test_leases_begin_anew_with_a_restart() -> None:
    """Nobody could be heard while there was no manager."""
    life = Life(MemoryFiles(), config=CONFIG)
    life.join()
    life.kv.execute(Step(opens=[Open([1] * 20, "A", chunk=20)]), 10, 1)
    life.now += 900
    life.kv.step()
    again = Life(life.files.killed(), config=CONFIG)
    again.now += 900
    again.kv.tick()
    assert len(again.kv.state.sequences) == 1
    again.now += 2000
    again.kv.tick()
    assert not again.kv.state.sequences


def test_undelivered_news_is_bounded_and_says_how_much_is_gone() -> None:
    client = Client(7)
    for number in range(NOTICES_MAX + 5):
        tell(client, Notice("lost", number, 0, "x", "lost"))
        assert len(client.notices) <= NOTICES_MAX
    first, second = client.notices[:2]
    assert (first.kind, first.handoff, first.code) == ("dropped", 6, "dropped")
    assert second.sequence == 6 and client.notices[-1].sequence == NOTICES_MAX + 4


def test_news_is_delivered_once_and_counts_anew() -> None:
    house = House(replace(CONFIG, client_lease_ms=0))
    house.open(10)
    client = house.kv.state.clients[10]
    for number in range(NOTICES_MAX + 1):
        tell(client, Notice("lost", number, 0, "x", "lost"))
    got = house.send(10, Step())["notices"]
    assert len(got) == NOTICES_MAX and got[0][0] == "dropped" and "notices" not in house.send(10, Step())


def test_seen_is_part_of_the_state() -> None:
    house = House()
    house.open(10)
    house.now += 500
    house.send(11, Step())
    assert state_digest(load_snapshot(CONFIG, snapshot(house.kv.state))) == state_digest(house.kv.state)


def test_touch_renews_and_keeps_news_for_the_next_step() -> None:
    house = House()
    sequence = house.kv.open([1] * 20, "A", chunk=20).sequence
    house.kv.worker_gone(house.workers[0])
    house.kv.touch()
    assert [notice.sequence for notice in house.kv.step().notices] == [sequence]


def test_lease_is_checked() -> None:
    with pytest.raises(InvalidValue, match="client_lease_ms"):
        replace(CONFIG, client_lease_ms=-1)
