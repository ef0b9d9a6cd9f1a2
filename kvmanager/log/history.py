"""History: a journal read from outside, while its manager may be running: the state at any version, and who held a page when.

Reads files and changes none. A torn tail and a damaged record are part of the answer, not errors: what is intact before them is shown.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvmanager.config import ManagerConfig, PoolConfig
from kvmanager.errors import BadMessage, InvalidValue, InvariantBroken, JournalCorrupt
from kvmanager.log.files import Files
from kvmanager.log.journal import Segment, segment_names
from kvmanager.machine import events as ev
from kvmanager.machine.apply import apply
from kvmanager.machine.batch import EventBatch, decode_batch
from kvmanager.machine.pins import pages_of
from kvmanager.machine.queries import pool_stats
from kvmanager.machine.snapshot import load_snapshot
from kvmanager.machine.state import State
from kvmanager.machine.workers import links_of
from kvmanager.pages.pool import Pool
from kvmanager.pages.sequences import slot_of

__all__ = ["History", "Holding", "PageWatch", "SequenceWatch", "describe_state"]

# What `apply` needs is in the snapshot; bounds only matter to `decide`.
_ANY_CONFIG = ManagerConfig((PoolConfig("any", 1),), sequences_max=1)
# Batches of these alone move no page.
_MOVE_NO_PAGE = (ev.GrownAgain, ev.WorkerAcked, ev.SequencesWritten, ev.TokensAppended, ev.ClientAnswered, ev.ClientForgotten)


class Holding(NamedTuple):
    """Why a page is what it is: kind is "free", "sequence", "index", "handoff", "pin" or "quarantine".

    ident   sequence, handoff or pin id; the freeing version of a quarantined page
    tokens  [first, last) token positions that the page holds for it; None where that means nothing
    note    tenant, or the side of a handoff
    """

    kind: str
    ident: int
    tokens: tuple[int, int] | None
    note: str


@dataclass(slots=True)
class Interval:
    """A holding from version `first` until just before version `end`; None if it goes on, `first` 0 if it began before the journal."""

    holding: Holding
    first: int
    end: int | None = None


def show_bytes(data: bytes) -> str:
    """Text if it is printable, hexadecimal if not."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return f"0x{data.hex()}"
    return text if text.isprintable() else f"0x{data.hex()}"


def split_namespace(namespace: bytes) -> tuple[bytes, bytes]:
    """(tenant, extra key) of what `state.encode_namespace` made."""
    tenant = struct.unpack_from("<H", namespace)[0]
    return namespace[4 : 4 + tenant], namespace[4 + tenant :]


def holdings(state: State, pool: Pool, page: int) -> list[Holding]:
    """Everybody who holds a page now."""
    found: list[Holding] = []
    size = pool.page_size

    def span(index: int) -> tuple[int, int]:
        return index * size, (index + 1) * size

    tables = state.tables
    rows, places = np.nonzero(tables.pages == page)
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        sequence = state.sequences.get(int(tables.ids[row]))
        if sequence is not None and tables.pools[row] == pool.index and place < tables.page_counts[row]:
            found.append(Holding("sequence", sequence.sequence_id, span(place), show_bytes(split_namespace(sequence.namespace)[0])))
    node = pool.prefix.node_of[page]
    if node is not None:
        above = list(node.path())
        place = sum(each.count for each in above[1:]) + node.pages.index(page)
        root = above[-1].parent
        salt = split_namespace(root.tokens)[0] if root is not None else b""
        found.append(Holding("index", 0, span(place), show_bytes(salt)))
    for handoff in state.handoffs.values():
        for side, index, pages in (
            ("source", handoff.source, handoff.source_pages),
            ("target", handoff.target, handoff.target_pages),
        ):
            if index == pool.index:
                places_held = np.flatnonzero(np.asarray(pages, np.int64) == page).tolist()
                found += [Holding("handoff", handoff.handoff_id, span(place), side) for place in places_held]
    for held in state.pins.values():
        if held.pool == pool.index:
            places_held = np.flatnonzero(pages_of(held) == page).tolist()
            tenant = split_namespace(held.namespace)[0]
            found += [Holding("pin", held.pin_id, span(place), show_bytes(tenant)) for place in places_held]
    for entry in pool.quarantine.values():
        if (np.asarray(entry.pages) == page).any():
            found.append(Holding("quarantine", entry.version, None, ""))
    return found or [Holding("free", 0, None, "")]


class PageWatch:
    """Who held one page, version by version. Without a pool's name it is that of the only one.

    Raises InvalidValue from the replay if there are several, or the page is none of its pages.
    """

    def __init__(self, pool: str | None, page: int) -> None:
        self.pool, self.page = pool, page
        self.page_size = 0
        self.intervals: list[Interval] = []
        self._open: dict[Holding, Interval] = {}

    def start(self, state: State, known: bool) -> None:
        """The first state of a run of segments. `known`: nothing came before it."""
        for each in self._open.values():
            each.end = state.version
        self._open = {}
        self._note(state, state.version if known else 0)

    def before(self, state: State, batch: EventBatch) -> None: ...

    def after(self, state: State, batch: EventBatch) -> None:
        for event in batch.events:
            grown = isinstance(event, (ev.SequencesGrown, ev.GrownFurther))
            if not isinstance(event, _MOVE_NO_PAGE) and not (grown and self.page not in event.pages):
                self._note(state, batch.version)
                return

    def _note(self, state: State, version: int) -> None:
        if self.pool is None and state.pools:
            if len(state.pools) > 1:
                raise InvalidValue("--pool", f"one of {', '.join(each.name for each in state.pools)}", "none")
            self.pool = state.pools[0].name
        pool = next((each for each in state.pools if each.name == self.pool), None)
        if pool is not None and not self.page_size:
            if self.page >= pool.num_pages:
                raise InvalidValue("--page", f"0..{pool.num_pages - 1}, the pages of pool {pool.name}", self.page)
            self.page_size = pool.page_size
        now = dict.fromkeys(holdings(state, pool, self.page)) if pool is not None else {}
        for holding in [each for each in self._open if each not in now]:
            self._open.pop(holding).end = version
        for holding in now:
            if holding not in self._open:
                self._open[holding] = interval = Interval(holding, version)
                self.intervals.append(interval)


class SequenceWatch:
    """One sequence: when it was opened, moved and closed, and its table as it is or last was."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.opened: int | None = None
        self.closed: int | None = None
        self.story: list[tuple[int, str]] = []
        self.last: dict[str, Any] | None = None
        self._handoffs: dict[int, None] = {}

    def start(self, state: State, known: bool) -> None: ...

    def before(self, state: State, batch: EventBatch) -> None:
        if self.sequence in state.sequences and any(
            isinstance(event, ev.SequenceClosed) and event.sequence == self.sequence for event in batch.events
        ):
            self.last = describe_sequence(state, self.sequence)

    def after(self, state: State, batch: EventBatch) -> None:
        for event in batch.events:
            if isinstance(event, ev.SequencesGrown):
                if len(event.pages) and (event.ids == self.sequence).any():
                    self.story.append((batch.version, f"grows to {state.tables.length(self.sequence)} tokens"))
            elif isinstance(event, ev.GrownFurther):
                if (state.tables.last_ids[event.at] == self.sequence).any():
                    self.story.append((batch.version, f"grows to {state.tables.length(self.sequence)} tokens"))
            elif isinstance(event, ev.SequencesTruncated):
                if (event.ids == self.sequence).any():
                    self.story.append((batch.version, f"truncated to {int(event.lengths[event.ids == self.sequence][0])} tokens"))
            elif isinstance(event, ev.SequenceForked):
                if (event.children == self.sequence).any():
                    self.opened = batch.version
                    self.story.append((batch.version, f"forked by client {event.owner} from {event.parent} at {event.length} tokens"))
                elif event.parent == self.sequence:
                    self.story.append((batch.version, f"forked at {event.length} tokens: {', '.join(map(str, event.children.tolist()))}"))
            elif getattr(event, "sequence", 0) == self.sequence or getattr(event, "handoff", 0) in self._handoffs:
                if isinstance(event, ev.HandoffBegun):
                    self._handoffs[event.handoff] = None
                if isinstance(event, ev.SequenceOpened):
                    self.opened = batch.version
                    pool = state.pools[event.pool]
                    count = len(event.cached) * pool.page_size + len(event.tokens)
                    told = f"opened by client {event.owner} in pool {pool.name}: {count} tokens, "
                    self.story.append((batch.version, f"{told}{len(event.cached)} cached and {len(event.fresh)} fresh pages"))
                elif isinstance(event, ev.SequenceClosed):
                    self.closed = batch.version
                    self.story.append((batch.version, f"closed, reason {event.reason}"))
                elif not isinstance(event, ev.TokensAppended):
                    self.story.append((batch.version, _name(event)))


def _name(event: Any) -> str:
    parts = [f"{name} {value}" for name, value in event._asdict().items() if isinstance(value, (int, str)) and name != "sequence"]
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in type(event).__name__).strip()
    return ", ".join([words, *parts])


def describe_sequence(state: State, sequence_id: int) -> dict[str, Any]:
    """A sequence and its block table, page by page."""
    sequence = state.sequences[sequence_id]
    pool = state.pools[sequence.pool]
    tenant, extra = split_namespace(sequence.namespace)
    tables = state.tables
    table = []
    for index, page in enumerate(tables.pages_of(sequence_id).tolist()):
        rows, _ = np.nonzero(tables.pages == page)
        others = [int(tables.ids[row]) for row in rows.tolist() if tables.pools[row] == pool.index]
        table.append(
            {
                "page": page,
                "tokens": [index * pool.page_size, (index + 1) * pool.page_size],
                "published": index < sequence.published,
                "shared_with": sorted(each for each in others if each not in (0, sequence_id)),
            }
        )
    return {
        "sequence": sequence_id,
        "slot": slot_of(sequence_id),
        "pool": pool.name,
        "owner": sequence.owner,
        "tenant": show_bytes(tenant),
        "extra": show_bytes(extra),
        "length": tables.length(sequence_id),
        "tokens_known": len(sequence.tokens) // 4,
        "written": {str(worker): tokens for worker, tokens in sorted(sequence.written.items())},
        "handoff": sequence.handoff,
        "sealed": sequence.sealed,
        "table": table,
    }


def describe_state(state: State) -> dict[str, Any]:
    """Pages by state, workers, sequences, handoffs, lives."""
    found = pool_stats(state)
    for pool in state.pools:
        workers = [state.workers[each] for each in state.pool_workers[pool.index]]
        found["pools"][pool.name]["workers"] = {
            str(each.worker_id): {"name": each.name, "acked": each.acked, "fenced": each.fenced, "links": links_of(state, each)}
            for each in workers
        }
        del found["pools"][pool.name]["fenced"]
    sequences = []
    for sequence_id, sequence in state.sequences.items():
        tenant = show_bytes(split_namespace(sequence.namespace)[0])
        sequences.append(
            {
                "sequence": sequence_id,
                "pool": state.pools[sequence.pool].name,
                "owner": sequence.owner,
                "tenant": tenant,
                "length": state.tables.length(sequence_id),
                "pages": len(state.tables.pages_of(sequence_id)),
                "published": sequence.published,
                "handoff": sequence.handoff,
            }
        )
    lives = [{"epoch": epoch, "last": last} for epoch, last in state.past.items()]
    return {**found, "time_ms": state.now_ms, "lives": lives, "clients": len(state.clients), "open": sequences}


@dataclass(slots=True)
class History:
    """A journal's folder. `torn` bytes lie behind the last intact record; `damage` says where an intact record lies behind a damaged one."""

    folder: str
    files: Files = field(default_factory=Files)
    segments: list[dict[str, Any]] = field(default_factory=list)
    torn: int = 0
    damage: JournalCorrupt | None = None
    state: State | None = None

    def names(self) -> list[str]:
        try:
            found = segment_names(self.files.names(self.folder))
        except OSError as error:
            raise InvalidValue("journal", "a folder that can be read", f"{self.folder}: {error.strerror}") from None
        if not found:
            raise InvalidValue("journal", "a folder with segments of a journal (*.kvj)", self.folder)
        return found

    def replay(
        self,
        at: int | None = None,
        watch: PageWatch | SequenceWatch | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> State:
        """The state at version `at` (the newest: None), having shown every batch up to it to `watch`. Raises InvalidValue."""
        names = self.names()
        versions = [int(name[:20]) for name in names]
        if at is not None and at < versions[0]:
            raise InvalidValue("--at", f"at least {versions[0]}, the oldest version in the journal", at)
        first = 0 if watch is not None else max(index for index, version in enumerate(versions) if at is None or version <= at)
        try:
            for number, name in enumerate(names[first:], first):
                if at is None or versions[number] <= at:
                    self._replay_segment(name, at, watch, progress)
        except JournalCorrupt as error:
            self.damage = error
        if self.state is None:
            raise self.damage or InvalidValue("journal", "a segment that can be read", self.folder)
        if at is not None and at > self.state.version and self.damage is None and number == len(names) - 1:
            raise InvalidValue("--at", f"at most {self.state.version}, the newest version in the journal", at)
        return self.state

    def _replay_segment(
        self, name: str, at: int | None, watch: PageWatch | SequenceWatch | None, progress: Callable[[int, int], None]
    ) -> None:
        try:
            data = self.files.read(f"{self.folder}/{name}")
        except FileNotFoundError:
            return  # a running manager has removed it meanwhile
        segment = Segment(name, data)
        told = {"name": name, "version": segment.version, "bytes": len(data), "batches": 0}
        self.segments.append(told)
        offset = segment.start
        try:
            if self.state is None or self.state.version != segment.version:
                known = segment.version == 0 and self.state is None
                self.state = load_snapshot(_ANY_CONFIG, decode_batch(bytes(segment.snapshot)))
                if watch is not None:
                    watch.start(self.state, known)
            for record in segment:
                if at is not None and record.version > at:
                    return
                offset = record.offset
                batch = decode_batch(bytes(record.data))
                if watch is not None:
                    watch.before(self.state, batch)
                apply(self.state, batch)
                if watch is not None:
                    watch.after(self.state, batch)
                told["batches"] += 1
                if not told["batches"] % 1000:
                    progress(offset, len(data))
        except (BadMessage, InvariantBroken) as error:
            raise JournalCorrupt(name, offset, "a batch that can be applied", f"{type(error).__name__}: {error}"[:500]) from error
        self.torn = segment.torn
