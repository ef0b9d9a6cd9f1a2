"""State: everything the manager knows. `apply` is its only writer, `decide` and the queries here only read.

Knows nothing of sockets, clocks, files or threads: time comes in with each batch. Nothing iterates a set or hashes a string, so two
processes that apply the same batches hold the same state, and `snapshot` writes it as the same bytes.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvmanager.config import ManagerConfig
from kvmanager.errors import Fenced, Unknown
from kvmanager.pages.accounts import tenant_of
from kvmanager.pages.extras import Extras
from kvmanager.pages.handoff import Handoff, Handoffs
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import TOKEN_BYTES, Node
from kvmanager.pages.queue_hint import Prompt
from kvmanager.pages.sequences import Sequence, Tables

__all__ = ["Client", "Notice", "PinHeld", "State", "Worker", "encode_namespace", "tenant_of"]

NEVER = 1 << 62  # a version that no step reaches: what a pool without workers has acknowledged


class Notice(NamedTuple):
    """News for the client that owns a sequence; handed over with its next reply.

    kind: "lost" (the pool's memory is gone, open it again elsewhere), "resident" (decode it in the target pool now), "aborted"
    (the handoff failed; the sequence is still in its source pool unless it was lost too), "moving" (the manager has begun a handoff of its
    own: the pool drains, or the handoff before it failed), "drained" (nothing is left in the pool), "dropped" (too many waited to be
    fetched: as many as `handoff` says, the oldest, are gone).
    reason: for people; of "resident" and "moving" the target pool's name, of "drained" the pool's. code: for programs, "" for resident, else
    "lost", "closed", "asked" (to abort), "timed_out", "stalled" (its source gets on with nothing: compute it elsewhere), "pull_failed",
    "drain", or the code of an error: "sequence_too_large" and "over_quota" say that trying again would not help. moved, spared: of "resident"
    the pages that moved, and those that the target had; page_bytes: of each of them, 0 if the target's workers have not said.
    """

    kind: str
    sequence: int
    handoff: int
    reason: str
    code: str = ""
    moved: int = 0
    spared: int = 0
    page_bytes: int = 0


@dataclass(slots=True)
class Worker:
    """One process with page memory. Its id is never used again: a worker that joins anew is another one, with fresh memory.

    client  that asked for it to join
    joined  version in which it did
    links   worker -> how this one reaches its pages, (transport, reason), what was said last at the end
    """

    worker_id: int
    name: str
    pool: int
    layout: str
    memory: bytes
    lease_ms: int
    client: int
    joined: int
    acked: int
    deadline_ms: int
    fenced: bool = False
    links: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(slots=True)
class Client:
    """Last request of a client and its reply, so that a repetition is answered and not executed; and its undelivered news."""

    client_id: int
    number: int = 0
    version: int = 0
    reply: bytes = b""
    notices: list[Notice] = field(default_factory=list)
    seen_ms: int = 0  # when its last command came


@dataclass(slots=True)
class PinHeld:
    """A pinned prefix: the pages from the root of its namespace to `node`. A deadline of 0 is none."""

    pin_id: int
    client: int
    pool: int
    namespace: bytes
    node: Node
    session: bytes
    deadline_ms: int
    deadline_version: int

    def expired(self, now_ms: int, version: int) -> bool:
        return bool(self.deadline_ms and now_ms > self.deadline_ms) or bool(self.deadline_version and version >= self.deadline_version)


def encode_namespace(tenant: bytes, extra: bytes) -> bytes:
    """Key of everything that may share pages: tenant salt and extra key (LoRA id, image hash). Injective: lengths lead."""
    return struct.pack("<HH", len(tenant), len(extra)) + tenant + extra


class State:
    def __init__(self, config: ManagerConfig, epoch: int = 1) -> None:
        self.config = config
        self.epoch = epoch
        self.version = 0
        self.now_ms = 0
        self.pools: list[Pool] = []
        self.groups: dict[str, list[Pool]] = {}
        self.tables = Tables()
        self.sequences: dict[int, Sequence] = {}
        self.families: dict[int, dict[int, None]] = {}  # sequences forked from each other
        self.workers: dict[int, Worker] = {}
        self.pool_workers: list[list[int]] = []
        self.handoffs = Handoffs()
        self.sealed: dict[int, None] = {}  # sequences that do not grow, because a handoff reads them or will
        self.clients: dict[int, Client] = {}
        self.waiting: OrderedDict[int, Prompt] = OrderedDict()  # the scheduler's queue, nearest first
        self.waiting_tokens = 0
        self.extras = Extras()
        self.free_slots: list[int] = list(range(config.sequences_max - 1, -1, -1))
        self.next_generation = 1
        self.next_worker = 1
        self.next_handoff = 1
        self.next_waiting = 1
        self.pins: dict[int, PinHeld] = {}
        self.sessions: dict[tuple[bytes, bytes], dict[int, None]] = {}  # (tenant, session) -> pins
        self.next_pin = 1
        self.past: dict[int, int] = {}  # earlier lives that this log continues, oldest first: epoch -> its last version
        self.begun = 0  # the first version of this life, if it continues another
        self.unsettled: dict[int, None] = {}  # workers that have not acknowledged it, of all pools

    # --- queries -------------------------------------------------------------------------------------------------------------

    def pool(self, name: str) -> Pool:
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise Unknown("pool", name)

    def sequence(self, sequence_id: int) -> Sequence:
        found = self.sequences.get(sequence_id)
        if found is None:
            raise Unknown("sequence", sequence_id)
        return found

    def worker(self, worker_id: int) -> Worker:
        """A worker whose word counts. Raises Unknown, or Fenced if its lease ended."""
        found = self.workers.get(worker_id)
        if found is None:
            raise Fenced(f"worker {worker_id}: expected a worker that has joined and is not known dead", worker=worker_id)
        if found.fenced:
            raise Fenced(f"worker {worker_id} ({found.name}): its lease ended; drain, then join again", worker=worker_id)
        return found

    def handoff(self, handoff_id: int) -> Handoff:
        found = self.handoffs.get(handoff_id)
        if found is None:
            raise Unknown("handoff", handoff_id)
        return found

    def page_sizes(self, rows: np.ndarray) -> np.ndarray | int:
        """Page size of the pool of each table row, int64; one int for all where there is one pool."""
        if len(self.pools) == 1:
            return self.pools[0].page_size
        return np.array([pool.page_size for pool in self.pools], np.int64)[self.tables.pools[rows]]

    def acked(self, pool: int) -> int:
        """The version that every worker of the pool has acknowledged, fenced ones included: they may still be writing."""
        return min((self.workers[worker].acked for worker in self.pool_workers[pool]), default=NEVER)

    def reusable(self, pool: int) -> int:
        """Pages of the pool that were let go up to this version may be handed out: nobody can be touching them any more.

        After a restart that is nothing before the workers of all pools have acknowledged this life, or are known dead: by an end of the
        log that was lost with its host, any of them may have been told to pull from here.
        """
        acked = self.acked(pool)
        return min(acked, self.begun - 1) if self.unsettled else acked

    def live_workers(self, pool: int) -> list[int]:
        return [worker for worker in self.pool_workers[pool] if not self.workers[worker].fenced]

    def written(self, sequence: Sequence) -> int:
        """Tokens that every live worker of the sequence's pool has acknowledged as written; 0 in a pool without workers."""
        return min((sequence.written.get(worker, 0) for worker in self.live_workers(sequence.pool)), default=0)

    def publishable_pages(self, sequence: Sequence, written: int) -> int:
        """Leading pages that may be in the prefix index: full, acknowledged as `written`, token ids known."""
        return min(written, len(sequence.tokens) // TOKEN_BYTES) // self.pools[sequence.pool].page_size
