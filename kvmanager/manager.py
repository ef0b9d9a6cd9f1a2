"""KVManager: the state machine embedded in the caller's process. One thread at a time."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from kvmanager.config import ManagerConfig
from kvmanager.errors import Internal, InvariantBroken, JournalFailed, KVError, error_from_wire
from kvmanager.log.journal import Journal, fingerprint
from kvmanager.log.recovery import LogTail, Recovered, batches_since, recover
from kvmanager.machine import drains, handoffs
from kvmanager.machine.apply import apply
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch, same_batch
from kvmanager.machine.clients import EMBEDDED, is_overdue
from kvmanager.machine.commands import Command, Tick
from kvmanager.machine.decide import decide, stale_number
from kvmanager.machine.events import PoolAdded, QuotaSet
from kvmanager.machine.invariants import check_invariants
from kvmanager.machine.lives import begin_life
from kvmanager.machine.queries import answer
from kvmanager.machine.snapshot import snapshot
from kvmanager.machine.state import NEVER, State
from kvmanager.surface import Surface

__all__ = ["KVManager", "new_state"]


def new_state(config: ManagerConfig, epoch: int) -> tuple[State, EventBatch]:
    """An empty state with the pools of `config`, and the batch that made it."""
    state = State(config, epoch)
    pools = [
        PoolAdded(index, pool.name, pool.group, pool.num_pages, pool.page_size, pool.workers, pool.layout)
        for index, pool in enumerate(config.pools)
    ]
    quotas = [QuotaSet(index, b"", 1, pool.tenant_quota) for index, pool in enumerate(config.pools) if pool.tenant_quota >= 0]
    return state, EventBatch(epoch, 1, 0, [*pools, *quotas])


class KVManager(Surface):
    """The manager as an object: decide, write to the journal, apply, publish, reply, in that order.

    config   pools and bounds
    clock    milliseconds; tests and the simulator pass their own
    epoch    number of this life; one that continues a journal has at least the next one
    checked  check every invariant after every batch: slow, for tests
    journal  a folder or a Journal: what is in it is recovered, and everything decided is written to it. None: nothing outlives this object

    Raises JournalCorrupt, JournalMismatch, JournalFailed; InvalidValue if another manager has the journal.
    """

    CLIENT = EMBEDDED  # the embedding program's own client id; those on the wire are random and larger

    def __init__(
        self,
        config: ManagerConfig,
        *,
        clock: Callable[[], int] | None = None,
        epoch: int = 1,
        checked: bool = False,
        journal: Journal | Path | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.clock = clock or (lambda: time.monotonic_ns() // 1_000_000)
        self.checked = checked
        self.journal = Journal(str(journal)) if isinstance(journal, (str, Path)) else journal
        self.recovered: Recovered | None = None
        self.tail = LogTail(config.log_bytes_max)
        self._number = 0
        self._clock_offset = 0
        self._refused: OrderedDict[int, tuple[int, KVError]] = OrderedDict()  # client -> its last request that was refused, and why
        self._subscribers: list[Callable[[EventBatch, bytes], None]] = []
        try:
            self._begin(epoch)
        except BaseException:
            if self.journal is not None:
                self.journal.close()
            raise

    def _begin(self, epoch: int) -> None:
        """Begin the first life, or the next one of what the journal holds."""
        self.recovered = recover(self.config, self.journal) if self.journal is not None else None
        if self.recovered is None:
            self.state, first = new_state(self.config, epoch)
            if self.journal is not None:
                self.journal.start(0, encode_batch(snapshot(self.state)), fingerprint(self.config))
        else:
            self.state, self.tail = self.recovered.state, self.recovered.tail
            first = begin_life(self.state, self.config, epoch)
            self._number = self.state.clients[self.CLIENT].number if self.CLIENT in self.state.clients else 0
            # Time goes on where the log ends: the host may have been started anew since, and its clock with it.
            self._clock_offset = self.state.now_ms - self.clock()
        # Synced whatever the policy: a life whose beginning were lost would be followed by another with the same number.
        self._commit(first, sync=True)

    def now(self) -> int:
        """The clock as the log sees it: after a restart it goes on where the log ended. One that goes back makes leases longer."""
        return self.clock() + self._clock_offset

    def subscribe(self, callback: Callable[[EventBatch, bytes], None]) -> None:
        """Call back with every batch from now on, decoded and as bytes, before the reply to its command is given."""
        self._subscribers.append(callback)

    def unsubscribe(self, callback: Callable[[EventBatch, bytes], None]) -> None:
        self._subscribers.remove(callback)

    def execute(self, command: Command, client: int, number: int) -> bytes:
        """Carry out a client's request; gives the reply's bytes (msgpack). Raises KVError, with nothing changed."""
        refused = self._refused.get(client)
        if refused is not None and number <= refused[0]:
            # Its sender has been told, or will be. A late copy that were carried out now would make things that nobody knows of.
            raise error_from_wire(**refused[1].to_wire()) if number == refused[0] else stale_number(refused[0], number)
        try:
            batch, reply = decide(self.state, command, self.now(), client, number)
        except KVError as error:
            self._remember_refusal(client, number, error)
            raise
        except InvariantBroken:
            raise
        except Exception as error:  # deciding only reads: our fault costs this sender an error, and nobody else anything
            internal = Internal(f"{type(command).__name__}: {type(error).__name__}: {error}"[:500])
            self._remember_refusal(client, number, internal)
            raise internal from error
        if batch is not None:
            self._commit(batch)
        return reply

    def _remember_refusal(self, client: int, number: int, error: KVError) -> None:
        """Nothing in the log tells of a refusal, so a restart forgets it."""
        record = self.state.clients.get(client)
        if record is None or number > record.number:
            self._refused[client] = number, error.with_traceback(None)
            self._refused.move_to_end(client)
            if len(self._refused) > self.config.clients_max:
                self._refused.popitem(last=False)

    def tick(self) -> None:
        """Notice leases that have ended, and pages and handoffs that nobody can touch any more.

        The server calls this by itself; an embedding program calls it every now and then. Nothing is logged while there is nothing to do.
        """
        state, now = self.state, self.now()
        if (
            any(not worker.fenced and now > worker.deadline_ms for worker in state.workers.values())
            or any(each.expired(now, state.version) for each in state.pins.values())
            or is_overdue(state, now)
            or any(pool.quarantine and pool.oldest_quarantined() <= state.reusable(pool.index) for pool in state.pools)
            or state.handoffs.sealed
            or any(next(iter(each.values()), NEVER) <= state.acked(target) for target, each in state.handoffs.aborted.items())
            or handoffs.is_overdue(state, now)
            or drains.is_due(state)
        ):
            self._number += 1
            self.execute(Tick(), self.CLIENT, self._number)
        if self.journal is not None:
            self.journal.tick(now)
            if self.journal.due():
                self.compact()

    def compact(self) -> bool:
        """Begin a new segment of the journal with a snapshot; whether it was done (see `Journal.start`). `tick` does so when it is due."""
        return self.journal is not None and self.journal.start(
            self.state.version, encode_batch(snapshot(self.state)), fingerprint(self.config)
        )

    def disconnect(self) -> None:
        """Let go of the journal, if there is one: nothing more can be decided then. (A client closes its connection.)"""
        if self.journal is not None:
            self.journal.close()

    def _execute(self, command: Command) -> dict[str, Any]:
        self._number += 1
        return msgpack.unpackb(self.execute(command, self.CLIENT, self._number), strict_map_key=False)

    def query(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer a client's query; see `queries.answer`. Raises KVError."""
        try:
            if message.get("t") == "batches":
                return {"batches": batches_since(self.state, self.tail, message)}
            found = answer(self.state, message, self.now())
            if message.get("t") == "stats" and self.journal is not None:
                found["journal"] = self.journal.stats()
            return found
        except (KVError, InvariantBroken):
            raise
        except Exception as error:  # a fault of ours costs whoever asked an error, and nobody else anything
            raise Internal(f"query {message.get('t')}: {type(error).__name__}: {error}"[:500]) from error

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        return self.query(message)

    def _commit(self, batch: EventBatch, *, sync: bool = False) -> None:
        # What is applied here is what everybody else reads: encode_batch takes nothing that would be decoded to something else.
        data = encode_batch(batch)
        if self.checked and not same_batch(decode_batch(data), batch):
            raise InvariantBroken(f"version {batch.version}: the events decoded are not those encoded: {batch.events}"[:1000])
        if self.journal is not None:
            self.journal.append(batch.version, data, batch.now_ms, sync=sync)
        apply(self.state, batch)
        if self.checked:
            check_invariants(self.state)
        self.tail.append(batch.version, data)
        for callback in self._subscribers:
            callback(batch, data)
        if self.journal is not None and self.journal.overdue():
            with contextlib.suppress(JournalFailed):  # this command is done; the next one will hear of it
                self.compact()
