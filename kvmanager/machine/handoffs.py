"""Handoffs: what the manager decides about them. What their events do: `handoff_events`. The books of one: `kvmanager.pages.handoff`.

A handoff that gets no further is ended by time: a moving one after `handoff_timeout_ms`, one that waits (for tokens to be written, for
pages in the target) after `handoff_wait_ms`, and one whose source has something to write and says nothing of it after `handoff_prefill_ms`:
another target would not help that, so its owner is told that it has stalled, and may compute it elsewhere. A pull that failed is tried again,
`handoff_tries` times in all. A handoff that names a group then begins anew into another pool of it; each pool is tried once.

Nothing here looks at all handoffs at once: a command costs what it moves on, however many are under way.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from kvmanager.errors import (
    InvalidValue,
    KVError,
    OutOfPages,
    OverQuota,
    SequenceTooLarge,
    TooMany,
    Unknown,
    WrongState,
)
from kvmanager.machine import events as ev
from kvmanager.machine import lives
from kvmanager.machine.admission import check_ready
from kvmanager.machine.commands import HandOff
from kvmanager.machine.draft import Draft
from kvmanager.machine.state import State
from kvmanager.pages.handoff import ANY_GROUP, Handoff, HandoffState, source_of
from kvmanager.pages.layouts import why_not
from kvmanager.pages.pool import Pool
from kvmanager.pages.prefix import TOKEN_BYTES, Match
from kvmanager.pages.sequences import Sequence
from kvmanager.tables import div_ceil

__all__ = ["abort", "abort_asked", "expire", "give_up", "hand_off", "list_handoffs", "pull_failed", "pulled", "settle_handoffs"]

NO_PAGES = np.zeros(0, np.int32)
QUEUE_LOOKS = 16  # handoffs of a full pool's queue that one command tries: those at its head, past tenants that are at their quota
REASON_MAX = 300


# --- beginning -------------------------------------------------------------------------------------------------------------------


def hand_off(draft: Draft, item: HandOff) -> list[Any]:
    """[handoff id, target pool]. Raises Unknown, WrongState, InvalidValue, LayoutMismatch, NoConversion, SequenceTooLarge, PoolNotReady,
    PoolDraining, TooMany; OutOfPages and OverQuota if pages are to be reserved, OverQuota too if the quota can never suffice."""
    state = draft.state
    if not draft.alive(item.sequence):
        raise Unknown("sequence", item.sequence)
    sequence = state.sequences[item.sequence]
    active = draft.active_handoff(sequence)
    if active:
        raise WrongState("sequence", item.sequence, "one without an active handoff", f"handoff {active}")
    if item.pool:
        targets = [state.pool(item.pool)]
        if targets[0].index == sequence.pool:
            raise InvalidValue("step.hand_off", f"a pool other than {item.pool}, where the sequence is", item.pool)
    else:
        targets = others(state, sequence, item.group)
    until = _known(draft, sequence) if item.reserve else 0
    return begin(draft, sequence, targets, item.group, reserve=item.reserve, stream=item.stream, until=until)


def others(state: State, sequence: Sequence, group: str) -> list[Pool]:
    """The pools of a group but the one where the sequence is. Raises Unknown."""
    among = state.pools if group == ANY_GROUP else state.groups.get(group, [])
    if not among:
        raise Unknown("group", group)
    return [pool for pool in among if pool.index != sequence.pool]


def begin(
    draft: Draft,
    sequence: Sequence,
    targets: list[Pool],
    group: str,
    *,
    reserve: bool = False,
    stream: bool = False,
    until: int = 0,
    tried: tuple[int, ...] = (),
    cause: str = "",
) -> list[Any]:
    """Log the beginning of a handoff into the best of `targets`. Raises why not: for several, why not into the one that suits best."""
    state = draft.state
    fitting: list[Pool] = []
    why: KVError | None = None
    for target in targets:
        try:
            _check_fits(draft, sequence, target, reserve)
            fitting.append(target)
        except KVError as error:
            why = why or error
    if not fitting:
        raise why or WrongState("sequence", sequence.sequence_id, "another pool that it may go to", "none in the group")
    if len(state.handoffs) + len(draft.begun) >= state.config.handoffs_max:
        raise TooMany("handoffs", state.config.handoffs_max)
    target, found = _choose(draft, sequence, fitting, reserve)
    known = _known(draft, sequence)
    handoff_id = state.next_handoff + len(draft.begun)
    event = ev.HandoffBegun(handoff_id, sequence.sequence_id, target.index, until, group, np.array(tried, np.int32), cause)
    draft.begun[sequence.sequence_id] = event
    draft.events.append(event)
    draft.incoming[target.index] = draft.incoming.get(target.index, 0) + known
    if reserve:
        pages = draft.pool(target.index)
        pages.pin(found.nodes, found.last_pages)
        shared = found.pages()
        fresh = pages.take(_total(draft, sequence, target, True) - len(shared), pages.account(sequence.namespace))
        draft.events.append(ev.HandoffReserved(handoff_id, shared, fresh))
        draft.reserved[handoff_id] = (shared, fresh)
        if stream:
            draft.events.append(ev.HandoffStreaming(handoff_id, *_who_pulls(draft, handoff_id, sequence.pool, target.index)))
    return [handoff_id, target.name]


def _who_pulls(draft: Draft, handoff_id: int, source: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """The target's workers, and for each the worker of the source that it pulls from. Both int64 [n]."""
    pullers, sources = draft.live_workers(target), draft.live_workers(source)
    chosen = [sources[source_of(rank, len(pullers), len(sources), handoff_id)] for rank in range(len(pullers))]
    return np.array(pullers, np.int64), np.array(chosen, np.int64)


def _check_fits(draft: Draft, sequence: Sequence, target: Pool, reserve: bool) -> None:
    """Raises unless the sequence could ever be in that pool, and its workers are there."""
    source = draft.state.pools[sequence.pool]
    what = f"handoff from pool {source.name} to {target.name}"
    if refusal := why_not(what, source.layout, target.layout, source.page_size == target.page_size):
        raise refusal
    total = _total(draft, sequence, target, reserve)
    if total > target.num_pages:
        raise SequenceTooLarge(target.name, total, target.num_pages)
    check_ready(draft, target)
    if refusal := _never(draft, sequence, target, total):
        raise refusal


def _never(draft: Draft, sequence: Sequence, target: Pool, total: int) -> KVError | None:
    """Why a sequence of so many pages can never be in the pool, however long it waits; None if it can."""
    if total > target.num_pages:
        return SequenceTooLarge(target.name, total, target.num_pages)
    account = draft.pool(target.index).account(sequence.namespace)
    if account is not None and total > account.quota:
        return OverQuota(target.name, account.tenant, total, account.quota)
    return None


def _total(draft: Draft, sequence: Sequence, target: Pool, reserve: bool = False) -> int:
    """Pages that the sequence needs in the pool: for what it has, and if they are to be reserved, for all tokens known of it."""
    tables, source = draft.state.tables, draft.state.pools[sequence.pool]
    row = tables.row(sequence.sequence_id)
    if source.page_size == target.page_size:
        cut = draft.cut.get(sequence.sequence_id)
        total = int(tables.page_counts[row]) if cut is None else cut.page_count
    else:
        total = div_ceil(max(draft.length(sequence.sequence_id), sequence.reserved * source.page_size), target.page_size)
    return max(total, div_ceil(_known(draft, sequence), target.page_size)) if reserve else total


def _known(draft: Draft, sequence: Sequence) -> int:
    """Leading tokens whose ids are known, but for those that this command tells."""
    return min(draft.known(sequence), len(sequence.tokens) // TOKEN_BYTES)


def _match(draft: Draft, sequence: Sequence, target: Pool, tokens: int) -> Match:
    data = bytes(sequence.tokens[: tokens * TOKEN_BYTES])
    return draft.pool(target.index).match(sequence.namespace, data, tokens // target.page_size)


def _choose(draft: Draft, sequence: Sequence, targets: list[Pool], reserve: bool) -> tuple[Pool, Match]:
    """By placement's score, pools with room for it now first. Raises OutOfPages or OverQuota if pages are to be reserved, and none has room."""
    config, known = draft.state.config, _known(draft, sequence)
    until = known if reserve else min(draft.length(sequence.sequence_id), known)
    looks: list[tuple[int, int, Pool, Match]] = []
    refusals: list[KVError] = []
    for target in targets:
        if len(targets) == 1 and not reserve:
            return target, Match([], 0, 0)
        found = _match(draft, sequence, target, until)
        pages = draft.pool(target.index)
        account = pages.account(sequence.namespace)
        wanted = _total(draft, sequence, target, reserve) - found.page_count()
        pinned = pages.pin(found.nodes, found.last_pages)
        full = pages.can_take(wanted, account) < wanted
        if full:
            refusals.append(pages.refusal(wanted, account))
        pages.unpin(pinned)
        load = target.load + draft.load_change.get(target.index, 0)
        load += draft.state.handoffs.incoming.get(target.index, 0) + draft.incoming.get(target.index, 0)
        cached = found.page_count() * target.page_size
        looks.append((int(full), config.placement_load_weight * load - config.placement_match_weight * cached, target, found))
    looks.sort(key=lambda item: item[:2])  # stable: equal ones stay in the order of the config
    if reserve and looks[0][0]:
        raise refusals[0]
    return looks[0][2], looks[0][3]


# --- ending ----------------------------------------------------------------------------------------------------------------------


def abort_asked(draft: Draft, handoff_id: int) -> None:
    handoff = draft.state.handoff(handoff_id)
    if handoff.state is HandoffState.ABORTED or handoff_id in draft.aborted:
        raise WrongState("handoff", handoff_id, "one that is not over", "aborted")
    abort(draft, handoff_id, "asked", "asked for by the client")


def abort(draft: Draft, handoff_id: int, code: str, reason: str) -> None:
    draft.aborted[handoff_id] = None
    draft.events.append(ev.HandoffAborted(handoff_id, code, reason[:REASON_MAX]))


def give_up(draft: Draft, handoff: Handoff, code: str, reason: str) -> None:
    """The target has failed it: abort it, and if it names a group, begin anew with another pool at the end of this command."""
    abort(draft, handoff.handoff_id, code, reason)
    if handoff.group:
        draft.redirected[handoff.handoff_id] = code


def _clocks(state: State) -> tuple[tuple[Iterable[int], int], ...]:
    """Handoffs that time ends, the one that has waited longest first, and how long each may get no further; 0 is for ever."""
    handoffs, config = state.handoffs, state.config
    return (
        (handoffs.moving, config.handoff_timeout_ms),
        (handoffs.owing, config.handoff_prefill_ms),
        (handoffs.waiting, config.handoff_wait_ms),
    )


def expire(draft: Draft, now_ms: int) -> None:
    """Give up what got no further for too long."""
    handoffs = draft.state.handoffs
    for among, limit in _clocks(draft.state):
        late: list[int] = []
        for number in among if limit else ():
            if now_ms - handoffs[number].since_ms <= limit:
                break
            if number not in draft.aborted:  # with its pool, in this very command
                late.append(number)
        for number in sorted(late):
            handoff = handoffs[number]
            what = f"{handoff.state.name.lower()} for more than {limit} ms without getting further"
            if among is handoffs.owing:
                abort(draft, number, "stalled", what + _behind(draft.state, handoff))
                continue
            pullers = handoff.sources if handoff.state is HandoffState.MOVING else {}
            missing = [draft.state.workers[each].name for each in pullers if each not in handoff.pulled]
            give_up(draft, handoff, "timed_out", what + (f": not pulled by {', '.join(missing)}" if missing else ""))


def _behind(state: State, handoff: Handoff) -> str:
    """Who has not written the sequence to its end, in words."""
    sequence, length = state.sequences[handoff.sequence_id], state.tables.length(handoff.sequence_id)
    late = [each for each in state.live_workers(handoff.source) if sequence.written.get(each, 0) < length]
    return f": not written by {', '.join(state.workers[each].name for each in late)}, {state.written(sequence)} of {length} tokens are"


def is_overdue(state: State, now_ms: int) -> bool:
    """Whether `expire` has something to do."""
    handoffs = state.handoffs
    for among, limit in _clocks(state):
        first = next(iter(among), 0)
        if limit and first and now_ms - handoffs[first].since_ms > limit:
            return True
    return False


# --- what workers report ---------------------------------------------------------------------------------------------------------


def _pulling(draft: Draft, handoff_id: int, worker: int) -> Handoff | None:
    """The handoff that the worker pulls for. None if it is over, or was never this worker's: such a report changes nothing."""
    handoff = draft.state.handoffs.get(handoff_id)
    if handoff is None or handoff.state is not HandoffState.MOVING or handoff_id in draft.aborted:
        return None
    return handoff if worker in handoff.sources and worker not in handoff.pulled else None


def pulled(draft: Draft, handoff_id: int, worker: int, pool: int) -> None:
    """A worker reports its pull."""
    handoff = _pulling(draft, handoff_id, worker)
    if handoff is None:
        return
    draft.events.append(ev.HandoffPulled(handoff_id, worker))
    everywhere = all(each in handoff.pulled or each == worker for each in draft.live_workers(pool))
    if everywhere and lives.is_current(draft, handoff.source):
        draft.events.append(ev.HandoffResident(handoff_id))


def pull_failed(draft: Draft, handoff_id: int, attempt: int, worker: int, reason: str) -> None:
    """A worker reports that a try of its pull has failed, for good: nothing of it can land any more. Only the current try counts."""
    handoff = _pulling(draft, handoff_id, worker)
    if handoff is None or attempt != handoff.failures.get(worker, 0):
        return
    tries = draft.state.config.handoff_tries
    if attempt + 1 >= tries:
        give_up(draft, handoff, "pull_failed", f"worker {draft.state.workers[worker].name}, {tries} tries: {reason}")
        return
    targets, sources = list(handoff.sources), draft.live_workers(handoff.source)
    source = sources[source_of(targets.index(worker), len(targets), len(sources), handoff_id + attempt + 1)]
    draft.events.append(ev.HandoffFailed(handoff_id, worker, attempt, source, reason[:REASON_MAX]))


# --- going on --------------------------------------------------------------------------------------------------------------------


def settle_handoffs(draft: Draft) -> None:
    """Handoffs go on as far as they can; aborted ones end once nobody can be reading for them."""
    handoffs = draft.state.handoffs
    if not handoffs and not draft.begun:
        return
    for target, aborted in handoffs.aborted.items():
        ended: list[int] = []
        for number, version in aborted.items():
            if version > draft.acked(target):
                break
            ended.append(number)
        draft.events += [ev.HandoffEnded(number) for number in sorted(ended)]
    lives.settle_pulled(draft)
    due = dict(handoffs.sealed)
    for sequence_id in draft.written:
        number = draft.state.sequences[sequence_id].handoff
        if number and handoffs[number].state is HandoffState.PREFILLING:
            due[number] = None
    for number in sorted(due):
        if number not in draft.aborted:
            handoff = handoffs[number]
            _advance(draft, number, handoff.sequence_id, handoff.target, handoff.state, handoff)
    for target, queue in handoffs.reserving.items():
        _serve(draft, target, queue)
    for number, cause in list(draft.redirected.items()):
        _redirect(draft, handoffs[number], cause)
    for event in list(draft.begun.values()):
        _advance(draft, event.handoff, event.sequence, event.target, HandoffState.PREFILLING, None)


def _serve(draft: Draft, target: int, queue: list[int]) -> None:
    """The queue of a pool that was full: whoever came first gets pages first. One tenant's quota holds up nobody else."""
    for number in queue[:QUEUE_LOOKS]:
        if number in draft.aborted:
            continue
        handoff = draft.state.handoffs[number]
        refusal = _advance(draft, number, handoff.sequence_id, target, handoff.state, handoff)
        if isinstance(refusal, OutOfPages):
            return


def _redirect(draft: Draft, handoff: Handoff, cause: str) -> None:
    """Begin anew with another pool of the group, if there is one."""
    state = draft.state
    if not draft.alive(handoff.sequence_id):
        return
    sequence = state.sequences[handoff.sequence_id]
    if draft.active_handoff(sequence):
        return
    tried = (*handoff.tried, handoff.target)
    targets = [pool for pool in others(state, sequence, handoff.group) if pool.index not in tried]
    try:
        begin(
            draft,
            sequence,
            targets,
            handoff.group,
            reserve=handoff.until > 0,
            stream=handoff.streaming,
            until=handoff.until,
            tried=tried,
            cause=cause,
        )
    except KVError:
        return  # its owner has been told that the first one failed, and asks again as it sees fit


def _advance(draft: Draft, handoff_id: int, sequence_id: int, target: int, at: HandoffState, handoff: Handoff | None) -> KVError | None:
    """Carry a handoff as far as it goes now: prefilling to sealed to reserving to moving. Gives why there are no pages, if that is it.

    `handoff` is None for one that begins in this very command.
    """
    state = draft.state
    sequence = state.sequences[sequence_id]
    if sequence_id in draft.cut:
        return None  # the next acknowledgement tells how much of it is written
    length = state.tables.length(sequence_id)
    if at is HandoffState.PREFILLING:
        until = handoff.until if handoff is not None else draft.begun[sequence_id].until
        if sequence_id in draft.grown or draft.written_tokens(sequence) < length or length < until:
            return None
        draft.events.append(ev.HandoffSealed(handoff_id))
    if not lives.is_current(draft, sequence.pool):
        return None
    if draft.published_pages(sequence) < sequence.shared and not sequence.unlisted:
        return None  # a fork may publish these pages for both, and a handoff's pages have to stay as they are: it will be soon
    pool = state.pools[target]
    total = _total(draft, sequence, pool)
    if refusal := _never(draft, sequence, pool, total):  # it grew after the handoff was asked for, or a quota was set
        return _cannot(draft, handoff, handoff_id, refusal)
    pages = draft.pool(target)
    found = _match(draft, sequence, pool, min(length, len(sequence.tokens) // TOKEN_BYTES))
    shared = found.pages()
    first, reserved = _reserved(draft, handoff, handoff_id)
    skipped = min(max(len(shared) - first, 0), len(reserved))  # the others stay where they are in the table: they may be streamed into
    kept = reserved[skipped : skipped + total - len(shared)]
    pinned = pages.pin(found.nodes, found.last_pages)
    account = pages.account(sequence.namespace)
    more = total - len(shared) - len(kept)
    if pages.can_take(more, account) < more:
        refusal = pages.refusal(more, account)
        pages.unpin(pinned)
        if at is HandoffState.RESERVING:
            return refusal
        if handoff is not None and handoff.group and _room_elsewhere(draft, handoff, sequence):
            give_up(draft, handoff, refusal.code, refusal.text)
            return refusal
        draft.events.append(ev.HandoffReserving(handoff_id))
        return refusal
    fresh = np.concatenate([kept, pages.take(more, account)])
    pullers, sources = _who_pulls(draft, handoff_id, sequence.pool, target)
    draft.events.append(ev.HandoffMoving(handoff_id, shared, fresh, len(kept), skipped, pullers, sources))
    return None


def _reserved(draft: Draft, handoff: Handoff | None, handoff_id: int) -> tuple[int, np.ndarray]:
    """Pages of the target that were taken for the handoff before it moves, and where in its table there they begin."""
    if handoff is not None:
        return handoff.target_fresh, np.array(handoff.target_pages[handoff.target_fresh :], np.int32)
    shared, fresh = draft.reserved.get(handoff_id, (NO_PAGES, NO_PAGES))
    return len(shared), fresh


def _cannot(draft: Draft, handoff: Handoff | None, handoff_id: int, refusal: KVError) -> KVError:
    if handoff is not None:
        give_up(draft, handoff, refusal.code, refusal.text)
    else:
        abort(draft, handoff_id, refusal.code, refusal.text)
    return refusal


def _room_elsewhere(draft: Draft, handoff: Handoff, sequence: Sequence) -> bool:
    """Whether another pool of the group has room now, so that nothing has to wait for this one."""
    for pool in others(draft.state, sequence, handoff.group):
        if pool.index == handoff.target or pool.index in handoff.tried:
            continue
        try:
            _check_fits(draft, sequence, pool, False)
        except KVError:
            continue
        pages, wanted = draft.pool(pool.index), _total(draft, sequence, pool)
        if pages.can_take(wanted, pages.account(sequence.namespace)) >= wanted:
            return True
    return False


# --- queries ---------------------------------------------------------------------------------------------------------------------


def list_handoffs(state: State, limit: int) -> list[dict[str, Any]]:
    """The oldest handoffs that are not over, for people and programs. Ages are in versions since the last change of state."""
    return [
        {
            "handoff": handoff.handoff_id,
            "sequence": handoff.sequence_id,
            "state": handoff.state.name.lower(),
            "source": state.pools[handoff.source].name,
            "target": state.pools[handoff.target].name,
            "tokens": handoff.length,
            "pages": len(handoff.target_pages),
            "pages_shared": handoff.target_shared,
            "pulled": len(handoff.pulled),
            "transport": _transports(state, handoff),
            "failed": sum(handoff.failures.values()),
            "streaming": handoff.streaming,
            "age": state.version - handoff.version,
        }
        for handoff in islice(state.handoffs.values(), limit)
    ]


def _transports(state: State, handoff: Handoff) -> str:
    """By what its workers pull, as far as they have said: "shm", or "cuda_ipc+nixl" if they differ."""
    pairs = ((state.workers.get(worker), source) for worker, source in handoff.sources.items())
    return "+".join(dict.fromkeys(puller.links[source][0] for puller, source in pairs if puller is not None and source in puller.links))
