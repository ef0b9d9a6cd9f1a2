"""Watch: what must hold after every version of the simulated system. Cheap checks always, dear ones by lot."""

from __future__ import annotations

import hashlib
from collections import deque

import msgpack

from kvmanager import events as ev
from kvmanager.apply import apply
from kvmanager.commands import Command, Step
from kvmanager.events import EventBatch, decode_batch, encode_batch
from kvmanager.invariants import check_invariants
from kvmanager.manager import KVManager
from kvmanager.simulator.books import Turn, demand
from kvmanager.simulator.model import Model
from kvmanager.snapshot import load_snapshot, snapshot, state_digest

__all__ = ["Watch"]

COMPARE_EVERY, INVARIANTS_EVERY, DIGEST_EVERY, REPLAY_EVERY = 4, 16, 8, 400
DIGESTS_KEPT = 256


class Watch:
    """commands   executed so far: a simulated run's steps
    history       of all bytes published: two runs of one seed agree in it to the last byte
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.manager: KVManager | None = None
        self.commands = 0
        self.history = hashlib.sha256()
        self.starts: dict[int, dict[int, int]] = {}  # version -> sequence -> pool: what workers are to run, for whoever orders it
        self._digests: dict[tuple[int, int], bytes] = {}
        self._base = b""
        self._since: deque[bytes] = deque()

    def attach(self, manager: KVManager) -> None:
        self.manager = manager
        self._take_base()

    def _take_base(self) -> None:
        assert self.manager is not None
        self._base = encode_batch(snapshot(self.manager.state))
        self._since.clear()

    def saw(self, batch: EventBatch, data: bytes, command: Command, client: int) -> Turn:
        """Follow one batch. The manager has applied it; nobody else has seen it yet."""
        assert self.manager is not None
        state = self.manager.state
        self.commands += 1
        self.history.update(data)
        self._since.append(data)
        answered = batch.events[-1]
        demand(isinstance(answered, ev.ClientAnswered), f"version {batch.version} ends with {type(answered).__name__}")
        turn = Turn(command, client, msgpack.unpackb(answered.reply, strict_map_key=False))
        if isinstance(command, Step):
            for asked, made in zip(command.opens, turn.reply.get("opened", []), strict=True):
                if made:
                    turn.opened[made[0]] = asked
        self._check_notices(turn)
        self.model.read(batch, turn)
        if turn.starts:
            self.starts[batch.version] = {each: self.model.texts[each].pool for each in turn.starts}
            if len(self.starts) > DIGESTS_KEPT:
                del self.starts[next(iter(self.starts))]
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
        return turn

    def _check_notices(self, turn: Turn) -> None:
        """News of a client's sequences come with its next reply, each once and in order."""
        expected = self.model.notices.pop(turn.client, [])
        got = [tuple(notice[:3]) for notice in turn.reply.get("notices", [])]
        demand(got == expected, f"notices of client {turn.client}: {got}, expected {expected}")

    def digest_at(self, epoch: int, version: int) -> bytes | None:
        """The manager's tables at a version, if they were noted."""
        return self._digests.get((epoch, version))

    def check_replay(self) -> None:
        """What was published since the last time, applied to what was the state then, gives the state that is."""
        assert self.manager is not None
        state = load_snapshot(self.model.config, decode_batch(self._base))
        for data in self._since:
            apply(state, decode_batch(data))
        demand(state_digest(state) == state_digest(self.manager.state), f"replaying the log gives another state at {state.version}")
        self._take_base()

    def check_all(self) -> None:
        assert self.manager is not None
        self.model.compare(self.manager.state)
        check_invariants(self.manager.state)
        self.check_replay()
