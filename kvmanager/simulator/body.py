"""Body: a simulated worker process. A real `Replica`, a page memory of stamps, and a process's fate: stopped, killed, fenced.

It follows before it joins, as a real worker does; runs steps on the replica's tables, sequence by sequence; copies pages one by one;
acknowledges what the replica says. Whatever it reads is compared with the stamps of the sequence that it reads for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvmanager.errors import Fenced, KVError, ReplicaGap, StaleEpoch, StaleStep
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import Ack, Join
from kvmanager.machine.lives import first_version
from kvmanager.service import wire
from kvmanager.simulator.books import Broken, Chore, Work, Worker, demand
from kvmanager.simulator.caller import Caller
from kvmanager.simulator.model import Model
from kvmanager.simulator.world import Network, World
from kvmanager.worker.replica import AckContent, Pull, Replica

__all__ = ["Body"]

RENEW_US = 250_000
PATIENCE_US = 80_000  # nobody orders a step for this long: its scheduler is gone, the step is skipped
CHORE_US = 10_000
LAYERS, GARBAGE = 4, -1  # layers of a slot, told apart only in what is pulled early; what no token's stamp is


@dataclass
class _Ahead:
    """A step that is run before it is ordered: `stamp` goes into slot `length`; `read` is what was found before it, layer by layer."""

    handoff: int
    sequence: int
    pages: list[int]
    length: int
    stamp: int
    read: list[list[int]] = field(default_factory=list)


class Body:
    """pool, rank  its place: whoever comes after it there finds the same memory, as it was left"""

    def __init__(self, world: World, network: Network, model: Model, pool: int, rank: int, client: int, serve: Callable[..., None]) -> None:
        self.world, self.network, self.model = world, network, model
        self.pool, self.rank = pool, rank
        config = model.config.pools[pool]
        self.name = f"{config.name}{rank}"
        self.memory = model.memory(pool, self.name)
        self.caller = Caller(world, network, client, f"{self.name}.{client}", serve)
        self.replica = Replica(config.name)
        self.alive = True
        self.stopped = False
        self.joined: Worker | None = None  # as the books have it; None until the manager has answered
        self.loaded = False
        self.digest_at: Callable[[int, int], bytes | None] = lambda epoch, version: None
        self._catching_up = False
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # what waits for a process that is stopped or in a step
        self._frozen: list[tuple[Callable[..., None], tuple[Any, ...]]] = []  # what it would have gone on with
        self._orders: dict[int, list[int]] = {}
        self._running = 0  # the step in progress
        self._waiting_for = self._waiting_since = 0  # a step that waits for its order, and since when
        self._joined_at = 0
        self._page_us = world.rng.choice((300, 1_000, 30_000))  # to copy one page of a pull
        self.patience_us = world.rng.choice((0, 10_000, 40_000))  # to wait for an answer to its joining
        self._lives = 0  # of the manager's, that the replica has followed
        self._holes: dict[int, None] = {}  # sequences of which this worker left out a step: what it reads there is not its fault
        self._copies: dict[int, Pull] = {}
        self._streamed: dict[int, dict[int, np.ndarray]] = {}  # handoff -> target page -> what was pulled early, layer by layer
        self._flaky = world.rng.choice(
            (0, 0.5)
        )  # where pulls fail, those of further layers do in the first try: some layers are there already
        self._eager = world.rng.choice((0.5, 1, 1))  # to compute the next token of what is on its way here
        self.replica.pull_by_layers(LAYERS, world.rng.choice((0, 1, 2)))
        self._aheads: dict[int, _Ahead] = {}  # under way, by handoff
        self._results: dict[int, _Ahead] = {}  # by sequence
        self._tried: dict[int, None] = {}
        self._acking = False
        self._acked_at = world.now_us
        self._ask_hello()
        self._chores()

    # --- life ---

    def kill(self) -> None:
        """It touches nothing any more."""
        self.alive = False
        self.caller.die()
        if self.joined is not None:
            self.joined.works.clear()
            self.joined.chores.clear()
            self.joined.early.clear()
            self.joined.ahead.clear()
            for pull in [pull for pull in self.joined.pulls.values() if pull.todo]:
                del self.joined.pulls[pull.handoff]  # those that it has ended, it may have reported

    def has_hole(self, sequence: int) -> bool:
        """Whether it has left out a step of the sequence: it never says then that it is written to its end."""
        return sequence in self._holes or self.replica.has_hole(sequence)

    def stop(self) -> None:
        self.stopped = True

    def resume(self) -> None:
        """It goes on where it was, and then reads what has come meanwhile."""
        self.stopped = False
        frozen, self._frozen = self._frozen, []
        for call, args in frozen:
            if self.alive:
                call(*args)
        self._catch_up()

    def _busy(self) -> bool:
        return self.stopped or bool(self._running)

    def _catch_up(self) -> None:
        while self._inbox and self.alive and not self._busy():
            call, args = self._inbox.pop(0)
            call(*args)

    def receive(self, call: Callable[..., None], *args: Any) -> None:
        """A message for this process: taken in now, or once it can."""
        if self.alive:
            self._inbox.append((call, args))
            self._catch_up()

    def _later(self, delay_us: int, call: Callable[..., None], *args: Any) -> None:
        """The process goes on by itself; while it is stopped it does not."""

        def go_on() -> None:
            if self.alive:
                if self.stopped:
                    self._frozen.append((call, args))
                else:
                    call(*args)

        self.world.after(delay_us, go_on)

    def _chores(self) -> None:
        """Every now and then: what is due without a message."""
        if not self.alive:
            return
        if self.joined is not None and not self._busy() and not self.replica.stranded:
            if self.replica.step and self.world.now_us - self._waiting_since > PATIENCE_US:
                self._skip(self.replica.step)
            if self.world.now_us - self._acked_at > RENEW_US and not self._acking:
                self._send_ack(self.replica.renewal())
        self.world.after(CHORE_US, self._chores)

    # --- joining and following ---

    def _ask_hello(self) -> None:
        def answered(reply: dict[str, Any] | KVError) -> None:
            if not self.loaded and self.alive:  # until a publication has come, the subscription may not be live
                self.world.after(20_000, self._ask_hello)

        if self.alive and not self.loaded:
            self.caller.ask({"t": "hello"}, lambda reply: self.receive(answered, reply))

    def _synchronise(self) -> None:
        """Something is missing: ask for the batches, or for a snapshot if they are gone or the tables differ."""
        if not self._catching_up:
            self._catching_up = True
            self._ask_missing()

    def _ask_missing(self) -> None:
        replica = self.replica
        if not replica.epoch or replica.differs:
            self._ask_tables()
        else:
            body = {"t": "batches", "epoch": replica.epoch, "version": replica.known}
            self.caller.ask(body, lambda reply: self.receive(self._take_missing, reply))

    def _take_missing(self, reply: dict[str, Any] | KVError) -> None:
        try:
            if isinstance(reply, KVError):
                raise reply
            for data in reply["batches"]:
                self.replica.feed(data)
        except (ReplicaGap, StaleEpoch):
            self._ask_tables()
            return
        if reply["batches"]:
            self._ask_missing()
        else:
            self._catching_up = False
        self._look()

    def _ask_tables(self) -> None:
        self.caller.ask({"t": "tables"}, lambda reply: self.receive(self._load, reply))

    def _load(self, reply: dict[str, Any] | KVError) -> None:
        self._catching_up = False
        if isinstance(reply, KVError):
            raise Broken(f"{self.name}: tables refused: {reply}")
        self.replica.load(reply["tables"])
        self._skip_unheard()
        if not self.loaded:
            self.loaded = True
            self._ask_join()
        self._look()

    def _skip_unheard(self) -> None:
        """What a snapshot went past, and what was decided for this worker before it knew that it had joined."""
        replica, copies = self.replica, self.replica.copies()
        for work in list(self._works()):
            if work.version <= replica.version and work.version != replica.step:  # steps that it will never run
                self._holes[work.sequence] = None
                self._works().remove(work)
        for chore in self._chores_up_to(replica.version if copies is None else copies.version - 1):  # copies that it will never make
            self._holes[chore.sequences[0]] = None

    def _ask_join(self) -> None:
        def answered(reply: dict[str, Any] | KVError) -> None:
            if isinstance(reply, KVError):
                self.world.after(50_000, self._ask_join)  # the place is not free yet, or holds something
                return
            self._acked_at = self.world.now_us
            self.joined = self.model.workers.get(reply["worker"])
            if self.joined is None:  # declared dead before it heard of its birth
                self.kill()
                return
            self._joined_at = self.joined.acked
            self._skip_unheard()
            self.replica.joined(reply["worker"])
            self._look()

        if self.alive:
            pool = self.model.config.pools[self.pool]
            command = Join(self.name, pool.name, pool.layout, seen=1)
            self.caller.ask(command_to_wire(command), lambda reply: self.receive(answered, reply), self.patience_us)

    def published(self, topic: bytes, data: bytes) -> None:
        self.receive(self._take_in, topic, data)

    def _take_in(self, topic: bytes, data: bytes) -> None:
        if not self.loaded:
            self._synchronise()
            return
        if self._catching_up:
            return  # what has been asked for will be newer, or show the gap again
        try:
            if topic == wire.BATCH_TOPIC:
                self.replica.feed(data)
            else:
                self.replica.check(*wire.decode_heartbeat(data))
        except ReplicaGap as error:
            demand("differ" not in error.text, f"{self.name}: {error.text}")
            self._synchronise()
            return
        self._look()

    def _look(self) -> None:
        """Something has changed: is there a step to run, a page to copy, something to acknowledge?"""
        digest = self.digest_at(self.replica.epoch, self.replica.version)
        if digest is not None and digest != self.replica.tables.digest():
            raise Broken(f"{self.name}: tables at version {self.replica.version} differ from the manager's")
        if self.replica.stranded:
            self.kill()  # it drains and ends: nobody knows what is in its pages
            return
        if self.joined is not None and self._lives != len(self.replica.past):
            self._lives = len(self.replica.past)
            self._forget_lost()
        self._see_to_copies()
        if self.joined is None or self._busy():
            return
        if self.model.workers.get(self.joined.worker) is not self.joined:
            return  # its joining was lost with the end of the log: the next acknowledgement will tell
        while self.replica.step and self.replica.step <= self._joined_at:
            self._done_with(self.replica.step, [])  # it was somebody else's, before this worker joined
            self._see_to_copies()
        if self.replica.step and self._waiting_for != self.replica.step:
            self._waiting_for, self._waiting_since = self.replica.step, self.world.now_us
        if self.replica.step in self._orders and self.replica.ready(self.replica.step):
            self._run(self.replica.step)
        self._see_to_pulls()
        if not self._acking:
            content = self.replica.ack()
            if content is not None:
                self._send_ack(content)

    def _forget_lost(self) -> None:
        """What was to do at versions that it never heard of, because they were lost before they reached it."""
        lasts = list(self.replica.past.values())

        def lost(version: int) -> bool:
            return any(last < version < first_version(last) for last in lasts)

        if self.joined is not None and lasts:
            self.joined.works[:] = [work for work in self.joined.works if not lost(work.version)]
            self.joined.chores[:] = [chore for chore in self.joined.chores if not lost(chore.version)]

    # --- copies within the pool ---

    def _chores_up_to(self, version: int) -> list[Chore]:
        """Take these chores off the books."""
        if self.joined is None:
            return []
        done = [chore for chore in self.joined.chores if chore.version <= version]
        self.joined.chores = self.joined.chores[len(done) :]
        return done

    def _see_to_copies(self) -> None:
        """What the replica wants copied before it goes on, and what it has gone past."""
        while (copies := self.replica.copies()) is not None:
            self._go_past(self._chores_up_to(copies.version - 1))
            here = self._chores_up_to(copies.version)
            self._go_past(here)
            asked = sorted(zip(*(column.tolist() for column in copies[1:]), strict=True))
            known = sorted((chore.source, chore.target, len(chore.stamps)) for chore in here if chore.stamps)
            own = self.joined is not None and copies.version > self._joined_at
            demand(not own or asked == known, f"{self.name}: step {copies.version} copies {asked}, the books have {known}")
            self.replica.copied(copies.version)
        self._go_past(self._chores_up_to(self.replica.version))

    def _go_past(self, chores: list[Chore]) -> None:
        for chore in chores:
            hole = chore.sequences[-1] in self._holes
            if hole:
                self._holes[chore.sequences[0]] = None
            self.model.copy(self.name, self.memory, chore, hole=hole)

    # --- steps ---

    def _works(self) -> list[Work]:
        return self.joined.works if self.joined is not None else []

    def order(self, version: int, sequences: list[int]) -> None:
        """The scheduler says: run this step for these sequences."""
        self.receive(self._ordered, version, sequences)

    def _ordered(self, version: int, sequences: list[int]) -> None:
        if self.joined is None:
            return
        try:
            self.replica.ready(version)
        except (StaleStep, StaleEpoch):
            return
        self._orders[version] = sequences
        self._look()

    def _run(self, version: int) -> None:
        ids = self._orders.pop(version)
        for each in [each for each in self._orders if each < version]:
            del self._orders[each]
        rng = self.world.rng
        demand(self.replica.ready(version), f"{self.name}: step {version} is ready and is not")
        mine = {work.sequence: work for work in self._works() if work.version == version}
        demand(sorted(mine) == sorted(ids), f"{self.name}: step {version} is for {ids}, the books have {list(mine)}")
        if self.world.faults.happens("skip", rng):
            ids = ids[: rng.randrange(len(ids))]
        tables = self.replica.batch(version, ids)
        for row, sequence in enumerate(ids):
            got, work = (int(tables.lengths[row]), tables.pages_of(row).tolist()), mine[sequence]
            demand(got == (work.length, work.pages), f"{self.name}: step {version} of {sequence}: tables {got}, the books have {work}")
        self._running = version
        for place, sequence in enumerate(ids):
            if self.replica.ran_ahead(version, sequence):
                self._take_result(mine[sequence])
            else:
                self._later(200 * (place + 1), self._run_one, mine[sequence])
        if self.replica.streaming() and rng.random() < 0.7:
            self._later(200 * len(ids) + 100, self._tell_layers, version, ids, rng.randrange(1, LAYERS))
        self._later(200 * (len(ids) + 1) + int(rng.random() * 2000), self._finish, version, ids)

    def _run_one(self, work: Work) -> None:
        self.model.run(self.name, self.memory, work, hole=work.sequence in self._holes)

    def _tell_layers(self, version: int, ids: list[int], layers: int) -> None:
        """In the middle of a step: so much of it is there."""
        self.replica.layers_written(version, [each for each in ids if each not in self._holes], layers)
        if not self._acking and (content := self.replica.ack()) is not None:
            self._send_ack(content)

    def _finish(self, version: int, ids: list[int]) -> None:
        self._running = 0
        self._done_with(version, ids)
        self._look()
        self._catch_up()

    def _skip(self, version: int) -> None:
        self._done_with(version, [])
        self._look()

    def _done_with(self, version: int, ids: list[int]) -> None:
        for work in [work for work in self._works() if work.version == version]:
            if work.sequence not in ids:
                self._holes[work.sequence] = None
            self._works().remove(work)
        self.replica.finish(version, ids)

    # --- pulls ---

    def _see_to_pulls(self) -> None:
        for pull in self.replica.pulls():
            if pull.handoff not in self._copies:
                self._copies[pull.handoff] = pull
                books = self.joined.pulls.get(pull.handoff) if self.joined is not None else None
                if books is not None and books.failed:
                    books.begin_again()  # a snapshot came before the manager heard of it
                self.replica.begin_pull(pull.handoff)
                if self.joined is not None and (pull.early or pull.first_layer or pull.end_layer or pull.handoff in self._streamed):
                    self.joined.early[pull.handoff] = pull.target_pages.tolist()
                    self._streamed.setdefault(pull.handoff, {})
                    self.model.seen["pulled_early"] += pull.early
                self.replica.linked(pull.peer.worker, f"copy{self._page_us}", f"{self.name} from {pull.peer.name}")
                self._later(self._page_us, self._copy, pull, 0)
            if not pull.early and pull.handoff not in self._tried and self.joined is not None:
                self._tried[pull.handoff] = None
                if self.world.rng.random() < self._eager:
                    self._begin_ahead(pull.handoff, pull.sequence)
        self._drop_pulls()

    # --- running ahead ---

    def _begin_ahead(self, handoff: int, sequence: int) -> None:
        """The next token's step, before the sequence is here."""
        text, tables = self.model.texts.get(sequence), self.replica.begin_ahead(handoff)
        if tables is None:
            return
        length = int(tables.lengths[0]) - 1
        stamp = self.model.stamp_after(text, length) if text is not None and len(text.stamps) >= length else GARBAGE
        ahead = self._aheads[handoff] = _Ahead(handoff, sequence, tables.pages_of(0).tolist(), length, stamp)
        if self.joined is not None:
            self.joined.ahead[handoff] = ahead.pages
        self._later(200, self._go_ahead, ahead)

    def _go_ahead(self, ahead: _Ahead) -> None:
        """One layer, if it is there, then the next: all that the sequence has is read, and one slot written."""
        rng, replica, layer = self.world.rng, self.replica, len(ahead.read)
        over = bool(replica.spoiled(ahead.handoff)) or layer == LAYERS
        given_up = not over and rng.random() < 0.02
        if over or given_up:
            del self._aheads[ahead.handoff]
            if self.joined is not None:
                self.joined.ahead.pop(ahead.handoff, None)
            kept = replica.end_ahead(ahead.handoff, whole=not given_up)
            self.model.seen["ran_ahead" if kept else "ran_ahead_for_nothing"] += 1
            if kept:
                self._results[ahead.sequence] = ahead
            self._look()
            return
        if replica.layers_there(ahead.handoff) > layer:
            kept_apart = self._streamed.get(ahead.handoff, {})
            rows = [kept_apart[page][layer] if page in kept_apart else self.memory[page] for page in ahead.pages]
            ahead.read.append(np.concatenate(rows)[: ahead.length].tolist())
            place, slot = divmod(ahead.length, self.model.sizes[self.pool])
            page = ahead.pages[place]
            self.memory[page, slot] = ahead.stamp
            if page in kept_apart:
                layers = kept_apart[page]
                layers[layer, slot] = ahead.stamp
                self.memory[page, slot] = ahead.stamp if (layers[:, slot] == ahead.stamp).all() else GARBAGE
        self._later(50 + int(rng.random() * self._page_us), self._go_ahead, ahead)

    def _take_result(self, work: Work) -> None:
        """The step has been run already: what was read for it, layer by layer, has to be what is read now."""
        ahead = self._results.pop(work.sequence, None)
        if ahead is None:
            raise Broken(
                f"step {work.version} of sequence {work.sequence} on {self.name} has been run ahead, says the replica, and has not"
            )
        self.model.seen["ahead_taken"] += 1
        if work.sequence in self._holes:
            return
        if ahead.stamp != work.stamps[ahead.length]:
            self._run_one(work)  # another token was chosen: as a worker that compares it
            return
        wanted = work.stamps[: work.start]
        for layer, got in enumerate(ahead.read):
            if work.start != ahead.length or got != wanted:
                raise Broken(
                    f"step {work.version} of sequence {work.sequence} on {self.name} is what was computed ahead for handoff {ahead.handoff}, "
                    f"which read {got[:4]} of {ahead.length} tokens in layer {layer}, not its own {wanted[:4]} of {work.start}"
                )

    def _copy(self, pull: Pull, at: int) -> None:
        """One page, then the next."""
        ongoing = any(each.handoff == pull.handoff and each.early >= pull.early for each in self.replica.pulls())
        books = self.joined.pulls.get(pull.handoff) if self.joined is not None else None
        failed = self._fails(pull, at)
        if not ongoing or failed or at == len(pull.target_pages):
            del self._copies[pull.handoff]
            if self.joined is not None:
                self.joined.early.pop(pull.handoff, None)
            if failed and ongoing:
                if pull.handoff not in self._tried:
                    self._streamed.pop(pull.handoff, None)
                if books is not None and not pull.early:
                    books.fail()
                self.replica.pull_failed(pull.handoff, "sums differ")
            else:
                if books is not None and at == len(pull.target_pages):
                    self._count_streamed(books)
                self.replica.pulled(pull.handoff)
            self._look()
            return
        if pull.handoff in self._streamed:
            self._copy_layers(pull, at)
        target = int(pull.target_pages[at])
        item = next((item for item in books.todo if item.target == target), None) if books is not None else None
        if books is not None and item is not None and not pull.early:
            pages, slots = _where(pull, at)
            read = books.source[pages, slots]
            got, stamps, whole = read[: len(item.stamps)].tolist(), item.stamps, item.pages
            if pull.handoff in self._streamed:  # a piece may end before the page does
                stamps, whole = stamps[: len(read)], whole[: len(dict.fromkeys(pages.tolist()))]
            # Once aborted, the source may die and be somebody else's: what is copied then is never used.
            demand(
                books.aborted_at or (list(dict.fromkeys(pages.tolist())) == whole and got == stamps),
                f"handoff {pull.handoff}: {self.name} pulled pages {pages} and read {got[:4]}, not {stamps[:4]}",
            )
            if pull.handoff not in self._streamed:
                self.memory[target, : len(read)] = read
                books.todo.remove(item)
        self._later(int(self.world.rng.random() * self._page_us), self._copy, pull, at + 1)

    def _fails(self, pull: Pull, at: int) -> bool:
        faults, rng = self.world.faults, self.world.rng
        often = at == 0 and pull.first_layer > 0 and not pull.early and not pull.attempt and faults.active_now("skip")
        return faults.happens("skip", rng) or (often and rng.random() < self._flaky)

    def _copy_layers(self, pull: Pull, at: int) -> None:
        """A page of a piece of a streamed handoff, which may be of some layers only: a slot is whole if all its layers are of one token."""
        assert self.joined is not None
        peer = self.model.workers.get(pull.peer.worker)
        if peer is not None:
            (pages, slots), target = _where(pull, at), int(pull.target_pages[at])
            first, end = pull.layers(LAYERS)
            layers = self._streamed[pull.handoff].setdefault(target, np.full((LAYERS, len(self.memory[target])), GARBAGE))
            layers[first:end, : len(pages)] = peer.memory[pages, slots]
            self.memory[target] = np.where((layers == layers[0]).all(axis=0), layers[0], GARBAGE)

    def _count_streamed(self, books: Any) -> None:
        """What has arrived piece by piece is not to be pulled any more, once it is right."""
        for item in [item for item in books.todo if item.target in self._streamed.get(books.handoff, {})]:
            if self.memory[item.target, : len(item.stamps)].tolist() == item.stamps:
                books.todo.remove(item)

    def _drop_pulls(self) -> None:
        """Aborted pulls that this process has heard of and does not carry out any more."""
        if self.joined is not None:
            wanted = {pull.handoff for pull in self.replica.pulls()}
            for pull in list(self.joined.pulls.values()):
                heard = pull.aborted_at and self.replica.version >= pull.aborted_at
                if heard and pull.handoff not in wanted and pull.handoff not in self._copies:
                    del self.joined.pulls[pull.handoff]

    # --- acknowledgements ---

    def _send_ack(self, content: AckContent) -> None:
        assert self.joined is not None
        self._acking, self._acked_at = True, self.world.now_us
        ack = Ack(
            self.joined.worker, content.version, content.ids, content.tokens, content.pulled, content.epoch, content.as_of, content.failed,
            content.layers, content.links,
        )  # fmt: skip
        command = command_to_wire(ack)
        self.caller.ask(command, lambda reply: self.receive(self._ack_answered, reply))

    def _ack_answered(self, reply: dict[str, Any] | KVError) -> None:
        self._acking = False
        if isinstance(reply, (Fenced, StaleEpoch)):
            self.kill()  # it ends itself; whoever watches over it says so
            return
        demand(not isinstance(reply, KVError), f"acknowledgement of {self.name} refused: {reply}")
        self._look()


def _where(pull: Pull, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Pages and slots of the source that target page `at` of a pull is made of: whole pages of one size, else as many tokens as it says."""
    theirs, ours = pull.source_page_size, pull.target_page_size
    if theirs == ours:
        return np.full(ours, pull.source_pages[at]), np.arange(ours)
    place = pull.source_skip + np.arange(at * ours, min((at + 1) * ours, pull.tokens))
    return pull.source_pages[place // theirs], place % theirs
