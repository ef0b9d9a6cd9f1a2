"""Handoff: a sequence changes pools. The states, the books of one handoff, and which pages have to move.

    prefilling ──▶ sealed ──▶ reserving ──▶ moving ──▶ resident
        └────────────┴────────────┴───────────┴──────▶ aborted ──▶ (ended)

prefilling  the source still writes; sealed once its workers have acknowledged every token
reserving   the target pool lacks pages; tried again whenever some come free there
moving      the target has pages; its workers pull. The handoff itself owns the source pages, whatever becomes of the sequence
resident    the sequence's table is the target's; the handoff is over
aborted     the target's pages are quarantined. The source pages stay held until the target's workers have acknowledged the abort or
            are known dead: until then one of them may still be reading

Ids are made by the manager and never used twice, so a late completion of an older handoff names nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from kvmanager.pages.prefix import Node

__all__ = ["Handoff", "HandoffState"]


class HandoffState(IntEnum):
    PREFILLING = 1
    SEALED = 2
    RESERVING = 3
    MOVING = 4
    ABORTED = 5


@dataclass(slots=True)
class Handoff:
    """One handoff that is not over.

    version         of the last change of state
    length          tokens at sealing
    source_pages    the sequence's table at `moving`, held by the handoff
    source_indexed  how many of those lead in the source's prefix index, ending at source_node
    target_shared   leading pages that the target already had: not moved
    target_flushed  leading pages that were such before the tenant was flushed there: others may still hold them, unlisted
    target_pages    the whole table in the target pool, shared pages first
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
    length: int = 0
    source_pages: list[int] = field(default_factory=list)
    source_indexed: int = 0
    source_node: Node | None = None
    target_shared: int = 0
    target_pages: list[int] = field(default_factory=list)
    target_node: Node | None = None
    pulled: dict[int, None] = field(default_factory=dict)
    target_flushed: int = 0
