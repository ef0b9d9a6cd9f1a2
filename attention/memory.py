"""Page memory of one worker, and pulling pages of other workers into it.

Owns the bytes. Pages are page-major: one page of all layers is one contiguous run. A fresh page holds garbage, NaN included: nothing
here may rely on zeros. Memory is only ever pulled: nobody writes into somebody else's pages.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention.checksum import sum_segments
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.base import Announcement, OwnPages, Pull, Source, Transport
from kvmanager.attention.transports.choice import LOCAL, TRANSPORTS, Choice, choose
from kvmanager.attention.transports.fields import BYTES_MAX, int_field, map_field, text_field
from kvmanager.attention.transports.move import page_ids, plan_move
from kvmanager.attention.transports.shm import CopyThreads, ShmTransport, drop_segment, new_segment
from kvmanager.errors import InvalidValue, LayoutMismatch, NoConversion, PullFailed, TransportUnavailable, WrongState

__all__ = ["PageMemory", "PeerMemory"]

NUM_PAGES_MAX = 2**31 - 1  # page ids are int32
COPY_THREADS_MAX = 64


@lru_cache(maxsize=1)
def _host() -> str:
    """Equal for processes that see the same /dev/shm of the same boot of the same kernel."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return sha256(f"{boot} {os.stat('/dev/shm').st_dev}".encode()).hexdigest()[:16]
    except OSError:
        return f"unknown-{os.getpid()}"


class PageMemory:
    """The pages of one worker: `pages` is [num_pages, num_layers, page_size, storage_width] of the layout's storage_dtype.

    On the CPU they lie in POSIX shared memory so that another process can pull them; on CUDA in one plain allocation.

    transports    what this memory offers its peers and pulls by: of "shm", "cuda_ipc" and "nixl"; by default the one for this host.
                  Naming one that cannot work here raises TransportUnavailable, which says what to install.
    copy_threads  how many threads copy between host memories, at most; none exist while nothing is being pulled
    """

    def __init__(
        self,
        layout: LatentLayout,
        num_pages: int,
        device: str | torch.device = "cpu",
        *,
        transports: Sequence[str] | None = None,
        copy_threads: int = 1,
    ) -> None:
        pages_max = min(NUM_PAGES_MAX, BYTES_MAX // layout.page_bytes)
        if isinstance(num_pages, bool) or not isinstance(num_pages, int) or not 1 <= num_pages <= pages_max:
            raise InvalidValue("num_pages", f"an integer from 1 to {pages_max}", num_pages)
        if isinstance(copy_threads, bool) or not isinstance(copy_threads, int) or not 1 <= copy_threads <= COPY_THREADS_MAX:
            raise InvalidValue("copy_threads", f"an integer from 1 to {COPY_THREADS_MAX}", copy_threads)
        self.layout = layout
        self.num_pages = num_pages
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise InvalidValue("device", "cpu or cuda", self.device)
        names = _checked_transports(transports, self.device.type)
        shape = (num_pages, layout.num_layers, layout.page_size, layout.storage_width)
        dtype = getattr(torch, layout.storage_dtype)
        self._finalizer: weakref.finalize | None = None
        self._open = True
        rows: np.ndarray | None = None
        segment = ""
        if self.device.type == "cpu":
            segment, mapped = new_segment(num_pages * layout.page_bytes)
            self._finalizer = weakref.finalize(self, drop_segment, segment, os.getpid())
            self.pages = torch.frombuffer(mapped, dtype=dtype).view(shape)  # holds the mapping for as long as a view of it lives
            rows = np.frombuffer(mapped, dtype=np.uint8).reshape(num_pages, layout.num_layers, -1)
        else:
            self.pages = torch.empty(shape, dtype=dtype, device=self.device)
            self.device = self.pages.device  # with its index
        own = OwnPages(layout, self.pages, rows)
        self._transports: dict[str, Transport] = {}
        self._peers: dict[int, PeerMemory] = {}
        self._pulls: dict[int, Pull] = {}  # not yet settled
        self._guard = threading.Lock()
        try:
            for name in names:
                self._transports[name] = _make_transport(name, own, segment, copy_threads)
        except BaseException:
            self.close()
            raise

    def layer(self, index: int) -> Tensor:
        """One layer's view, [num_pages, page_size, storage_width]; its page stride is that of all layers."""
        if not 0 <= index < self.layout.num_layers:
            raise InvalidValue("layer", f"0 to {self.layout.num_layers - 1}", index)
        return self.pages[:, index]

    # --- what peers need, and peers --------------------------------------------------------------------------------------

    def export(self) -> Announcement:
        """What a peer needs to pull from this memory: ints, strings, bytes and maps of them, good while this memory is open."""
        self._require_open()
        return {**self._identity(), "transports": {name: transport.announce() for name, transport in self._transports.items()}}

    def _identity(self) -> Announcement:
        return {
            "content": self.layout.content_fingerprint,
            "format": self.layout.format,
            "page_size": self.layout.page_size,
            "num_pages": self.num_pages,
            "bytes": self.num_pages * self.layout.page_bytes,
            "device": self.device.type,
            "host": _host(),
        }

    def open_peer(self, export: Announcement, transport: str | None = None) -> PeerMemory:
        """Open a peer's memory for pulling, by the transport that both announce or by the one named.

        The peer's pages may have another size, and a format that this layout `converts`: they are encoded as they are pulled. Everything
        else of the layout must agree. Every field is checked first: an export comes off the wire. Raises InvalidValue, LayoutMismatch,
        NoConversion, or TransportUnavailable with the reason for each transport.
        """
        self._require_open()
        content, stored = text_field(export, "content"), text_field(export, "format")
        if content != self.layout.content_fingerprint:
            raise LayoutMismatch("peer memory", self.layout.content_fingerprint, content[:64])
        if stored != self.layout.format and stored not in self.layout.converts:
            raise NoConversion("peer memory", stored[:64], self.layout.format)
        layout = dataclasses.replace(self.layout, page_size=int_field(export, "page_size"))
        if stored != self.layout.format:
            layout = dataclasses.replace(layout, dtype=stored, scales=())  # type: ignore[arg-type]  # one of those it converts
        num_pages, num_bytes = int_field(export, "num_pages", 1, NUM_PAGES_MAX), int_field(export, "bytes")
        if num_bytes != num_pages * layout.page_bytes:
            raise InvalidValue("bytes", f"{num_pages} pages of {layout.page_bytes} bytes", num_bytes)
        announced = map_field(export, "transports")
        theirs: Announcement = {
            "device": text_field(export, "device"),
            "host": text_field(export, "host"),
            "transports": {name: map_field(announced, name) for name in TRANSPORTS if name in announced},
        }
        ours = {**self._identity(), "transports": self._transports, "cards": _reachable_cards(self.device)}
        choice = choose(ours, theirs, transport)
        source = self._transports[choice.transport].open(theirs["transports"][choice.transport], num_pages, num_bytes, layout)
        peer = PeerMemory(self, layout, num_pages, choice, source)
        self._peers[id(peer)] = peer
        return peer

    # --- pulling ---------------------------------------------------------------------------------------------------------

    def begin_pull(
        self,
        peer: PeerMemory,
        src_page_ids: Sequence[int] | np.ndarray,
        dst_page_ids: Sequence[int] | np.ndarray,
        *,
        tokens: int | None = None,
        source_skip: int = 0,
        target_skip: int = 0,
        layers: tuple[int, int] | None = None,
        expected: np.ndarray | None = None,
    ) -> Pull:
        """Start copying pages of a peer into own pages; many may run at once. Poll the Pull until it is settled.

        tokens, source_skip, target_skip   which slots, where pages differ in size or a prefix is there already: see `plan_move`
        layers     (first, end) for a group of layers; all by default
        expected   uint64, one a source page: what `checksums` gave at the source; another sum fails the pull with ChecksumMismatch

        Destinations must be distinct, and none of them a page of a cancelled pull that is not settled: WrongState.
        """
        self._require_open()
        if peer.memory is not self:
            raise InvalidValue("peer", "a peer that this memory opened", "another memory's")
        peer._require_open()
        move = plan_move(
            page_ids("src_page_ids", src_page_ids, peer.num_pages),
            page_ids("dst_page_ids", dst_page_ids, self.num_pages),
            peer.layout.page_size,
            self.layout.page_size,
            self.layout.num_layers,
            tokens=tokens,
            source_skip=source_skip,
            target_skip=target_skip,
            layers=layers,
        )
        if expected is not None:
            expected = np.asarray(expected)
            if expected.dtype != np.uint64 or expected.shape != move.source_pages.shape:
                raise InvalidValue("expected", f"uint64 [{len(move.source_pages)}]", f"{expected.dtype} {list(expected.shape)}")
        with self._guard:
            for other in self._pulls.values():
                if other.cancelled and (held := np.intersect1d(other.move.target_pages, move.target_pages)).size:
                    raise WrongState("page", int(held[0]), "free of transfers", "the target of a cancelled pull that has not settled")
        pull = peer._source.begin(move, expected, self._on_settled)
        with self._guard:
            if not pull.settled:
                self._pulls[id(pull)] = pull
        return pull

    def _on_settled(self, pull: Pull) -> None:
        with self._guard:
            self._pulls.pop(id(pull), None)

    def pull(
        self,
        peer: PeerMemory,
        src_page_ids: Sequence[int] | np.ndarray,
        dst_page_ids: Sequence[int] | np.ndarray,
        *,
        timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        """`begin_pull`, and wait: returns when the bytes are here. After `timeout_s` it is cancelled, waited for and PullFailed is raised."""
        pull = self.begin_pull(peer, src_page_ids, dst_page_ids, **options)
        pull.wait(timeout_s)
        if not pull.settled:
            while not pull.cancel() or not pull.settled:  # bounded by the transport's own grace; nothing may go on before it
                pull.wait(1.0)
            raise PullFailed(pull.transport, f"expected an end within {timeout_s} s, got none; cancelled")
        pull.result()

    @property
    def pulls(self) -> list[Pull]:
        """Those that have begun and are not settled: what may still write into these pages. Poll them."""
        with self._guard:
            return list(self._pulls.values())

    def checksums(self, pages: Sequence[int] | np.ndarray, tokens: int | None = None, layers: tuple[int, int] | None = None) -> np.ndarray:
        """uint64, one a page: the sum over their slots, for a reader's `expected`. With `tokens`, over the first so many of the list."""
        self._require_open()
        ids = page_ids("pages", pages, self.num_pages)
        size = self.layout.page_size
        count = len(ids) * size if tokens is None else tokens
        if not 0 <= count <= len(ids) * size:
            raise InvalidValue("tokens", f"0 to {len(ids) * size}", count)
        slots = np.clip(count - size * np.arange(len(ids)), 0, size)
        zeros = np.zeros_like(ids)
        return sum_segments(
            self.pages, self.layout, np.stack([ids, zeros, slots, zeros], axis=1), layers or (0, self.layout.num_layers), size
        )

    def copy_pages(
        self, source_pages: Sequence[int] | np.ndarray, target_pages: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray
    ) -> None:
        """Copy the first tokens[i] slots, in all layers, of page source_pages[i] to target_pages[i]. -1 in either is padding.

        Targets must be distinct, and no page a source as well: what `Replica.copies` asks for is so. On CUDA one launch in the current
        stream, which nothing here waits for.
        """
        self._require_open()
        sources = page_ids("source_pages", source_pages, self.num_pages, low=-1)
        targets = page_ids("target_pages", target_pages, self.num_pages, low=-1)
        counts = np.asarray(tokens)
        if not len(sources) == len(targets) == len(counts):
            raise InvalidValue("tokens", f"{len(sources)} sources, as many targets and token counts", f"{len(targets)}, {len(counts)}")
        if len(counts) == 0:
            return
        if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0 or counts.max() > self.layout.page_size:
            raise InvalidValue("tokens", f"ints from 0 to {self.layout.page_size}", f"{counts.dtype} from {counts.min()} to {counts.max()}")
        written = targets[targets >= 0]
        if len(np.unique(written)) != len(written) or np.isin(written, sources).any():
            raise InvalidValue("target_pages", "distinct page ids, none of them a source", "some twice")
        if self.device.type == "cpu":
            for source, target, count in zip(sources.tolist(), targets.tolist(), counts.tolist(), strict=True):
                if source >= 0 and target >= 0:
                    self.pages[target, :, :count] = self.pages[source, :, :count]
            return
        from kvmanager.kernels.page_copy import copy_pages

        rows = torch.from_numpy(np.stack([sources, targets, counts], axis=1).astype(np.int32))
        copy_pages(self.pages, rows.pin_memory().to(self.device, non_blocking=True))

    def close(self) -> None:
        """Give the memory back, once every pull into it has been ended. Peers that have it open keep their mapping of it; nobody new can
        open it. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        for peer in list(self._peers.values()):
            peer.close()
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()
        if self._finalizer is not None:
            self._finalizer()
        del self.pages

    def _require_open(self) -> None:
        if not self._open:
            raise WrongState("page memory", self.layout.fingerprint, "open", "closed")


class PeerMemory:
    """Another process's pages, open for reading by one own memory. Made by `PageMemory.open_peer`.

    `choice` says which transport was chosen and why; `str(peer.choice)` is a line for a log.
    """

    def __init__(self, memory: PageMemory, layout: LatentLayout, num_pages: int, choice: Choice, source: Source) -> None:
        self.memory = memory
        self.layout = layout
        self.num_pages = num_pages
        self.choice = choice
        self._source = source
        self._open = True

    def gone(self) -> None:
        """The peer's process is known to be dead: settle every pull from it, and take no more."""
        if self._open:
            self._source.gone()
            self.close()

    def close(self) -> None:
        """Let go of the peer's memory. Pulls from it that still run are cancelled, and have settled when this returns. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        self._source.close()
        self.memory._peers.pop(id(self), None)

    def _require_open(self) -> None:
        if not self._open:
            raise WrongState("peer memory", self.layout.fingerprint, "open", "closed")


def _checked_transports(names: Sequence[str] | None, device: str) -> tuple[str, ...]:
    """The transports to make; raises TransportUnavailable for one that this kind of memory cannot have."""
    local = LOCAL[0] if device == "cpu" else LOCAL[1]
    if names is None:
        return (local,)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InvalidValue("transports", f"a sequence of names of {', '.join(TRANSPORTS)}", names)
    for name in names:
        if name not in TRANSPORTS:
            raise InvalidValue("transports", f"names of {', '.join(TRANSPORTS)}", name)
        if name in LOCAL and name != local:
            raise TransportUnavailable(name, f"{device} memory moves by {local}")
    return tuple(dict.fromkeys(names))


def _make_transport(name: str, own: OwnPages, segment: str, copy_threads: int) -> Transport:
    if name == "shm":
        return ShmTransport(own, segment, CopyThreads(copy_threads))
    if name == "cuda_ipc":
        from kvmanager.attention.transports.cuda_ipc import CudaIpcTransport

        return CudaIpcTransport(own)
    from kvmanager.attention.transports.nixl import NixlTransport

    return NixlTransport(own)


def _reachable_cards(device: torch.device) -> tuple[str, ...]:
    if device.type != "cuda":
        return ()
    from kvmanager.attention.transports.cuda_ipc import reachable_cards

    return reachable_cards(device)
