"""Handoff: a sequence changes pools. The states and the books of one handoff, and who pulls from whom.

    prefilling ──▶ sealed ──▶ reserving ──▶ moving ──▶ resident
        └────────────┴────────────┴───────────┴──────▶ aborted ──▶ (ended)

prefilling  the source still writes; sealed once its workers have acknowledged every token. With a reservation the target's pages are the
            handoff's already, and nobody writes into them yet; if it is streamed, the target's workers do: from then on they may be
            pulling what the source says is written. Nobody holds the source's pages for them: what is copied out of pages that became
            somebody else's is never believed, and lands in pages that are the handoff's or in quarantine
reserving   the target pool lacks pages; tried again whenever some come free there, first come first served
moving      the target has pages; its workers pull. The handoff itself owns the source pages, whatever becomes of the sequence
resident    the sequence's table is the target's; the handoff is over
aborted     the target's pages are quarantined. The source pages stay held until the target's workers have acknowledged the abort or
            are known dead: until then one of them may still be reading

Ids are made by the manager and never used twice, so a late completion of an older handoff names nothing. A pull that failed is tried
again under the same id; a report says which try it is about.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from enum import IntEnum

from kvmanager.pages.prefix import Node

__all__ = ["ANY_GROUP", "Handoff", "HandoffState", "Handoffs", "source_of"]

ANY_GROUP = "*"  # a handoff to whichever pool of whatever group


class HandoffState(IntEnum):
    PREFILLING = 1
    SEALED = 2
    RESERVING = 3
    MOVING = 4
    ABORTED = 5


def source_of(rank: int, targets: int, sources: int, turn: int) -> int:
    """The place of the source worker from which target worker `rank` of `targets` pulls: latents are the same in all of them.

    No source has more than ceil(targets / sources) pullers; `turn`, a handoff id or more, rotates who comes first.
    """
    return (rank * sources // targets + turn) % sources


@dataclass(slots=True)
class Handoff:
    """One handoff that is not over.

    version         of the last change of state
    since_ms        when it last got further: a change of state, tokens or layers written by the source, something for it to write after a
                    while without, a worker that has pulled
    until           tokens: it is not sealed before the sequence is that long
    load            tokens of the sequence when it began, which weigh on the target from then on
    group           pools that it may go to if this one fails it, "" for none
    tried           pools that have failed it
    length          tokens at sealing
    source_pages    the sequence's table at `moving`, held by the handoff
    source_indexed  how many of those lead in the source's prefix index, ending at source_node
    target_shared   leading pages that lead in the target's index, ending at target_node: not moved
    target_pages    the whole table in the target pool, pages that were there first
    target_fresh    where in it the pages begin that were taken for this handoff
    target_node     not None from `moving` on, or from the reservation on
    flushed         its tenant's pages in the target were flushed meanwhile
    streaming       the target's workers may pull before it moves, into what was reserved
    reach           tokens and layers of them that its source has reported as written in the middle of a step
    sources         each worker of the target -> the source worker that it pulls from: from `moving` on, or from the beginning if it streams
    failures        worker -> tries that failed
    pulled          workers of the target pool that have reported the pull as done and verified
    """

    handoff_id: int
    sequence_id: int
    namespace: bytes
    owner: int
    source: int
    target: int
    state: HandoffState
    version: int
    since_ms: int = 0
    until: int = 0
    load: int = 0
    group: str = ""
    tried: tuple[int, ...] = ()
    length: int = 0
    source_pages: list[int] = field(default_factory=list)
    source_indexed: int = 0
    source_node: Node | None = None
    target_shared: int = 0
    target_pages: list[int] = field(default_factory=list)
    target_fresh: int = 0
    target_node: Node | None = None
    flushed: bool = False
    streaming: bool = False
    reach: tuple[int, int] = (0, 0)
    sources: dict[int, int] = field(default_factory=dict)
    failures: dict[int, int] = field(default_factory=dict)
    pulled: dict[int, None] = field(default_factory=dict)


class Handoffs(dict[int, Handoff]):
    """All handoffs that are not over, by id, and where to look for those that may get further: nothing here walks through all of them.

    waiting    prefilling, sealed and reserving ones, by when they last got further, longest ago first
    moving     the same for those that move
    owing      the same for prefilling ones whose source has something to write
    prefilling sequence -> prefilling handoff
    sealed     sealed ones: they wait for something that is soon over
    reserving  target pool -> ids, ascending: the order in which they are served
    aborted    target pool -> id -> version of the abort, oldest first
    incoming   pool -> tokens on their way to it
    holding    pool -> handoffs that have pages in it, or may get some
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[int, None] = {}
        self.moving: dict[int, None] = {}
        self.owing: dict[int, None] = {}
        self.prefilling: dict[int, int] = {}
        self.sealed: dict[int, None] = {}
        self.reserving: dict[int, list[int]] = {}
        self.aborted: dict[int, dict[int, int]] = {}
        self.incoming: dict[int, int] = {}
        self.holding: dict[int, int] = {}

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def begin(self, handoff: Handoff) -> None:
        self[handoff.handoff_id] = handoff
        self._hold(handoff, 1)
        self._enter(handoff)

    def turn(self, handoff: Handoff, to: HandoffState, version: int, now_ms: int) -> None:
        self._leave(handoff)
        handoff.state, handoff.version, handoff.since_ms = to, version, now_ms
        self._enter(handoff)

    def progress(self, handoff_id: int, now_ms: int) -> None:
        """It got further, in the state that it is in."""
        handoff = self[handoff_id]
        handoff.since_ms = now_ms
        for among in (self.moving, self.waiting, self.owing):
            if handoff_id in among:
                del among[handoff_id]
                among[handoff_id] = None

    def owe(self, handoff_id: int, owes: bool, now_ms: int) -> None:
        """Whether the source of a prefilling handoff has something to write. It gets further when that begins, not when it gets more."""
        if not owes:
            self.owing.pop(handoff_id, None)
        elif handoff_id not in self.owing:
            self.owing[handoff_id] = None
            self.progress(handoff_id, now_ms)

    def end(self, handoff_id: int) -> Handoff:
        handoff = self.pop(handoff_id)
        self._hold(handoff, -1)
        self._leave(handoff)
        return handoff

    def _hold(self, handoff: Handoff, change: int) -> None:
        for pool in (handoff.source, handoff.target):
            self.holding[pool] = self.holding.get(pool, 0) + change

    def _enter(self, handoff: Handoff) -> None:
        number, state = handoff.handoff_id, handoff.state
        if state is HandoffState.ABORTED:
            self.aborted.setdefault(handoff.target, {})[number] = handoff.version
            return
        self.incoming[handoff.target] = self.incoming.get(handoff.target, 0) + handoff.load
        (self.moving if state is HandoffState.MOVING else self.waiting)[number] = None
        if state is HandoffState.PREFILLING:
            self.prefilling[handoff.sequence_id] = number
        elif state is HandoffState.SEALED:
            self.sealed[number] = None
        elif state is HandoffState.RESERVING:
            insort(self.reserving.setdefault(handoff.target, []), number)

    def _leave(self, handoff: Handoff) -> None:
        number, state = handoff.handoff_id, handoff.state
        if state is HandoffState.ABORTED:
            del self.aborted[handoff.target][number]
            return
        self.incoming[handoff.target] -= handoff.load
        del (self.moving if state is HandoffState.MOVING else self.waiting)[number]
        if state is HandoffState.PREFILLING:
            del self.prefilling[handoff.sequence_id]
            self.owing.pop(number, None)
        elif state is HandoffState.SEALED:
            del self.sealed[number]
        elif state is HandoffState.RESERVING:
            queue = self.reserving[handoff.target]
            del queue[bisect_left(queue, number)]

    def restored(self) -> None:
        """After a snapshot: the orders that are not that of the ids."""
        for among in (self.waiting, self.moving, self.owing):
            order = sorted(among, key=lambda number: (self[number].since_ms, number))
            among.clear()
            among.update(dict.fromkeys(order))
        for ended in self.aborted.values():
            by_version = sorted(ended, key=lambda number: (ended[number], number))
            versions = dict(ended)
            ended.clear()
            ended.update((number, versions[number]) for number in by_version)
