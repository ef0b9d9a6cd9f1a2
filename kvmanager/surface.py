"""Surface: the methods that the embedded manager and the client have in common, and the replies that they give.

It builds commands and reads replies; who carries them to a state machine is the subclass's business, so a program moves from
`KVManager(config)` to `KVClient(address)` by changing one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvmanager.errors import KVError, error_from_wire
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import (
    Ack,
    Command,
    Drain,
    Enqueue,
    Flush,
    HandOff,
    Join,
    Open,
    Pin,
    SetQuota,
    Step,
    Tokens,
    WorkerGone,
    as_tokens,
)
from kvmanager.machine.explain import Explanation
from kvmanager.machine.preview import DryRun, read_dry_run
from kvmanager.machine.state import Notice

__all__ = ["Opened", "Pinned", "Refused", "StepReply", "Surface", "Victim"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A sequence that was opened in `pool`: tokens [0, cached_tokens) are in its pages already, slots are reserved up to `length`."""

    sequence: int
    cached_tokens: int
    length: int
    pool: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pin: the first `tokens` tokens of the prefix were cached, and stay so."""

    pin: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """One item of a step that was not done: its list in the step, its place there, and why."""

    kind: str
    index: int
    error: KVError


class Victim(NamedTuple):
    """A sequence to preempt, and the pages of its pool that this would free, once its workers have acknowledged its end."""

    sequence: int
    pool: str
    pages: int


@dataclass(frozen=True, slots=True)
class StepReply:
    """What became of a step.

    version   workers run this step on tables of this version
    opened    one for each of step.opens, None where refused
    handoffs  handoff id for each of step.hand_off, 0 where refused; `targets` are the pools that they go to
    queued    id for each of step.enqueue, 0 where refused
    forked    ids of the children for each of step.fork, none where refused
    pinned    one for each of step.pin, None where refused
    refused   items that were not done
    victims   if asked for: whom to preempt for those that were refused for lack of pages, first to go first
    notices   news of this client's sequences since its last reply (see Notice)
    """

    version: int
    opened: list[Opened | None] = field(default_factory=list)
    handoffs: list[int] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    pinned: list[Pinned | None] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    forked: list[list[int]] = field(default_factory=list)
    victims: list[Victim] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def error(self, kind: str, index: int) -> KVError | None:
        """Why item `index` of the step's list `kind` was refused; None if it was done."""
        return next((item.error for item in self.refused if item.kind == kind and item.index == index), None)


def _step_reply(reply: dict[str, Any]) -> StepReply:
    return StepReply(
        reply["version"],
        [Opened(*item) if item else None for item in reply.get("opened", [])],
        reply.get("handoffs", []),
        reply.get("queued", []),
        [Pinned(*item) if item else None for item in reply.get("pinned", [])],
        [Refused(kind, index, error_from_wire(*error)) for kind, index, *error in reply.get("refused", [])],
        [Notice(*item) for item in reply.get("notices", [])],
        reply.get("forked", []),
        [Victim(*item) for item in reply.get("victims", [])],
        reply.get("targets", []),
    )


class Surface:
    """The methods that the embedded manager and the client have in common. Subclasses carry commands and keep `notices` flowing."""

    def __init__(self) -> None:
        self._epochs: dict[int, int] = {}  # worker that joined through here -> the manager's life it did so in
        self.notices: list[Notice] = []  # delivered with replies to other calls than `step`; the next `step` hands them on

    def _execute(self, command: Command) -> dict[str, Any]:
        """The decoded reply, or the KVError that the manager answered."""
        raise NotImplementedError

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a query (see kvmanager.machine.queries), or the KVError that the manager answered. Nothing changes, nothing is logged."""
        raise NotImplementedError

    def _run(self, command: Command) -> dict[str, Any]:
        reply = self._execute(command)
        self.notices += [Notice(*item) for item in reply.get("notices", [])]
        return reply

    # --- for schedulers ------------------------------------------------------------------------------------------------------

    def step(
        self,
        *,
        opens: Sequence[Open] = (),
        grow: Any = (),
        grow_counts: Any = None,
        close: Any = (),
        tokens: Sequence[tuple[int, Tokens]] = (),
        hand_off: Sequence[HandOff | tuple[int, str]] = (),
        abort: Any = (),
        dequeue: Any = (),
        enqueue: Sequence[Enqueue] = (),
        truncate: Any = (),
        fork: Any = (),
        pin: Sequence[Pin] = (),
        unpin: Any = (),
        release: Sequence[tuple[bytes, bytes]] = (),
        victims: bool = False,
        forget: Any = (),
    ) -> StepReply:
        """One scheduler step for the whole batch; see `commands.Step` for each argument and their order.

        Raises InvalidValue if any value is malformed; nothing has changed then. Items that cannot be done are in `.refused`.
        Raises StaleEpoch, once, if the manager's host was lost and with it something that a reply has told: sequences may be shorter
        than they were, or gone, or open again. Nothing has changed then; close what cannot be told apart, and go on.
        """
        command = Step(
            opens=tuple(opens),
            grow=grow,
            grow_counts=grow_counts,
            close=close,
            tokens=tuple(tokens),
            hand_off=tuple(hand_off),
            abort=abort,
            dequeue=dequeue,
            enqueue=tuple(enqueue),
            truncate=truncate,
            fork=fork,
            pin=tuple(pin),
            unpin=unpin,
            release=tuple(release),
            victims=victims,
            forget=forget,
        )
        reply = _step_reply(self._execute(command))
        if self.notices:
            reply.notices[:0], self.notices = self.notices, []
        return reply

    def dry_run(self, **items: Any) -> DryRun:
        """What a step of these items (the same arguments as `step`'s) would come to, decided by the same code. Nothing happens.

        Raises InvalidValue as `step` does.
        """
        return read_dry_run(self._ask({"t": "dry_run", "step": command_to_wire(Step(**items))}))

    def _one(self, kind: str, command: Step) -> dict[str, Any]:
        reply = self._run(command)
        for refused_kind, _, *error in reply.get("refused", []):
            if refused_kind == kind:
                raise error_from_wire(*error)
        return reply

    def open(
        self,
        tokens: Tokens,
        pool: str = "",
        *,
        tenant: bytes = b"",
        extra: bytes = b"",
        chunk: int = 0,
        group: str = "",
        wait: bool = True,
        priority: int = 0,
        waiting: int = 0,
        extras: Sequence[tuple[bytes, int, int]] = (),
        reserve: int = 0,
    ) -> Opened:
        """Open one sequence; see `commands.Open`.

        Raises OutOfPages, PrefixPending, SequenceTooLarge, PoolNotReady, Unknown (pool, group), TooMany.
        """
        reply = self._one("open", Step(opens=(Open(tokens, pool, tenant, extra, chunk, group, wait, priority, waiting, extras, reserve),)))
        return Opened(*reply["opened"][0])

    def grow(self, sequence: int, count: int = 1) -> int:
        """Reserve slots for `count` more tokens of a sequence; gives the version. Raises OutOfPages, SequenceTooLarge, Unknown, WrongState."""
        return self._one("grow", Step(grow=[sequence], grow_counts=[count]))["version"]

    def append_tokens(self, sequence: int, tokens: Tokens) -> int:
        """Make the ids of decoded tokens known, so that their pages can be shared. Raises Unknown."""
        return self._one("tokens", Step(tokens=((sequence, tokens),)))["version"]

    def close(self, sequence: int, *, forget: bool = False) -> int:
        """End a sequence. Its written pages stay cached for sharing until they are evicted, or are forgotten at once. Raises Unknown."""
        if forget:
            return self._one("forget", Step(forget=[sequence]))["version"]
        return self._one("close", Step(close=[sequence]))["version"]

    def enqueue(
        self,
        tokens: Tokens,
        pool: str = "",
        *,
        tenant: bytes = b"",
        extra: bytes = b"",
        group: str = "",
        front: bool = False,
        extras: Sequence[tuple[bytes, int, int]] = (),
    ) -> int:
        """A prompt waits in the scheduler's queue; gives its id. See `commands.Enqueue`. Raises Unknown (pool, group), TooMany."""
        return self._one("enqueue", Step(enqueue=(Enqueue(tokens, pool, tenant, extra, group, front, extras),)))["queued"][0]

    def dequeue(self, waiting: int) -> int:
        """A prompt waits no longer, and was not opened; gives the version. Raises Unknown."""
        return self._one("dequeue", Step(dequeue=[waiting]))["version"]

    def truncate(self, sequence: int, length: int) -> int:
        """Make a sequence its first `length` tokens again; gives the version. Raises Unknown, InvalidValue, WrongState, OutOfPages."""
        return self._one("truncate", Step(truncate=((sequence, length),)))["version"]

    def fork(self, sequence: int, count: int = 1) -> list[int]:
        """Begin `count` sequences as copies of this one; gives their ids. Raises Unknown, WrongState, TooMany, OutOfPages."""
        return self._one("fork", Step(fork=((sequence, count),)))["forked"][0]

    def pin(
        self,
        tokens: Tokens,
        pool: str,
        *,
        tenant: bytes = b"",
        extra: bytes = b"",
        lease_ms: int = 0,
        lease_steps: int = 0,
        session: bytes = b"",
        extras: Sequence[tuple[bytes, int, int]] = (),
    ) -> Pinned:
        """Keep a prefix cached; see `commands.Pin`. Raises NotCached, OverPinBudget, Unknown (pool), TooMany."""
        item = Pin(tokens, pool, tenant, extra, 0, lease_ms, lease_steps, session, extras)
        return Pinned(*self._one("pin", Step(pin=(item,)))["pinned"][0])

    def hold(self, sequence: int, session: bytes, *, lease_ms: int = 0, lease_steps: int = 0) -> Pinned:
        """A session keeps what the index has of a sequence, instead of the shorter prefix that it kept before; see `commands.Pin`.

        Raises NotCached, OverPinBudget, Unknown (sequence), TooMany.
        """
        item = Pin(sequence=sequence, lease_ms=lease_ms, lease_steps=lease_steps, session=session)
        return Pinned(*self._one("pin", Step(pin=(item,)))["pinned"][0])

    def unpin(self, pin: int) -> int:
        """Let a pinned prefix go, or one branch of a session; gives the version. Raises Unknown."""
        return self._one("unpin", Step(unpin=[pin]))["version"]

    def release(self, session: bytes, *, tenant: bytes = b"") -> int:
        """Let everything go that a session holds; gives the version. Raises Unknown."""
        return self._one("release", Step(release=((tenant, session),)))["version"]

    def pins(self, tenant: bytes | None = None) -> list[dict[str, Any]]:
        """All pins, or those of one tenant: pin, client, pool, tenant, session, tokens, pages, and what is left of the leases."""
        return self._ask({"t": "pins"} if tenant is None else {"t": "pins", "tenant": tenant})["pins"]

    def hand_off(self, sequence: int, pool: str = "", *, group: str = "", reserve: bool = False, stream: bool = False) -> int:
        """Move a sequence to another pool, or to the best one of a group; gives the handoff id. See `commands.HandOff`.

        The outcome comes as a notice: resident or aborted. Raises Unknown, WrongState, InvalidValue, LayoutMismatch, NoConversion, SequenceTooLarge,
        PoolNotReady, PoolDrains, TooMany, OverQuota, and OutOfPages if pages are to be reserved.
        """
        return self._one("hand_off", Step(hand_off=(HandOff(sequence, pool, group, reserve, stream),)))["handoffs"][0]

    def abort(self, handoff: int) -> int:
        """Give a handoff up; the sequence stays in its source pool. Raises Unknown if it is over."""
        return self._one("abort", Step(abort=[handoff]))["version"]

    def touch(self) -> int:
        """Say that this client is alive, if it has nothing else to say within `ManagerConfig.client_lease_ms`; gives the version."""
        return self._run(Step())["version"]

    # --- for whoever runs the service ----------------------------------------------------------------------------------------

    def set_quota(self, tenant: bytes | None, pages: int | None, pool: str = "") -> int:
        """So many pages for a tenant, or for every one without a quota of its own (None); gives the version. See `commands.SetQuota`.

        Raises Unknown (pool), TooMany.
        """
        return self._run(SetQuota(tenant, pages, pool))["version"]

    def flush(self, tenant: bytes, pool: str = "") -> int:
        """Forget everything that is cached for a tenant; gives the pages that nobody held. See `commands.Flush`. Raises Unknown (pool)."""
        return self._run(Flush(tenant, pool))["pages"]

    def drain(self, pool: str = "", *, worker: int = 0, stop: bool = False) -> dict[str, int]:
        """Empty a pool, or that of a worker, while everybody goes on; gives the sequences and handoffs that are still there.

        "drained" comes as a notice, and stands in `stats`, once the workers can leave. See `commands.Drain`. Raises Unknown, Fenced.
        """
        reply = self._run(Drain(pool, worker, stop))
        return {"sequences": reply["sequences"], "handoffs": reply["handoffs"]}

    def tenants(self) -> list[dict[str, Any]]:
        """Tenants with a quota or pins, by pool: tenant, pages, quota, pinned."""
        return self._ask({"t": "tenants"})["tenants"]

    # --- for workers and whoever watches over them ---------------------------------------------------------------------------

    def join(self, name: str, pool: str, layout: str, *, memory: bytes = b"", lease_ms: int = 0, page_bytes: int = 0) -> int:
        """A worker with fresh memory joins a pool; gives its id. Raises LayoutMismatch, WrongState, Unknown (pool), TooMany."""
        reply = self._run(Join(name, pool, layout, memory, lease_ms, page_bytes=page_bytes))
        self._epochs[reply["worker"]] = reply["epoch"]
        return reply["worker"]

    def epoch_of(self, worker: int) -> int:
        """The life of the manager in which the worker joined through this object, 0 if it did not: for `worker_gone` by somebody else."""
        return self._epochs.get(worker, 0)

    def ack(
        self,
        worker: int,
        version: int,
        *,
        ids: Any = (),
        tokens: Any = (),
        pulled: Any = (),
        epoch: int = 0,
        as_of: int = 0,
        failed: Any = (),
        layers: Any = (),
        links: Any = (),
    ) -> int:
        """A worker reports what it finished; see `commands.Ack`. `epoch` is 0 for that in which it joined through this object.

        Raises Fenced if its lease ended, StaleEpoch if the manager does not continue what the worker has followed: drain, join again.
        """
        return self._run(Ack(worker, version, ids, tokens, pulled, epoch or self.epoch_of(worker), as_of, failed, layers, links))["version"]

    def worker_gone(self, worker: int, *, epoch: int = 0) -> list[int]:
        """The worker's process is known dead, or it drained; gives the sequences that are lost with it.

        epoch  a life of the manager in which the worker had this id, 0 is not checked unless it joined through this object

        Raises Unknown, StaleEpoch.
        """
        lost = self._run(WorkerGone(worker, epoch or self.epoch_of(worker)))["lost"]
        self._epochs.pop(worker, None)
        return lost

    # --- for whoever asks ----------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Pages of each pool by state, workers, handoffs; see `queries.pool_stats`."""
        return self._ask({"t": "stats"})

    def workers(self) -> list[dict[str, Any]]:
        """All workers: worker, name, pool, acked, behind (versions), lease_left_ms, fenced, links
        (how it reaches others' pages: worker, name, transport, reason)."""
        return self._ask({"t": "workers"})["workers"]

    def handoffs(self, limit: int = 1000) -> list[dict[str, Any]]:
        """The oldest handoffs under way: handoff, sequence, state, source, target, tokens, pages, pages_shared, pulled,
        transport (as far as the pullers have said), failed (tries), age (versions).

        Raises InvalidValue (limit above 10,000).
        """
        return self._ask({"t": "handoffs", "limit": limit})["handoffs"]

    def snapshot(self) -> bytes:
        """The manager's state as the bytes of one event batch."""
        return self._ask({"t": "snapshot"})["snapshot"]

    def batches_since(self, epoch: int, version: int) -> list[bytes]:
        """Batches after `version`, which a reader of the life `epoch` has applied: oldest first, a part at a time, none at the end.

        Raises ReplicaGap if some are gone, StaleEpoch if it has seen what the manager's log does not hold: it has to take a snapshot.
        """
        return self._ask({"t": "batches", "epoch": epoch, "version": version})["batches"]

    def explain(
        self,
        tokens: Tokens,
        pool: str = "",
        *,
        tenant: bytes = b"",
        extra: bytes = b"",
        group: str = "",
        extras: Sequence[tuple[bytes, int, int]] = (),
    ) -> list[Explanation]:
        """Why no more of a prompt is found in the cache of a pool, or of each pool of a group. See `kvmanager.machine.explain` for the reasons.

        Raises InvalidValue, Unknown (pool, group).
        """
        data = as_tokens("explain.tokens", tokens).tobytes()
        prompt = {"tokens": data, "pool": pool, "tenant": tenant, "extra": extra, "group": group, "extras": list(extras)}
        answer = self._ask({"t": "explain", **prompt})
        return [Explanation(*row) for row in answer["pools"]]

    def tables_snapshot(self) -> bytes:
        """The part of the manager's state that a replica starts from: tables, workers, handoffs."""
        return self._ask({"t": "tables"})["tables"]
