"""Replica: a worker's copy of the block tables, and the bookkeeping that keeps the worker honest. No sockets here: feed it bytes.

It applies batches in order and stops after one that gives its pool something to write, until that step has been run: so lengths and
tables are exactly those of the step, and what it acknowledges is true by construction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvmanager.errors import InvalidValue, ReplicaGap, StaleEpoch, StaleStep, Unknown, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EventBatch, decode_batch
from kvmanager.pages.handoff import HandoffState
from kvmanager.pages.sequences import Tables
from kvmanager.tables import BatchRows, BatchTables, div_ceil
from kvmanager.worker.ahead import AHEAD_MAX, Ahead, Aheads
from kvmanager.worker.streams import LAYERS_ALL, Piece, Stream

__all__ = ["AckContent", "Copies", "Peer", "Pull", "Replica"]

REASON_MAX = 500
LINK_REASON_MAX = 300
NO_PAGES = np.zeros(0, np.int32)


class Peer(NamedTuple):
    """A worker as others see it."""

    worker: int
    name: str
    pool: int
    layout: str
    memory: bytes


class Pull(NamedTuple):
    """Pages to copy into this pool from `peer`'s. What is there already, the sequence's first `shared_pages` pages, is not in it.

    source_pages, target_pages   of equal size, source_pages[i] to target_pages[i]; else `tokens` slots of all layers, one after the other:
                                 from slot `source_skip` of the first source page on, to the first slot of the first target page on
    source_page_size, target_page_size   slots of a page
    attempt    of this worker, from 0 on
    first_layer, end_layer   which layers of them, an `end_layer` of 0 is the last one's: see `layers`
    early      the handoff does not move yet: a piece of what its source has written so far, and there will be more
    """

    handoff: int
    sequence: int
    version: int
    peer: Peer
    source_pages: np.ndarray
    target_pages: np.ndarray
    shared_pages: int
    source_page_size: int = 0
    target_page_size: int = 0
    tokens: int = 0
    source_skip: int = 0
    attempt: int = 0
    first_layer: int = 0
    end_layer: int = 0
    early: bool = False

    def layers(self, num_layers: int) -> tuple[int, int]:
        """(first, end) for a memory of so many layers. Empty if the source said at the last of them that all were written."""
        end = min(self.end_layer or num_layers, num_layers)
        return min(self.first_layer, end), end


class Copies(NamedTuple):
    """Pages to copy in this worker's memory before it writes anything of step `version`: of all layers of source_pages[i] the first
    tokens[i] slots to target_pages[i]. No page is a source and a target, and all targets are distinct: any order will do. All int32."""

    version: int
    source_pages: np.ndarray
    target_pages: np.ndarray
    tokens: np.ndarray


class AckContent(NamedTuple):
    """What to send with `ack`: all of it, `as_of` included."""

    version: int
    ids: list[int]
    tokens: list[int]
    pulled: list[int]
    epoch: int
    as_of: int = 0
    failed: list[tuple[int, int, str]] = []  # noqa: RUF012 - never changed; (handoff, attempt, reason)
    layers: list[tuple[int, int, int]] = []  # noqa: RUF012 - never changed; (handoff, tokens, layers)
    links: list[tuple[int, str, str]] = []  # noqa: RUF012 - the same; (worker, transport, reason)


@dataclass(slots=True)
class _Moving:
    sequence: int
    source: int
    target: int
    shared: np.ndarray
    fresh: np.ndarray
    moving: bool = False
    moved_at: int = 0  # the version in which it began to
    streaming: bool = False
    sources: dict[int, int] = field(default_factory=dict)  # worker of the target -> worker that it pulls from
    tries: dict[int, int] = field(default_factory=dict)  # that failed


class Replica:
    """Tables of all pools, seen by a worker of `pool` (its name), or by an observer that runs nothing (None)."""

    def __init__(self, pool: str | None = None) -> None:
        self.pool_name = pool
        self.worker = 0  # its id, see `joined`
        self.stranded = False  # a worker whose pages are not what the manager believes: see `load`
        self.differs = False  # the tables are not the manager's: only a snapshot helps
        self._links: dict[int, tuple[str, str]] = {}  # peer -> how this worker reaches its pages
        self._num_layers = self._layer_group = 0  # see `pull_by_layers`
        self._aheads = Aheads()
        self._reset()

    def _reset(self) -> None:
        self.epoch = 0  # of the newest batch that was fed
        self.past: dict[int, int] = {}  # earlier lives that this log continues: epoch -> its last version
        self.version = 0  # applied
        self.known = 0  # fed
        self.step = 0  # the applied step that this pool has still to run, 0 if none
        self.acked = 0  # acknowledged: steps at or below it are refused
        self.tables = Tables()
        self.pools: list[ev.PoolAdded] = []
        self.pool = -1
        self.peers: dict[int, Peer] = {}
        self.leaving: dict[int, bool] = {}  # peers that have ended by what was fed and is not applied yet: whether known dead, not fenced
        self._links_untold: dict[int, None] = {}
        self._queue: deque[EventBatch] = deque()
        self._handoffs: dict[int, _Moving] = {}
        self._pulls: dict[int, Pull] = {}  # not yet finished
        self._copying: dict[int, int] = {}  # begun and not ended, aborted ones included: handoff -> version of its beginning
        self._begun: dict[int, Pull] = {}  # what of these is being copied
        self._streams: dict[int, Stream] = {}  # handoffs into this pool that are pulled piece by piece
        self._streamed: dict[int, int] = {}  # their sequences -> handoff
        self._streaming: dict[int, int] = {}  # own sequences that others pull while they are written -> handoff
        self._layers: dict[int, tuple[int, int]] = {}  # handoff -> tokens and layers of them that the step in progress has written
        self._there: dict[int, None] = {}  # handoffs that move here and of which all pages have come
        self._pulled: list[int] = []  # finished, to be reported
        self._failed: dict[int, tuple[Pull, str]] = {}  # ended without success: the pull, and why
        self._unreported: dict[int, None] = {}  # those of them that the manager has not been told of
        self._written: dict[int, int] = {}
        self._reported: dict[int, int] = {}
        self._handing: dict[int, None] = {}  # own sequences on their way out: report them to the token
        self._broken: dict[int, None] = {}  # a step of theirs was left out: there is a hole in their pages
        self._step_ids: list[int] = []
        self._copies: Copies | None = None  # to be carried out before anything else
        self._after_copies: dict[int, int] = {}  # sequence -> tokens that are written once they have been
        self._owed = False  # an acknowledgement would let something go on
        self._batch_rows: tuple[list[int], int, np.ndarray] = ([], -1, np.zeros(0, np.int64))  # ids, as of which placements, rows
        self._growing: tuple[np.ndarray, int, list[int]] = (self.tables.last_ids, -1, [])  # ids, as of which placements, those of this pool

    @property
    def page_size(self) -> int:
        return self.pools[self.pool].page_size

    def joined(self, worker: int) -> None:
        """This replica is that of the worker with this id: a handoff says which worker pulls from which. Say so before the first pull."""
        self.worker = worker
        for handoff, pull in self._pulls.items():  # begun before this was known, and not carried out yet
            move = self._handoffs[handoff]
            peer = self.peers.get(move.sources.get(worker, 0), pull.peer)
            self._pulls[handoff] = pull._replace(peer=peer, attempt=move.tries.get(worker, 0))

    # --- following -----------------------------------------------------------------------------------------------------------

    def load(self, data: bytes) -> None:
        """Start from a snapshot. What this worker wrote before it is forgotten, so it is never reported as written again.

        A worker that has followed another log - of a manager that is gone with all it knew, or the end of this one, lost with its host -
        is stranded: nobody knows what is in its pages. From then on it raises StaleEpoch: drain, and join again with a new replica.
        """
        batch = decode_batch(data)
        lives = next((event for event in batch.events if isinstance(event, ev.LivesRestored)), None)
        past = dict(zip(lives.epochs.tolist(), lives.lasts.tolist(), strict=True)) if lives is not None else {}
        same = (batch.epoch == self.epoch and batch.version >= self.known) or self.known <= past.get(self.epoch, -1)
        self.stranded |= self.epoch > 0 and self.pool_name is not None and not same
        acked, copying, begun = (self.acked if same else 0), self._copying, self._begun
        self._reset()
        self._aheads.reload(same)
        self._begun = begun
        self.epoch, self.version, self.known, self.acked = batch.epoch, batch.version, batch.version, acked
        self.past, self.differs = past, False
        self._copying = copying if same else dict.fromkeys(copying, 1)  # a snapshot does not stop a copy that is under way
        self._owed = True  # what was freed in the versions that it skipped
        for event in batch.events:
            self._apply(event)
        if self.pool_name is not None and self.pool < 0:
            raise Unknown("pool", self.pool_name)
        self._links = {peer: link for peer, link in self._links.items() if peer in self.peers}
        self._links_untold = dict.fromkeys(self._links)  # what was said before may have been lost
        # A snapshot may have skipped steps that this worker never ran: what is in these sequences' pages is not known.
        self._broken = dict.fromkeys(self._own(self.tables.open_ids()))

    def feed(self, data: bytes) -> None:
        """Take one event batch. Older ones are dropped; raises ReplicaGap if one is missing, or the manager restarted and this is not
        the very batch that continues."""
        batch = decode_batch(data)
        first = batch.events[0] if batch.events else None
        if isinstance(first, ev.EpochBegun) and (first.before, first.last) == (self.epoch, self.known):
            self.past[first.before] = first.last
            self.epoch, self.known = batch.epoch, batch.version
            self._queue.append(batch)
            self.advance()
            return
        if batch.epoch in self.past:
            return  # sent by the manager of an earlier life
        if batch.epoch != self.epoch:
            raise ReplicaGap(f"replica: expected epoch {self.epoch}, got {batch.epoch}: the manager restarted", epoch=batch.epoch)
        if batch.version <= self.known:
            return
        if batch.version != self.known + 1:
            raise ReplicaGap(f"replica: expected version {self.known + 1}, got {batch.version}", expected=self.known + 1)
        self.known = batch.version
        for event in batch.events:
            if type(event) in _ENDS:
                self.leaving[event.worker] = type(event) is ev.WorkerDead
        self._queue.append(batch)
        self.advance()

    def check(self, epoch: int, version: int, digest: bytes) -> None:
        """Compare with a heartbeat. Raises ReplicaGap if batches were lost, the manager restarted, or the tables differ."""
        if epoch != self.epoch or version > self.known:
            raise ReplicaGap(f"replica: at {self.epoch}:{self.known}, the manager at {epoch}:{version}", version=version)
        if version == self.version and digest != self.tables.digest():
            self.differs = True
            raise ReplicaGap(f"replica: tables at version {version} differ from the manager's", version=version)

    def advance(self) -> None:
        """Apply what was fed, up to and including the next step that this pool has to run."""
        while self._queue and not self.step and self._copies is None:
            batch = self._queue.popleft()
            writing: list[int] = []
            for event in batch.events:
                writing += self._apply(event)
            self.version = batch.version
            if writing and self.pool >= 0:
                self.step, self._step_ids = batch.version, writing
            if self._copies is None and self._after_copies:
                self._settle_copied()

    def _check_life(self) -> None:
        if self.stranded:
            raise StaleEpoch(
                f"replica: expected the log that this worker has followed, the manager of epoch {self.epoch} has another: drain, join again",
                epoch=self.epoch,
            )

    # --- running steps -------------------------------------------------------------------------------------------------------

    def ready(self, version: int) -> bool:
        """Whether step `version` can run now. False: not here yet, or something is run ahead for one of its sequences and has to end first.
        Raises StaleStep for one acknowledged already, WrongState if its copies have not been carried out, StaleEpoch."""
        self._check_life()
        self._require_copied(version)
        if version <= self.acked or (version <= self.version and version != self.step):  # the latter: a snapshot went past it
            raise StaleStep(version, max(self.acked, self.step - 1 if self.step else self.version))
        return self.step == version and not (len(self._aheads) and self._aheads.running(self._step_ids))

    def batch(self, version: int, sequences: Iterable[int]) -> BatchTables:
        """Tables and lengths of the step's sequences, in the order given. Raises StaleStep, ReplicaGap (not here yet), WrongState, Unknown."""
        self._require_here(version)
        return self.tables.batch_of(self._rows(sequences), version, self.page_size)

    def batch_rows(self, version: int, sequences: Iterable[int]) -> BatchRows:
        """As `batch`, but that nothing is copied: for a backend that keeps page tables on its device. Good until `finish`."""
        self._require_here(version)
        rows = self._rows(sequences)
        return BatchRows(version, self.page_size, self.tables.lengths.take(rows), rows, self.tables)

    def _require_here(self, version: int) -> None:
        if not self.ready(version):
            if self.step == version:
                raise WrongState("step", version, "what is run ahead for its sequences ended first", "still running")
            raise ReplicaGap(f"step: expected the replica to be at {version}, it is at {self.version}", version=self.version)

    def _rows(self, sequences: Iterable[int]) -> np.ndarray:
        """Table rows of sequences of this pool. Those of the last batch are known again, unless something was opened, closed or moved."""
        before, placements, rows = self._batch_rows
        if placements == self.tables.placements and type(sequences) is list and sequences == before:
            return rows
        ids = sequences.astype(np.int64) if isinstance(sequences, np.ndarray) else np.fromiter(sequences, np.int64)
        rows = self.tables.rows(ids)
        foreign = self.tables.pools[rows] != self.pool
        if foreign.any():
            raise InvalidValue("step.sequences", f"sequences of pool {self.pool_name}", int(ids[int(np.argmax(foreign))]))
        self._batch_rows = (ids.tolist(), self.tables.placements, rows)
        return rows

    def finish(self, version: int, sequences: Iterable[int]) -> None:
        """Step `version` has been run for these sequences. One of its sequences that is left out is never shared or moved: its
        pages have a hole. An empty list skips the step."""
        if version != self.step:
            raise StaleStep(version, self.acked)
        self._require_copied(version)
        ran, step = dict.fromkeys(sequences), self._step_ids
        for sequence in [each for each in step if each not in ran]:
            self._broken[sequence] = None
        lengths = self.tables.lengths[self.tables.rows(np.fromiter(step, np.int64))].tolist()
        written = dict(zip(step, lengths, strict=True))
        if self._broken:
            written = {sequence: length for sequence, length in written.items() if sequence not in self._broken}
        self._written.update(written)
        if len(self._aheads):
            for sequence in step:
                self._aheads.spoil_of(sequence, "its step has been run")
        self.step, self._step_ids, self._owed = 0, [], True
        self.advance()

    def has_hole(self, sequence: int) -> bool:
        """Whether a step of the sequence was left out here: it is never shared or moved."""
        return sequence in self._broken

    # --- copying -------------------------------------------------------------------------------------------------------------

    def copies(self) -> Copies | None:
        """Pages to copy now, before any step is run; None if there are none. Nothing newer is applied until `copied`. Ask again then."""
        return self._copies

    def copied(self, version: int) -> None:
        """The copies of `version` have been carried out. Say so before the next acknowledgement only if no device is still at it."""
        if self._copies is None or version != self._copies.version:
            raise StaleStep(version, self.acked)
        self._copies, self._owed = None, True
        self._settle_copied()
        self.advance()

    def _require_copied(self, version: int) -> None:
        if self._copies is not None and self._copies.version == version:
            raise WrongState("step", version, "its copies carried out first", f"{len(self._copies.tokens)} copies to do")

    def _settle_copied(self) -> None:
        for sequence, tokens in self._after_copies.items():
            if sequence not in self._broken:
                self._written[sequence] = tokens
        self._after_copies = {}

    # --- pulling -------------------------------------------------------------------------------------------------------------

    def pulls(self) -> list[Pull]:
        """Handoffs into this pool of which there is something to copy, oldest first, each with one pull at a time: of one that is streamed
        the next comes into the list when this one has ended. An aborted one vanishes from the list, and so does a pull that is under way
        and would no longer be believed."""
        if not self._begun:
            return list(self._pulls.values())
        return [pull for handoff, pull in self._pulls.items() if handoff not in self._begun or _same(self._begun[handoff], pull)]

    def begin_pull(self, handoff: int) -> None:
        """Copying starts: until `pulled`, nothing newer is acknowledged, even if the handoff is aborted meanwhile."""
        pull = self._pulls[handoff]
        # Whoever pulls early begins with what it knows now: pages that were let go of later are held until this has ended.
        self._copying[handoff] = self.version + 1 if pull.early else pull.version
        self._begun[handoff] = pull

    def pulled(self, handoff: int) -> None:
        """Copying has ended: the pages are here and verified. If the handoff was aborted meanwhile, nothing is reported."""
        pull = self._ended(handoff)
        if pull is None:
            return
        stream = self._streams.get(handoff)
        if stream is not None:
            stream.pulled()
            if self._next_piece(handoff, stream) or stream.piece is not None or (pull.early and not self._handoffs[handoff].moving):
                return  # there is more to come, or what there is has no source any more: the abort is on its way
            self._end_stream(handoff)
        self._there[handoff] = None
        self._pulled.append(handoff)

    def pull_failed(self, handoff: int, reason: str = "") -> None:
        """Copying has ended without success, and nothing of it can land any more. The manager is told why; it has the pull tried again,
        which then is in the list once more, or aborts the handoff. If it was early, the handoff is streamed no further: it is pulled once
        it moves."""
        pull = self._ended(handoff)
        if pull is None:
            return
        self._end_stream(handoff)
        self._aheads.spoil(handoff, f"a pull failed: {reason}"[:REASON_MAX])  # what is pulled again may overwrite what it wrote
        if not pull.early:
            self._failed[handoff] = pull, reason[:REASON_MAX]
            self._unreported[handoff] = None
        elif (move := self._handoffs[handoff]).moving:
            self._start_pull(handoff, move.moved_at, self.tables.pages_of(move.sequence), self.tables.length(move.sequence))

    def _ended(self, handoff: int) -> Pull | None:
        """The pull that has ended; None if something else is wanted by now, or nothing."""
        self._copying.pop(handoff, None)
        begun, pull = self._begun.pop(handoff, None), self._pulls.get(handoff)
        if pull is None or (begun is not None and not _same(begun, pull)):
            return None
        return self._pulls.pop(handoff)

    # --- running ahead -------------------------------------------------------------------------------------------------------

    def pull_by_layers(self, num_layers: int, group: int) -> None:
        """What is left to pull once a handoff moves comes in groups of so many of its layers, the first ones first; 0: all at once."""
        self._num_layers, self._layer_group = num_layers, group

    def begin_ahead(self, handoff: int) -> BatchTables | None:
        """Begin to compute the next token of a sequence that moves here, on these tables: its own with one token more, of the handoff's version.
        Before anything of a layer is written or read, `layers_there` has to be above it. Until `end_ahead` nothing newer is acknowledged.

        None if it cannot be: it does not move here or does not yet, its last page is full, or AHEAD_MAX are run or kept already."""
        move, ahead = self._handoffs.get(handoff), self._aheads.get(handoff)
        if move is None or not move.moving or move.target != self.pool or (ahead is not None and ahead.running):
            return None
        length, size = self.tables.length(move.sequence) + 1, self.page_size
        table = np.concatenate([move.shared, move.fresh])
        count = div_ceil(length, size)
        if count > len(table) or handoff in self._failed or (ahead is None and len(self._aheads) >= AHEAD_MAX):
            return None
        self._aheads.begin(Ahead(handoff, move.sequence, length, table[:count].copy(), self.version + 1))
        return BatchTables(move.moved_at, size, np.array([length], np.int32), table[:count], np.array([0, count], np.int64))

    def layers_there(self, handoff: int) -> int:
        """Leading layers of a sequence that moves here whose pages are all here; LAYERS_ALL if every layer is, or if it is the pool's by now."""
        ahead = self._aheads.get(handoff)
        if handoff in self._there or (ahead is not None and ahead.resident):
            return LAYERS_ALL
        stream = self._streams.get(handoff)
        move = self._handoffs.get(handoff)
        return stream.layers_there() if stream is not None and move is not None and move.moving else 0

    def spoiled(self, handoff: int) -> str:
        """Why what is run ahead for this handoff is worth nothing by now: end it. "" if it may still be."""
        ahead = self._aheads.get(handoff)
        return ahead.void if ahead is not None else "not begun"

    def end_ahead(self, handoff: int, *, whole: bool = True) -> bool:
        """What was run ahead has ended, on the device too; `whole`: to its last layer. Whether to keep the result for `ran_ahead`."""
        if not whole:
            self._aheads.spoil(handoff, "given up")
        return self._aheads.end(handoff)

    def ran_ahead(self, version: int, sequence: int) -> bool:
        """Whether what was run ahead is just this sequence's part of step `version`, which is to run now: the same tokens before it in the same
        pages. The slot is written then; whoever keeps the result compares the token. Asked before `finish`, after which it is dropped."""
        ahead = self._aheads.result_of(sequence)
        if ahead is None or version != self.step or sequence not in self._step_ids or sequence in self._broken:
            return False
        pages = self.tables.pages_of(sequence)[: len(ahead.pages)]
        return self.tables.length(sequence) == ahead.length and np.array_equal(pages, ahead.pages)

    # --- streaming -----------------------------------------------------------------------------------------------------------

    def streaming(self) -> list[int]:
        """Sequences of the step to run now that others pull while it runs: tell them how far it is, by `layers_written`."""
        return [each for each in self._step_ids if each in self._streaming and each not in self._broken] if self._streaming else []

    def layers_written(self, version: int, sequences: Iterable[int], layers: int) -> None:
        """The first `layers` layers of these sequences of step `version`, which is running, are in their pages, so that another process can
        read them there. It goes out with the next acknowledgement; a hint that may as well be left out."""
        if version != self.step:
            raise StaleStep(version, self.acked)
        streaming = self.streaming()
        for sequence in sequences:
            if sequence in streaming:
                self._layers[self._streaming[sequence]] = self.tables.length(sequence), layers

    def _begin_stream(self, handoff: int) -> None:
        move = self._handoffs[handoff]
        move.streaming = True
        if self.tables.pool_of(move.sequence) == self.pool:
            self._streaming[move.sequence] = handoff
        elif move.target == self.pool and self._puller(move) in move.sources:
            size, shared = self.page_size, len(move.shared)
            self._streams[handoff] = Stream(shared * size, (shared + len(move.fresh)) * size)
            self._streamed[move.sequence] = handoff

    def _end_stream(self, handoff: int) -> None:
        self._streams.pop(handoff, None)
        self._streamed.pop(self._handoffs[handoff].sequence, None)

    def _next_piece(self, handoff: int, stream: Stream) -> bool:
        """Whether there is something to pull of a streamed handoff; the next piece is in the list, unless one of it is being pulled."""
        pull = self._pulls.get(handoff)
        if pull is not None and handoff in self._begun and stream.piece is not None and _same(self._begun[handoff], pull):
            return True
        move, piece = self._handoffs[handoff], stream.advance()
        self._pulls.pop(handoff, None)
        if piece is None:
            return False
        version = move.moved_at if move.moving else self.version + 1
        pull = self._pull(handoff, move, version, self.tables.pages_of(move.sequence), piece)
        if pull is not None:
            self._pulls[handoff] = pull
        return pull is not None

    def _on_reserved(self, event: ev.HandoffReserved) -> None:
        move = self._handoffs[event.handoff]
        move.shared, move.fresh = event.shared, event.fresh

    def _on_streaming(self, event: ev.HandoffStreaming) -> None:
        move = self._handoffs[event.handoff]
        move.sources = dict(zip(event.pullers.tolist(), event.sources.tolist(), strict=True))
        self._begin_stream(event.handoff)

    def _on_written(self, event: ev.SequencesWritten) -> None:
        if self._streamed:
            for sequence, tokens in zip(event.ids.tolist(), event.tokens.tolist(), strict=True):
                stream = self._stream_from(self._streamed.get(sequence, 0), event.worker)
                if stream is not None:
                    stream.note_written(tokens)
                    self._next_piece(self._streamed[sequence], stream)

    def _on_layers(self, event: ev.LayersWritten) -> None:
        for handoff, tokens, layers in zip(event.handoffs.tolist(), event.tokens.tolist(), event.layers.tolist(), strict=True):
            stream = self._stream_from(handoff, event.worker)
            if stream is not None:
                stream.note_layers(tokens, layers)
                self._next_piece(handoff, stream)

    def _stream_from(self, handoff: int, worker: int) -> Stream | None:
        """The stream of a handoff that this worker pulls from that one, if it does not move yet."""
        stream = self._streams.get(handoff)
        if stream is None or (move := self._handoffs[handoff]).moving or move.sources.get(self._puller(move)) != worker:
            return None
        return stream

    def _move_stream(self, handoff: int, move: _Moving, before: np.ndarray, length: int) -> None:
        """The handoff moves: what was pulled early counts, if it lies in pages where the sequence's table has them now."""
        stream, size, shared = self._streams.get(handoff), self.page_size, len(move.shared)
        start, table = min(shared * size, length), np.concatenate([move.shared, move.fresh])
        stop = div_ceil(max(stream.part, stream.piece.stop if stream.piece is not None else 0), size) if stream is not None else 0
        if stream is not None and shared * size >= stream.start and np.array_equal(table[shared:stop], before[shared:stop]):
            stream.shared(start)
            stream.limit = length
        else:
            stream = self._streams[handoff] = Stream(start, length)
        stream.note_written(length)
        stream.by_layers(self._num_layers, self._layer_group)
        if not self._next_piece(handoff, stream):
            self._end_stream(handoff)
            self._start_pull(handoff, move.moved_at, self.tables.pages_of(move.sequence), length, length)

    def linked(self, worker: int, transport: str, reason: str) -> None:
        """This worker reaches that peer's pages by `transport`: told to the manager with the next acknowledgement."""
        if self._links.get(worker) != (transport, reason):
            self._links[worker] = transport, reason[:LINK_REASON_MAX]
            self._links_untold[worker] = None

    # --- acknowledging -------------------------------------------------------------------------------------------------------

    def ack(self) -> AckContent | None:
        """What to acknowledge now; None if that would help nobody. Calling it means sending it.

        An acknowledgement becomes an event that all replicas apply: answering each other's would never end. So one is due only after a
        step, a pull, or an event that freed pages of this pool.
        """
        self._check_life()
        version = self.version - 1 if self.step or self._copies is not None else self.version
        # A pull in progress writes into this pool and reads another: nothing newer than its beginning is finished.
        begun = [*(pull.version for pull in self._pulls.values() if not pull.early), *self._copying.values(), *self._aheads.held()]
        version = min(version, *(each - 1 for each in begun)) if begun else version
        size, reported, handing = self.page_size if self._written else 1, self._reported, self._handing
        ids = [
            each
            for each, tokens in self._written.items()
            if tokens // size > reported.get(each, 0) // size or (each in handing and tokens > reported.get(each, 0))
        ]
        hints = self._layers or self._links_untold
        if not ids and not self._pulled and not self._unreported and not hints and not (self._owed and version > self.acked):
            return None
        self._owed = version < self.version
        self.acked = max(self.acked, version)
        for sequence in ids:
            self._reported[sequence] = self._written[sequence]
        pulled, self._pulled = self._pulled, []
        failed = [(each, self._failed[each][0].attempt, self._failed[each][1]) for each in self._unreported]
        self._unreported = {}
        layers, self._layers = [(each, *how_far) for each, how_far in self._layers.items()], {}
        as_of = max(self.acked, self.version) if ids or layers else 0
        links = [(each, *self._links[each]) for each in self._links_untold if each in self._links]
        self._links_untold = {}
        return AckContent(self.acked, ids, [self._written[each] for each in ids], pulled, self.epoch, as_of, failed, layers, links)

    def renewal(self) -> AckContent:
        """An acknowledgement for the lease's sake, whether or not it helps anybody else."""
        self._owed = True
        return self.ack() or AckContent(self.acked, [], [], [], self.epoch)

    # --- events --------------------------------------------------------------------------------------------------------------

    def _apply(self, event: Any) -> list[int]:
        """Apply one event; gives the sequences of this pool that it gives something to write."""
        handler = _HANDLERS.get(type(event))
        return (handler(self, event) if handler is not None else None) or []

    def _own_growing(self) -> list[int]:
        """Those of the last growth that are this pool's."""
        tables = self.tables
        ids, placements, own = self._growing
        if ids is not tables.last_ids or placements != tables.placements:
            own = self._own(tables.last_ids)
            self._growing = tables.last_ids, tables.placements, own
        return own

    def _own(self, ids: np.ndarray) -> list[int]:
        return ids[self.tables.pools[self.tables.rows(ids)] == self.pool].tolist() if self.pool >= 0 else []

    def _on_pool(self, event: ev.PoolAdded) -> None:
        self.pools.append(event)
        if event.name == self.pool_name:
            self.pool = event.pool

    def _on_join(self, event: ev.WorkerJoined) -> None:
        self.peers[event.worker] = Peer(event.worker, event.name, event.pool, event.layout, event.memory)

    def _on_worker_end(self, event: ev.WorkerDead | ev.WorkerFenced) -> None:
        self.peers.pop(event.worker, None)
        self.leaving.pop(event.worker, None)
        self._links.pop(event.worker, None)

    def _on_worker_restored(self, event: ev.WorkerRestored) -> None:
        if event.fenced:
            self.peers.pop(event.worker, None)

    def _on_open(self, event: ev.SequenceOpened) -> list[int]:
        self.tables.open(event.sequence, event.pool, event.length, np.concatenate([event.cached, event.fresh]))
        if event.pool != self.pool:
            return []
        if len(event.cached):  # whatever is in the index has been written
            self._written[event.sequence] = self._reported[event.sequence] = len(event.cached) * self.page_size
        there = len(event.cached) * self.page_size + event.copied
        if event.copied:
            self._after_copies[event.sequence] = there
        return [event.sequence] if event.length > there else []

    def _on_grow(self, event: ev.SequencesGrown) -> list[int]:
        self.tables.grow(event.ids, event.counts, event.page_counts, event.pages)
        return self._own(event.ids)

    def _on_grow_again(self, event: ev.GrownAgain) -> list[int]:
        self.tables.grow_again(NO_PAGES, NO_PAGES)
        return self._own_growing()

    def _on_grow_further(self, event: ev.GrownFurther) -> list[int]:
        self.tables.grow_again(event.at, event.pages)
        return self._own_growing()

    def _on_truncated(self, event: ev.SequencesTruncated) -> None:
        self.tables.truncate(event.ids, event.lengths, event.page_counts, event.targets)
        own = dict.fromkeys(self._own(event.ids))
        self._owed |= bool(own)
        for sequence, length, target in zip(event.ids.tolist(), event.lengths.tolist(), event.targets.tolist(), strict=True):
            if sequence not in own:
                continue
            self._aheads.spoil_of(sequence, "truncated")
            written = self._written.get(sequence, 0)
            stays = length
            if target >= 0:
                stays = length // self.page_size * self.page_size
                self._after_copies[sequence] = min(written, length)
            if written > stays:
                self._written[sequence] = stays
            if self._reported.get(sequence, 0) > stays:
                self._reported[sequence] = stays

    def _on_forked(self, event: ev.SequenceForked) -> None:
        pool = self.tables.pool_of(event.parent)
        shared = self.tables.pages_of(event.parent)[: event.length // self.pools[pool].page_size]
        for place, child in enumerate(event.children.tolist()):
            self.tables.open(child, pool, event.length, np.concatenate([shared, event.fresh[place : place + 1]]))
            if event.parent in self._broken:
                self._broken[child] = None
            elif pool == self.pool:
                # A child whose last page is a copy has been written that far once the copy is there; the truncated parent likewise.
                self._after_copies[child] = min(self._after_copies.get(event.parent, self._written.get(event.parent, 0)), event.length)

    def _on_copied(self, event: ev.PagesCopied) -> None:
        if event.pool == self.pool:
            self._copies = Copies(self.version + 1, event.sources, event.targets, event.tokens)

    def _on_publish(self, event: ev.PagesPublished) -> None:
        # The swapped copies, if any, are free once acknowledged.
        self._owed |= self.tables.pool_of(event.sequence) == self.pool
        streamed = self._streamed.get(event.sequence, 0)
        if streamed:
            self._cut_stream(streamed, event)
        self.tables.swap(event.sequence, event.first, event.pages)
        if streamed:
            self._next_piece(streamed, self._streams[streamed])

    def _cut_stream(self, handoff: int, event: ev.PagesPublished) -> None:
        """Pages that were swapped may be somebody else's before they have been copied."""
        stream, move = self._streams[handoff], self._handoffs[handoff]
        before = self.tables.pages_of(event.sequence)[event.first : event.first + len(event.pages)]
        if not move.moving and (swapped := np.flatnonzero(before != event.pages)).size:
            stream.cut((event.first + int(swapped[0])) * self.pools[move.source].page_size)
            self._pulls.pop(handoff, None)

    def _forget(self, sequence: int) -> None:
        self._aheads.spoil_of(sequence, "closed or moved")
        for table in (self._written, self._reported, self._handing, self._broken, self._after_copies, self._streaming):
            table.pop(sequence, None)

    def _on_close(self, event: ev.SequenceClosed) -> None:
        self._owed |= self.tables.pool_of(event.sequence) == self.pool
        self.tables.close(event.sequence)
        self._forget(event.sequence)

    def _on_index_dropped(self, event: ev.IndexDropped) -> None:
        self._owed |= event.pool == self.pool

    def _on_handoff_ended(self, event: ev.HandoffEnded) -> None:
        self._owed = True  # the source's pages go to quarantine

    def _on_begun(self, event: ev.HandoffBegun) -> None:
        source = self.tables.pool_of(event.sequence)
        empty = np.zeros(0, np.int32)
        self._handoffs[event.handoff] = _Moving(event.sequence, source, event.target, empty, empty)
        if source == self.pool:
            self._aheads.spoil_of(event.sequence, "it moves on")
            self._handing[event.sequence] = None
            self._reported.pop(event.sequence, None)  # what was said about another version may not have counted: say it all again

    def _start_pull(self, handoff: int, version: int, source_pages: np.ndarray, length: int, first: int = 0) -> None:
        """List the pull of everything from token `first` on that the pool does not share."""
        move = self._handoffs[handoff]
        if move.target == self.pool:
            piece = Piece(max(first, len(move.shared) * self.page_size), length)
            if (pull := self._pull(handoff, move, version, source_pages, piece)) is not None:
                self._pulls[handoff] = pull

    def _pull(self, handoff: int, move: _Moving, version: int, source_pages: np.ndarray, piece: Piece) -> Pull | None:
        """The pull of a piece, which begins with a page here; None if its source is gone: the abort is on its way."""
        own = self._puller(move)
        peer = self.peers.get(move.sources.get(own, 0))
        if peer is None:
            return None
        theirs, ours, shared = self.pools[move.source].page_size, self.page_size, len(move.shared)
        there, used = piece.first // ours, div_ceil(piece.stop, ours)  # pages reserved beyond the length hold nothing
        start = there * ours
        pages = source_pages[start // theirs : div_ceil(piece.stop, theirs)].copy(), move.fresh[there - shared : max(used, shared) - shared]
        tokens = max(piece.stop - start, 0) if piece.first < piece.stop else 0
        if not tokens:
            pages = NO_PAGES, NO_PAGES
        skip, attempt = start % theirs if tokens else 0, move.tries.get(own, 0)
        return Pull(
            handoff, move.sequence, version, peer, *pages, there, theirs, ours, tokens, skip, attempt,
            piece.first_layer, piece.end_layer, not move.moving,
        )  # fmt: skip

    def _puller(self, move: _Moving) -> int:
        """This worker, as one that pulls for a handoff; the first of them if it does not know its id."""
        return self.worker or next(iter(move.sources), 0)

    def _on_moving(self, event: ev.HandoffMoving) -> None:
        move = self._handoffs[event.handoff]
        before = np.concatenate([move.shared, move.fresh])
        move.shared, move.fresh, move.moving, move.moved_at = event.shared, event.fresh, True, self.version + 1
        move.sources = dict(zip(event.pullers.tolist(), event.sources.tolist(), strict=True))
        length = self.tables.length(move.sequence)
        if event.handoff in self._streams or (self._layer_group and move.target == self.pool):
            self._move_stream(event.handoff, move, before, length)
        else:
            self._start_pull(event.handoff, move.moved_at, self.tables.pages_of(move.sequence), length)

    def _on_failed(self, event: ev.HandoffFailed) -> None:
        """The manager has the pull tried again, if it is this worker's."""
        move = self._handoffs[event.handoff]
        move.sources[event.worker], move.tries[event.worker] = event.source, event.attempt + 1
        if move.target != self.pool or self._puller(move) != event.worker:
            return
        self._end_stream(event.handoff)
        self._there.pop(event.handoff, None)
        self._aheads.spoil(event.handoff, "it is pulled again")
        self._failed.pop(event.handoff, None)
        self._unreported.pop(event.handoff, None)
        if event.handoff in self._copying and event.handoff in self._pulls:
            # A snapshot had it tried again before this was heard of: that try goes on, as the next one.
            self._pulls[event.handoff] = self._pulls[event.handoff]._replace(attempt=event.attempt + 1)
            return
        self._start_pull(event.handoff, self.version + 1, self.tables.pages_of(move.sequence), self.tables.length(move.sequence))

    def _on_resident(self, event: ev.HandoffResident) -> None:
        self._end_stream(event.handoff)
        move = self._handoffs.pop(event.handoff)
        self._pulls.pop(event.handoff, None)  # a replica that has not been told its id lists what another life of its worker has pulled
        self._owed |= move.source == self.pool
        length = self.tables.length(move.sequence)
        self.tables.place(move.sequence, move.target, length, np.concatenate([move.shared, move.fresh]))
        self._forget(move.sequence)
        if event.handoff in self._there:
            self._aheads.resident(event.handoff)
        else:  # another life of this worker has pulled it
            self._aheads.spoil(event.handoff, "nothing of it was pulled here")
        self._there.pop(event.handoff, None)
        if move.target == self.pool:
            self._written[move.sequence] = self._reported[move.sequence] = length

    def _on_abort(self, event: ev.HandoffAborted) -> None:
        move = self._handoffs.get(event.handoff)
        if move is not None:
            self._end_stream(event.handoff)
            del self._handoffs[event.handoff]
            self._owed |= (move.moving or len(move.fresh) > 0) and move.target == self.pool
            self._handing.pop(move.sequence, None)
            self._streaming.pop(move.sequence, None)
            self._layers.pop(event.handoff, None)
        self._aheads.spoil(event.handoff, f"aborted: {event.code}")
        self._there.pop(event.handoff, None)
        self._pulls.pop(event.handoff, None)
        self._failed.pop(event.handoff, None)
        self._unreported.pop(event.handoff, None)
        if event.handoff in self._pulled:
            self._pulled.remove(event.handoff)

    def _on_epoch(self, event: ev.EpochBegun) -> None:
        self._owed = True  # free pages are held until every worker has acknowledged the new life
        self._links_untold = dict.fromkeys(self._links)

    def _on_state_restored(self, event: ev.StateRestored) -> None:
        self.tables.last_ids, self.tables.last_counts = event.last_ids, event.last_counts

    def _on_sequence_restored(self, event: ev.SequenceRestored) -> None:
        self.tables.open(event.sequence, event.pool, event.length, event.pages)

    def _on_handoff_restored(self, event: ev.HandoffRestored) -> None:
        if event.state == HandoffState.ABORTED:
            return
        pages = event.target_pages
        move = _Moving(event.sequence, event.source, event.target, pages[: event.target_fresh], pages[event.target_fresh :])
        self._handoffs[event.handoff] = move
        if event.state == HandoffState.MOVING:
            move.moving, move.moved_at = True, event.version
            move.sources = dict(zip(event.pullers.tolist(), event.sources.tolist(), strict=True))
            move.tries = dict(zip(event.pullers.tolist(), event.failures.tolist(), strict=True))
            if self.worker in event.pulled:
                self._there[event.handoff] = None
            else:
                self._start_pull(event.handoff, event.version, event.source_pages, event.length)
        elif event.streaming:
            move.sources = dict(zip(event.pullers.tolist(), event.sources.tolist(), strict=True))
            self._begin_stream(event.handoff)


def _same(one: Pull, other: Pull) -> bool:
    """Whether both copy the same, of whichever rank and in whichever try."""
    return (one.shared_pages, one.tokens, one.first_layer, one.end_layer) == (
        other.shared_pages,
        other.tokens,
        other.first_layer,
        other.end_layer,
    ) and (np.array_equal(one.target_pages, other.target_pages) and np.array_equal(one.source_pages, other.source_pages))


_ENDS = (ev.WorkerDead, ev.WorkerFenced)
_HANDLERS: dict[type, Callable[[Replica, Any], list[int] | None]] = {
    ev.PoolAdded: Replica._on_pool,
    ev.WorkerJoined: Replica._on_join,
    ev.WorkerFenced: Replica._on_worker_end,
    ev.WorkerDead: Replica._on_worker_end,
    ev.WorkerRestored: Replica._on_worker_restored,
    ev.IndexDropped: Replica._on_index_dropped,
    ev.HandoffEnded: Replica._on_handoff_ended,
    ev.SequenceOpened: Replica._on_open,
    ev.SequencesGrown: Replica._on_grow,
    ev.GrownAgain: Replica._on_grow_again,
    ev.GrownFurther: Replica._on_grow_further,
    ev.SequencesTruncated: Replica._on_truncated,
    ev.SequenceForked: Replica._on_forked,
    ev.PagesCopied: Replica._on_copied,
    ev.PagesPublished: Replica._on_publish,
    ev.SequenceClosed: Replica._on_close,
    ev.HandoffBegun: Replica._on_begun,
    ev.HandoffReserved: Replica._on_reserved,
    ev.HandoffStreaming: Replica._on_streaming,
    ev.SequencesWritten: Replica._on_written,
    ev.LayersWritten: Replica._on_layers,
    ev.HandoffMoving: Replica._on_moving,
    ev.HandoffFailed: Replica._on_failed,
    ev.HandoffResident: Replica._on_resident,
    ev.HandoffAborted: Replica._on_abort,
    ev.StateRestored: Replica._on_state_restored,
    ev.SequenceRestored: Replica._on_sequence_restored,
    ev.HandoffRestored: Replica._on_handoff_restored,
    ev.EpochBegun: Replica._on_epoch,
}
