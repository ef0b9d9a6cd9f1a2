"""Watch: what must hold after every version of the simulated system. Cheap checks always, dear ones by lot.

It remembers the log with where it came from, so that after a restart it knows what the recovered state has to be, and can go back with
the model when the end of the log is lost.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgpack

from kvmanager.machine import events as ev
from kvmanager.machine.apply import apply
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch
from kvmanager.machine.commands import Command, Step
from kvmanager.machine.invariants import check_invariants
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.machine.state import State
from kvmanager.manager import KVManager
from kvmanager.simulator.books import Broken, Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.questions import check_answer
from kvmanager.simulator.replies import check_refusals, check_reply

__all__ = ["Watch"]

COMPARE_EVERY, INVARIANTS_EVERY, DIGEST_EVERY, REPLAY_EVERY = 4, 16, 8, 400
QUESTION_DIGEST_EVERY = 50
DIGESTS_KEPT, BASES_KEPT = 256, 16


@dataclass
class _Base:
    """State and books at a version, and what came after it, until the next base."""

    version: int
    state: bytes
    books: bytes
    since: list[tuple[int, bytes, Command | None, int]] = field(default_factory=list)


class Watch:
    """commands   executed so far: a simulated run's steps
    history       of all bytes published: two runs of one seed agree in it to the last byte
    starts        version -> sequence -> pool: what workers are to run, for whoever orders it
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.manager: KVManager | None = None
        self.commands = self.questions = 0
        self.history = hashlib.sha256()
        self.starts: dict[int, dict[int, int]] = {}
        self.rolled_back = 0
        self._may_lose = False
        self._digests: dict[tuple[int, int], bytes] = {}
        self._bases: deque[_Base] = deque(maxlen=BASES_KEPT)

    # --- the manager's lives ---

    def begin(self, manager: KVManager) -> None:
        self.manager = manager
        self._take_base()

    def lost(self, synced: bool) -> None:
        """The manager's host was lost: the end of the log may be, unless it was synced before anybody saw it."""
        self._may_lose = not synced

    def resume(self, manager: KVManager, command: Command, client: int) -> list[EventBatch]:
        """A new life has begun on what the journal held; gives the batches that nobody has seen yet.

        At most one of them was decided in the life before: for the command that was being executed when that ended.
        """
        seen = self.model.version
        found = manager.tail.since(seen, 1 << 40)
        if found is None:
            raise Broken(f"the log's end after version {seen} is not in memory after a restart")
        batches = [decode_batch(data) for data in found]
        lives = [batch.events[0] for batch in batches if isinstance(batch.events[0], ev.EpochBegun)]
        demand(lives, "a restart did not begin a new life")
        last = lives[0].last
        if last < seen:
            demand(self._may_lose, f"version {seen} was published, and the journal ends with {last}")
            self.rolled_back += 1
            self._go_back(last)
        self._may_lose = False
        state = self._state_at(last)
        for batch, data in zip(batches, found, strict=True):
            apply(state, decode_batch(data))
            self.history.update(data)
            if isinstance(batch.events[0], ev.EpochBegun):
                self.model.begin_life(batch.version)
            else:
                demand(batch.version == seen + 1, f"version {batch.version} in the journal, and {seen} was the last to be published")
                self.commands += 1
                self._follow(batch, command, client)
        demand(state_digest(state) == state_digest(manager.state), f"the state recovered at version {last} is not the state that was")
        self.manager = manager
        self._take_base()
        self.model.compare(manager.state)
        check_invariants(manager.state)
        return batches

    def _go_back(self, version: int) -> None:
        base = self._base_at(version)

        def follow() -> None:
            for at, data, command, client in base.since:
                if at <= version:
                    batch = decode_batch(data)
                    if command is None:
                        self.model.begin_life(at)
                    else:
                        self._follow(batch, command, client)

        self.model.go_back(base.books, follow)
        while self._bases[-1] is not base:
            self._bases.pop()
        base.since = [each for each in base.since if each[0] <= version]

    def _base_at(self, version: int) -> _Base:
        for base in reversed(self._bases):
            if base.version <= version:
                return base
        raise Broken(f"the journal went back to version {version}, before the oldest that is remembered ({self._bases[0].version})")

    def _state_at(self, version: int) -> State:
        base = self._base_at(version)
        state = load_snapshot(self.model.config, decode_batch(base.state))
        for at, data, _, _ in base.since:
            if at <= version:
                apply(state, decode_batch(data))
        return state

    def _take_base(self) -> None:
        assert self.manager is not None
        state = self.manager.state
        self._bases.append(_Base(state.version, encode_batch(snapshot(state)), self.model.checkpoint()))

    # --- every version ---

    def saw(self, batch: EventBatch, data: bytes, command: Command, client: int) -> None:
        """Follow one batch. The manager has applied it; nobody else has seen it yet."""
        assert self.manager is not None
        state = self.manager.state
        self.commands += 1
        self.history.update(data)
        self._bases[-1].since.append((batch.version, data, command, client))
        self._follow(batch, command, client)
        if self.commands % COMPARE_EVERY == 0:
            self.model.compare(state)
        if self.commands % INVARIANTS_EVERY == 0:
            check_invariants(state)
        if self.commands % DIGEST_EVERY == 0:
            self._digests[batch.epoch, batch.version] = state.tables.digest()
            if len(self._digests) > DIGESTS_KEPT // DIGEST_EVERY:
                del self._digests[next(iter(self._digests))]
        if self.commands % REPLAY_EVERY == 0:
            self.check_replay()

    def _follow(self, batch: EventBatch, command: Command, client: int) -> None:
        answered = batch.events[-1]
        demand(isinstance(answered, ev.ClientAnswered), f"version {batch.version} ends with {type(answered).__name__}")
        turn = Turn(command, client, msgpack.unpackb(answered.reply, strict_map_key=False))
        if isinstance(command, Step):
            for asked, made in zip(command.opens, turn.reply.get("opened", []), strict=True):
                if made:
                    turn.opened[made[0]] = asked
        self._check_notices(turn)
        if not self.model.replaying:
            check_reply(self.model, turn)
        self.model.read(batch, turn)
        if not self.model.replaying:
            check_refusals(self.model, turn)
        if turn.starts and not self.model.replaying:
            self.starts[batch.version] = {each: self.model.texts[each].pool for each in turn.starts}
            if len(self.starts) > DIGESTS_KEPT:
                del self.starts[next(iter(self.starts))]

    def _check_notices(self, turn: Turn) -> None:
        """News of a client's sequences come with its next reply, each once and in order."""
        expected = self.model.notices.pop(turn.client, [])
        got = [tuple(notice[:3]) for notice in turn.reply.get("notices", [])]
        demand(got == expected, f"notices of client {turn.client}: {got}, expected {expected}")

    def asked(self, message: dict[str, Any], answer: dict[str, Any]) -> None:
        """A question was answered. Nothing has changed, and what is determined is as in the books."""
        assert self.manager is not None
        self.questions += 1
        state = self.manager.state
        demand(state.version == self.model.version, f"asking for {message['t']} made version {state.version}")
        check_answer(self.model, message, answer)
        if self.questions % QUESTION_DIGEST_EVERY == 0:
            self.check_replay()

    def digest_at(self, epoch: int, version: int) -> bytes | None:
        """The manager's tables at a version, if they were noted."""
        return self._digests.get((epoch, version))

    def check_replay(self) -> None:
        """What was published since the last time, applied to what was the state then, gives the state that is."""
        assert self.manager is not None
        version = self.manager.state.version
        demand(
            state_digest(self._state_at(version)) == state_digest(self.manager.state), f"replaying the log gives another state at {version}"
        )
        self._take_base()

    def check_all(self) -> None:
        assert self.manager is not None
        self.model.compare(self.manager.state)
        check_invariants(self.manager.state)
        self.check_replay()
