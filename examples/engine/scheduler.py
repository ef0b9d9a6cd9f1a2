"""The scheduler: continuous batching over prefill and decode workers. It decides who runs; the manager decides who gets which page.

Each turn takes in what workers reported and sends the manager one step for everybody who is idle: close what ended, hand over what is
prefilled, grow what runs, open what waits. The reply says who got pages; the rest waits, or the youngest is preempted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvmanager import KVClient, Notice, Open, StepReply
from kvmanager.errors import OutOfPages, OverQuota, PoolDrains, PoolNotReady, PrefixPending, SequenceTooLarge, Unknown, WrongState
from kvmanager.examples.engine.channel import SchedulerChannel
from kvmanager.examples.engine.request import Request, Stage
from kvmanager.machine.commands import HandOff

__all__ = ["PoolState", "Scheduler", "Supervisor", "WorkerNotReady"]

PULL_ATTEMPTS = 3  # after so many failed handoffs a request is refused with the reason


class WorkerNotReady(RuntimeError):
    """A worker did not come up. `pool` says whose log to read."""

    def __init__(self, pool: str, what: str) -> None:
        super().__init__(f"worker {pool}: {what}")
        self.pool = pool


class Supervisor(Protocol):
    """Who started the workers' processes and can say, for certain, that one has ended."""

    def dead(self) -> list[str]:
        """Pools whose worker's process has ended since the last call."""
        ...

    def kill(self, pool: str) -> None:
        """End a worker that does not answer any more."""
        ...


@dataclass(slots=True)
class PoolState:
    """A worker as the scheduler sees it."""

    name: str
    role: str  # "prefill", "decode" or "mixed", which is both
    worker: int = 0  # 0: not ready yet
    epoch: int = 0  # life of the manager in which it joined
    busy: set[int] = field(default_factory=set)  # versions of the steps it was given and has not reported
    alive: bool = True
    draining: bool = False

    def does(self, role: str) -> bool:
        return self.role in (role, "mixed")


@dataclass(slots=True)
class _Plan:
    """What one step asks for, and for whom."""

    close: list[int] = field(default_factory=list)
    tokens: list[tuple[int, list[int]]] = field(default_factory=list)
    hand_off: list[tuple[Request, str]] = field(default_factory=list)
    stream: set[int] = field(default_factory=set)  # numbers of those of `hand_off` that are streamed
    grow: list[tuple[Request, int]] = field(default_factory=list)
    opens: list[tuple[Request, Open]] = field(default_factory=list)
    fetch: bool = False  # there is news to fetch, even if there is nothing to ask

    def __bool__(self) -> bool:
        return bool(self.close or self.tokens or self.hand_off or self.grow or self.opens or self.fetch)


class Scheduler:
    """client: the manager. channel: the workers. pools: name -> role. chunk_tokens: prompt tokens a prefill step computes at most.

    page_size: of the pools, the smallest: ids of so many decoded tokens are told at once.
    stream: prompts move to their decode worker while they are computed. decode_early: it may compute their next token before all of it is there.
    keep_latents: before a request's pages are closed, fetch what is in them (for comparison with a reference).
    on_event: told in words what an operator would want to know.
    """

    def __init__(
        self,
        client: KVClient,
        channel: SchedulerChannel,
        supervisor: Supervisor,
        pools: dict[str, str],
        *,
        page_size: int,
        chunk_tokens: int = 64,
        keep_latents: bool = False,
        stream: bool = False,
        decode_early: bool = False,
        on_event: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.client, self.channel, self.supervisor = client, channel, supervisor
        self.pools = {name: PoolState(name, role) for name, role in pools.items()}
        self.page_size, self.chunk_tokens, self.keep_latents, self.on_event = page_size, chunk_tokens, keep_latents, on_event
        self.stream, self.decode_early = stream, decode_early
        self.early_pulls = 0  # pieces of prompts that arrived while the rest was computed
        self.early_tokens = 0  # tokens that were computed while pages were on their way
        self.requests: list[Request] = []
        self._by_sequence: dict[int, Request] = {}
        self._to_close: list[int] = []
        self._starved = False  # somebody waits for pages that an acknowledgement will free or fill: nobody will call
        self._fetch = False  # the manager has news for us
        self._hurry = False  # something changed that the next turn should act on without waiting
        self._stepped_at = 0.0

    def submit(self, prompt: list[int], max_new_tokens: int, tenant: bytes = b"") -> Request:
        """Queue a prompt. The request is updated in place."""
        request = Request(len(self.requests), list(prompt), max_new_tokens, tenant, submitted=time.monotonic())
        self.requests.append(request)
        return request

    @property
    def idle(self) -> bool:
        return all(request.over for request in self.requests) and not self._to_close

    def wait_ready(self, timeout_s: float) -> None:
        """Until every worker has reported. Raises WorkerNotReady naming the first that did not."""
        deadline = time.monotonic() + timeout_s
        while missing := [pool.name for pool in self.pools.values() if pool.alive and not pool.worker]:
            self._receive(50)
            if dead := self.supervisor.dead():
                raise WorkerNotReady(dead[0], "ended before it was ready")
            if time.monotonic() > deadline:
                raise WorkerNotReady(missing[0], f"expected to be ready within {timeout_s:.0f} s, and is not")

    def turn(self, timeout_ms: int = 50) -> None:
        """One round: take in reports, notice deaths, send one step."""
        self._receive(0 if self._hurry else 2 if self._starved else timeout_ms)
        self._hurry = False
        for name in self.supervisor.dead():
            self._on_death(self.pools[name])
        if time.monotonic() - self._stepped_at > 0.5:
            self._fetch = True  # a worker may have been fenced; its sequences' owner hears of it with a reply
        plan = self._plan()
        if plan:
            self._run(plan)

    def migrate(self, request: Request, pool: str) -> None:
        """Have a request that decodes go on in another pool, between two of its steps. What comes of it shows in `request.pool`."""
        request.going = pool

    def drain(self, pool: str) -> None:
        """Empty a worker's pool while everybody goes on; once that is done, its worker ends."""
        self.pools[pool].draining = True
        self.client.drain(pool)
        self._fetch = True

    # --- reports -------------------------------------------------------------------------------------------------------------

    def _receive(self, timeout_ms: int) -> None:
        for name, message in self.channel.receive(timeout_ms):
            pool = self.pools[name]
            if message["t"] == "ready":
                pool.worker, pool.epoch = message["worker"], message["epoch"]
            elif message["t"] == "done" and message["version"] in pool.busy:
                pool.busy.discard(message["version"])
                self.early_tokens += message.get("ahead", 0)
                self._on_tokens(message["out"], message["logits"])
            elif message["t"] == "stale" and message["version"] in pool.busy:
                pool.busy.discard(message["version"])
                self.on_event(f"worker {name} had to start from a snapshot: its sequences are computed again")
                for request in self._in_pool(name):
                    self._give_up(request)
            elif message["t"] == "pulled":
                self._fetch = True
                self.early_pulls += message.get("early", False)
            elif message["t"] == "latents":
                if dumped := self._by_sequence.get(message["sequence"]):
                    dumped.latents = (message["shape"], message["data"])
                    self._end(dumped)
            elif message["t"] == "failed":
                self.on_event(f"worker {name}: {message['error']}")

    def _on_tokens(self, out: list[list[int]], logits: bytes) -> None:
        size = len(logits) // len(out) if out else 0
        for row, (sequence, token) in enumerate(out):
            request = self._by_sequence.get(sequence)
            if request is None:
                continue  # given up meanwhile
            if not request.generated:
                request.first_token = time.monotonic()
            request.generated.append(token)
            request.token_times.append(time.monotonic())
            if logits:
                request.logits.append(logits[row * size : (row + 1) * size])
            if len(request.generated) >= request.max_new_tokens:
                if self.keep_latents:
                    request.stage = Stage.DUMPING
                    self.channel.send(request.pool, {"t": "dump", "sequence": sequence})
                else:
                    self._end(request)
            elif Stage.PREFILLING in (request.stage, request.resume if request.stage is Stage.MOVING else None):
                prefilled = Stage.DECODING if self.pools[request.pool].does("decode") else Stage.PREFILLED
                if request.stage is Stage.MOVING:
                    request.resume = prefilled  # the manager had begun to move it in the middle of its prompt
                elif request.handoff:
                    request.stage, request.resume = Stage.MOVING, prefilled  # streamed: the rest of it is on its way
                    self._ask_ahead(request)
                else:
                    request.stage = prefilled

    def _end(self, request: Request, error: str = "") -> None:
        request.stage = Stage.FAILED if error else Stage.FINISHED
        request.error, request.finished = error, time.monotonic()
        if self._by_sequence.pop(request.sequence, None) is not None:
            self._to_close.append(request.sequence)

    def _give_up(self, request: Request) -> None:
        """Close its pages and compute it again later."""
        self._by_sequence.pop(request.sequence, None)
        self._to_close.append(request.sequence)
        request.restart()

    def _on_pull_failed(self, request: Request, error: str) -> None:
        """Its pages cannot be read where they are, as often as it was tried: compute them again, perhaps elsewhere."""
        request.pull_failures += 1
        if request.pull_failures < PULL_ATTEMPTS:
            self._give_up(request)
        else:
            self._end(request, f"handoff failed {PULL_ATTEMPTS} times: {error}")

    def _on_lost(self, sequence: int) -> None:
        request = self._by_sequence.pop(sequence, None)
        if request is None:
            return
        if request.stage is Stage.DUMPING:
            request.stage, request.finished = Stage.FINISHED, time.monotonic()
            return
        request.lost += 1
        request.restart()

    def _on_death(self, pool: PoolState) -> None:
        pool.alive, pool.busy = False, set()
        lost = self.client.worker_gone(pool.worker, epoch=pool.epoch) if pool.worker else []
        for sequence in lost:
            self._on_lost(sequence)
        self._fetch = True
        self.on_event(f"{pool.role} worker {pool.name} is dead; {len(lost)} sequences lost with it are computed again")
        for role in ("prefill", "decode"):
            if not any(each.alive and each.does(role) for each in self.pools.values()):
                for request in self.requests:
                    if not request.over:
                        self._end(request, f"no {role} worker is left")

    # --- one step ------------------------------------------------------------------------------------------------------------

    def _in_pool(self, name: str, *stages: Stage) -> list[Request]:
        """Requests in a pool, oldest first."""
        return [each for each in self.requests if each.pool == name and not each.over and (not stages or each.stage in stages)]

    def _idle_pools(self, role: str) -> list[PoolState]:
        return [pool for pool in self.pools.values() if pool.does(role) and pool.alive and pool.worker and not pool.busy]

    def _plan(self) -> _Plan:
        plan = _Plan(fetch=self._fetch)
        plan.close, self._to_close, self._fetch = self._to_close, [], False
        for request in self.requests:
            if request.stage is Stage.PREFILLED and (target := self._decode_pool()):
                plan.hand_off.append((request, target))
            elif self.stream and request.stage is Stage.PREFILLING and not request.streamed and (target := self._decode_pool()):
                request.streamed = True  # asked once: if there is no room for it now, it goes when it is prefilled
                plan.hand_off.append((request, target))
                plan.stream.add(request.number)
            elif request.stage is Stage.DECODING and request.going and not self.pools[request.pool].busy:
                plan.hand_off.append((request, request.going))
                request.going = ""
        leaving = {request.number for request, _ in plan.hand_off}
        for pool in self._idle_pools("decode"):
            for request in self._in_pool(pool.name, Stage.DECODING):
                if request.number in leaving:
                    continue
                plan.grow.append((request, 1))
                # Ids of decoded tokens, a page at a time: the next turn of a conversation can then share them.
                if (count := min(request.length, len(request.tokens)) - request.told) >= self.page_size:
                    plan.tokens.append((request.sequence, request.tokens[request.told : request.told + count]))
                    request.told += count
        waiting = [request for request in self.requests if request.stage is Stage.WAITING]
        for pool in self._idle_pools("prefill"):
            budget = self.chunk_tokens - sum(request.pool == pool.name for request, _ in plan.grow)  # those that decode in the same step
            for request in self._in_pool(pool.name, Stage.PREFILLING):
                count = min(len(request.tokens) - request.length, budget)
                if count > 0:
                    plan.grow.append((request, count))
                    budget -= count
            while budget > 0 and (at := self._next_for(pool, waiting)) is not None:
                request = waiting.pop(at)
                request.pool = pool.name
                # What is streamed is opened first and computed by the next step, which asks for its handoff too: every layer of it can go.
                # One slot more than the prompt: where its next token goes, if that is computed before the sequence is its decode pool's.
                chunk, more = 0 if self.stream else budget, int(self.decode_early)
                plan.opens.append((request, Open(request.tokens, pool.name, request.tenant, chunk=chunk, reserve=more)))
                budget -= min(budget, len(request.tokens))
        return plan

    def _next_for(self, pool: PoolState, waiting: list[Request]) -> int | None:
        """Place of the first that may be computed there: one that has stalled in a pool goes to another, if there is one."""
        alone = sum(each.does("prefill") and each.alive and not each.draining for each in self.pools.values()) < 2
        fits = (at for at, request in enumerate(waiting) if alone or request.shuns != pool.name)
        return None if pool.draining else next(fits, None)

    def _decode_pool(self) -> str:
        """The decode pool with the fewest sequences; empty if none is alive."""
        alive = [pool.name for pool in self.pools.values() if pool.does("decode") and pool.alive and pool.worker and not pool.draining]
        loads = {name: sum(name in (each.pool, each.target) and not each.over for each in self.requests) for name in alive}
        return min(alive, key=lambda name: loads[name]) if alive else ""

    def _run(self, plan: _Plan) -> None:
        reply = self.client.step(
            close=plan.close,
            tokens=plan.tokens,
            hand_off=[
                HandOff(request.sequence, target, reserve=True, stream=True)
                if request.number in plan.stream
                else (request.sequence, target)
                for request, target in plan.hand_off
            ],
            grow=[request.sequence for request, _ in plan.grow],
            grow_counts=[count for _, count in plan.grow],
            opens=[each for _, each in plan.opens],
        )
        self._stepped_at = time.monotonic()
        self._starved = False
        for (request, target), handoff in zip(plan.hand_off, reply.handoffs, strict=True):
            if handoff and request.number in plan.stream:
                request.resume, request.handoff, request.target = Stage.PREFILLING, handoff, target
            elif handoff:
                self._moves(request, handoff, target)
        # Before work is given out: what the manager moved by itself since the last reply has grown where it is now.
        for notice in reply.notices:
            self._on_notice(notice)
        items: dict[str, list[list[Any]]] = {}
        self._dispatch_grown(plan, reply, items)
        self._dispatch_opened(plan, reply, items)
        for name, work in items.items():
            work.sort(key=lambda item: len(item[2]) != 4)  # sequences with one new token come first in a plan
            self.pools[name].busy.add(reply.version)
            self.channel.send(name, {"t": "run", "version": reply.version, "items": work})
        for index, (request, target) in enumerate(plan.hand_off):
            error = reply.error("hand_off", index)
            if isinstance(error, PoolNotReady):
                self.supervisor.kill(target)  # fenced, so it must end before anybody may have its pages
            elif isinstance(error, SequenceTooLarge):
                self._end(request, str(error))

    def _moves(self, request: Request, handoff: int, target: str) -> None:
        if request.stage is not Stage.MOVING:
            request.resume = request.stage
        request.stage, request.handoff, request.target = Stage.MOVING, handoff, target
        self._ask_ahead(request)

    def _ask_ahead(self, request: Request) -> None:
        """Its next token is all that is to be computed: the worker where it is going may begin with the layers that it has."""
        if self.decode_early and request.generated and request.length == len(request.tokens) - 1:
            ask = {"t": "ahead", "handoff": request.handoff, "sequence": request.sequence, "position": request.length}
            self.channel.send(request.target, ask | {"token": request.tokens[-1]})

    def _item(self, request: Request, length: int) -> list[Any]:
        """Work for a worker: write and attend tokens [request.length, length); ask for a token if they are all there are."""
        tokens = np.array(request.tokens[request.length : length], "<i4").tobytes()
        item = [request.sequence, request.length, tokens, length == len(request.tokens)]
        request.length = length
        return item

    def _give(self, items: dict[str, list[list[Any]]], request: Request, length: int) -> None:
        if length > request.length:
            items.setdefault(request.pool, []).append(self._item(request, length))
        else:
            self._hurry = True  # opened, and nothing of it to be computed in this step

    def _dispatch_grown(self, plan: _Plan, reply: StepReply, items: dict[str, list[list[Any]]]) -> None:
        starved: dict[str, list[Request]] = {}
        patient: set[str] = set()
        for index, (request, count) in enumerate(plan.grow):
            error = reply.error("grow", index)
            if error is None:
                items.setdefault(request.pool, []).append(self._item(request, request.length + count))
            elif isinstance(error, OutOfPages):
                starved.setdefault(request.pool, []).append(request)
                if error.details["quarantined"] or error.details["free"]:
                    patient.add(request.pool)
            elif isinstance(error, SequenceTooLarge):
                self._end(request, str(error))
            elif not isinstance(error, (Unknown, WrongState)):  # lost, or on its way out of a pool that is drained: a notice says so
                raise error
        for pool, requests in starved.items():
            self._starved = True
            if pool not in patient and len(self._in_pool(pool)) > 1:
                youngest = requests[-1]
                youngest.preempted += 1
                self._give_up(youngest)

    def _dispatch_opened(self, plan: _Plan, reply: StepReply, items: dict[str, list[list[Any]]]) -> None:
        for index, (request, _) in enumerate(plan.opens):
            opened = reply.opened[index]
            error = reply.error("open", index)
            if opened is not None:
                request.sequence, request.stage = opened.sequence, Stage.PREFILLING
                request.length, request.told = opened.cached_tokens, len(request.tokens)
                if not request.generated:
                    request.cached_tokens = opened.cached_tokens
                self._by_sequence[opened.sequence] = request
                self._give(items, request, opened.length)
            elif isinstance(error, (OutOfPages, PoolDrains, PoolNotReady, PrefixPending)):
                if isinstance(error, PoolNotReady):
                    self.supervisor.kill(request.pool)
                request.pool = ""
                self._starved = True
            else:
                self._end(request, str(error))

    def _on_notice(self, notice: Notice) -> None:
        request = self._by_sequence.get(notice.sequence)
        if notice.kind == "lost":
            if request is not None and self.pools[request.pool].alive:
                self.supervisor.kill(request.pool)  # fenced: it must end before anybody may have its pages
            self._on_lost(notice.sequence)
        elif notice.kind == "drained":
            self.on_event(f"pool {notice.reason} is empty: its worker leaves")
            self.channel.send(notice.reason, {"t": "stop"})
        elif notice.kind == "moving" and request is not None and request.stage is not Stage.DUMPING:
            self._moves(request, notice.handoff, notice.reason)
        elif request is None or request.handoff != notice.handoff:
            return
        elif notice.kind == "resident":
            decodes = self.pools[notice.reason].does("decode")
            request.stage = Stage.DECODING if decodes and request.resume is not Stage.PREFILLING else request.resume
            request.pool, request.handoff, request.target = notice.reason, 0, ""
            request.moves += 1
            request.pages_moved += notice.moved
            request.pages_shared += notice.spared
        elif notice.kind == "aborted":
            request.stage = request.resume if request.stage is Stage.MOVING else request.stage
            request.handoff, request.target = 0, ""
            if notice.code in (SequenceTooLarge.code, OverQuota.code):  # no use in trying again
                self._end(request, notice.reason)
            elif notice.code == "stalled" and Stage.PREFILLING in (request.stage, request.resume):
                request.shuns = request.pool
                self._give_up(request)
            elif notice.code in ("pull_failed", "timed_out") and request.resume is Stage.PREFILLED:
                self._on_pull_failed(request, notice.reason)
        self._hurry = True
