"""System: a whole deployment in one thread. A manager, its clients and workers, the network between them, and whoever restarts them.

faulty phase   faults as drawn from the seed, pools near full, until so many commands have been executed
healing        faults are over, everybody who was stopped or killed comes back, clients close what they have
at rest        every sequence has ended, every page is free or cached, every replica stands where the manager stands
"""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from typing import Any

from kvmanager.config import ManagerConfig
from kvmanager.errors import KVError
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import WorkerGone
from kvmanager.machine.events import WorkerJoined
from kvmanager.machine.snapshot import state_digest
from kvmanager.simulator import operations  # noqa: F401 - for what they register
from kvmanager.simulator.body import Body
from kvmanager.simulator.books import Broken, Move
from kvmanager.simulator.caller import Caller
from kvmanager.simulator.faults import FAULTS, Faults
from kvmanager.simulator.host import Host
from kvmanager.simulator.model import Model
from kvmanager.simulator.pools import draw_formats, draw_pool, draw_sizes
from kvmanager.simulator.seat import Seat, draw_documents
from kvmanager.simulator.watch import Watch
from kvmanager.simulator.world import Network, World

__all__ = ["System"]

LEASE_MS = 1000
LIFE_US = 10_000  # how often fate looks at each process
WATCH_OVER_US = 100_000
STALL_US = 20_000_000
HANDOFFS_US = 20_000_000  # by then every handoff must have ended that can
HEAL_US = 60_000_000  # by then everybody must have come to rest
SUPERVISOR = 2


class System:
    def __init__(self, seed: int, faults: tuple[str, ...] = tuple(FAULTS)) -> None:
        self.seed = seed
        self.world = World(seed, Faults(seed, faults))
        self.rng = rng = self.world.rng
        self.network = Network(self.world)
        self.config = draw_config(rng, seed)
        self.model = Model(self.config)
        self.watch = Watch(self.model)
        self.host = Host(self.world, self.network, self.config, self.watch, self._saw)
        self.bodies: dict[tuple[int, int], Body] = {}  # by pool and rank
        self.by_client: dict[int, Body] = {}
        self.by_worker: dict[int, Body] = {}
        self.epochs: dict[int, int] = {}  # worker -> the manager's life in which it joined
        self.next_client = 100
        self.supervisor = Caller(self.world, self.network, SUPERVISOR, "supervisor", self.host.serve)
        self.of_the_day: dict[str, Any] = {"documents": draw_documents(rng)}
        self.seats: list[Seat] = []
        self.deaths = 0
        self._reporting: dict[int, None] = {}
        for number, pool in enumerate(self.config.pools):
            for rank in range(pool.workers):
                self._start_body(number, rank)
        for number in range(rng.choice((1, 2, 3))):
            self._start_seat(number)
        self._watch_over()
        self._fate()

    # --- processes ---

    def _new_client(self) -> int:
        self.next_client += 1
        return self.next_client

    def _start_body(self, pool: int, rank: int) -> None:
        body = Body(self.world, self.network, self.model, pool, rank, self._new_client(), self.host.serve)
        body.digest_at = self.watch.digest_at
        before = self.bodies.get((pool, rank))
        if before is not None:
            self.host.subscribers.pop(before.caller.name, None)
        self.bodies[pool, rank] = self.by_client[body.caller.client] = body
        self.host.subscribers[body.caller.name] = body.published

    def _start_seat(self, number: int) -> None:
        client = self._new_client()
        caller = Caller(self.world, self.network, client, f"client{number}.{client}", self.host.serve)
        heir_of = tuple(each for seat in self.seats[number : number + 1] for each in (*seat.heir_of, seat.caller.client))
        seat = Seat(self.world, self.model, caller, self._order, self.of_the_day, heir_of)
        self.seats[number : number + 1] = [seat]

    def _order(self, version: int, link: str) -> None:
        """A scheduler tells the workers to run what it asked for; twice, because nobody confirms."""
        pools: dict[int, list[int]] = {}
        for sequence, pool in self.watch.starts.get(version, {}).items():
            pools.setdefault(pool, []).append(sequence)
        for (pool, _), body in self.bodies.items():
            if pool in pools:
                for _ in range(2):
                    self.network.send(link, body.caller.name, body.order, version, pools[pool])

    def _saw(self, batch: EventBatch, client: int) -> None:
        for event in batch.events:
            if isinstance(event, WorkerJoined):
                self.by_worker[event.worker] = self.by_client[client]
                self.epochs[event.worker] = batch.epoch

    # --- fate, and who watches over the processes ---

    def _fate(self) -> None:
        rng, happens = self.rng, self.world.faults.happens
        for body in self.bodies.values():
            if body.alive and happens("kill", rng):
                self.deaths += 1
                body.kill()
            elif body.alive and not body.stopped and happens("stop", rng):
                body.stop()
                self.world.after(int(rng.random() * 3 * LEASE_MS * 1000), self._resume, body)
        for number, seat in enumerate(self.seats):
            if happens("leave", rng):
                seat.caller.die()
                self._start_seat(number)
        self.world.after(LIFE_US, self._fate)

    def _resume(self, body: Body) -> None:
        if body.stopped:
            body.resume()

    def _watch_over(self) -> None:
        """Reap the dead and start their successors. Only a process that has ended is reported as gone."""
        for worker in list(self.model.workers.values()):
            body = self.by_worker[worker.worker]
            if worker.fenced and body.alive and body.stopped and self.rng.random() < 0.05:
                body.kill()
            if not body.alive and worker.worker not in self._reporting:
                self._reporting[worker.worker] = None
                self.supervisor.ask(
                    command_to_wire(WorkerGone(worker.worker, self.epochs[worker.worker])), partial(self._reported, worker.worker)
                )
        for (pool, rank), body in list(self.bodies.items()):
            if not body.alive and self.rng.random() < 0.5:
                self._start_body(pool, rank)
        self.world.after(WATCH_OVER_US, self._watch_over)

    def _reported(self, worker: int, reply: dict[str, Any] | KVError) -> None:
        del self._reporting[worker]

    # --- a run ---

    def run(self, steps: int) -> None:
        """The faulty phase, until so many commands have been executed."""
        before = -1
        while not self.world.run(lambda: self.watch.commands >= steps, until_us=self.world.now_us + STALL_US):
            if self.watch.commands == before:
                raise Broken(f"nothing was executed for {STALL_US // 1_000_000} s: {self.unrest()}")
            before = self.watch.commands

    def heal(self) -> None:
        """Faults are over. Raises Broken if anything is left after a bounded time."""
        self.world.faults.healed = True
        for body in self.bodies.values():
            self._resume(body)
        for seat in self.seats:
            seat.resting = True
        self._let_handoffs_end()
        for seat in self.seats:
            seat.healing = True
        if not self.world.run(self.at_rest, self.world.now_us + HEAL_US):
            raise Broken(f"not at rest {HEAL_US // 1_000_000} s after the last fault: {self.unrest()}")
        self.watch.check_all()

    def _let_handoffs_end(self) -> None:
        """Clients close what is in no handoff, and ask for nothing more: every handoff that nothing stands in the way of ends by itself."""
        until = self.world.now_us + HANDOFFS_US
        while (stuck := self.stuck_handoffs()) and self.world.now_us < until:
            self.world.run(lambda: False, self.world.now_us + WATCH_OVER_US)
        if stuck:
            raise Broken(f"handoffs that did not end within {HANDOFFS_US // 1_000_000} s: {stuck}")

    def stuck_handoffs(self) -> list[str]:
        """Those that should go on, in words."""
        if self.host.manager is None:
            return ["the manager is down"]
        return [f"{move.handoff} {move.state}" for move in self.model.moves.values() if not self._may_wait(move)]

    def _may_wait(self, move: Move) -> bool:
        """For tokens that nobody computes or that a worker has left out, or for pages: until somebody aborts or closes something."""

        def bodies(pool: int) -> list[Body]:
            return [body for (where, _), body in self.bodies.items() if where == pool]

        if move.state == "prefilling":
            if self.model.texts[move.sequence].length < move.until:
                return True  # nobody computes the rest any more
            again = move.source in self.model.draining  # however often it stalls, the manager begins anew
            return (again or not self.config.handoff_prefill_ms) and any(body.has_hole(move.sequence) for body in bodies(move.source))
        if move.state == "reserving":
            text, owners = self.model.texts[move.sequence], self.model.owners(move.target)
            nobodys = self.config.pools[move.target].num_pages - sum(count > 0 for count in owners.values())  # free, or to be evicted
            if nobodys < self.model.pages_in(text, move.target) or any(pool == move.target for pool, _ in self.model.quotas):
                return True
            before = (each for each in self.model.moves.values() if each.target == move.target and each.handoff < move.handoff)
            return any(each.state == "reserving" and self._may_wait(each) for each in before)
        return False

    def unrest(self) -> str:
        """What is still going on, in words; empty at rest."""
        if self.host.manager is None:
            return "the manager is down"
        state = self.host.manager.state
        if state.sequences:
            return f"open sequences {list(state.sequences)[:8]}"
        if state.handoffs:
            return f"handoffs {list(state.handoffs)[:8]}"
        for pool in state.pools:
            counts = pool.counts()
            if counts.free + counts.cached != counts.total:
                return f"pool {pool.name}: {counts}"
            if len(state.live_workers(pool.index)) < pool.workers_expected or len(state.pool_workers[pool.index]) > pool.workers_expected:
                return f"pool {pool.name}: workers {state.pool_workers[pool.index]}, expected {pool.workers_expected}"
        for body in self.bodies.values():
            if (body.replica.epoch, body.replica.version) != (state.epoch, state.version):
                return f"{body.name} at {body.replica.epoch}:{body.replica.version}, the manager at {state.epoch}:{state.version}"
            if body.replica.tables.digest() != state.tables.digest():
                return f"{body.name}: tables differ from the manager's"
        return ""

    def at_rest(self) -> bool:
        return not self.unrest()

    def seen(self) -> Counter[str]:
        """What has happened, by name: events, faults, refusals."""
        return (
            self.model.seen + self.network.seen + self.host.seen + Counter(killed_workers=self.deaths, rolled_back=self.watch.rolled_back)
        )

    def journal_files(self) -> dict[str, bytes]:
        return self.host.journal_files()

    def digest(self) -> str:
        """Of everything that was decided and of the state it led to."""
        if self.host.manager is None:
            raise Broken("no manager to take a digest of")
        history = self.watch.history.copy()
        history.update(state_digest(self.host.manager.state).encode())
        return history.hexdigest()


def draw_config(rng: random.Random, seed: int) -> ManagerConfig:
    """Few pages, so that pools are nearly full all the time; sometimes one that is larger."""
    sizes, formats = draw_sizes(rng), draw_formats(seed)
    pools = tuple(
        draw_pool(
            rng, name, sizes, rng.choice((5, 8, 12, 12, 40)), formats, workers=rng.choice((1, 1, 2)), partial_match=rng.choice((0, 0, 1, 5))
        )
        for name in ("A", "B", "C")[: rng.choice((1, 2, 2, 3))]
    )
    return ManagerConfig(
        pools=pools,
        sequences_max=rng.choice((5, 8, 12, 24)),
        handoffs_max=rng.choice((2, 6)),
        clients_max=64,
        lease_ms=LEASE_MS,
        handoff_timeout_ms=rng.choice((0, 60, 500, 5000)),
        handoff_wait_ms=rng.choice((1000, 10_000)),
        handoff_tries=rng.choice((1, 2, 3)),
        handoff_prefill_ms=rng.choice((0, 300, 5000)),
        drain_at_once=rng.choice((1, 3)),
        client_lease_ms=rng.choice((0, 0, 3 * LEASE_MS)),
    )
