"""Lives: what one life of the manager knows of those before it. A restart from a journal begins the next one, with the next epoch.

A host that is lost may take with it the end of the log, which workers have seen. So nothing of what was lost is ever used again for
something else: versions and ids of a new life start far above what the old one can have reached without a sync. A version names one
batch for ever, and says by its number whether the manager that came back knows it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmanager.config import ManagerConfig
from kvmanager.errors import JournalMismatch, StaleEpoch
from kvmanager.machine import events as ev
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.draft import Draft
from kvmanager.machine.state import State

__all__ = [
    "LIVES_MAX",
    "RECORDS_UNSYNCED_MAX",
    "begin_life",
    "check_ack",
    "check_epoch",
    "check_seen",
    "first_version",
    "follows",
    "in_log",
    "is_current",
    "settle_pulled",
]

_STRIDE = 1_000_000
RECORDS_UNSYNCED_MAX = _STRIDE - 1  # the journal syncs at the latest then
_IDS = 1 << 24  # more than 64 MiB, the most that stays unsynced, can hold openings, handoffs or joins
LIVES_MAX = 64  # a worker that slept through so many restarts starts over


def first_version(last: int) -> int:
    """The first version of a life whose log goes on behind `last`."""
    return (last // _STRIDE + 2) * _STRIDE


def follows(last: int, version: int) -> bool:
    """Whether `version` can stand behind `last` in a log: the next one, or the first of the next life."""
    return version in (last + 1, first_version(last))


def begin_life(state: State, config: ManagerConfig, epoch: int) -> EventBatch:
    """The batch that begins the next life of a recovered manager. Raises JournalMismatch, naming what `config` has changed."""
    for pool, ours in zip(state.pools, config.pools, strict=False):
        for name, before, now in (
            ("name", pool.name, ours.name),
            ("num_pages", pool.num_pages, ours.num_pages),
            ("page_size", pool.page_size, ours.page_size),
            ("group", pool.group, ours.group),
            ("workers", pool.workers_expected, ours.workers),
            ("layout", pool.layout or ours.layout, ours.layout or pool.layout),
        ):
            if before != now:
                raise JournalMismatch(f"pool {pool.name}: {name}", before, now)
    if len(config.pools) < len(state.pools):
        raise JournalMismatch("pools", ", ".join(pool.name for pool in state.pools), ", ".join(pool.name for pool in config.pools))
    slots = len(state.free_slots) + len(state.sequences)
    if config.sequences_max < slots:
        raise JournalMismatch("sequences_max", f"at least {slots}", config.sequences_max)
    added = [
        ev.PoolAdded(index, pool.name, pool.group, pool.num_pages, pool.page_size, pool.workers, pool.layout)
        for index, pool in enumerate(config.pools)
        if index >= len(state.pools)
    ]
    quotas = [
        ev.QuotaSet(index, b"", 1, pool.tenant_quota)
        for index, pool in enumerate(config.pools)
        if pool.tenant_quota >= 0
        and pool.tenant_quota != (state.pools[index].prefix.accounts.everybody if index < len(state.pools) else -1)
    ]
    begun = ev.EpochBegun(state.epoch, state.version, config.sequences_max)
    return EventBatch(max(epoch, state.epoch + 1), first_version(state.version), state.now_ms, [begun, *added, *quotas])


def begins_after(state: State, batch: EventBatch) -> bool:
    """Whether the batch begins the life that follows on `state`."""
    first = batch.events[0] if batch.events else None
    return (
        isinstance(first, ev.EpochBegun)
        and (first.before, first.last) == (state.epoch, state.version)
        and batch.epoch > first.before
        and batch.version == first_version(first.last)
    )


def epoch_begun(state: State, event: ev.EpochBegun) -> None:
    """Applied with the new epoch and version in place: hold what workers of the old life might touch, and give everybody time."""
    state.past[event.before] = event.last
    while len(state.past) > LIVES_MAX:
        del state.past[next(iter(state.past))]
    state.begun = state.version
    state.unsettled = dict.fromkeys(state.workers)
    state.next_generation += _IDS
    state.next_worker += _IDS
    state.next_handoff += _IDS
    state.next_waiting += _IDS
    state.next_pin += _IDS
    for held in state.pins.values():
        if held.deadline_version:
            held.deadline_version += state.version - event.last  # versions that nobody lived through
    have = len(state.free_slots) + len(state.sequences)
    state.free_slots[:0] = range(event.slots - 1, have - 1, -1)
    for handoff in list(state.handoffs.values()):
        handoff.since_ms = state.now_ms  # as with leases: nobody got further while there was no manager
    state.handoffs.restored()
    for pool in state.pools:
        pool.hold_free(state.version)
    for client in state.clients.values():
        client.seen_ms = state.now_ms
    for worker in state.workers.values():
        worker.deadline_ms = state.now_ms + worker.lease_ms  # nobody could acknowledge while there was no manager


def lives_restored(state: State, event: ev.LivesRestored, _: Any) -> None:
    state.past = dict(zip(event.epochs.tolist(), event.lasts.tolist(), strict=True))
    state.begun = event.begun
    state.unsettled = {worker.worker_id: None for worker in state.workers.values() if worker.acked < state.begun}


def restore_events(state: State) -> list[Any]:
    """What a snapshot says of earlier lives."""
    if not state.past:
        return []
    return [ev.LivesRestored(state.begun, np.array(list(state.past), np.int64), np.array(list(state.past.values()), np.int64))]


def in_log(state: State, epoch: int, version: int) -> bool:
    """Whether a reader that has seen `version` of the life `epoch` has seen nothing but this log."""
    last = state.version if epoch == state.epoch else state.past.get(epoch)
    return last is not None and version <= last


def is_current(draft: Draft, pool: int) -> bool:
    """Whether every worker of the pool has acknowledged this life. Until then one may have acted on versions that were lost, so nobody
    may go on with a copy of what is in its pages."""
    return draft.acked(pool) >= draft.state.begun


def settle_pulled(draft: Draft) -> None:
    """Handoffs that were pulled before their source acknowledged this life are resident once it has."""
    state = draft.state
    if not state.begun or not (draft.acks or draft.dead):
        return
    if not any(state.acked(pool.index) < state.begun <= draft.acked(pool.index) for pool in state.pools):
        return
    for number in sorted(state.handoffs.moving):
        handoff = state.handoffs[number]
        if not handoff.pulled or number in draft.aborted:
            continue
        if all(each in handoff.pulled for each in draft.live_workers(handoff.target)) and is_current(draft, handoff.source):
            draft.events.append(ev.HandoffResident(handoff.handoff_id))


def check_epoch(state: State, epoch: int) -> None:
    """Raises StaleEpoch unless `epoch` is the current life or a remembered one of this log; 0 is not checked."""
    if epoch and epoch != state.epoch and epoch not in state.past:
        raise StaleEpoch(f"expected epoch {state.epoch} or one that it continues, got {epoch}", epoch=state.epoch)


def was_lost(state: State, version: int) -> bool:
    """Whether the version belongs to the end of an earlier life that was lost with its host: no version of this log."""
    return version < state.begun and any(last < version < first_version(last) for last in state.past.values())


def check_seen(state: State, version: int, client: int) -> None:
    """Raises StaleEpoch if a scheduler acts on a reply that is no part of this log: what it was told then did not happen. Or if it has not
    seen the reply to its last command: it had given it up, and that was carried out all the same."""
    record = state.clients.get(client)
    if record is not None and version < record.version:
        raise StaleEpoch(
            f"step.seen: expected at least version {record.version}, the one of this client's request {record.number}, got {version}: "
            "its reply never came, and it was carried out",
            epoch=state.epoch,
            version=state.version,
        )
    if version > state.version or was_lost(state, version):
        raise StaleEpoch(
            f"step.seen: expected a version of the log of epoch {state.epoch}, got {version}: the manager came back without it",
            epoch=state.epoch,
            version=state.version,
        )


def check_ack(state: State, epoch: int, version: int) -> None:
    """Raises StaleEpoch if whoever finished `version` in the life `epoch` has seen what this log does not hold."""
    check_epoch(state, epoch)
    known = in_log(state, epoch, version) if epoch not in (0, state.epoch) else True
    if not known or was_lost(state, version):
        raise StaleEpoch(
            f"expected a version of the log of epoch {state.epoch}, got {version} of epoch {epoch or 'unknown'}", epoch=state.epoch
        )
