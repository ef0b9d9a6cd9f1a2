"""Copies: pages whose leading slots the workers are to copy before they write anything of a step.

Two sequences that agree up to the middle of a page cannot share it: both would write into it. So the one that comes later gets a page of
its own and a copy of what they have in common. The copy is an event of the step, and every worker carries it out in its own memory.

Within one batch no page is both a source and a target, and all targets are fresh: so the copies may run in any order, or at once, and
each reads its source as it was before the step. A source stays what it is until every worker has acknowledged the step: a page that
somebody owned at the step's beginning goes to quarantine or to the newest end of the index at the earliest in this version, and one
that nobody held is made as young as if it had just been used.
"""

from __future__ import annotations

import numpy as np

from kvmanager.machine import events as ev
from kvmanager.machine.draft import Draft
from kvmanager.machine.state import State

__all__ = ["apply_copied", "decide_copies"]


def decide_copies(draft: Draft) -> None:
    """Log what this command has to have copied: one event for each pool."""
    for pool, copies in draft.copies.items():
        columns = zip(*((source, target, tokens) for target, (source, tokens) in copies.items()), strict=True)
        draft.events.append(ev.PagesCopied(pool, *(np.array(column, np.int32) for column in columns)))


def apply_copied(state: State, event: ev.PagesCopied) -> None:
    """The bytes are the workers' business; here the sources of the index become young, so that nobody evicts them meanwhile."""
    prefix = state.pools[event.pool].prefix
    for page in dict.fromkeys(event.sources.tolist()):
        node = prefix.node_of[page]
        if node is not None:
            prefix.touch(node, state.version)
