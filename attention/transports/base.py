"""What every transport offers, and the life of a pull. Knows no transport.

    running ──▶ done          every byte is here, and verified if that was asked for
       │  ├───▶ failed        `error` says why; some bytes may have landed
       ▼  │
    cancelling ──▶ cancelled

done, failed and cancelled are *settled*: nothing can write into the target pages any more. Until then they belong to the transfer, whatever
has become of the sequence: `release` of a transfer library does not stop it (a peer that woke after its pull had been released still wrote 244 of
256 MiB). A transport settles a pull only after the transfer has ended, the peer is known dead and what it sent has been let go of, or its own
transfer agent was destroyed. So `cancel` gives back a state and not a promise, and `result` refuses to speak before the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from kvmanager.attention.layout import LatentLayout
from kvmanager.attention.transports.move import Move
from kvmanager.errors import KVError, PullFailed, WrongState

__all__ = ["Announcement", "OwnPages", "Pull", "PullState", "Source", "Transport"]

Announcement = dict[str, Any]  # plain ints, strings and bytes: what one side tells the other through the manager


class OwnPages(NamedTuple):
    """The memory that a transport registers and pulls into.

    pages   [num_pages, num_layers, page_size, storage_width] of the layout's storage_dtype
    rows    the same on the CPU as uint8 [num_pages, num_layers, page_size * slot_bytes]; None on a device
    """

    layout: LatentLayout
    pages: Tensor
    rows: np.ndarray | None


class PullState(Enum):
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


_SETTLED = (PullState.DONE, PullState.FAILED, PullState.CANCELLED)


class Pull:
    """One transfer into own pages. Safe to use from several threads; `on_settled` is called once, by whichever thread saw the end."""

    pause_s_max = 1e-3  # between polls in `wait`; a transport whose end nobody signals polls faster

    def __init__(self, transport: str, move: Move, on_settled: Callable[[Pull], None] | None = None) -> None:
        self.transport = transport
        self.move = move
        self.error: KVError | None = None
        self._state = PullState.RUNNING
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._on_settled = on_settled

    @property
    def state(self) -> PullState:
        return self._state

    @property
    def settled(self) -> bool:
        """No byte of this transfer can land any more: only now may the target pages be used, or be somebody else's."""
        return self._state in _SETTLED

    @property
    def cancelled(self) -> bool:
        return self._state in (PullState.CANCELLING, PullState.CANCELLED)

    def poll(self) -> PullState:
        """Advance the transfer as far as that goes without waiting."""
        return self._state

    def cancel(self) -> PullState:
        """Ask for an early end and give the state there is now. CANCELLING: the target pages are still the transfer's; go on polling."""
        with self._lock:
            if self._state is PullState.RUNNING:
                self._state = PullState.CANCELLING
                asked = True
            else:
                asked = False
        if asked:
            self._ask_to_end()
        return self.poll()

    def wait(self, timeout_s: float) -> PullState:
        """Poll until settled or until `timeout_s` seconds have passed: whether it is settled is in the state that this gives back."""
        until = time.monotonic() + timeout_s
        pause = min(20e-6, self.pause_s_max)
        while not self.settled and self.poll() not in _SETTLED:
            left = until - time.monotonic()
            if left <= 0:
                break
            self._ended.wait(min(pause, left))
            pause = min(2 * pause, self.pause_s_max)
        return self._state

    def result(self) -> None:
        """Returns if every byte is here; raises the error of a failed pull, and WrongState of one that is not settled or was cancelled."""
        if self._state is PullState.FAILED:
            assert self.error is not None
            raise self.error
        if self._state is not PullState.DONE:
            raise WrongState("pull", self.transport, PullState.DONE.value, self._state.value)

    # --- for transports ------------------------------------------------------------------------------------------------------

    def _ask_to_end(self) -> None:
        """Called once, when a running pull is cancelled."""

    def _settle(self, error: KVError | None = None, *, complete: bool = True) -> None:
        """The transfer has ended. `complete` says whether all of it was copied; a pull that was cancelled before then is cancelled."""
        with self._lock:
            if self.settled:
                return
            if self._state is PullState.CANCELLING:
                self._state = PullState.CANCELLED
            elif error is None and complete:
                self._state = PullState.DONE
            else:
                self.error = error or PullFailed(self.transport, "ended early")
                self._state = PullState.FAILED
            tell, self._on_settled = self._on_settled, None
        if tell is not None:
            tell(self)
        self._ended.set()


class Source(Protocol):
    """A peer's memory, open for reading."""

    def begin(self, move: Move, expected: np.ndarray | None, on_settled: Callable[[Pull], None]) -> Pull:
        """Start a transfer. `expected`, uint64 [rows of the move]: the checksum that each source page's slots must have, or None."""
        ...

    def gone(self) -> None:
        """The peer's process is known dead: settle every pull from it."""
        ...

    def close(self) -> None:
        """Let go of the peer's memory; every pull from it is settled when this returns."""
        ...


class Transport(Protocol):
    """One way to reach other memories, made for (and registering) one own memory."""

    name: str

    def announce(self) -> Announcement:
        """What a peer needs to open this memory by this transport."""
        ...

    def open(self, announced: Announcement, num_pages: int, num_bytes: int, layout: LatentLayout) -> Source:
        """Open a peer's memory, whose layout may differ in page size, and in a format that the own one `converts`. Every field of what it
        announced is checked first: it comes off the wire."""
        ...

    def close(self) -> None:
        """Undo the registration. Peers that have this memory open may go on reading it until they close it."""
        ...
