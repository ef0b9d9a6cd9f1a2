"""apply: the only writer of `State`. It makes no choices: what happens was decided, or is restored from a snapshot.

It never fails on a decided batch; `InvariantBroken` here means a bug or bytes that are no log of this manager.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmanager.errors import InvariantBroken
from kvmanager.machine import events as ev
from kvmanager.machine import lives
from kvmanager.machine.admission import apply_opened
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.clients import apply_answered, apply_forgotten
from kvmanager.machine.closing import apply_closed
from kvmanager.machine.copies import apply_copied
from kvmanager.machine.drains import apply_drained, apply_draining
from kvmanager.machine.forks import apply_forked
from kvmanager.machine.growth import apply_appended, apply_grown, apply_grown_again, apply_grown_further
from kvmanager.machine.handoff_events import (
    apply_aborted,
    apply_begun,
    apply_ended,
    apply_failed,
    apply_layers_written,
    apply_moving,
    apply_pulled,
    apply_reserved,
    apply_reserving,
    apply_resident,
    apply_sealed,
    apply_streaming,
)
from kvmanager.machine.pins import apply_pin_begun, apply_pins_ended
from kvmanager.machine.publishing import apply_evicted, apply_index_dropped, apply_published, apply_released
from kvmanager.machine.restore import RESTORE, Restoring
from kvmanager.machine.state import State
from kvmanager.machine.tenants import apply_flushed, apply_quota
from kvmanager.machine.truncation import apply_truncated
from kvmanager.machine.waiting import apply_dequeued, apply_enqueued
from kvmanager.machine.workers import (
    apply_acked,
    apply_dead,
    apply_fenced,
    apply_joined,
    apply_link_chosen,
    apply_page_bytes,
    apply_written,
)
from kvmanager.pages.neighbours import Neighbours
from kvmanager.pages.pool import Pool

__all__ = ["apply"]


def apply(state: State, batch: EventBatch, restoring: Restoring | None = None) -> None:
    """Change `state` by one batch. Batches come in version order; a snapshot's batch sets the version it was taken at."""
    in_order = batch.epoch == state.epoch and batch.version == state.version + 1
    if restoring is None and not in_order and not lives.begins_after(state, batch):
        raise InvariantBroken(f"apply: expected {state.epoch}:{state.version + 1}, got {batch.epoch}:{batch.version}")
    state.epoch, state.version = batch.epoch, batch.version
    state.now_ms = max(state.now_ms, batch.now_ms)  # a clock that jumps back must not shorten a lease
    for event in batch.events:
        if restoring is not None and type(event) in RESTORE:
            RESTORE[type(event)](state, event, restoring)
        else:
            _APPLY[type(event)](state, event)
    state.extras.sweep()


def _extras_named(state: State, event: ev.ExtrasNamed) -> None:
    state.extras.name(*event)


def _pool_added(state: State, event: ev.PoolAdded) -> None:
    pool = Pool(*event, extras=state.extras, remnants_bytes_max=state.config.remnants_bytes_max)
    if event.pool < len(state.config.pools) and state.config.pools[event.pool].partial_match:
        pool.prefix.neighbours = Neighbours()
    state.pools.append(pool)
    state.groups.setdefault(event.group, []).append(pool)
    state.pool_workers.append([])


_APPLY: dict[type, Callable[[State, Any], None]] = {
    ev.PoolAdded: _pool_added,
    ev.WorkerJoined: apply_joined,
    ev.WorkerAcked: apply_acked,
    ev.SequencesWritten: apply_written,
    ev.WorkerFenced: apply_fenced,
    ev.WorkerDead: apply_dead,
    ev.SequenceOpened: apply_opened,
    ev.SequencesGrown: apply_grown,
    ev.GrownAgain: apply_grown_again,
    ev.GrownFurther: apply_grown_further,
    ev.TokensAppended: apply_appended,
    ev.PagesPublished: apply_published,
    ev.SequenceClosed: apply_closed,
    ev.PagesEvicted: apply_evicted,
    ev.PagesReleased: apply_released,
    ev.IndexDropped: apply_index_dropped,
    ev.HandoffBegun: apply_begun,
    ev.HandoffReserved: apply_reserved,
    ev.HandoffStreaming: apply_streaming,
    ev.LayersWritten: apply_layers_written,
    ev.HandoffSealed: apply_sealed,
    ev.HandoffReserving: apply_reserving,
    ev.HandoffMoving: apply_moving,
    ev.HandoffFailed: apply_failed,
    ev.HandoffPulled: apply_pulled,
    ev.HandoffResident: apply_resident,
    ev.HandoffAborted: apply_aborted,
    ev.HandoffEnded: apply_ended,
    ev.SequencesTruncated: apply_truncated,
    ev.SequenceForked: apply_forked,
    ev.PagesCopied: apply_copied,
    ev.ClientAnswered: apply_answered,
    ev.ClientForgotten: apply_forgotten,
    ev.PromptEnqueued: apply_enqueued,
    ev.PromptsDequeued: apply_dequeued,
    ev.QuotaSet: apply_quota,
    ev.TenantFlushed: apply_flushed,
    ev.PinBegun: apply_pin_begun,
    ev.PinsEnded: apply_pins_ended,
    ev.ExtrasNamed: _extras_named,
    ev.PoolDraining: apply_draining,
    ev.PoolDrained: apply_drained,
    ev.EpochBegun: lives.epoch_begun,
    ev.LinkChosen: apply_link_chosen,
    ev.PageBytesTold: apply_page_bytes,
}
