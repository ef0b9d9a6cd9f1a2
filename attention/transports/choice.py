"""Which transport two memories use: the first of a fixed order that both announce and that can work between them; and why.

| both on | order | because |
|---|---|---|
| host memory | shm, nixl | one copy by the reader, at memcpy's speed; nixl reaches another host |
| CUDA | cuda_ipc, nixl | one kernel over NVLink or within the card; nixl reaches another host |
| one of each | nixl | no reader of one kind maps the other's memory here |
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmanager.attention.transports.base import Announcement
from kvmanager.errors import TransportUnavailable

__all__ = ["INSTALL", "LOCAL", "TRANSPORTS", "Choice", "choose"]

TRANSPORTS = ("shm", "cuda_ipc", "nixl")
LOCAL = ("shm", "cuda_ipc")
INSTALL = {"nixl": "pip install 'kvmanager[nixl]'"}


@dataclass(frozen=True, slots=True)
class Choice:
    """`str()` of it is the line for a log or a table."""

    transport: str
    reason: str
    passed_over: tuple[tuple[str, str], ...] = ()  # transports that were looked at before it, and why they cannot

    def __str__(self) -> str:
        others = "".join(f"; not {name}: {why}" for name, why in self.passed_over)
        return f"{self.transport}: {self.reason}{others}"


def _why_not(name: str, ours: Announcement, theirs: Announcement) -> str:
    """Empty if `name` works between the two."""
    if name not in ours["transports"]:
        return f"not offered by this memory (transports={'+'.join(ours['transports'])})"
    if name not in theirs["transports"]:
        return f"not announced by the peer, which offers {'+'.join(theirs['transports']) or 'nothing'}"
    if name in LOCAL:
        if ours["host"] != theirs["host"]:
            return "the peer is on another host, or sees another /dev/shm"
        needed = "cpu" if name == "shm" else "cuda"
        if not ours["device"] == theirs["device"] == needed:
            return f"needs {needed} memory on both sides, got {ours['device']} and {theirs['device']}"
    if name == "cuda_ipc":
        card = theirs["transports"]["cuda_ipc"].get("card")
        if card not in ours["cards"]:
            return f"the peer's card {card} is not visible to this process, or not reachable from its own (CUDA_VISIBLE_DEVICES)"
    return ""


_REASONS = {
    "shm": "both in this host's memory: the reader maps the pages and copies",
    "cuda_ipc": "both on CUDA cards of this host that reach each other",
    "nixl": "announced by both",
}


def choose(ours: Announcement, theirs: Announcement, forced: str | None = None) -> Choice:
    """Choose by what both sides announced. `forced` names the only one to consider. Raises TransportUnavailable with every reason."""
    passed: list[tuple[str, str]] = []
    for name in TRANSPORTS if forced is None else (forced,):
        why = _why_not(name, ours, theirs) if name in TRANSPORTS else f"unknown; there are {', '.join(TRANSPORTS)}"
        if not why:
            return Choice(name, _REASONS[name] + (", forced" if forced else ""), tuple(passed))
        passed.append((name, why))
    hint = "" if "nixl" in ours["transports"] else f"; between hosts: {INSTALL['nixl']} and transports=(..., 'nixl') on both sides"
    raise TransportUnavailable(forced or "any", "; ".join(f"{name}: {why}" for name, why in passed) + hint)
