"""Driver: lives through random days of a manager, from one seed, and checks everything after every command.

Beside the books every worker has a page memory: one stamp a token slot, standing for (tenant, extra, all tokens up to here). Steps are
executed later than they were decided, in any order that a sequence's own steps allow, on the tables of the version that decided them;
pulls go page by page. So a page that is handed out too early is seen twice: by the books at once, by a wrong stamp when somebody reads.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgpack
import numpy as np

from kvmanager.config import ManagerConfig
from kvmanager.errors import KVError
from kvmanager.machine import events as ev
from kvmanager.machine.apply import apply
from kvmanager.machine.batch import EventBatch, decode_batch, encode_batch
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import Ack, Command, Join, Open, Step, Tick, WorkerGone
from kvmanager.machine.decide import decide
from kvmanager.machine.preview import answer_dry_run
from kvmanager.machine.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.machine.state import State
from kvmanager.manager import KVManager, new_state
from kvmanager.simulator import operations  # noqa: F401 - for what they register
from kvmanager.simulator.books import PAGE, Turn, Worker, demand
from kvmanager.simulator.model import Model
from kvmanager.simulator.operations.questions import check_answer
from kvmanager.simulator.pools import draw_formats, draw_pool, draw_sizes
from kvmanager.simulator.registry import ACTIONS, DRAWS, HEALERS
from kvmanager.simulator.replies import check_refusals, check_reply

__all__ = ["Driver", "live_through"]

LEASE_MS = 1000


class Driver:
    """Draws a manager, then commands for it, from one seed; checks everything after every one."""

    SCHEDULERS = (1, 2)

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.seed = seed
        sizes, formats = draw_sizes(rng), draw_formats(seed)
        pools = tuple(
            draw_pool(rng, name, sizes, rng.randint(5, 12), formats, workers=rng.choice((1, 2)), partial_match=rng.choice((0, 0, 1, 5)))
            for name in ("A", "B", "C")[: rng.choice((2, 2, 3))]
        )
        self.config = ManagerConfig(
            pools=pools,
            sequences_max=rng.choice((5, 8, 12)),
            handoffs_max=rng.choice((2, 6)),
            lease_ms=LEASE_MS,
            handoff_timeout_ms=rng.choice((0, 50, 300, 5000)),
            handoff_wait_ms=rng.choice((0, 100, 2000)),
            handoff_tries=rng.choice((1, 2, 3)),
            handoff_prefill_ms=rng.choice((0, 200, 5000)),
            drain_at_once=rng.choice((1, 3)),
            inflight_wait_ms=rng.choice((0, 20, 2000)),
            placement=rng.choice(("prefix", "prefix", "round_robin")),
            placement_load_weight=rng.choice((0, 1, 3)),
        )
        self.now = 1000
        self.manager = KVManager(self.config, clock=lambda: self.now, checked=True)
        self.received: list[tuple[EventBatch, bytes]] = []
        self.manager.subscribe(lambda batch, data: self.received.append((batch, data)))
        self.replayed, first = new_state(self.config, 1)
        apply(self.replayed, decode_batch(encode_batch(first)))
        self.fork = self.load()
        self.digest = state_digest(self.replayed)
        self.model = Model(self.config)
        self.numbers: Counter[int] = Counter()
        self.delivered: dict[int, list[tuple[str, int, int]]] = {}
        self.last_sent: tuple[Command, int, int, bytes] | None = None
        self.last_grow: tuple[list[int], list[int]] = ([], [])
        self.errors: Counter[str] = Counter()
        self.steps = 0
        self.documents = [[rng.choice((1, 2)) for _ in range(6 * PAGE)] for _ in range(2)]
        # Which faults there are, and how busy it is, is drawn too: a day without deaths goes deeper than one with many.
        self.actions = [Driver.step, *(each.call for each in ACTIONS)]
        self.weights = [30, *(rng.choice(each.rates) for each in ACTIONS)]
        self.of_the_day: dict[str, Any] = {}
        self.failing = rng.choice((0, 0.1, 0.4))
        for pool in pools:
            for rank in range(pool.workers):
                self.send(Join(f"{pool.name}{rank}", pool.name, pool.layout), 100)

    def load(self) -> State:
        return load_snapshot(self.config, decode_batch(encode_batch(snapshot(self.manager.state))))

    # --- one command, and everything that must hold after it ---

    def send(self, command: Command, client: int) -> dict[str, Any] | None:
        self.numbers[client] += 1
        number = self.numbers[client]
        forked: Any
        try:
            forked = decide(self.fork, command, self.now, client, number)
        except KVError as error:
            forked = error
        foreseen = None
        if isinstance(command, Step) and self.steps % 3 == 0 and not isinstance(forked, KVError):
            foreseen = answer_dry_run(self.manager.state, {"step": command_to_wire(command)}, self.now)
        self.received.clear()
        try:
            data = self.manager.execute(command, client, number)
        except KVError as error:
            demand(isinstance(forked, KVError) and forked.to_wire() == error.to_wire(), f"a loaded snapshot decides {forked}, not {error}")
            demand(not self.received, "an error was published")
            demand(state_digest(self.manager.state) == self.digest, f"{error.code} changed the state")
            self.errors[error.code] += 1
            return None
        [(batch, published)] = self.received
        demand(not isinstance(forked, KVError), f"a loaded snapshot refuses with {forked}")
        demand(encode_batch(forked.batch) == published and forked.reply == data, "a loaded snapshot decides something else")
        for state in (self.replayed, self.fork):
            apply(state, decode_batch(published))
        self.digest = state_digest(self.manager.state)
        demand(state_digest(self.replayed) == self.digest, "replaying the log gives another state")
        demand(state_digest(self.fork) == self.digest, "a loaded snapshot went another way")
        if self.steps % 5 == 0:
            self.fork = self.load()
            demand(state_digest(self.fork) == self.digest, "a loaded snapshot is another state")
        reply = msgpack.unpackb(data, strict_map_key=False)
        if foreseen is not None:
            evicted = sorted(page for event in batch.events if isinstance(event, ev.PagesEvicted) for page in event.pages.tolist())
            expected = sorted(page for _, ids, _, _ in foreseen["evicted"] for page in np.frombuffer(ids, "<i4").tolist())
            demand(foreseen["refused"] == reply.get("refused", []), f"a dry run was refused {foreseen['refused']}, the step {reply}")
            demand(evicted == expected, f"a dry run would evict {expected}, the step evicted {evicted}")
        turn = Turn(command, client, reply)
        if isinstance(command, Step):
            for asked, made in zip(command.opens, reply.get("opened", []), strict=True):
                if made:
                    turn.opened[made[0]] = asked
        check_reply(self.model, turn)
        self.model.read(batch, turn)
        check_refusals(self.model, turn)
        self.model.compare(self.manager.state)
        self.delivered.setdefault(client, []).extend(tuple(notice[:3]) for notice in reply.get("notices", []))
        for _, _, code, *_ in reply.get("refused", []):
            self.errors[code] += 1
        self.last_sent = command, client, number, data
        return reply

    def repeat(self) -> None:
        """A reply was lost: the same number again gets the same bytes, and nothing happens."""
        if self.last_sent is None:
            return
        command, client, number, data = self.last_sent
        self.received.clear()
        demand(self.manager.execute(command, client, number) == data, "a repeated request got another reply")
        demand(not self.received and state_digest(self.manager.state) == self.digest, "a repeated request changed something")

    def ask(self, message: dict[str, Any]) -> None:
        """A question: its answer is in the books, and nothing happens."""
        self.received.clear()
        answer = self.manager.query(message)
        demand(not self.received and state_digest(self.manager.state) == self.digest, f"a question changed something: {message}")
        check_answer(self.model, message, answer)

    # --- what may happen ---

    def drawn(self, name: str, *choices: Any) -> Any:
        """One of `choices`, drawn at the first question and the same all day."""
        if name not in self.of_the_day:
            self.of_the_day[name] = self.rng.choice(choices)
        return self.of_the_day[name]

    def step(self) -> None:
        """One scheduler step, of whatever each operation draws for it."""
        fields: dict[str, Any] = {}
        for draw in DRAWS:
            fields.update(draw(self))
        self.send(Step(**fields), self.rng.choice(self.SCHEDULERS))

    def work(self, most: int = 4) -> None:
        rng = self.rng
        for worker in list(self.model.workers.values()):
            for _ in range(rng.randint(0, most)):
                if worker.works or worker.chores:
                    self.model.execute(worker, rng)
            for pull in list(worker.pulls.values()):
                if pull.aborted_at and rng.random() < 0.4:
                    pull.todo.clear()  # it has seen the abort and stops; what it pulled so far is of no use
                elif pull.todo and rng.random() < self.failing:
                    pull.fail()
                elif pull.todo and rng.random() < 0.7:
                    self.model.pull(worker, pull, rng)

    def ack(self, worker: Worker, eager: bool = False) -> None:
        rng = self.rng
        newest = worker.may_ack(self.manager.state.version)
        version = newest if eager or rng.random() < 0.6 else rng.randint(0, newest)
        told = [(each, tokens) for each, tokens in worker.done.items() if eager or rng.random() < 0.8]
        if not eager:
            told = [(each, tokens if rng.random() < 0.8 else rng.randint(0, tokens)) for each, tokens in told]
        failed: list[Any] = [(pull.handoff, pull.attempt, "sums differ") for pull in worker.pulls.values() if pull.failed]
        pulled = [pull.handoff for pull in worker.pulls.values() if not pull.todo and not pull.failed and (eager or rng.random() < 0.7)]
        if not eager and rng.random() < 0.1:
            failed += [(each, rng.randint(0, 3) + 50, "long ago") for each in self.model.moves]
            pulled += [rng.randint(1, 50) + 10_000, *(each for each in self.model.moves if each not in worker.pulls)]
        as_of = newest if eager else rng.choice((0, newest, rng.randint(version, newest)))
        reply = self.send(
            Ack(worker.worker, version, [each for each, _ in told], [tokens for _, tokens in told], pulled, as_of=as_of, failed=failed),
            100 + worker.worker,
        )
        demand(reply is None if worker.fenced else reply is not None, f"acknowledgement of {worker}: {reply}")
        for each in list(worker.done):
            if each not in self.model.texts and rng.random() < 0.5:
                del worker.done[each]  # late reports of closed sequences go on for a while
        for pull in list(worker.pulls.values()):
            if pull.aborted_at and not pull.todo and rng.random() < 0.5:
                del worker.pulls[pull.handoff]  # until then its late reports go on

    def die(self, worker: Worker | None = None) -> None:
        worker = worker or self.rng.choice(list(self.model.workers.values()) or [None])
        if worker is not None:
            lost = sorted(text.sequence for text in self.model.texts.values() if text.pool == worker.pool and not worker.fenced)
            reply = self.send(WorkerGone(worker.worker), 50)
            demand(reply is not None and sorted(reply["lost"]) == lost, f"lost with {worker.name}: {reply}, the model has {lost}")

    def join(self) -> None:
        for number, pool in enumerate(self.config.pools):
            names = [worker.name for worker in self.model.crew(number)]
            for rank in range(pool.workers):
                if f"{pool.name}{rank}" not in names and not any(
                    worker.name == f"{pool.name}{rank}" for worker in self.model.crew(number, fenced=True)
                ):
                    self.send(Join(f"{pool.name}{rank}", pool.name, pool.layout), 100)

    def tick(self, jump: int) -> None:
        self.now += jump
        self.send(Tick(), 60)
        for worker in self.model.workers.values():
            late = self.manager.state.workers[worker.worker].deadline_ms < self.manager.state.now_ms
            demand(worker.fenced or not late, f"{worker.name} is late and not fenced")

    def once(self) -> None:
        self.steps += 1
        rng = self.rng
        self.now += rng.choice((0, 1, 5, -3))
        rng.choices(self.actions, self.weights)[0](self)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.once()

    def heal(self) -> None:
        """Faults are over and everybody finishes: every handoff ends, every page comes home, and a sequence as large as the pool fits."""
        for _ in range(6):
            for worker in list(self.model.workers.values()):
                if worker.fenced:
                    self.die(worker)
            self.join()
            self.settle()
        if self.model.texts:
            self.send(Step(close=list(self.model.texts)), 1)
        for healer in HEALERS:
            for command in healer(self):
                self.send(command, 1)
        for _ in range(4):
            self.settle()
        demand(not self.model.moves, f"handoffs that never ended: {self.model.moves}")
        state = self.manager.state
        for each in state.pools:
            counts = each.counts()
            demand(counts.free + counts.cached == counts.total, f"pool {each.name} at the end: {counts}")
        for pool in self.config.pools:
            reply = self.send(Step(opens=[Open([3] * (pool.num_pages * pool.page_size), pool.name, chunk=1 << 20)]), 1)
            demand(reply is not None and reply["opened"][0], f"pool {pool.name} at the end: {reply}")
        self.settle()
        for client in self.SCHEDULERS:
            self.send(Step(), client)
            delivered, expected = self.delivered.get(client, []), self.model.notices.get(client, [])
            demand(delivered == expected, f"notices of client {client}: {delivered}, expected {expected}")

    def settle(self) -> None:
        for worker in list(self.model.workers.values()):
            while worker.works or worker.chores:
                self.model.execute(worker, self.rng)
            for pull in worker.pulls.values():
                if pull.failed and not pull.aborted_at:
                    continue
                while pull.todo and not pull.aborted_at:
                    self.model.pull(worker, pull, self.rng)
                pull.todo.clear()
            self.ack(worker, eager=True)


def live_through(seed: int, steps: int) -> Driver:
    """A whole run. An error names the seed and the step that found it."""
    driver = None
    try:
        driver = Driver(seed)
        driver.run(steps)
        driver.heal()
    except Exception as error:
        error.add_note(f"seed {seed}, step {driver.steps if driver else 0} of {steps}")
        raise
    return driver
