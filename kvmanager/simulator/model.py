"""Model: books kept from the event stream alone, and the memories of all workers. It shares no code with the state machine.

What each event does to the books is in `operations`, beside how its command is drawn.
"""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kvmanager.config import ManagerConfig
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.state import State
from kvmanager.simulator import books
from kvmanager.simulator.books import Broken, Chore, Move, Pull, Stamps, Text, Turn, Work, Worker, demand
from kvmanager.simulator.pools import CONVERTED, format_of
from kvmanager.simulator.registry import FOLLOWERS

__all__ = ["Model"]

_KEPT = ("config", "sizes", "formats", "stamps", "memories", "seen", "replaying")


class Model:
    def __init__(self, config: ManagerConfig) -> None:
        self.config = config
        self.sizes = [pool.page_size for pool in config.pools]  # slots of a page of each pool
        self.formats = [format_of(pool) for pool in config.pools]
        self.stamps = Stamps()
        self.texts: dict[int, Text] = {}
        self.moves: dict[int, Move] = {}
        self.workers: dict[int, Worker] = {}
        self.memories: dict[tuple[int, str], np.ndarray] = {}
        # stamp of a page's last slot -> (page id, stamp of the page before it)
        self.index: list[dict[int, tuple[int, int]]] = [{} for _ in config.pools]
        self.dropped: list[dict[int, int]] = [{} for _ in config.pools]  # page -> version in which its last owner let go
        self.last_grow: list[tuple[int, int]] = []
        self.clients: dict[int, None] = {}  # that the manager remembers
        self.notices: dict[int, list[tuple[str, int, int]]] = {}
        self.copied: Counter[tuple[int, bytes]] = Counter()  # (pool, tenant) -> pages that truncations of that batch took for copies
        self.taken: Counter[int] = Counter()  # pool -> pages handed out by the batch that was read last
        self.waiting: dict[int, int] = {}  # prompt in the queue -> its client
        self.wanted: dict[int, tuple[list[int], list[int]]] = {}  # and its pools, and the stamps at the ends of its pages
        self.pins: dict[int, tuple[int, list[int]]] = {}  # pin -> pool, pages
        self.quotas: dict[tuple[int, bytes | None], int] = {}  # (pool, tenant or everybody else) -> pages
        self.tenants: dict[int, bytes] = {}  # stamp of a page that was ever in an index -> whose it is
        self.draining: dict[int, int] = {}  # pool -> client that asked for it
        self.drained: dict[int, None] = {}
        self.seen: Counter[str] = Counter()
        self.version, self.now_ms = 1, 0
        self.begun = 0  # the version that began this life of the manager, if it is not the first
        self.replaying = False  # following again what was followed before: what workers do about it they have done

    # --- questions ---

    def owners(self, pool: int) -> Counter[int]:
        """How many owners each page has: whatever a new operation makes an owner of pages belongs here."""
        count: Counter[int] = Counter()
        for text in self.texts.values():
            if text.pool == pool:
                count.update(text.pages)
        for move in self.moves.values():
            if move.source == pool:
                count.update(move.source_pages)
            if move.target == pool:
                count.update(move.target_pages)
        for where, pages in self.pins.values():
            if where == pool:
                count.update(pages)
        return count

    def memory(self, pool: int, name: str) -> np.ndarray:
        """A place's page memory. It comes back as it was left: whatever is read without being written first is garbage."""
        found = self.memories.get((pool, name))
        if found is None:
            found = self.memories[pool, name] = np.zeros((self.config.pools[pool].num_pages, self.sizes[pool]), np.int64)
        return found

    def crew(self, pool: int, fenced: bool = False) -> list[Worker]:
        return [worker for worker in self.workers.values() if worker.pool == pool and (fenced or not worker.fenced)]

    def indexed_run(self, pool: int, index: dict[int, tuple[int, int]], stamps: list[int], tokens_max: int) -> list[int]:
        """Pages of the pool's `index` that hold the first of these stamps, at most `tokens_max` of them."""
        run: list[int] = []
        size = self.sizes[pool]
        for end in range(size, min(len(stamps), tokens_max) + 1, size):
            found = index.get(stamps[end - 1])
            if found is None:
                break
            run.append(found[0])
        return run

    def pages_of(self, pool: int, tokens: int) -> int:
        """How many the pool needs for so many tokens."""
        return -(-tokens // self.sizes[pool])

    def may_move(self, source: int, target: int) -> bool:
        """Whether pages of one pool can become pages of the other."""
        pair = self.formats[source], self.formats[target]
        return pair[0] == pair[1] or pair == CONVERTED

    def pages_in(self, text: Text, pool: int) -> int:
        """How many it needs for a sequence that comes from another pool, with what that has reserved."""
        ours, theirs = self.sizes[pool], self.sizes[text.pool]
        return len(text.pages) if ours == theirs else -(-max(text.length, text.reserved * theirs) // ours)

    def let_go_up_to(self, pool: int) -> int:
        """Pages let go up to this version nobody can be touching: after a restart, none before all workers of all pools have heard of it."""
        acked = min((worker.acked for worker in self.crew(pool, fenced=True)), default=self.version)
        settled = all(worker.acked >= self.begun for worker in self.workers.values())
        return acked if settled else min(acked, self.begun - 1)

    # --- checks ---

    def check_content(self, pool: int, pages: list[int], stamps: list[int], what: str) -> None:
        """Every live worker of the pool holds exactly these stamps in these pages."""
        if self.replaying:
            return
        for worker in self.crew(pool):
            if worker.acked < self.begun:
                continue  # it may have followed an end of the log that was lost, and ends once it hears of it
            size = self.sizes[pool]
            for place, page in enumerate(pages):
                expected = stamps[place * size : (place + 1) * size]
                got = worker.memory[page, : len(expected)].tolist()
                demand(got == expected, f"{what}: pool {pool}, page {page} of {worker.name} holds {got[:4]}, not {expected[:4]}")

    def take(self, pool: int, pages: list[int], what: str) -> None:
        """Pages are handed out: nobody may own them, find them, or still be reading or writing them."""
        if not pages:
            return
        self.taken[pool] += len(pages)
        owners = self.owners(pool)
        indexed = {page for page, _ in self.index[pool].values()}
        demand(len(set(pages)) == len(pages), f"{what}: pages {pages} handed out twice at once")
        for page in pages:
            demand(not owners[page], f"{what}: page {page} of pool {pool} has {owners[page]} owners")
            demand(page not in indexed, f"{what}: page {page} of pool {pool} is in the index")
            self.check_drained(pool, page, what)

    def check_drained(self, pool: int, page: int, what: str) -> None:
        if self.replaying:
            return
        freed = self.dropped[pool].get(page, 0)
        for worker in self.workers.values():  # whatever a lost end of the log may have told it, of this pool or another
            demand(worker.acked >= self.begun, f"{what}: page {page} before {worker.name} acknowledged the life begun in {self.begun}")
        for worker in self.crew(pool, fenced=True):
            demand(worker.acked >= freed, f"{what}: page {page} freed in {freed}, {worker.name} acknowledged {worker.acked}")
            for version, pages in [(work.version, work.pages) for work in worker.works] + [
                (each.version, each.pages) for each in worker.chores
            ]:
                demand(page not in pages, f"{what}: {worker.name} still has step {version} in flight on page {page}")
            for pull in worker.pulls.values():
                demand(page not in [item.target for item in pull.todo], f"{what}: {worker.name} still pulls into page {page}")
            for handoff, targets in worker.early.items():
                demand(page not in targets, f"{what}: {worker.name} still pulls early into page {page}, for handoff {handoff}")
            for handoff, used in worker.ahead.items():
                demand(page not in used, f"{what}: {worker.name} still runs ahead on page {page}, for handoff {handoff}")
        for worker in self.workers.values():
            for pull in worker.pulls.values():
                if pull.source_pool == pool:
                    reads = any(page in item.pages for item in pull.todo)
                    demand(not reads, f"{what}: {worker.name} still pulls from page {page}")

    def let_go(self, pool: int, pages: list[int]) -> None:
        """An owner has let go of `pages`, and the books no longer list it: note the version for those without any other."""
        owners = self.owners(pool)
        for page in pages:
            if not owners[page]:
                self.dropped[pool][page] = self.version

    def tell(self, owner: int, kind: str, sequence: int, handoff: int) -> None:
        if owner in self.clients:
            self.notices.setdefault(owner, []).append((kind, sequence, handoff))

    def write_on(self, text: Text, length: int) -> None:
        """The author goes on: tokens that the manager learns of later, or never. Few letters, so that authors write the same."""
        while len(text.tokens) < length:
            text.tokens.append((text.stamps[-1] * 7 // 3 + text.mood) % 2 + 1)
            text.stamps.append(self.stamps.after(text.stamps[-1], text.tokens[-1]))

    def stamp_after(self, text: Text, length: int) -> int:
        """What slot `length` will hold once its author goes on there, if he does so now."""
        if len(text.stamps) > length:
            return text.stamps[length]
        return self.stamps.after(text.stamps[-1], (text.stamps[-1] * 7 // 3 + text.mood) % 2 + 1)

    # --- the event stream ---

    def read(self, batch: EventBatch, turn: Turn) -> None:
        """Follow one batch."""
        self.version, self.now_ms = batch.version, max(self.now_ms, batch.now_ms)
        self.taken.clear()
        self.copied.clear()
        turn.visible = [dict(index) for index in self.index]
        for event in batch.events:
            self.seen[type(event).__name__] += 1
            follower = FOLLOWERS.get(type(event))
            if follower is not None:
                follower(self, event, turn)
        for pool, page in turn.indexed:
            for text in self.texts.values():
                if text.pool == pool and not text.unlisted and page in text.pages[text.published :]:
                    raise Broken(
                        f"page {page} of pool {pool} is in the index, and sequence {text.sequence} owns it and does not hold it there"
                    )
        for pool, chore in turn.chores:
            if chore.stamps:
                chore.source, count = turn.copies.pop((pool, chore.target), (-1, 0))
                demand(count == len(chore.stamps), f"page {chore.target} of pool {pool}: {count} copied slots, not {len(chore.stamps)}")
            for worker in self.crew(pool) if not self.replaying else ():
                worker.chores.append(replace(chore))
        demand(not turn.copies, f"copied for nobody: {turn.copies}")
        for sequence, start in turn.starts.items() if not self.replaying else ():
            text = self.texts[sequence]
            for worker in self.crew(text.pool):
                worker.works.append(Work(self.version, sequence, start, text.length, list(text.pages), text.stamps))

    # --- going back: a host is lost, and with it the end of the log ---

    def checkpoint(self) -> bytes:
        """The books as they are. Stamps, memories and counts of what was seen only grow and stay."""
        return pickle.dumps({name: value for name, value in self.__dict__.items() if name not in _KEPT})

    def go_back(self, checkpoint: bytes, follow: Callable[[], None]) -> None:
        """To a checkpoint and, by `follow`, to a later version. What workers have in flight is theirs and stays."""
        before = self.workers
        self.__dict__.update(pickle.loads(checkpoint))
        self.replaying = books.SHUT = True  # memories have gone on, so there is nothing to compare with
        try:
            follow()
        finally:
            self.replaying = books.SHUT = False
        for number, worker in list(self.workers.items()):
            now = before.get(number)
            if now is not None:
                now.acked, now.fenced = worker.acked, worker.fenced
                self.workers[number] = now
            else:
                worker.memory = self.memory(worker.pool, worker.name)
                worker.works.clear()
                worker.pulls.clear()
                worker.early.clear()
                worker.ahead.clear()

    def begin_life(self, version: int) -> None:
        """The manager came back: pages that nobody has are held until every worker has heard of it, and so are pulls that are no more."""
        self.version = self.begun = version
        for number, pool in enumerate(self.config.pools):
            owners, indexed = self.owners(number), {page for page, _ in self.index[number].values()}
            self.dropped[number].update((page, version) for page in range(pool.num_pages) if not owners[page] and page not in indexed)
        for worker in self.workers.values():
            for pull in worker.pulls.values():
                move = self.moves.get(pull.handoff)
                if not pull.aborted_at and (move is None or move.state != "moving"):
                    pull.aborted_at = version

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
            acked = self.let_go_up_to(number)
            held = sum(freed > acked and not owners[page] and page not in indexed for page, freed in self.dropped[number].items())
            demand(counts.quarantined >= held, f"pool {pool.name}: {counts}, the model has {held} freed after the last acknowledgement")
            demand(
                (counts.used, counts.cached) == (used, cached), f"pool {pool.name}: {counts}, the model has {used} used, {cached} cached"
            )
            demand(counts.free + counts.used + counts.cached + counts.quarantined == pool.num_pages, f"pool {pool.name}: {counts}")

    # --- workers at work ---

    def execute(self, worker: Worker, rng: random.Random) -> None:
        """One step's share of one sequence: whichever may go, in no order but the sequence's own."""
        may_go: list[Work | Chore] = []
        waited_for: dict[int, None] = {}
        in_order: list[Work | Chore] = [*worker.chores, *worker.works]
        for each in sorted(in_order, key=lambda each: each.version):  # of one version, chores first
            involved = each.sequences if isinstance(each, Chore) else (each.sequence,)
            if not any(sequence in waited_for for sequence in involved):
                may_go.append(each)
            waited_for.update(dict.fromkeys(involved))
        work = rng.choice(may_go)
        if isinstance(work, Chore):
            worker.chores.remove(work)
            self.copy(worker.name, worker.memory, work)
            worker.done[work.sequences[0]] = min(work.written, max(work.known, worker.done.get(work.sequences[-1], 0)))
            return
        worker.works.remove(work)
        self.run(worker.name, worker.memory, work)
        worker.done[work.sequence] = work.length

    def run(self, name: str, memory: np.ndarray, work: Work, hole: bool = False) -> None:
        """Read what is there and compare, unless the worker itself left a hole there; write what is new."""
        slots, size = np.arange(work.length), memory.shape[1]
        pages, offsets = np.array(work.pages, np.int64)[slots // size], slots % size
        stamps = np.array(work.stamps[: work.length])
        read = memory[pages[: work.start], offsets[: work.start]]
        if not hole and not np.array_equal(read, stamps[: work.start]):
            slot = int(np.argmax(read != stamps[: work.start]))
            raise Broken(
                f"step {work.version} of sequence {work.sequence} on {name} read {read[slot]} in slot {slot}, "
                f"page {work.pages[slot // size]}, not its own {stamps[slot]}"
            )
        memory[pages[work.start :], offsets[work.start :]] = stamps[work.start :]

    def copy(self, name: str, memory: np.ndarray, chore: Chore, hole: bool = False) -> None:
        """Copy slots of one page to another, if that belongs to the chore, and compare them first."""
        count = len(chore.stamps)
        if count:
            got = memory[chore.source, :count].tolist()
            if not hole and got != chore.stamps:
                raise Broken(
                    f"step {chore.version} of sequence {chore.sequences[0]} on {name} read {got[:4]} to copy from page "
                    f"{chore.source}, not its own {chore.stamps[:4]}"
                )
            memory[chore.target, :count] = memory[chore.source, :count]

    def pull(self, worker: Worker, pull: Pull, rng: random.Random) -> None:
        item = pull.todo.pop(rng.randrange(len(pull.todo)))
        slots = item.read(pull.source)
        got, stamps = slots[: len(item.stamps)].tolist(), item.stamps
        if got != stamps:
            raise Broken(f"handoff {pull.handoff}: {worker.name} pulled pages {item.pages} and read {got[:4]}, not {stamps[:4]}")
        worker.memory[item.target, : len(slots)] = slots
