"""Many requests at a time: a small continuous-batching scheduler and simulated workers, against the production manager.

Time is simulated: a step takes `step_ms`, whatever is in it, and all pools step together. In each step a pool computes at most `chunk`
prompt tokens, oldest sequence first, and one token of every sequence that decodes. Requests arrive when the trace says (`speed` times
faster) and wait in line; the first in line is opened, in whichever pool the manager chooses, once a pool has less than a step's worth of
prompt left to compute. One whose prefix is being computed already is passed over until that is there. When pages run out, the sequence
admitted last in that pool is closed and its request goes back to the head of the line; nobody is admitted then until a sequence has ended.

Workers acknowledge a step at its end, or `ack_late` steps later. With a queue of n the manager is told of those n in line that come
next after the ones just asked for.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from kvmanager.config import PoolConfig
from kvmanager.errors import InvalidValue, InvariantBroken, OutOfPages, PrefixPending, SequenceTooLarge
from kvmanager.replay.meter import ITEMS_MAX, Meter
from kvmanager.replay.traces import TokensOf, TracedRequest
from kvmanager.surface import Opened

__all__ = ["ConcurrentRun", "Load"]

GROUP = "replay"
IDLE_STEPS_MAX = 100_000  # steps in which nothing at all happens, before we call it our own fault
PASSED_OVER_MAX = 64  # requests in line that wait for another's prefix, looked past in one step


@dataclass(frozen=True, slots=True)
class Load:
    """How requests meet pools.

    pools      data-parallel pools of one group, `pages` each
    placement  how the manager chooses a request's pool: ManagerConfig.placement
    batch      sequences that one pool runs at once; it may get a few more, since the manager chooses the pool
    chunk      prompt tokens that one pool computes in a step
    step_ms    simulated duration of a step
    speed      requests arrive so many times faster than recorded
    ack_late   steps by which workers acknowledge late
    """

    pools: int = 1
    placement: str = "prefix"
    batch: int = 256
    chunk: int = 4096
    step_ms: float = 50.0
    speed: float = 1.0
    ack_late: int = 0


@dataclass(slots=True, eq=False)
class _Job:
    """A request in line or running. `generated` tokens survive a preemption; they are part of the prompt then."""

    request: TracedRequest
    arrived_ms: float
    generated: int = 0
    again: int = 0  # tokens that were computed before a preemption
    opened_before: bool = False
    waiting: int = 0  # its id in the manager's waiting queue; 0: it was not told

    @property
    def prompt_length(self) -> int:
        return self.request.input_length + self.generated

    def prompt(self) -> np.ndarray:
        tokens = TokensOf.prompt(self.request, self.request.input_length)
        return np.concatenate([tokens, TokensOf.output(self.request, 0, self.generated)]) if self.generated else tokens


@dataclass(slots=True, eq=False)
class _Running:
    """computed   tokens whose latents are written; `target` after the step at hand
    reserved      slots it has
    prompt_length tokens to compute before the next one is generated
    told          generated tokens whose ids the manager knows
    """

    job: _Job
    sequence: int
    prompt_length: int
    computed: int
    reserved: int
    target: int
    told: int


@dataclass(slots=True, eq=False)
class _Pool:
    name: str
    worker: int
    running: dict[int, _Running] = field(default_factory=dict)  # in order of admission
    backlog: int = 0  # prompt tokens of running sequences still to be computed
    budget: int = 0  # prompt tokens that it may yet compute in this step
    closed_at: int = 0  # version of the last step that closed a sequence here: its pages come home once that is acknowledged
    acked: int = 0
    acks: deque[tuple[int, list[int], list[int]]] = field(default_factory=deque)


class ConcurrentRun:
    """Iterate over `run()`: it gives the number of requests done after each step. `meter` has what came of it so far."""

    def __init__(self, requests: Sequence[TracedRequest], *, pages: int, page_size: int, load: Load, queue: int = 0) -> None:
        self.requests = requests
        self.page_size = page_size
        self.load = load
        self.queue = queue
        self.now_ms = 0.0
        self.first_token_ms = array("d")
        names = [f"pool{number}" for number in range(load.pools)]
        sequences = 2 * load.batch * load.pools  # room for those that a pool gets beyond its batch
        if sequences + queue > ITEMS_MAX:
            limit = (ITEMS_MAX - queue) // 2
            raise InvalidValue("--batch", f"at most {limit} sequences in all pools", load.batch * load.pools)
        self.meter = Meter(
            [PoolConfig(name, pages, page_size, GROUP) for name in names],
            clock=lambda: int(self.now_ms),
            sequences=sequences,
            queue=queue + sequences if queue else 0,  # those preempted stand before the others
            placement=load.placement,
        )
        self.pools = {name: _Pool(name, self.meter.join(name)) for name in names}
        self.done = 0
        self._arrivals = deque(sorted(requests, key=lambda request: request.at_ms))
        self._waiting: deque[_Job] = deque()
        self._passed_over = 0  # jobs at the head of the line that waited for another's prefix in the step before
        self._held = False  # pages ran out: nobody is admitted until a sequence ends
        self._closing: dict[str, list[int]] = {}
        self._telling: list[tuple[int, np.ndarray]] = []
        self._leaving: list[int] = []  # ids in the manager's waiting queue of requests given up

    def run(self) -> Iterator[int]:
        idle = 0
        while self._arrivals or self._waiting or self._running():
            if not self._waiting and not self._running():
                self.now_ms = max(self.now_ms, self._arrivals[0].at_ms / self.load.speed)
            self._arrive()
            before = self.done
            idle = 0 if self._turn() or self.done > before else idle + 1
            if idle > IDLE_STEPS_MAX:
                raise InvariantBroken(f"replay: nothing happened in {IDLE_STEPS_MAX} steps, {self.done} requests done")
            self.now_ms += self.load.step_ms
            yield self.done
        if self._closing:
            self.meter.step(close=[sequence for closing in self._closing.values() for sequence in closing])

    def _running(self) -> int:
        return sum(len(pool.running) for pool in self.pools.values())

    def _arrive(self) -> None:
        while self._arrivals and self._arrivals[0].at_ms / self.load.speed <= self.now_ms:
            request = self._arrivals.popleft()
            self._waiting.append(_Job(request, request.at_ms / self.load.speed))
            self.meter.counts.requests += 1

    # --- one step: plan it, ask the manager, compute it ----------------------------------------------------------------------

    def _turn(self) -> bool:
        """One step of all pools; says whether anything was computed or admitted."""
        growing: list[tuple[_Pool, _Running]] = []
        counts: list[int] = []
        for pool in self.pools.values():
            self._plan(pool, growing, counts)
        heads = list(islice(self._waiting, self._admissible()))
        ahead, behind = self._untold(len(heads))
        told = ahead[::-1] + behind
        reply = self.meter.step(
            close=[sequence for closing in self._closing.values() for sequence in closing],
            tokens=self._telling,
            grow=[running.sequence for _, running in growing],
            grow_counts=counts,
            opens=[{"tokens": job.prompt(), "group": GROUP, "chunk": self.load.chunk, "waiting": job.waiting} for job in heads],
            dequeue=self._leaving,
            enqueue=[{"tokens": job.prompt(), "group": GROUP, "front": at < len(ahead)} for at, job in enumerate(told)],
        )
        for name in self._closing:
            self.pools[name].closed_at = reply.version
        self._closing, self._telling, self._leaving = {}, [], []
        for job, waiting in zip(told, reply.queued, strict=True):
            job.waiting = waiting
        refused = {(item.kind, item.index): item.error for item in reply.refused}
        short: dict[str, _Pool] = {}
        for at, (pool, running) in enumerate(growing):
            error = refused.pop(("grow", at), None)
            if error is None:
                running.reserved += counts[at]
                continue
            running.target = running.computed
            if isinstance(error, OutOfPages):
                short[pool.name] = pool
            elif isinstance(error, (SequenceTooLarge, InvalidValue)):
                self.meter.counts.too_large += 1
                self._end(pool, running)
            else:
                raise error
        self._passed_over = 0
        for at, (job, opened) in enumerate(zip(heads, reply.opened, strict=True)):
            error = refused.pop(("open", at), None)
            if opened is not None:
                self._waiting.remove(job)
                self._admit(job, opened)
            elif isinstance(error, (SequenceTooLarge, InvalidValue)):
                self._waiting.remove(job)
                if job.waiting:  # what is refused still waits
                    self._leaving.append(job.waiting)
                self.meter.counts.too_large += 1
                self.done += 1
            elif isinstance(error, PrefixPending):
                self._passed_over += 1
                self.meter.counts.waits += 1
            elif error is not None and not isinstance(error, OutOfPages):
                raise error
        for error in refused.values():
            raise error
        self.meter.sample((self.now_ms + self.load.step_ms) / 1000)
        worked = [self._compute(pool, reply.version) for pool in self.pools.values()]
        for pool in short.values():
            self._preempt(pool)
        return any(worked) or any(opened is not None for opened in reply.opened)

    def _plan(self, pool: _Pool, growing: list[tuple[_Pool, _Running]], counts: list[int]) -> None:
        """What the pool computes in this step, and which slots that takes beyond those reserved."""
        pool.budget, pool.backlog = self.load.chunk, 0
        for running in pool.running.values():
            left = running.prompt_length - running.computed
            if left > 0:
                pool.backlog += left
                take = min(pool.budget, left)
                pool.budget -= take
            else:
                take = 1
            running.target = running.computed + take
            if running.target > running.reserved:
                growing.append((pool, running))
                counts.append(running.target - running.reserved)

    def _admissible(self) -> int:
        """How many of those in line may be opened in this step."""
        if self._held and self._running():
            return 0
        self._held = False
        ready = sum(pool.backlog < self.load.chunk and len(pool.running) < self.load.batch for pool in self.pools.values())
        return ready and ready + min(self._passed_over, PASSED_OVER_MAX)

    def _untold(self, skip: int) -> tuple[list[_Job], list[_Job]]:
        """Those next in line, after the `skip` first, of whom the manager does not know: ahead of the last that it knows, and behind."""
        jobs = list(islice(self._waiting, skip, max(skip, self.queue)))
        known = max((at for at, job in enumerate(jobs) if job.waiting), default=0)
        return [job for job in jobs[:known] if not job.waiting], [job for job in jobs[known:] if not job.waiting]

    def _admit(self, job: _Job, opened: Opened) -> None:
        cached, sequence = opened.cached_tokens, opened.sequence
        counts, request = self.meter.counts, job.request
        if job.opened_before:
            counts.tokens_again += max(0, job.again - cached)
        else:
            job.opened_before = True
            counts.pages_whole += request.input_length // self.page_size
            counts.pages_hit += cached // self.page_size
            counts.tokens_prompt += request.input_length
            counts.tokens_hit += cached
        job.waiting = 0
        pool = self.pools[opened.pool]
        take = min(pool.budget, opened.length - cached)  # it begins in this very step, if there is time left
        pool.budget -= take
        pool.running[sequence] = _Running(
            job, sequence, job.prompt_length, cached, reserved=opened.length, target=cached + take, told=job.generated
        )

    def _compute(self, pool: _Pool, version: int) -> bool:
        """The pool's worker runs the step; what it has written is acknowledged `ack_late` steps later."""
        size, ids, written, worked = self.page_size, [], [], False
        for running in list(pool.running.values()):
            if running.target == running.computed:
                continue
            worked = True
            job, request = running.job, running.job.request
            crossed = running.target // size > running.computed // size
            running.computed = running.target
            if crossed:
                ids.append(running.sequence)
                written.append(running.computed)
                known = request.input_length + running.told
                if running.computed > known:  # a page of generated tokens is full: others may share it once their ids are known
                    stop = running.computed - request.input_length
                    self._telling.append((running.sequence, TokensOf.output(request, running.told, stop)))
                    running.told = stop
            if running.computed < running.prompt_length:
                continue
            if request.output_length:
                if not job.generated:
                    self.first_token_ms.append(self.now_ms + self.load.step_ms - job.arrived_ms)
                job.generated += 1
                self.meter.counts.tokens_output += 1
            if job.generated >= request.output_length:
                self._end(pool, running)
        pool.acks.append((version, ids, written))
        if len(pool.acks) > self.load.ack_late:
            version, ids, written = pool.acks.popleft()
            self.meter.ack(pool.worker, version, ids, written)
            pool.acked = version
        return worked

    def _end(self, pool: _Pool, running: _Running) -> None:
        self._close(pool, running)
        self.done += 1
        self._held = False

    def _close(self, pool: _Pool, running: _Running) -> None:
        del pool.running[running.sequence]
        self._closing.setdefault(pool.name, []).append(running.sequence)
        self._telling = [item for item in self._telling if item[0] != running.sequence]

    def _preempt(self, pool: _Pool) -> None:
        """The sequence admitted last gives way in a pool that ran out of pages, unless pages are on their way home there already."""
        if self._closing.get(pool.name) or pool.closed_at > pool.acked or len(pool.running) < 2:
            return
        running = next(reversed(pool.running.values()))
        self._close(pool, running)
        running.job.again = running.computed
        self._waiting.appendleft(running.job)
        self._held = True
        self.meter.counts.preemptions += 1
