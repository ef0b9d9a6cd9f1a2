"""Device memory of another process on this host, by CUDA IPC: the reader maps the owner's allocation and one kernel copies out of it.

The mapping is made by the driver's own calls, in the context of the reader's card: no context on the peer's card, no reference counters of a framework.
Pulls run in a stream of their own; a cancelled one has settled when its kernel has ended, milliseconds later, whatever the peer does.
Kernel or copy engines: see RULE below.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from kvmanager.attention.checksum import WORD_BYTES, slot_factors, word_factors
from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.base import Announcement, OwnPages, Pull, PullState
from kvmanager.attention.transports.convert import convert_from, new_staging, staged_pages, staged_parts
from kvmanager.attention.transports.fields import bytes_field, int_field, text_field
from kvmanager.attention.transports.move import Move, Runs
from kvmanager.errors import ChecksumMismatch, InvalidValue, KVError, PullFailed, TransportUnavailable
from kvmanager.kernels.page_checksum import sum_pages
from kvmanager.kernels.page_pull import pull_pages

__all__ = ["COPY_ENGINE_RUN_BYTES", "CudaIpcTransport", "reachable_cards"]

HANDLE_BYTES = 64
# RULE: runs of at least so many bytes go to the copy engines, shorter ones to the kernel. A copy costs the host about 3 us to enqueue, whatever
# its size, and an engine takes about 11 us for 4.5 MB over NVLink.
COPY_ENGINE_RUN_BYTES = 1 << 62


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class _Driver:
    """The few driver calls that are needed; the context is the one that torch made current."""

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TransportUnavailable("cuda_ipc", f"needs NVIDIA's driver library libcuda.so.1 ({error})") from None
        self._lib.cuIpcOpenMemHandle_v2.argtypes = (ctypes.c_void_p, _Handle, ctypes.c_uint)
        self._lib.cuIpcCloseMemHandle.argtypes = (ctypes.c_uint64,)
        self._lib.cuIpcGetMemHandle.argtypes = (ctypes.c_void_p, ctypes.c_uint64)
        self._lib.cuMemGetAddressRange_v2.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64)
        self._lib.cuMemcpyAsync.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)

    def call(self, name: str, *arguments: object) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._lib.cuGetErrorName(code, ctypes.byref(text))
            raise PullFailed("cuda_ipc", f"{name}: {(text.value or b'').decode() or code}")

    def handle(self, address: int) -> tuple[bytes, int, int]:
        """(handle, offset of `address` in its allocation, bytes of the allocation)."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        self.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        self.call("cuIpcGetMemHandle", ctypes.byref(handle), base.value)
        return ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES), address - base.value, size.value

    def open(self, handle: bytes) -> int:
        opened, base = _Handle(), ctypes.c_uint64()
        ctypes.memmove(ctypes.byref(opened), handle, HANDLE_BYTES)
        self.call("cuIpcOpenMemHandle_v2", ctypes.byref(base), opened, 1)  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        return base.value

    def close(self, base: int) -> None:
        self.call("cuIpcCloseMemHandle", base)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self.call("cuMemcpyAsync", target, source, num_bytes, stream)


@lru_cache(maxsize=1)
def _driver() -> _Driver:
    return _Driver()


def _card(device: torch.device) -> str:
    return f"{torch.cuda.get_device_properties(device).uuid}"


@lru_cache(maxsize=16)
def reachable_cards(device: torch.device) -> tuple[str, ...]:
    """UUIDs of this process's visible cards whose memory `device` can read, its own included."""
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return tuple(_card(each) for each in cards if each == device or torch.cuda.can_device_access_peer(device, each))


class _CudaPull(Pull):
    pause_s_max = 10e-6  # a pull takes milliseconds, and only polling finds its end

    def __init__(self, move: Move, expected: np.ndarray | None, on_settled: Callable[[Pull], None]) -> None:
        super().__init__("cuda_ipc", move, on_settled)
        self._expected = expected
        self._sums: torch.Tensor | None = None  # pinned, filled before `_event`
        self._event: torch.cuda.Event | None = None
        self._keep: tuple[object, ...] = ()  # what the copies still read

    @property
    def event(self) -> torch.cuda.Event | None:
        """Recorded behind the copies: a stream may wait for it instead of the host. With `expected`, only `poll` verifies."""
        return self._event

    def poll(self) -> PullState:
        if not self.settled and self._event is not None:
            try:
                if not self._event.query():
                    return self.state
            except RuntimeError as error:  # the context is broken: nothing of it runs any more
                self._settle(PullFailed("cuda_ipc", str(error).splitlines()[0]))
                return self.state
            self._settle(self._check())
        return self.state

    def _check(self) -> KVError | None:
        if self._expected is None or self._sums is None or self.cancelled:
            return None
        sums = np.zeros(len(self._expected), np.uint64)
        np.add.at(sums, self.move.row, self._sums.numpy().view(np.uint64))
        wrong = np.flatnonzero(sums != self._expected)
        if not len(wrong):
            return None
        row = int(wrong[0])
        return ChecksumMismatch("cuda_ipc", int(self.move.source_pages[row]), int(self._expected[row]), int(sums[row]))


class _CudaSource:
    def __init__(self, own: OwnPages, theirs: LatentLayout, base: int | None, address: int) -> None:
        self._own, self._theirs, self._base, self._address = own, theirs, base, address
        self._staging: torch.Tensor | None = None  # as int64 words, if formats differ and sums are asked for
        self._device = own.pages.device
        layout = own.layout
        self._words = own.pages.view(dtype=torch.int64).view(
            len(own.pages), layout.num_layers, layout.page_size, layout.slot_bytes // WORD_BYTES
        )
        self._stream = torch.cuda.Stream(self._device)
        self._pulls: deque[_CudaPull] = deque()

    def begin(self, move: Move, expected: np.ndarray | None, on_settled: Callable[[Pull], None]) -> Pull:
        pull = _CudaPull(move, expected, on_settled)
        while self._pulls and self._pulls[0].settled:
            self._pulls.popleft()
        self._pulls.append(pull)
        layout = self._own.layout
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            run_bytes = move.num_layers * move.source_page_size * layout.slot_bytes if move.whole else 0
            if self._theirs.format != layout.format:
                self._convert(pull, move, expected is not None)
            elif run_bytes >= COPY_ENGINE_RUN_BYTES:
                self._copy(move.runs(layout.num_layers, layout.slot_bytes))
            else:
                (segments,) = self._send(pull, move.segments)
                pull_pages(
                    self._address,
                    self._words,
                    segments,
                    source_page_size=move.source_page_size,
                    whole=move.whole,
                    first_layer=move.first_layer,
                    end_layer=move.end_layer,
                )
            if expected is not None and pull._sums is None:
                self._sum(pull, move)
            event = torch.cuda.Event()
            event.record(self._stream)
        pull._event = event
        return pull

    def _copy(self, runs: Runs) -> None:
        driver, stream, base = _driver(), self._stream.cuda_stream, self._words.data_ptr()
        for source, target, length in zip(runs.source.tolist(), runs.target.tolist(), runs.length.tolist(), strict=True):
            driver.copy(base + target, self._address + source, length, stream)

    def _convert(self, pull: _CudaPull, move: Move, summed: bool) -> None:
        """Into pages of another format: straight from the peer's, or, where they have to be summed as they arrived, by way of a few at a time."""
        layout, theirs, layers = self._own.layout, self._theirs, (move.first_layer, move.end_layer)
        if not summed:
            (segments,) = self._send(pull, move.segments)
            convert_from(self._address, theirs.page_size, self._own.pages, layout, segments, layers)
            return
        count, num_words, name = staged_pages(theirs), theirs.slot_bytes // WORD_BYTES, str(self._device)
        if self._staging is None:
            staging = new_staging(theirs, count, self._device)
            self._staging = staging.view(dtype=torch.int64).view(count, theirs.num_layers, theirs.page_size, num_words)
        factors = slot_factors(theirs.num_layers, theirs.page_size, name), word_factors(num_words, name)
        sums = []
        for part in staged_parts(move, count):
            pulled, summed_rows, converted = self._send(pull, part.read, part.summed, part.converted)
            pull_pages(
                self._address,
                self._staging,
                pulled,
                source_page_size=theirs.page_size,
                whole=False,
                first_layer=layers[0],
                end_layer=layers[1],
            )
            sums.append(sum_pages(self._staging, summed_rows, *layers, *factors))
            convert_from(self._staging.data_ptr(), theirs.page_size, self._own.pages, layout, converted, layers)
        if sums:
            self._bring(pull, torch.cat(sums))

    def _send(self, pull: _CudaPull, *arrays: np.ndarray) -> list[torch.Tensor]:
        """As int32 on the card; kept, with their pinned copies, until the pull has ended."""
        pinned = [torch.from_numpy(np.ascontiguousarray(array, np.int32)).pin_memory() for array in arrays]
        sent = [rows.to(self._device, non_blocking=True) for rows in pinned]
        pull._keep = (*pull._keep, *pinned, *sent)
        return sent

    def _bring(self, pull: _CudaPull, sums: torch.Tensor) -> None:
        pull._sums = torch.empty(sums.shape, dtype=torch.int64, pin_memory=True)
        pull._sums.copy_(sums, non_blocking=True)
        pull._keep = (*pull._keep, sums)

    def _sum(self, pull: _CudaPull, move: Move) -> None:
        layout, name = self._own.layout, str(self._device)
        (rows,) = self._send(pull, move.segments[:, [2, 3, 4, 1]])
        sums = sum_pages(
            self._words,
            rows,
            move.first_layer,
            move.end_layer,
            slot_factors(layout.num_layers, move.source_page_size, name),
            word_factors(self._words.shape[3], name),
        )
        self._bring(pull, sums)

    def gone(self) -> None:
        """Nothing to do: the kernels read memory that stays mapped, and end by themselves."""

    def close(self) -> None:
        self._stream.synchronize()
        for pull in self._pulls:
            pull.cancel()
        self._pulls.clear()
        if self._base is not None:
            with torch.cuda.device(self._device):
                _driver().close(self._base)
        self._base = None


_OWN: dict[tuple[bytes, int], int] = {}  # addresses of this process's open memories: a process cannot open its own


class CudaIpcTransport:
    """The owner's side is a handle of its allocation; the reader's is a mapping of it."""

    name = "cuda_ipc"

    def __init__(self, own: OwnPages) -> None:
        self._own = own
        with torch.cuda.device(own.pages.device):
            torch.cuda.synchronize()  # makes the context current for the driver's calls
            try:
                self._handle, self._offset, _ = _driver().handle(own.pages.data_ptr())
            except PullFailed as error:
                why = f"this memory cannot be shared ({error.details['reason']}); PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False makes it so"
                raise TransportUnavailable("cuda_ipc", why) from None
        _OWN[self._handle, self._offset] = own.pages.data_ptr()

    def announce(self) -> Announcement:
        return {"card": _card(self._own.pages.device), "handle": self._handle, "offset": self._offset}

    def open(self, announced: Announcement, num_pages: int, num_bytes: int, layout: LatentLayout) -> _CudaSource:
        text_field(announced, "card")
        handle, offset = bytes_field(announced, "handle", HANDLE_BYTES), int_field(announced, "offset")
        if len(handle) != HANDLE_BYTES or offset % 16:
            raise InvalidValue("handle", f"{HANDLE_BYTES} bytes and an offset in whole vectors of 16", f"{len(handle)} and {offset}")
        device = self._own.pages.device
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            if (handle, offset) in _OWN:
                _let_read(device)
                return _CudaSource(self._own, layout, None, _OWN[handle, offset])
            driver = _driver()
            base = driver.open(handle)
            first, size = ctypes.c_uint64(), ctypes.c_size_t()
            driver.call("cuMemGetAddressRange_v2", ctypes.byref(first), ctypes.byref(size), base)
            if offset + num_bytes > size.value:
                driver.close(base)
                raise InvalidValue("bytes", f"at most the {size.value} of the allocation, from {offset} on", num_bytes)
        return _CudaSource(self._own, layout, base, base + offset)

    def close(self) -> None:
        _OWN.pop((self._handle, self._offset), None)


def _let_read(device: torch.device) -> None:
    """Have torch enable access from `device` to the other cards it can reach: what IPC does lazily for other processes' memory."""
    for index in range(torch.cuda.device_count()):
        other = torch.device("cuda", index)
        if other != device and torch.cuda.can_device_access_peer(device, other):
            torch.empty(1, device=other).copy_(torch.empty(1, device=device))  # torch enables the copy's source to reach its target
