"""In flight: which open sequence computes the page that continues a place in the prefix index. The books of one pool.

A prompt whose next page somebody is computing already can wait for that page instead of computing it again. The place is the index node
where the computing sequence's indexed pages end, and the token ids of its next page: compared, like everything that leads to sharing.
So a prompt finds it with one look into a dict, where its own match ends. There is one sequence a place, the first; others that compute the
same (they would not wait, or came by another way) are not listed, and when the first goes they are found no more.

Whether to wait is decided by `flying`, and it ends by itself: the sequence closes, is lost, is sealed for a handoff, or has put no page
into the index for `inflight_wait_ms`. Nobody is promised anything by waiting; whoever will not wait says so (`Open.wait`).

Changed by apply only; `since_ms` is the time of the batch that brought the sequence to its place.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from kvmanager.pages.prefix import Node
from kvmanager.pages.sequences import Sequence

__all__ = ["Flight", "InFlight", "pages_agreeing"]

Place: TypeAlias = tuple[Node, bytes]


class Flight(NamedTuple):
    place: Place
    since_ms: int


class InFlight:
    def __init__(self) -> None:
        self.first: dict[Place, int] = {}
        self.flights: dict[int, Flight] = {}  # of the sequences in `first`

    def find(self, node: Node, page: bytes) -> int:
        """The sequence that computes `page` (its token ids) right after `node`; 0 if none is known to."""
        return self.first.get((node, page), 0)

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def note(self, sequence: Sequence, page_bytes: int, now_ms: int) -> None:
        """The sequence may have come to another place, or learned the rest of its next page."""
        start = sequence.published * page_bytes
        known = len(sequence.tokens) >= start + page_bytes
        flight = self.flights.get(sequence.sequence_id)
        if flight is None and not known:
            return  # the decoding sequence that was told one token more
        place = (sequence.node, bytes(sequence.tokens[start : start + page_bytes])) if known else None
        if flight is not None:
            if flight.place == place:
                return
            self.forget(sequence.sequence_id)
        if place is not None and self.first.setdefault(place, sequence.sequence_id) == sequence.sequence_id:
            self.flights[sequence.sequence_id] = Flight(place, now_ms)

    def forget(self, sequence_id: int) -> None:
        flight = self.flights.pop(sequence_id, None)
        if flight is not None:
            del self.first[flight.place]


def pages_agreeing(one: bytes, other: bytes, page_bytes: int) -> int:
    """Leading whole pages in which both agree."""
    whole = min(len(one), len(other)) // page_bytes
    if one[: whole * page_bytes] == other[: whole * page_bytes]:
        return whole
    low, high = 0, whole - 1
    while low < high:
        middle = (low + high + 1) // 2
        if one[: middle * page_bytes] == other[: middle * page_bytes]:
            low = middle
        else:
            high = middle - 1
    return low
