"""Page memory of one worker, and how another process on this host pulls pages out of it.

Owns the bytes. Pages are page-major: one page of all layers is one contiguous run. A fresh page holds garbage, NaN included: nothing
here may rely on zeros. Memory is only ever pulled: nobody writes into somebody else's pages.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import weakref
from collections.abc import Sequence
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvmanager.attention.layout import LatentLayout
from kvmanager.errors import InvalidValue, LayoutMismatch, WrongState

__all__ = ["PageMemory", "PeerMemory"]

NUM_PAGES_MAX = 2**31 - 1  # page ids are int32
MEMORY_BYTES_MAX = 2**46
HANDLE_BYTES_MAX = 4096
PULL_PAGES_MAX = 256  # pages a device copy stages at a time
_SHM_DIR = "/dev/shm"
_SHM_NAME = re.compile(r"kvmanager-[0-9a-f]{32}")  # the name comes from a peer: it must not be able to name anything else


def _new_shared_map(num_bytes: int) -> tuple[str, mmap.mmap]:
    """A fresh POSIX shared memory segment, mode 0600, and its name. All of it is reserved now: running out raises here, not as a SIGBUS later."""
    name = f"kvmanager-{secrets.token_hex(16)}"
    path = f"{_SHM_DIR}/{name}"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InvalidValue("device", f"a host whose {_SHM_DIR} can be written", error.strerror) from None
    try:
        os.posix_fallocate(fd, 0, num_bytes)
        mapped = mmap.mmap(fd, num_bytes)
    except OSError as error:
        os.unlink(path)
        raise InvalidValue("num_pages", f"{num_bytes} bytes to fit in {_SHM_DIR}", error.strerror) from None
    finally:
        os.close(fd)
    resource_tracker.register(f"/{name}", "shared_memory")  # its tracker process removes the segment if this process is killed
    return name, mapped


def _drop_shared_map(name: str, owner_pid: int) -> None:
    if os.getpid() != owner_pid:  # a forked child inherits the finalizer, not the segment
        return
    try:
        os.unlink(f"{_SHM_DIR}/{name}")
    except FileNotFoundError:
        return
    resource_tracker.unregister(f"/{name}", "shared_memory")


def _open_shared_map(name: str, num_bytes: int) -> mmap.mmap:
    """Map a peer's segment read-only. Plain open and mmap: SharedMemory would register it here, and this process's exit would unlink it."""
    try:
        fd = os.open(f"{_SHM_DIR}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidValue("name", "the shared memory of a live peer", f"{name} ({error.strerror})") from None
    try:
        size = os.fstat(fd).st_size
        if size != num_bytes:
            raise InvalidValue("bytes", f"the segment's {size}", num_bytes)
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _page_ids(field: str, ids: Sequence[int] | np.ndarray, num_pages: int, low: int = 0) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InvalidValue(field, "a list of page ids", f"{array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)
    if array.size and (array.min() < low or array.max() >= num_pages):
        raise InvalidValue(field, f"page ids from {low} to {num_pages - 1}", int(array.min() if array.min() < low else array.max()))
    return array


class PageMemory:
    """The pages of one worker: `pages` is [num_pages, num_layers, page_size, storage_width] of the layout's storage_dtype.

    On the CPU they lie in POSIX shared memory so that another process can pull them; on CUDA in one plain allocation.
    """

    def __init__(self, layout: LatentLayout, num_pages: int, device: str | torch.device = "cpu") -> None:
        pages_max = min(NUM_PAGES_MAX, MEMORY_BYTES_MAX // layout.page_bytes)
        if isinstance(num_pages, bool) or not isinstance(num_pages, int) or not 1 <= num_pages <= pages_max:
            raise InvalidValue("num_pages", f"an integer from 1 to {pages_max}", num_pages)
        self.layout = layout
        self.num_pages = num_pages
        self.device = torch.device(device)
        shape = (num_pages, layout.num_layers, layout.page_size, layout.storage_width)
        dtype = getattr(torch, layout.storage_dtype)
        self._finalizer: weakref.finalize | None = None
        self._open = True
        if self.device.type == "cpu":
            self._name, mapped = _new_shared_map(num_pages * layout.page_bytes)
            self._finalizer = weakref.finalize(self, _drop_shared_map, self._name, os.getpid())
            self.pages = torch.frombuffer(mapped, dtype=dtype).view(shape)  # holds the mapping for as long as a view of it lives
            self._rows = np.frombuffer(mapped, dtype=np.uint8).reshape(num_pages, layout.page_bytes)
        elif self.device.type == "cuda":
            self.pages = torch.empty(shape, dtype=dtype, device=self.device)
            self.device = self.pages.device  # with its index
        else:
            raise InvalidValue("device", "cpu or cuda", self.device)

    def layer(self, index: int) -> Tensor:
        """One layer's view, [num_pages, page_size, storage_width]; its page stride is that of all layers."""
        if not 0 <= index < self.layout.num_layers:
            raise InvalidValue("layer", f"0 to {self.layout.num_layers - 1}", index)
        return self.pages[:, index]

    def export(self) -> dict[str, int | str | bytes]:
        """What a peer needs to pull from this memory: plain ints, strings and bytes, good while this memory is open."""
        self._require_open()
        common: dict[str, int | str | bytes] = {
            "fingerprint": self.layout.fingerprint,
            "format": self.layout.format,
            "num_pages": self.num_pages,
            "bytes": self.num_pages * self.layout.page_bytes,
        }
        if self.device.type == "cpu":
            return {"kind": "shm", "name": self._name, **common}
        torch.cuda.synchronize(self.device)
        device, handle, size, offset, counter, counter_offset, event, event_sync = self.pages.untyped_storage()._share_cuda_()
        return {
            "kind": "cuda_ipc",
            "device": int(device),
            "handle": bytes(handle),
            "storage_bytes": int(size),
            "storage_offset": int(offset),
            "counter": bytes(counter),
            "counter_offset": int(counter_offset),
            "event": bytes(event),
            "event_sync": int(event_sync),
            **common,
        }

    def pull(self, peer: PeerMemory, src_page_ids: Sequence[int] | np.ndarray, dst_page_ids: Sequence[int] | np.ndarray) -> None:
        """Copy pages, all layers, from a peer into own pages; returns when the bytes are here. Destinations must be distinct."""
        self._require_open()
        peer._require_open()
        if peer.layout.fingerprint != self.layout.fingerprint:
            raise LayoutMismatch("pull", self.layout.fingerprint, peer.layout.fingerprint)
        src = _page_ids("src_page_ids", src_page_ids, peer.num_pages)
        dst = _page_ids("dst_page_ids", dst_page_ids, self.num_pages)
        if len(src) != len(dst):
            raise InvalidValue("dst_page_ids", f"as many ids as src_page_ids ({len(src)})", len(dst))
        if len(np.unique(dst)) != len(dst):
            raise InvalidValue("dst_page_ids", "distinct page ids", "some twice")
        if peer.device_type != self.device.type:
            raise InvalidValue("peer", f"memory on {self.device.type}", peer.device_type)
        if self.device.type == "cpu":
            for source, destination in zip(src.tolist(), dst.tolist(), strict=True):
                self._rows[destination] = peer._rows[source]
            return
        # As bytes: torch does not index every dtype.
        theirs, ours = (pages.view(torch.uint8).view(len(pages), -1) for pages in (peer._pages, self.pages))
        for start in range(0, len(src), PULL_PAGES_MAX):
            part = slice(start, start + PULL_PAGES_MAX)
            fetched = theirs.index_select(0, torch.from_numpy(src[part]).to(theirs.device)).to(self.device)
            ours.index_copy_(0, torch.from_numpy(dst[part]).to(self.device), fetched)
        torch.cuda.synchronize(self.device)

    def copy_pages(
        self, source_pages: Sequence[int] | np.ndarray, target_pages: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray
    ) -> None:
        """Copy the first tokens[i] slots, in all layers, of page source_pages[i] to target_pages[i]. -1 in either is padding.

        Targets must be distinct, and no page a source as well: what `Replica.copies` asks for is so. On CUDA one launch in the current
        stream, which nothing here waits for.
        """
        self._require_open()
        sources = _page_ids("source_pages", source_pages, self.num_pages, low=-1)
        targets = _page_ids("target_pages", target_pages, self.num_pages, low=-1)
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
        """Give the memory back. Peers that have it open keep their mapping of it; nobody new can open it. Safe to call twice."""
        if not self._open:
            return
        self._open = False
        if self._finalizer is not None:
            self._finalizer()
            del self._rows
        del self.pages

    def _require_open(self) -> None:
        if not self._open:
            raise WrongState("page memory", self.layout.fingerprint, "open", "closed")


_MISSING: Any = object()


def _field(export: dict[str, Any], name: str, kind: Any) -> Any:
    value: Any = export.get(name, _MISSING)
    if type(value) is not kind:
        raise InvalidValue(name, f"{kind.__name__} in a memory export", type(value).__name__)
    if kind is int and not 0 <= value <= MEMORY_BYTES_MAX:
        raise InvalidValue(name, f"0 to {MEMORY_BYTES_MAX}", value)
    if kind is bytes and len(value) > HANDLE_BYTES_MAX:
        raise InvalidValue(name, f"at most {HANDLE_BYTES_MAX} bytes", len(value))
    return value


class PeerMemory:
    """Another process's pages, open for reading. Made by `PeerMemory.open` from what that process exported."""

    def __init__(self, layout: LatentLayout, num_pages: int, rows: np.ndarray | None, pages: Tensor | None) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.device_type = "cpu" if pages is None else pages.device.type
        self._open = True
        if rows is not None:
            self._rows = rows
        if pages is not None:
            self._pages = pages

    @classmethod
    def open(cls, export: dict[str, Any], layout: LatentLayout) -> PeerMemory:
        """Map a peer's memory. Every field is checked first: an export comes off the wire."""
        kind = _field(export, "kind", str)
        fingerprint = _field(export, "fingerprint", str)
        if (stored := _field(export, "format", str)) != layout.format:  # the fingerprint says so too, but not what differs
            raise LayoutMismatch("peer memory", layout.format, stored[:64])
        if fingerprint != layout.fingerprint:
            raise LayoutMismatch("peer memory", layout.fingerprint, fingerprint[:64])
        num_pages, num_bytes = _field(export, "num_pages", int), _field(export, "bytes", int)
        if num_pages < 1 or num_bytes != num_pages * layout.page_bytes:
            raise InvalidValue("bytes", f"{num_pages} pages of {layout.page_bytes} bytes", num_bytes)
        if kind == "shm":
            name = _field(export, "name", str)
            if not _SHM_NAME.fullmatch(name):
                raise InvalidValue("name", "kvmanager- and 32 hex digits", name[:64])
            rows = np.frombuffer(_open_shared_map(name, num_bytes), dtype=np.uint8).reshape(num_pages, layout.page_bytes)
            return cls(layout, num_pages, rows, None)
        if kind != "cuda_ipc":
            raise InvalidValue("kind", "shm or cuda_ipc", kind[:64])
        return cls(layout, num_pages, None, _open_cuda(export, layout, num_pages, num_bytes))

    def close(self) -> None:
        """Let go of the peer's memory. Safe to call twice."""
        self._open = False
        self.__dict__.pop("_rows", None)
        self.__dict__.pop("_pages", None)

    def _require_open(self) -> None:
        if not self._open:
            raise WrongState("peer memory", self.layout.fingerprint, "open", "closed")


def _open_cuda(export: dict[str, Any], layout: LatentLayout, num_pages: int, num_bytes: int) -> Tensor:
    device, size, offset = (_field(export, name, int) for name in ("device", "storage_bytes", "storage_offset"))
    if not torch.cuda.is_available() or device >= torch.cuda.device_count():
        raise InvalidValue("device", "a CUDA device of this process", device)
    if size != num_bytes:
        raise InvalidValue("storage_bytes", str(num_bytes), size)
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(
        device,
        _field(export, "handle", bytes),
        size,
        offset,
        _field(export, "counter", bytes),
        _field(export, "counter_offset", int),
        _field(export, "event", bytes),
        bool(_field(export, "event_sync", int)),
    )
    pages = torch.empty(0, dtype=getattr(torch, layout.storage_dtype), device=f"cuda:{device}").set_(storage)
    return pages.view(num_pages, layout.num_layers, layout.page_size, layout.storage_width)
