"""A driver that lives through random days of a manager, and a model of what must be true, made of dicts and lists.

The model reads the event stream as a worker would and keeps its own tables, owners, index and clocks; it shares no code with the state
machine. Beside it every worker has a page memory: one stamp a token slot, standing for (tenant, extra, all tokens up to here). Steps are
executed later than they were decided, in any order that a sequence's own steps allow, on the tables of the version that decided them;
pulls go page by page. So a page that is handed out too early is seen twice: by the books at once, by a wrong stamp when somebody reads.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np

from kvmanager import events as ev
from kvmanager.apply import apply
from kvmanager.commands import Ack, Command, Join, Open, Step, Tick, WorkerGone
from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.decide import decide
from kvmanager.errors import KVError
from kvmanager.events import decode_batch, encode_batch
from kvmanager.manager import KVManager, new_state
from kvmanager.snapshot import load_snapshot, snapshot, state_digest
from kvmanager.state import State

PAGE = 16
LEASE_MS = 1000


class Broken(AssertionError):
    """The model and the manager disagree."""


def demand(condition: object, text: str) -> None:
    if not condition:
        raise Broken(text)


class Stamps:
    """A number for each (tenant, extra, tokens up to here): equal if and only if all of it is."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Any, ...], int] = {}

    def root(self, tenant: bytes, extra: bytes) -> int:
        return self._numbers.setdefault((tenant, extra), len(self._numbers) + 1)

    def after(self, stamp: int, token: int) -> int:
        return self._numbers.setdefault((stamp, token), len(self._numbers) + 1)


@dataclass
class Text:
    """One sequence as its author knows it. `stamps[i]` is what slot i of its pages must hold."""

    sequence: int
    owner: int
    pool: int
    tokens: list[int]
    stamps: list[int]
    known: int  # leading tokens whose ids the manager has been told
    length: int = 0
    pages: list[int] = field(default_factory=list)
    handoff: int = 0


@dataclass
class Work:
    """One step's share of one sequence: read [0, start), write [start, length), on the tables of `version`."""

    version: int
    sequence: int
    start: int
    length: int
    pages: list[int]
    stamps: list[int]


@dataclass
class Pull:
    handoff: int
    source_pool: int
    source: np.ndarray
    todo: list[tuple[int, int, list[int]]]  # source page, target page, stamps
    aborted_at: int = 0
    reported: bool = False


@dataclass
class Worker:
    worker: int
    name: str
    pool: int
    memory: np.ndarray
    acked: int
    fenced: bool = False
    works: list[Work] = field(default_factory=list)
    pulls: dict[int, Pull] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)  # sequence -> tokens written

    def may_ack(self, newest: int) -> int:
        """The newest version that this worker can truthfully acknowledge."""
        bound = newest
        for work in self.works:
            bound = min(bound, work.version - 1)
        for pull in self.pulls.values():
            if pull.aborted_at and pull.todo:  # it has not stopped yet, so it has not seen the abort
                bound = min(bound, pull.aborted_at - 1)
        return bound


@dataclass
class Move:
    """A handoff as the event stream tells it."""

    handoff: int
    sequence: int
    source: int
    target: int
    state: str = "prefilling"
    source_pages: list[int] = field(default_factory=list)
    target_pages: list[int] = field(default_factory=list)


class Model:
    """Books kept from the event stream alone, and the memories of all workers."""

    def __init__(self, config: ManagerConfig) -> None:
        self.config = config
        self.stamps = Stamps()
        self.texts: dict[int, Text] = {}
        self.moves: dict[int, Move] = {}
        self.workers: dict[int, Worker] = {}
        self.memories: dict[tuple[int, str], np.ndarray] = {}
        # stamp of a page's last slot -> (page id, stamp of the page before it)
        self.index: list[dict[int, tuple[int, int]]] = [{} for _ in config.pools]
        self.dropped: list[dict[int, int]] = [{} for _ in config.pools]  # page -> version in which its last owner let go
        self.last_grow: list[tuple[int, int]] = []
        self.notices: dict[int, list[tuple[str, int, int]]] = {}
        self.seen: Counter[str] = Counter()
        self.version = 1

    # --- questions ---

    def owners(self, pool: int) -> Counter[int]:
        count: Counter[int] = Counter()
        for text in self.texts.values():
            if text.pool == pool:
                count.update(text.pages)
        for move in self.moves.values():
            if move.source == pool:
                count.update(move.source_pages)
            if move.target == pool:
                count.update(move.target_pages)
        return count

    def crew(self, pool: int, fenced: bool = False) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.pool == pool and (fenced or not worker.fenced)]

    def indexed_run(self, index: dict[int, tuple[int, int]], stamps: list[int], pages_max: int) -> list[int]:
        run: list[int] = []
        while len(run) < pages_max and (len(run) + 1) * PAGE <= len(stamps):
            found = index.get(stamps[(len(run) + 1) * PAGE - 1])
            if found is None:
                break
            run.append(found[0])
        return run

    # --- checks ---

    def check_content(self, pool: int, pages: list[int], stamps: list[int], what: str) -> None:
        """Every live worker of the pool holds exactly these stamps in these pages."""
        for worker in self.crew(pool):
            for place, page in enumerate(pages):
                expected = stamps[place * PAGE : (place + 1) * PAGE]
                got = worker.memory[page, : len(expected)].tolist()
                demand(got == expected, f"{what}: pool {pool}, page {page} of {worker.name} holds {got[:4]}, not {expected[:4]}")

    def take(self, pool: int, pages: list[int], what: str) -> None:
        """Pages are handed out: nobody may own them, find them, or still be reading or writing them."""
        owners = self.owners(pool)
        indexed = {page for page, _ in self.index[pool].values()}
        demand(len(set(pages)) == len(pages), f"{what}: pages {pages} handed out twice at once")
        for page in pages:
            demand(not owners[page], f"{what}: page {page} of pool {pool} has {owners[page]} owners")
            demand(page not in indexed, f"{what}: page {page} of pool {pool} is in the index")
            self.check_drained(pool, page, what)

    def check_drained(self, pool: int, page: int, what: str) -> None:
        freed = self.dropped[pool].get(page, 0)
        for worker in self.crew(pool, fenced=True):
            demand(worker.acked >= freed, f"{what}: page {page} freed in {freed}, {worker.name} acknowledged {worker.acked}")
            for work in worker.works:
                demand(page not in work.pages, f"{what}: {worker.name} still has step {work.version} in flight on page {page}")
            for pull in worker.pulls.values():
                demand(page not in [item[1] for item in pull.todo], f"{what}: {worker.name} still pulls into page {page}")
        for worker in self.workers.values():
            for pull in worker.pulls.values():
                if pull.source_pool == pool:
                    demand(page not in [item[0] for item in pull.todo], f"{what}: {worker.name} still pulls from page {page}")

    def let_go(self, pool: int, pages: list[int]) -> None:
        owners = self.owners(pool)
        for page in pages:
            if not owners[page]:
                self.dropped[pool][page] = self.version

    def tell(self, owner: int, kind: str, sequence: int, handoff: int) -> None:
        self.notices.setdefault(owner, []).append((kind, sequence, handoff))

    # --- the event stream ---

    def read(self, batch: ev.EventBatch, opened: dict[int, tuple[Open, int]]) -> None:
        """Follow one batch. `opened`: sequence id -> (what was asked for, by whom)."""
        self.version = batch.version
        starts: dict[int, int] = {}
        visible = [dict(index) for index in self.index]  # what the decision could see: pages published by this batch come after it
        for event in batch.events:
            self.seen[type(event).__name__] += 1
            handler = getattr(self, f"_{type(event).__name__}", None)
            if handler is not None:
                handler(event, starts=starts, visible=visible, opened=opened)
        for sequence, start in starts.items():
            text = self.texts[sequence]
            for worker in self.crew(text.pool):
                worker.works.append(Work(self.version, sequence, start, text.length, list(text.pages), text.stamps))

    def _SequenceOpened(self, event: ev.SequenceOpened, starts: Any, visible: Any, opened: Any) -> None:
        asked, owner = opened[event.sequence]
        tokens = asked.tokens.tolist()
        stamp, stamps = self.stamps.root(asked.tenant, asked.extra), []
        for token in tokens:
            stamps.append(stamp := self.stamps.after(stamp, token))
        cached, fresh = event.cached.tolist(), event.fresh.tolist()
        run = self.indexed_run(visible[event.pool], stamps, (len(tokens) - 1) // PAGE)
        demand(cached == run, f"open {event.sequence}: cached pages {cached}, the model finds {run}")
        self.check_content(event.pool, cached, stamps[: len(cached) * PAGE], f"open {event.sequence}")
        self.take(event.pool, fresh, f"open {event.sequence}")
        text = Text(event.sequence, owner, event.pool, tokens, stamps, len(tokens), event.length, cached + fresh)
        demand(event.sequence not in self.texts, f"sequence id {event.sequence} given twice")
        demand(len(text.pages) == -(-event.length // PAGE), f"open {event.sequence}: {len(text.pages)} pages for {event.length} tokens")
        self.texts[event.sequence] = text
        self.seen["cached"] += bool(cached)
        if event.length > len(cached) * PAGE:
            starts[event.sequence] = len(cached) * PAGE

    def _grow(self, sequence: int, count: int, pages: list[int], starts: dict[int, int]) -> None:
        text = self.texts[sequence]
        move = self.moves.get(text.handoff)
        demand(move is None or move.state == "prefilling", f"sequence {sequence} grew while it was handed off")
        self.take(text.pool, pages, f"grow {sequence}")
        starts[sequence] = text.length
        text.length += count
        text.pages = text.pages + pages
        demand(len(text.pages) == -(-text.length // PAGE), f"grow {sequence}: {len(text.pages)} pages for {text.length} tokens")
        self.write_on(text, text.length)

    def write_on(self, text: Text, length: int) -> None:
        """The author goes on: tokens that the manager learns of later, or never. Few letters, so that authors write the same."""
        while len(text.tokens) < length:
            text.tokens.append(text.stamps[-1] * 7 // 3 % 2 + 1)
            text.stamps.append(self.stamps.after(text.stamps[-1], text.tokens[-1]))

    def _SequencesGrown(self, event: ev.SequencesGrown, starts: Any, **_: Any) -> None:
        self.last_grow, at = [], 0
        for sequence, count, page_count in zip(event.ids.tolist(), event.counts.tolist(), event.page_counts.tolist(), strict=True):
            self._grow(sequence, count, event.pages[at : at + page_count].tolist(), starts)
            self.last_grow.append((sequence, count))
            at += page_count

    def _GrownAgain(self, event: ev.GrownAgain, starts: Any, **_: Any) -> None:
        for sequence, count in self.last_grow:
            self._grow(sequence, count, [], starts)

    def _TokensAppended(self, event: ev.TokensAppended, **_: Any) -> None:
        text = self.texts[event.sequence]
        told = event.tokens.tolist()
        demand(text.tokens[text.known : text.known + len(told)] == told, f"tokens of {event.sequence} arrived changed")
        text.known += len(told)

    def _PagesPublished(self, event: ev.PagesPublished, **_: Any) -> None:
        text, pages = self.texts[event.sequence], event.pages.tolist()
        index = self.index[text.pool]
        last = event.first + len(pages)
        demand(last * PAGE <= min(text.known, text.length), f"publish {event.sequence}: page {last - 1} is not known to its end")
        before = text.pages[event.first : last]
        for place, page in enumerate(pages, event.first):
            stamp, above = text.stamps[(place + 1) * PAGE - 1], text.stamps[place * PAGE - 1] if place else 0
            found = index.setdefault(stamp, (page, above))
            demand(found[0] == page, f"publish {event.sequence}: page {page} where the index has {found[0]}")
            if page != before[place - event.first]:
                self.seen["deduplicated"] += 1
        text.pages = text.pages[: event.first] + pages + text.pages[last:]
        self.let_go(text.pool, before)
        self.check_content(text.pool, text.pages[:last], text.stamps[: last * PAGE], f"publish {event.sequence}")

    def _SequenceClosed(self, event: ev.SequenceClosed, **_: Any) -> None:
        text = self.texts.pop(event.sequence)
        self.let_go(text.pool, text.pages)
        if event.reason == 1:
            self.tell(text.owner, "lost", event.sequence, 0)

    def _PagesEvicted(self, event: ev.PagesEvicted, visible: Any, **_: Any) -> None:
        owners = self.owners(event.pool)
        index = self.index[event.pool]
        for page in event.pages.tolist():
            stamp = next((stamp for stamp, (each, _) in index.items() if each == page), None)
            demand(stamp is not None, f"evict: page {page} is not in the index")
            demand(not owners[page], f"evict: page {page} has {owners[page]} owners")
            demand(all(above != stamp for _, above in index.values()), f"evict: page {page} went before a page that continues it")
            self.check_drained(event.pool, page, "evict")
            del index[stamp]
            visible[event.pool].pop(stamp, None)

    def _IndexDropped(self, event: ev.IndexDropped, visible: Any, **_: Any) -> None:
        self.index[event.pool].clear()
        visible[event.pool].clear()

    def _WorkerJoined(self, event: ev.WorkerJoined, **_: Any) -> None:
        pool = self.config.pools[event.pool]
        # The same place comes back with the same memory, as it was left: whatever is read without being written first is garbage.
        memory = self.memories.setdefault((event.pool, event.name), np.zeros((pool.num_pages, PAGE), np.int64))
        self.workers[event.worker] = Worker(event.worker, event.name, event.pool, memory, self.version)

    def _WorkerAcked(self, event: ev.WorkerAcked, **_: Any) -> None:
        worker = self.workers[event.worker]
        demand(not worker.fenced, f"{worker.name} is fenced and its word was taken")
        worker.acked = max(worker.acked, event.version)

    def _WorkerFenced(self, event: ev.WorkerFenced, **_: Any) -> None:
        self.workers[event.worker].fenced = True
        self.check_lost(self.workers[event.worker].pool)

    def _WorkerDead(self, event: ev.WorkerDead, **_: Any) -> None:
        worker = self.workers.pop(event.worker)
        if not worker.fenced:
            self.check_lost(worker.pool)

    def check_lost(self, pool: int) -> None:
        demand(not self.index[pool], f"pool {pool} lost its memory and its index is not empty")
        demand(all(text.pool != pool for text in self.texts.values()), f"pool {pool} lost its memory and has open sequences")

    def _HandoffBegun(self, event: ev.HandoffBegun, **_: Any) -> None:
        text = self.texts[event.sequence]
        demand(not text.handoff, f"sequence {event.sequence} in two handoffs")
        text.handoff = event.handoff
        self.moves[event.handoff] = Move(event.handoff, event.sequence, text.pool, event.target)

    def _HandoffSealed(self, event: ev.HandoffSealed, **_: Any) -> None:
        move = self.moves[event.handoff]
        demand(move.state == "prefilling", f"handoff {event.handoff} sealed while {move.state}")
        move.state = "sealed"
        text = self.texts[move.sequence]
        self.check_content(move.source, text.pages, text.stamps[: text.length], f"seal {event.handoff}")

    def _HandoffReserving(self, event: ev.HandoffReserving, **_: Any) -> None:
        move = self.moves[event.handoff]
        demand(move.state == "sealed", f"handoff {event.handoff} reserving while {move.state}")
        move.state = "reserving"

    def _HandoffMoving(self, event: ev.HandoffMoving, visible: Any, **_: Any) -> None:
        move = self.moves[event.handoff]
        demand(move.state in ("sealed", "reserving"), f"handoff {event.handoff} moving while {move.state}")
        text = self.texts[move.sequence]
        shared, fresh = event.shared.tolist(), event.fresh.tolist()
        run = self.indexed_run(visible[move.target], text.stamps[: min(text.known, text.length)], text.length // PAGE)
        demand(shared == run, f"handoff {event.handoff}: shared pages {shared}, the model finds {run}")
        demand(
            len(shared) + len(fresh) == len(text.pages), f"handoff {event.handoff}: {len(shared) + len(fresh)} of {len(text.pages)} pages"
        )
        self.check_content(move.target, shared, text.stamps[: len(shared) * PAGE], f"handoff {event.handoff}")
        self.take(move.target, fresh, f"handoff {event.handoff}")
        move.state, move.source_pages, move.target_pages = "moving", list(text.pages), shared + fresh
        sources = self.crew(move.source)
        for rank, worker in enumerate(self.crew(move.target)):
            todo = [
                (text.pages[place], page, text.stamps[place * PAGE : min((place + 1) * PAGE, text.length)])
                for place, page in enumerate(fresh, len(shared))
            ]
            worker.pulls[event.handoff] = Pull(event.handoff, move.source, sources[rank % len(sources)].memory, todo)
        self.seen["moving_shared"] += bool(shared)

    def _HandoffPulled(self, event: ev.HandoffPulled, **_: Any) -> None:
        pull = self.workers[event.worker].pulls.get(event.handoff)
        demand(pull is not None and not pull.todo, f"handoff {event.handoff}: pulled, says the log, but {event.worker} has not")

    def _HandoffResident(self, event: ev.HandoffResident, **_: Any) -> None:
        move = self.moves.pop(event.handoff)
        demand(move.state == "moving", f"handoff {event.handoff} resident while {move.state}")
        text = self.texts[move.sequence]
        left = text.pages
        text.pool, text.pages, text.handoff = move.target, move.target_pages, 0
        self.let_go(move.source, left)
        for worker in self.crew(move.target, fenced=True):
            pull = worker.pulls.pop(event.handoff)
            demand(not pull.todo, f"handoff {event.handoff}: resident before {worker.name} had all pages")
            worker.done[move.sequence] = text.length
        self.check_content(move.target, text.pages, text.stamps[: text.length], f"resident {event.handoff}")
        self.tell(text.owner, "resident", move.sequence, event.handoff)

    def _HandoffAborted(self, event: ev.HandoffAborted, **_: Any) -> None:
        move = self.moves[event.handoff]
        demand(move.state != "aborted", f"handoff {event.handoff} aborted twice")
        text = self.texts[move.sequence]
        text.handoff = 0
        self.seen[f"aborted_{move.state}"] += 1
        if move.state == "moving":
            pages, move.target_pages, move.state = move.target_pages, [], "aborted"
            self.let_go(move.target, pages)
            for worker in self.workers.values():
                if event.handoff in worker.pulls:
                    worker.pulls[event.handoff].aborted_at = self.version
        else:
            del self.moves[event.handoff]
        self.tell(text.owner, "aborted", move.sequence, event.handoff)

    def _HandoffEnded(self, event: ev.HandoffEnded, **_: Any) -> None:
        move = self.moves.pop(event.handoff)
        demand(move.state == "aborted", f"handoff {event.handoff} ended while {move.state}")
        for worker in self.workers.values():
            pull = worker.pulls.get(event.handoff)
            demand(pull is None or not pull.todo, f"handoff {event.handoff} ended while {worker.name} was pulling")
        self.let_go(move.source, move.source_pages)

    # --- comparison with the manager ---

    def compare(self, state: State) -> None:
        demand(list(state.sequences) == list(self.texts), f"open sequences {list(state.sequences)}, the model has {list(self.texts)}")
        for sequence, text in self.texts.items():
            row = state.tables.row(sequence)
            got = (int(state.tables.pools[row]), state.tables.length(sequence), state.tables.pages_of(sequence).tolist())
            demand(got == (text.pool, text.length, text.pages), f"sequence {sequence}: {got}, the model has {text}")
        for number, pool in enumerate(state.pools):
            owners, indexed = self.owners(number), {page for page, _ in self.index[number].values()}
            used = sum(count > 0 for count in owners.values())
            cached = sum(not owners[page] for page in indexed)
            counts = pool.counts()
            acked = min((worker.acked for worker in self.crew(number, fenced=True)), default=self.version)
            held = sum(freed > acked and not owners[page] and page not in indexed for page, freed in self.dropped[number].items())
            demand(counts.quarantined >= held, f"pool {pool.name}: {counts}, the model has {held} freed after the last acknowledgement")
            demand(
                (counts.used, counts.cached) == (used, cached), f"pool {pool.name}: {counts}, the model has {used} used, {cached} cached"
            )
            demand(counts.free + counts.used + counts.cached + counts.quarantined == pool.num_pages, f"pool {pool.name}: {counts}")

    # --- workers at work ---

    def execute(self, worker: Worker, rng: random.Random) -> None:
        """One step's share of one sequence: whichever may go, in no order but the sequence's own."""
        first: dict[int, Work] = {}
        for work in worker.works:
            first.setdefault(work.sequence, work)
        work = rng.choice(list(first.values()))
        worker.works.remove(work)
        pages = np.array(work.pages, np.int64)
        slots = np.arange(work.length)
        there = pages[slots // PAGE], slots % PAGE
        stamps = np.array(work.stamps[: work.length])
        read = worker.memory[there][: work.start]
        if not np.array_equal(read, stamps[: work.start]):
            slot = int(np.argmax(read != stamps[: work.start]))
            raise Broken(
                f"step {work.version} of sequence {work.sequence} on {worker.name} read {read[slot]} in slot {slot}, "
                f"page {work.pages[slot // PAGE]}, not its own {stamps[slot]}"
            )
        worker.memory[there[0][work.start :], there[1][work.start :]] = stamps[work.start :]
        worker.done[work.sequence] = work.length

    def pull(self, worker: Worker, pull: Pull, rng: random.Random) -> None:
        source, target, stamps = pull.todo.pop(rng.randrange(len(pull.todo)))
        got = pull.source[source, : len(stamps)].tolist()
        if got != stamps:
            raise Broken(f"handoff {pull.handoff}: {worker.name} pulled page {source} and read {got[:4]}, not {stamps[:4]}")
        worker.memory[target] = pull.source[source]


class Driver:
    """Draws a manager, then commands for it, from one seed; checks everything after every one."""

    SCHEDULERS = (1, 2)

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.seed = seed
        pools = tuple(
            PoolConfig(name, rng.randint(5, 12), page_size=PAGE, workers=rng.choice((1, 2)))
            for name in ("A", "B", "C")[: rng.choice((2, 2, 3))]
        )
        self.config = ManagerConfig(pools=pools, sequences_max=rng.choice((5, 8, 12)), handoffs_max=rng.choice((2, 6)), lease_ms=LEASE_MS)
        self.now = 1000
        self.manager = KVManager(self.config, clock=lambda: self.now, checked=True)
        self.received: list[tuple[ev.EventBatch, bytes]] = []
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
        faults = {"late": rng.choice((0, 0.3, 1)), "die": rng.choice((0, 0.2, 1)), "bury": 3, "join": 4, "repeat": 2, "tick": 2}
        rates = {"step": 30, "work": rng.choice((5, 15, 30)), "ack": rng.choice((12, 20, 35)), **faults}
        self.actions, self.weights = list(rates), list(rates.values())
        self.close_rate, self.hand_off_rate = rng.choice((0.05, 0.15, 0.3)), rng.choice((0.02, 0.1, 0.3))
        self.abort_rate, self.open_counts = rng.choice((0.01, 0.1)), rng.choice(((0, 0, 1), (0, 1, 1, 2, 3)))
        for pool in pools:
            for rank in range(pool.workers):
                self.send(Join(f"{pool.name}{rank}", pool.name, "layout"), 100)

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
        opened = {}
        if isinstance(command, Step):
            for asked, made in zip(command.opens, reply.get("opened", []), strict=True):
                if made:
                    opened[made[0]] = asked, client
        self.model.read(batch, opened)
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

    # --- what may happen ---

    def prompt(self) -> list[int]:
        rng = self.rng
        document = rng.choice(self.documents)
        pages = rng.choice((0, 1, 1, 2, 2, 3, 4))
        length = max(1, pages * PAGE + rng.choice((-1, 0, 0, 1, 1, 7)))
        return document[:length] + [rng.choice((1, 2)) for _ in range(rng.choice((0, 0, 0, 1, PAGE)))]

    def open(self) -> Open:
        rng = self.rng
        pool = rng.choice(self.config.pools).name
        chunk = rng.choice((0, 5, PAGE, 100, 100, 100))
        return Open(self.prompt(), pool, tenant=rng.choice((b"red", b"blue")), extra=rng.choice((b"",) * 7 + (b"lora",)), chunk=chunk)

    def step(self) -> None:
        rng, texts = self.rng, self.model.texts
        ids = list(texts)
        close = [each for each in ids if rng.random() < self.close_rate]
        growing, counts = self.last_grow
        if rng.random() < 0.5 or not growing or not set(growing) <= set(ids):
            growing = [
                each for each, text in texts.items() if rng.random() < (0.1 if text.handoff else 0.6)
            ]  # seals come when growth stops
            rng.shuffle(growing)
            counts = [rng.choice((1, 1, 1, 1, 1, 1, 3, 20)) for _ in growing]
            if rng.random() < 0.02:
                growing, counts = [*growing, 12345 << 20], [*counts, 1]
            self.last_grow = growing, counts
        tokens = []
        for text in texts.values():
            if text.known < len(text.tokens) and rng.random() < 0.4:
                tokens.append((text.sequence, text.tokens[text.known : text.known + rng.choice((1, 4, 100))]))
        hand_off = [(each, rng.choice(self.config.pools).name) for each in ids if rng.random() < self.hand_off_rate]
        abort = [each for each in self.model.moves if rng.random() < self.abort_rate]
        opens = [self.open() for _ in range(rng.choice(self.open_counts))]
        if opens and rng.random() < 0.3:
            opens.append(opens[0])  # the same prompt twice at once
        self.send(
            Step(opens=opens, grow=growing, grow_counts=counts, close=close, tokens=tokens, hand_off=hand_off, abort=abort),
            rng.choice(self.SCHEDULERS),
        )

    def work(self, most: int = 4) -> None:
        rng = self.rng
        for worker in list(self.model.workers.values()):
            for _ in range(rng.randint(0, most)):
                if worker.works:
                    self.model.execute(worker, rng)
            for pull in list(worker.pulls.values()):
                if pull.aborted_at and rng.random() < 0.4:
                    pull.todo.clear()  # it has seen the abort and stops; what it pulled so far is of no use
                elif pull.todo and rng.random() < 0.7:
                    self.model.pull(worker, pull, rng)

    def ack(self, worker: Worker, eager: bool = False) -> None:
        rng = self.rng
        newest = worker.may_ack(self.manager.state.version)
        version = newest if eager or rng.random() < 0.6 else rng.randint(0, newest)
        told = [(each, tokens) for each, tokens in worker.done.items() if eager or rng.random() < 0.8]
        if not eager:
            told = [(each, tokens if rng.random() < 0.8 else rng.randint(0, tokens)) for each, tokens in told]
        pulled = [pull.handoff for pull in worker.pulls.values() if not pull.todo and (eager or rng.random() < 0.7)]
        if not eager and rng.random() < 0.1:
            pulled += [rng.randint(1, 50) + 10_000, *(each for each in self.model.moves if each not in worker.pulls)]
        reply = self.send(
            Ack(worker.worker, version, [each for each, _ in told], [tokens for _, tokens in told], pulled), 100 + worker.worker
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
                    self.send(Join(f"{pool.name}{rank}", pool.name, "layout"), 100)

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
        action = rng.choices(self.actions, self.weights)[0]
        if action == "step":
            self.step()
        elif action == "work":
            self.work()
        elif action == "ack":
            self.work(3)
            for worker in rng.sample(list(self.model.workers.values()), rng.randint(0, len(self.model.workers))):
                if worker.worker in self.model.workers:
                    self.ack(worker)
        elif action == "join":
            self.join()
        elif action == "repeat":
            self.repeat()
        elif action == "tick":
            self.tick(rng.choice((1, 1, 50, 300)))
        elif action == "late":
            self.tick(rng.choice((600, 1500)))
        elif action == "die":
            self.die()
        else:
            zombies = [worker for worker in self.model.workers.values() if worker.fenced]
            if zombies:
                self.die(rng.choice(zombies))

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
        for _ in range(4):
            self.settle()
        demand(not self.model.moves, f"handoffs that never ended: {self.model.moves}")
        state = self.manager.state
        for pool in state.pools:
            counts = pool.counts()
            demand(counts.free + counts.cached == counts.total, f"pool {pool.name} at the end: {counts}")
        for pool in self.config.pools:
            reply = self.send(Step(opens=[Open([3] * (pool.num_pages * PAGE), pool.name, chunk=1 << 20)]), 1)
            demand(reply is not None and reply["opened"][0], f"pool {pool.name} at the end: {reply}")
        self.settle()
        for client in self.SCHEDULERS:
            self.send(Step(), client)
            delivered, expected = self.delivered.get(client, []), self.model.notices.get(client, [])
            demand(delivered == expected, f"notices of client {client}: {delivered}, expected {expected}")

    def settle(self) -> None:
        for worker in list(self.model.workers.values()):
            while worker.works:
                self.model.execute(worker, self.rng)
            for pull in worker.pulls.values():
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


__all__ = ["PAGE", "Broken", "Driver", "Model", "live_through"]
