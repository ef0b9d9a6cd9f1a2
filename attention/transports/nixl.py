"""Memory of a process on another host (or this one), by NIXL over UCX: READ only, the optional extra `kvmanager[nixl]`.

What was found out about NIXL 1.5 and holds this module together:
- Neither `release`, nor forgetting the peer, nor deregistering memory ends a transfer: a peer that wakes later still writes. Only its end, or the
  destruction of the agent does. So every source (one peer's memory) has a reader's agent of its own: to end a pull from a peer that does not
  answer, that agent is destroyed, which costs the pulls from the same peer and no other.
- Over TCP, UCX aborts the process of the *source* if the reader's agent goes while it answers (not if the reader is killed). So whatever is under way
  is given GRACE_S to end, and so little is under way at once that a live peer needs a fraction of it. A peer that has not answered by then is
  frozen or cut off: its manager has fenced it, and it may die when it wakes.
- Its Python wrapper has the progress thread spin: a core for every idle agent. Here it waits for events (`pthrDelay`).
- Over shared memory a post copies everything before it returns, without holding the interpreter: pulls are posted in pieces by a thread.
- The serialised descriptor lists are pickle: never used; pages travel as integers. An agent's metadata, mutated, can abort the process that loads
  it: it is bounded, carries a digest against accidents, and comes from the manager only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch

from kvmanager.attention.checksum import sum_segments, sum_target
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.base import Announcement, OwnPages, Pull
from kvmanager.attention.transports.choice import INSTALL
from kvmanager.attention.transports.convert import StagedPart, convert_pages, new_staging, staged_pages, staged_parts
from kvmanager.attention.transports.fields import bytes_field, int_field, text_field
from kvmanager.attention.transports.move import Move, Runs
from kvmanager.errors import ChecksumMismatch, InvalidValue, KVError, PullFailed, TransportUnavailable, WrongState

__all__ = ["GRACE_S", "METADATA_BYTES_MAX", "MODULES", "NixlTransport", "api"]

METADATA_BYTES_MAX = 3072  # an announcement has to fit into the 4,096 bytes that a worker joins with
PIECE_BYTES = 32 << 20  # posted at a time: 3 ms of copying over shared memory
PIECES_MAX = 2  # of all pulls from one peer, under way at once: 64 MiB are 0.6 s of the slowest network in use
GRACE_S = 3.0  # what a cancelled pull is given to end by itself before its agent is destroyed
CLOSE_S_MAX = 60.0
_IDLE_POLL_US = 100_000  # of the agent's progress thread; events wake it
_PAUSE_S = 20e-6, 1e-3  # between looks at transfers under way: first, and at most


MODULES = ("nixl_cu13", "nixl_cu12")  # one wheel for each CUDA; the package `nixl` only picks one, and depends on both: twice 230 MB


@lru_cache(maxsize=1)
def api() -> Any:
    """NIXL's Python module. Raises TransportUnavailable with what to install."""
    cuda = torch.version.cuda or "13"
    missing: list[str] = []
    for name in MODULES if cuda.startswith("13") else MODULES[::-1]:
        try:
            return importlib.import_module(f"{name}._api")
        except ImportError as error:
            missing.append(str(error))
    raise TransportUnavailable("nixl", f"not installed ({'; '.join(missing)}): {INSTALL['nixl']}")


def _enter(own: OwnPages) -> None:
    """Make the memory's card this thread's current one: UCX works in the context that it finds."""
    if own.rows is None:
        torch.cuda.set_device(own.pages.device)
        torch.cuda.current_stream().synchronize()


class _Agent:
    """One NIXL agent over UCX with `pages` registered. Destroyed by `destroy`, after which no transfer of it writes anything."""

    def __init__(self, own: OwnPages, pages: torch.Tensor) -> None:
        nixl = self._nixl = api().nixlBind
        _enter(own)
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _IDLE_POLL_US
        config.syncMode = nixl.NIXL_THREAD_SYNC_STRICT
        try:
            self._agent = nixl.nixlAgent(f"kvmanager-{secrets.token_hex(8)}", config)
            options, _ = self._agent.getPluginParams("UCX")
            self._backend = self._agent.createBackend("UCX", options)
            self._kind = nixl.DRAM_SEG if own.rows is not None else nixl.VRAM_SEG
            self._device = pages.device.index or 0
            self._address = pages.data_ptr()
            region = np.array([[self._address, pages.numel() * pages.element_size(), self._device]], np.uint64)
            self._agent.registerMem(nixl.nixlRegDList(self._kind, region), [self._backend])
        except Exception as error:  # noqa: BLE001 - its exceptions have no common base
            raise TransportUnavailable("nixl", f"no UCX agent: {type(error).__name__}: {error}") from None

    def metadata(self) -> bytes:
        return bytes(self._agent.getLocalMD())

    def load(self, metadata: bytes) -> None:
        try:
            name = self._agent.loadRemoteMD(metadata)
        except Exception as error:  # noqa: BLE001
            raise InvalidValue("metadata", "a NIXL agent's", f"{type(error).__name__}: {error}") from None
        self._peer = name.decode() if isinstance(name, bytes) else name

    def read(self, address: int, device: int, source: np.ndarray, target: np.ndarray, length: np.ndarray) -> int:
        """Post one READ of runs (offsets, int64 [n]); gives its handle."""
        nixl = self._nixl
        ours, theirs = np.empty((2, len(length), 3), np.uint64)
        ours[:, 0], ours[:, 1], ours[:, 2] = target + self._address, length, self._device
        theirs[:, 0], theirs[:, 1], theirs[:, 2] = source + address, length, device
        lists = nixl.nixlXferDList(self._kind, ours), nixl.nixlXferDList(self._kind, theirs)
        handle: int = self._agent.createXferReq(nixl.NIXL_READ, *lists, self._peer, b"", [self._backend])
        self._agent.postXferReq(handle, b"")
        return handle

    def ended(self, handle: int) -> bool:
        """Whether the transfer has ended well, and is let go of; raises if it has failed."""
        status = self._agent.getXferStatus(handle)
        if status == self._nixl.NIXL_IN_PROG:
            return False
        if status != self._nixl.NIXL_SUCCESS:
            raise PullFailed("nixl", f"status {status}")
        self._agent.releaseXferReq(handle)
        return True

    def destroy(self, handles: list[int]) -> None:
        """End every transfer: the fence that `release` is not. 8 to 20 ms."""
        for handle in handles:
            with contextlib.suppress(Exception):  # one under way cannot be released; the agent's end takes it along
                self._agent.releaseXferReq(handle)
        del self._agent


class _Piece(NamedTuple):
    """Runs that are posted together, offsets and lengths in bytes, int64 [n]. Of pages to be converted, `part` says which slots they are; its
    staged pages are those of half a staging buffer."""

    source: np.ndarray
    target: np.ndarray
    length: np.ndarray
    part: StagedPart | None = None


class _NixlPull(Pull):
    def __init__(
        self,
        move: Move,
        pieces: Iterable[_Piece],
        expected: np.ndarray | None,
        on_settled: Callable[[Pull], None],
        wake: Callable[[], None],
    ):
        super().__init__("nixl", move, on_settled)
        self.expected = expected
        self.sums = np.zeros(len(move.source_pages), np.uint64)  # of what was converted
        self.pieces = deque(pieces)
        self.posted: list[tuple[int, _Piece, int]] = []  # and not ended: handle, piece, half of the staging buffer
        self.cancelled_at = 0.0
        self._wake = wake

    def _ask_to_end(self) -> None:
        self.cancelled_at = time.monotonic()
        self._wake()


def _pieces(move: Move, layout: LatentLayout) -> list[_Piece]:
    """A move as runs of at most PIECE_BYTES together."""
    source, target, length = _cut(move.runs(layout.num_layers, layout.slot_bytes), PIECE_BYTES)
    bounds = np.cumsum(length)
    starts = [0, *(np.flatnonzero(np.diff((bounds - 1) // PIECE_BYTES)) + 1).tolist()] if len(bounds) else []
    stretches = [slice(low, high) for low, high in zip(starts, [*starts[1:], len(bounds)], strict=True)]
    return [_Piece(source[each], target[each], length[each]) for each in stretches]


def _staged_pieces(move: Move, theirs: LatentLayout, pages: int) -> list[_Piece]:
    """A move as pieces of at most so many source pages, each read into pages of its own size."""
    pieces = []
    for part in staged_parts(move, pages):
        into = dataclasses.replace(move, segments=part.read, row=part.row, target_page_size=move.source_page_size)
        runs = into.runs(theirs.num_layers, theirs.slot_bytes)
        pieces.append(_Piece(runs.source, runs.target, runs.length, part))
    return pieces


def _cut(runs: Runs, piece: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The runs as (source, target, length), those longer than a piece in parts."""
    parts = np.maximum(1, -(-runs.length // piece))
    if (parts == 1).all():
        return runs.source, runs.target, runs.length
    index = np.repeat(np.arange(len(parts)), parts)
    offset = (np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)) * piece
    return runs.source[index] + offset, runs.target[index] + offset, np.minimum(piece, runs.length[index] - offset)


class _NixlSource:
    """One peer's memory. A thread posts and watches transfers; it exists while there are any, and alone touches the agent."""

    def __init__(self, own: OwnPages, theirs: LatentLayout, metadata: bytes, address: int, device: int) -> None:
        self._own, self._theirs, self._metadata, self._address, self._device = own, theirs, metadata, address, device
        self._agent: _Agent | None = None
        # Pages of another format are read into halves of this buffer, and converted from there: a late write lands in no page at all.
        self._half = 0  # pages of one half, 0 if nothing is to be converted
        self._into = own.pages
        if theirs.format != own.layout.format:
            self._half = max(1, min(staged_pages(theirs), PIECES_MAX * PIECE_BYTES // theirs.page_bytes) // PIECES_MAX)
            self._into = new_staging(theirs, PIECES_MAX * self._half, own.pages.device)
        self._free = list(range(PIECES_MAX))
        self._connect()
        self._pulls: list[_NixlPull] = []
        self._wake = threading.Condition()
        self._running = False
        self._end = ""  # why the agent has to go, once it has to
        self._closed = False

    def _connect(self) -> _Agent:
        if self._agent is None:
            agent = _Agent(self._own, self._into)
            agent.load(self._metadata)
            self._agent = agent
        return self._agent

    def begin(self, move: Move, expected: np.ndarray | None, on_settled: Callable[[Pull], None]) -> Pull:
        pieces = _staged_pieces(move, self._theirs, self._half) if self._half else _pieces(move, self._own.layout)
        pull = _NixlPull(move, pieces, expected, on_settled, self._notify)
        if not pull.pieces:
            pull._settle()
            return pull
        with self._wake:
            if self._closed:
                raise WrongState("peer memory", "nixl", "open", "closed")
            self._pulls.append(pull)
            self._wake.notify()
            if self._running:
                return pull
            self._running = True
        threading.Thread(target=self._work, name="kvmanager-nixl", daemon=True).start()
        return pull

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def gone(self) -> None:
        self._finish("the peer's process is gone")

    def close(self) -> None:
        """What is under way is given its grace first: destroying the agent then could take the peer's process along."""
        with self._wake:
            self._closed = True
            pulls = list(self._pulls)
        for pull in pulls:
            pull.cancel()
        until = time.monotonic() + GRACE_S + 1.0
        for pull in pulls:
            pull.wait(max(0.0, until - time.monotonic()))
        self._finish("closed")

    def _finish(self, why: str) -> None:
        """Destroy the agent: in the thread if it runs, else here. Every pull has settled when this returns."""
        until = time.monotonic() + CLOSE_S_MAX
        with self._wake:
            self._closed, self._end = True, why
            self._wake.notify()
            while self._running:
                if time.monotonic() > until:
                    raise WrongState("pull", "nixl", "settled", f"under way {CLOSE_S_MAX} s after its agent had to end")
                self._wake.wait(0.01)
        self._destroy(why)

    # --- in the thread -------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        _enter(self._own)
        pause = _PAUSE_S[0]
        while True:
            with self._wake:
                pulls, end = list(self._pulls), self._end
                if not pulls or end:
                    break
            try:
                moved = self._advance(pulls)
            except Exception as error:  # noqa: BLE001 - whatever it was, nothing of it may write on
                self._destroy(f"{type(error).__name__}: {error}")
                continue
            now = time.monotonic()
            if any(pull.posted and pull.cancelled and now - pull.cancelled_at > GRACE_S for pull in pulls):
                self._destroy("a cancelled pull from the same peer did not end: the agent was destroyed")
                continue
            pause = _PAUSE_S[0] if moved else min(2 * pause, _PAUSE_S[1])
            if not moved:
                with self._wake:
                    self._wake.wait(pause)
        if end:
            self._destroy(end)
        with self._wake:
            if self._pulls and not self._end:  # one came between the last look and here
                threading.Thread(target=self._work, name="kvmanager-nixl", daemon=True).start()
                return
            self._running = False
            self._wake.notify_all()

    def _advance(self, pulls: list[_NixlPull]) -> bool:
        """Let go of what has ended, post what comes next, settle pulls of which nothing is under way; whether anything happened."""
        agent = self._connect()
        moved = False
        for pull in pulls:
            for each in [each for each in pull.posted if agent.ended(each[0])]:
                pull.posted.remove(each)
                moved = True
                self._arrived(pull, each[1], each[2])
        under_way = sum(len(pull.posted) for pull in pulls)
        for pull in pulls:
            if pull.cancelled:
                pull.pieces.clear()
            while pull.pieces and under_way < PIECES_MAX:
                piece, half = pull.pieces.popleft(), self._free.pop()
                target = piece.target + half * self._half * self._theirs.page_bytes
                pull.posted.append((agent.read(self._address, self._device, piece.source, target, piece.length), piece, half))
                under_way += 1
                moved = True
            if not pull.posted and not pull.pieces:
                self._settle(pull, None if pull.cancelled else self._check(pull))
                moved = True
        return moved

    def _arrived(self, pull: _NixlPull, piece: _Piece, half: int) -> None:
        """A piece has ended: convert it, if it is in the staging buffer, unless nobody wants it any more."""
        self._free.append(half)
        part = piece.part
        if part is None or pull.cancelled:
            return
        theirs, own = self._theirs, self._own
        layers = pull.move.first_layer, pull.move.end_layer
        pages = self._into[half * self._half : (half + 1) * self._half]
        if pull.expected is not None:
            np.add.at(pull.sums, part.row, sum_segments(pages, theirs, part.summed, layers, theirs.page_size))
        if own.rows is not None:
            convert_pages(pages, theirs.page_size, own.pages, own.layout, part.converted, layers)
            return
        with torch.cuda.stream(torch.cuda.Stream(own.pages.device)):
            segments = torch.from_numpy(part.converted.astype(np.int32)).to(own.pages.device)
            convert_pages(pages, theirs.page_size, own.pages, own.layout, segments, layers)
            torch.cuda.current_stream().synchronize()  # the half is written into again, and the pull may end, once this returns

    def _check(self, pull: _NixlPull) -> KVError | None:
        if pull.expected is None:
            return None
        sums = pull.sums if self._half else sum_target(self._own.pages, self._own.layout, pull.move)
        wrong = np.flatnonzero(sums != pull.expected)
        if not len(wrong):
            return None
        row = int(wrong[0])
        return ChecksumMismatch("nixl", int(pull.move.source_pages[row]), int(pull.expected[row]), int(sums[row]))

    def _settle(self, pull: _NixlPull, error: KVError | None) -> None:
        with self._wake:
            self._pulls.remove(pull)
        pull._settle(error)

    def _destroy(self, why: str) -> None:
        """The fence, and then the pulls' end: in this order, or a page would be given away while it can be written."""
        agent, self._agent = self._agent, None
        with self._wake:
            pulls = list(self._pulls)
        if agent is not None:
            agent.destroy([handle for pull in pulls for handle, _, _ in pull.posted])
        self._free = list(range(PIECES_MAX))
        for pull in pulls:
            pull.posted.clear()
            self._settle(pull, PullFailed("nixl", why))


class NixlTransport:
    """The owner's side: an agent that answers reads of this memory. Each peer that is opened gets a reader's agent of its own."""

    name = "nixl"

    def __init__(self, own: OwnPages) -> None:
        self._own = own
        self._serving = _Agent(own, own.pages)
        self._metadata = self._serving.metadata()
        if len(self._metadata) > METADATA_BYTES_MAX:
            why = f"its metadata takes {len(self._metadata)} bytes, more than {METADATA_BYTES_MAX}: name fewer devices in UCX_NET_DEVICES"
            raise TransportUnavailable("nixl", why)

    def announce(self) -> Announcement:
        return {
            "metadata": self._metadata,
            "digest": sha256(self._metadata).hexdigest()[:16],
            "address": self._own.pages.data_ptr(),
            "device": self._own.pages.device.index or 0,
        }

    def open(self, announced: Announcement, num_pages: int, num_bytes: int, layout: LatentLayout) -> _NixlSource:
        metadata = bytes_field(announced, "metadata", METADATA_BYTES_MAX)
        address, device = int_field(announced, "address", 1, 2**63 - 1), int_field(announced, "device", 0, 1023)
        digest = sha256(metadata).hexdigest()[:16]
        if text_field(announced, "digest") != digest:  # a mutated blob can abort this process
            raise InvalidValue("metadata", "bytes that have the announced digest", digest)
        return _NixlSource(self._own, layout, metadata, address, device)

    def close(self) -> None:
        self._serving.destroy([])
