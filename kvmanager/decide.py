"""decide: what a command makes happen, as events. Reads the state, never writes it; all choices are made here.

An item of a step that cannot be done becomes a refusal in the reply. A command that cannot be done at all raises a KVError, and
nothing has changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack
import numpy as np

from kvmanager import clients, lives, pins
from kvmanager import events as ev
from kvmanager.accounts import Account
from kvmanager.admission import admit, check_ready
from kvmanager.commands import Ack, Command, Flush, Join, SetQuota, Step, Tick, WorkerGone
from kvmanager.copies import decide_copies
from kvmanager.draft import Draft
from kvmanager.errors import (
    BadMessage,
    InvalidValue,
    KVError,
    LayoutMismatch,
    OutOfPages,
    SequenceTooLarge,
    TooMany,
    Unknown,
    WrongState,
)
from kvmanager.forks import fork, publish_kin
from kvmanager.growth import grow_same
from kvmanager.handoff import HandoffState
from kvmanager.pool import Pool
from kvmanager.prefix import PAGE_ID, TOKEN_BYTES
from kvmanager.sequences import slot_of
from kvmanager.state import State
from kvmanager.tenants import flush, set_quota
from kvmanager.truncation import believed, decide_truncated, truncate
from kvmanager.victims import choose_victims
from kvmanager.waiting import dequeue, enqueue

__all__ = ["Decision", "carry_out", "decide"]


class Decision(NamedTuple):
    """The batch to apply and publish, or None for a request that was answered before; and the reply's bytes."""

    batch: ev.EventBatch | None
    reply: bytes


def stale_number(last: int, number: int) -> BadMessage:
    return BadMessage(f"request number: expected above {last}, got {number}")


def decide(state: State, command: Command, now_ms: int, client: int, number: int) -> Decision:
    """Decide one command of a client. The same number again gets the same reply and changes nothing."""
    record = state.clients.get(client)
    if record is not None and number <= record.number:
        if number == record.number:
            return Decision(None, record.reply)
        raise stale_number(record.number, number)
    draft, reply = carry_out(state, command, now_ms, client)
    notices = record.notices if record is not None else []
    if notices:
        reply["notices"] = [list(notice) for notice in notices]
    reply["version"] = draft.version
    data = msgpack.packb(reply, use_bin_type=True)
    clients.forget_for(draft, client)
    draft.events.append(ev.ClientAnswered(client, number, len(notices), data))
    return Decision(ev.EventBatch(state.epoch, draft.version, now_ms, draft.events), data)


def carry_out(state: State, command: Command, now_ms: int, client: int) -> tuple[Draft, dict[str, Any]]:
    """What happens, as events in a draft, and the reply to it; all but the books of who asked."""
    draft = Draft(state)
    if isinstance(command, Step):
        lives.check_seen(state, command.seen)
        _settle_pages(draft)  # before the step takes pages: what it evicts must not be what is being published
    reply = _DECIDERS[type(command)](draft, command, max(now_ms, state.now_ms), client)
    if isinstance(command, Flush):
        return draft, reply  # what was flushed must not be found once more: the next command goes on
    if not isinstance(command, Step):
        _settle_pages(draft)
    _settle_handoffs(draft)
    draft.events += [ev.SequenceClosed(sequence_id, 3) for sequence_id in draft.closed_last]
    return draft, reply


# --- workers ---------------------------------------------------------------------------------------------------------------------


def _join(draft: Draft, command: Join, now_ms: int, client: int) -> dict[str, Any]:
    state = draft.state
    pool = state.pool(command.pool)
    if len(state.workers) >= state.config.workers_max:
        raise TooMany("workers", state.config.workers_max)
    if len(state.live_workers(pool.index)) >= pool.workers_expected:
        raise WrongState("pool", pool.name, f"at most {pool.workers_expected} live workers", "one more")
    if pool.layout and command.layout != pool.layout:
        raise LayoutMismatch(f"pool {pool.name}", pool.layout, command.layout)
    if pool.prefix.pages_indexed or any(sequence.pool == pool.index for sequence in state.sequences.values()):
        # Fresh memory beside pages that hold something: this worker would read garbage.
        raise WrongState("pool", pool.name, "an empty pool for a worker with fresh memory", "cached pages or open sequences")
    lease_ms = command.lease_ms or state.config.lease_ms
    draft.events.append(ev.WorkerJoined(state.next_worker, command.name, pool.index, command.layout, command.memory, lease_ms))
    return {"worker": state.next_worker, "lease_ms": lease_ms, "epoch": state.epoch}


def _ack(draft: Draft, command: Ack, now_ms: int, client: int) -> dict[str, Any]:
    state = draft.state
    lives.check_ack(state, command.epoch, max(command.version, command.as_of))
    worker = state.worker(command.worker)
    if command.version > state.version:
        raise InvalidValue("ack.version", f"at most {state.version}, the newest there is", command.version)
    if command.as_of and not command.version <= command.as_of <= state.version:
        raise InvalidValue("ack.as_of", f"{command.version}..{state.version}", command.as_of)
    draft.events.append(ev.WorkerAcked(command.worker, command.version))
    draft.acks[command.worker] = command.version
    ids, lengths = [], []
    for sequence_id, tokens in zip(command.ids.tolist(), command.tokens.tolist(), strict=True):
        sequence = state.sequences.get(sequence_id)
        if sequence is None or sequence.pool != worker.pool:
            continue  # closed or moved since: the worker could not know
        tokens = believed(sequence, tokens, command.as_of or command.version)
        length = state.tables.length(sequence_id)
        if tokens > length:
            raise InvalidValue("ack.tokens", f"at most the {length} tokens of sequence {sequence_id}", tokens)
        ids.append(sequence_id)
        lengths.append(tokens)
        draft.written.setdefault(sequence_id, {})[command.worker] = tokens
    if ids:
        draft.events.append(ev.SequencesWritten(command.worker, np.array(ids, np.int64), np.array(lengths, np.int64)))
    for handoff_id in dict.fromkeys(command.pulled.tolist()):
        _pulled(draft, handoff_id, command.worker, worker.pool)
    return {}


def _gone(draft: Draft, command: WorkerGone, now_ms: int, client: int) -> dict[str, Any]:
    lives.check_epoch(draft.state, command.epoch)
    worker = draft.state.workers.get(command.worker)
    if worker is None:
        raise Unknown("worker", command.worker)
    lost = [] if worker.fenced else _lose_pool(draft, worker.pool, f"worker {worker.name} is dead")
    draft.dead[command.worker] = None
    draft.events.append(ev.WorkerDead(command.worker))
    return {"lost": lost}


def _tick(draft: Draft, command: Tick, now_ms: int, client: int) -> dict[str, Any]:
    for worker in draft.state.workers.values():
        if not worker.fenced and now_ms > worker.deadline_ms:
            _lose_pool(draft, worker.pool, f"worker {worker.name} stopped acknowledging")
            draft.fenced[worker.worker_id] = None
            draft.events.append(ev.WorkerFenced(worker.worker_id))
    pins.expire(draft, now_ms)
    clients.expire(draft, now_ms, client, lambda sequence_id: _close(draft, sequence_id, 2))
    return {}


def _lose_pool(draft: Draft, pool: int, reason: str) -> list[int]:
    """The memory of a pool is gone, or a worker that is not to be trusted holds it: nothing in it may be found again."""
    state = draft.state
    for handoff in state.handoffs.values():
        over = handoff.state is HandoffState.ABORTED or handoff.handoff_id in draft.aborted  # both pools may be lost at once
        if pool in (handoff.source, handoff.target) and not over:
            _abort(draft, handoff.handoff_id, "lost", reason)
    lost = [sequence.sequence_id for sequence in state.sequences.values() if sequence.pool == pool and draft.alive(sequence.sequence_id)]
    for sequence_id in lost:
        draft.closed[sequence_id] = None
        draft.events.append(ev.SequenceClosed(sequence_id, 1))
    pins.lose(draft, pool)
    if state.pools[pool].prefix.pages_indexed:
        draft.events.append(ev.IndexDropped(pool))
    return lost


# --- one scheduler step ----------------------------------------------------------------------------------------------------------


_LISTS = (
    "opens",
    "grow",
    "close",
    "tokens",
    "hand_off",
    "abort",
    "dequeue",
    "enqueue",
    "truncate",
    "fork",
    "unpin",
    "release",
    "pin",
    "forget",
)


def _step(draft: Draft, command: Step, now_ms: int, client: int) -> dict[str, Any]:
    limit = draft.state.config.batch_max
    if command.steady and 0 < len(command.grow) <= limit and grow_same(draft, command):
        return {}  # the steady decode step: nothing below would find anything to do
    for name in _LISTS:
        if len(getattr(command, name)) > limit:
            raise InvalidValue(f"step.{name}", f"at most {limit} items", len(getattr(command, name)))
    reply: dict[str, Any] = {}
    refused: list[list[Any]] = []

    def attempt(kind: str, index: int, call: Any, *args: Any) -> Any:
        try:
            return call(draft, *args)
        except KVError as error:
            refused.append([kind, index, error.code, error.text, error.details])
            return None

    for index, sequence_id in enumerate(command.close.tolist()):
        attempt("close", index, _close, sequence_id)
    for index, sequence_id in enumerate(command.forget.tolist()):
        attempt("forget", index, _forget, sequence_id)
    for index, handoff_id in enumerate(command.abort.tolist()):
        attempt("abort", index, _abort_asked, handoff_id)
    for index, (sequence_id, length) in enumerate(command.truncate.tolist()):
        attempt("truncate", index, truncate, sequence_id, length)
    decide_truncated(draft)
    for index, (sequence_id, tokens) in enumerate(command.tokens):
        attempt("tokens", index, _append_tokens, sequence_id, tokens)
    for index, pin_id in enumerate(command.unpin.tolist()):
        attempt("unpin", index, pins.unpin, pin_id)
    for index, (tenant, session) in enumerate(command.release):
        attempt("release", index, pins.end_session, tenant, session)
    if command.pin:
        reply["pinned"] = [attempt("pin", index, pins.pin, item, client, now_ms) for index, item in enumerate(command.pin)]
    if command.hand_off:
        reply["handoffs"] = [
            attempt("hand_off", index, _hand_off, sequence_id, pool) or 0 for index, (sequence_id, pool) in enumerate(command.hand_off)
        ]
    if len(command.grow) and not grow_same(draft, command):
        _grow(draft, command, refused)
    if len(command.fork):
        reply["forked"] = [attempt("fork", index, fork, *item, client) or [] for index, item in enumerate(command.fork.tolist())]
    if command.opens:
        reply["opened"] = [attempt("open", index, admit, item, client, now_ms) for index, item in enumerate(command.opens)]
    decide_copies(draft)
    for index, waiting_id in enumerate(command.dequeue.tolist()):
        attempt("dequeue", index, dequeue, waiting_id)
    if command.enqueue:
        reply["queued"] = [attempt("enqueue", index, enqueue, item, client) or 0 for index, item in enumerate(command.enqueue)]
    if refused:
        reply["refused"] = refused
        if command.victims and (victims := choose_victims(draft, command, refused)):
            reply["victims"] = victims
    return reply


def _close(draft: Draft, sequence_id: int, reason: int = 0) -> None:
    _end(draft, sequence_id)
    draft.slots.push([slot_of(sequence_id)])
    draft.events.append(ev.SequenceClosed(sequence_id, reason))


def _forget(draft: Draft, sequence_id: int) -> None:
    """Closed at the end of the batch: until then its pages are in the index, and whoever takes hold of them keeps them there."""
    _end(draft, sequence_id)
    draft.closed_last.append(sequence_id)


def _end(draft: Draft, sequence_id: int) -> None:
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    sequence = draft.state.sequences[sequence_id]
    if sequence.handoff and sequence.handoff not in draft.aborted:
        _abort(draft, sequence.handoff, "closed", "the sequence was closed")
    draft.closed[sequence_id] = None
    draft.load_change[sequence.pool] = draft.load_change.get(sequence.pool, 0) - len(sequence.tokens) // TOKEN_BYTES


def _append_tokens(draft: Draft, sequence_id: int, tokens: np.ndarray) -> None:
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    known = draft.known(draft.state.sequences[sequence_id])
    limit = draft.state.config.sequence_tokens_max
    if known + len(tokens) > limit:
        raise InvalidValue("step.tokens", f"at most {limit} tokens a sequence", known + len(tokens))
    draft.appended[sequence_id] = draft.appended.get(sequence_id, 0) + len(tokens)
    pool = draft.state.sequences[sequence_id].pool
    draft.load_change[pool] = draft.load_change.get(pool, 0) + len(tokens)
    draft.events.append(ev.TokensAppended(sequence_id, tokens))


def _grow(draft: Draft, command: Step, refused: list[list[Any]]) -> None:
    """One event for all; a sequence that cannot grow is refused alone."""
    state, tables = draft.state, draft.state.tables
    ids, counts = command.grow, command.grow_counts

    def refuse(index: int, error: KVError) -> None:
        refused.append(["grow", index, error.code, error.text, error.details])

    keep = tables.known(ids)
    if draft.closed:
        keep &= ~np.isin(ids, np.fromiter(draft.closed, np.int64))
    for index in np.flatnonzero(~keep).tolist():
        refuse(index, Unknown("sequence", int(ids[index])))
    sealed = [handoff for handoff in state.handoffs.values() if handoff.state not in (HandoffState.PREFILLING, HandoffState.ABORTED)]
    if sealed:
        held = {handoff.sequence_id: handoff for handoff in sealed if handoff.handoff_id not in draft.aborted}
        for index in np.flatnonzero(keep & np.isin(ids, np.fromiter(held, np.int64))).tolist():
            keep[index] = False
            state_name = held[int(ids[index])].state.name.lower()
            refuse(index, WrongState("sequence", int(ids[index]), "one that is not being handed off", state_name))
    positions = np.flatnonzero(keep)
    rows = tables.rows(ids[positions])
    lengths, have = tables.lengths[rows], tables.page_counts[rows]
    if draft.cut:
        draft.lay_cuts_over(ids[positions], lengths, have)
    lengths += counts[positions]
    sizes = np.array([pool.page_size for pool in state.pools], np.int64)[tables.pools[rows]]
    needed = -(-lengths // sizes) - have
    long = lengths > state.config.sequence_tokens_max
    page_counts = np.zeros(len(ids), np.int64)
    pages: list[int] = []
    wanted: dict[int, int] = {}  # pool -> pages
    granted: list[tuple[int, int, int]] = []
    supply: dict[int, int] = {}
    charges: dict[int, dict[Account, int]] = {}  # pool -> tenant with a quota -> pages
    for at in np.flatnonzero((needed > 0) | long).tolist():
        index, pool = int(positions[at]), state.pools[int(tables.pools[rows[at]])]
        total = int(have[at] + max(needed[at], 0))
        if long[at]:
            refuse(index, InvalidValue("step.grow", f"at most {state.config.sequence_tokens_max} tokens a sequence", int(lengths[at])))
        elif total > pool.num_pages:
            refuse(index, SequenceTooLarge(pool.name, total, pool.num_pages))
        else:
            count = int(needed[at])
            if pool.index not in supply:
                asked = int(needed[(needed > 0) & (tables.pools[rows] == pool.index)].sum())
                supply[pool.index] = draft.pool(pool.index).can_take(asked)
            account = state.sequences[int(ids[index])].node.account
            charged = charges.get(pool.index, {}).get(account, 0) + count if account is not None else 0
            if account is not None and draft.pool(pool.index).quota_left(charged, account) < charged:
                refuse(index, draft.pool(pool.index).over_quota(charged, account))
                keep[index] = False
                continue
            if wanted.get(pool.index, 0) + count <= supply[pool.index]:
                wanted[pool.index] = wanted.get(pool.index, 0) + count
                granted.append((index, pool.index, count))
                if account is not None:
                    charges.setdefault(pool.index, {})[account] = charged
                continue
            free = supply[pool.index] - wanted.get(pool.index, 0)
            refuse(index, OutOfPages(pool.name, count, free, pool.quarantined))
        keep[index] = False
    # All evictions are logged before the growth itself, and pages leave each stack in the order of the sequences.
    for owner, accounts in charges.items():
        for account, count in accounts.items():
            draft.pool(owner).make_room(count, account)
    taken = {pool: iter(draft.pool(pool).take(count, None)) for pool, count in wanted.items()}
    for index, owner, count in granted:
        page_counts[index] = count
        pages += [next(taken[owner]) for _ in range(count)]
    if not keep.any():
        return
    if keep.all():
        same = not granted and np.array_equal(ids, tables.last_ids) and np.array_equal(counts, tables.last_counts)
        draft.events.append(ev.GrownAgain() if same else ev.SequencesGrown(ids, counts, page_counts, np.array(pages, np.int32)))
    else:
        draft.events.append(ev.SequencesGrown(ids[keep], counts[keep], page_counts[keep], np.array(pages, np.int32)))
    draft.grown.update(dict.fromkeys(ids[keep].tolist()) if state.handoffs or len(command.hand_off) else {})


# --- handoff ---------------------------------------------------------------------------------------------------------------------


def _hand_off(draft: Draft, sequence_id: int, target_name: str) -> int:
    state = draft.state
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    sequence = state.sequences[sequence_id]
    begun = [event for event in draft.events if isinstance(event, ev.HandoffBegun)]
    active = sequence.handoff if sequence.handoff not in draft.aborted else 0
    if active or any(event.sequence == sequence_id for event in begun):
        raise WrongState("sequence", sequence_id, "one without an active handoff", f"handoff {active}")
    target, source = state.pool(target_name), state.pools[sequence.pool]
    if target is source:
        raise InvalidValue("step.hand_off", f"a pool other than {source.name}, where the sequence is", target.name)
    if target.page_size != source.page_size:
        raise InvalidValue("step.hand_off", f"a pool of page_size {source.page_size}", f"{target.name} with {target.page_size}")
    if source.layout and target.layout and source.layout != target.layout:
        raise LayoutMismatch(f"handoff from pool {source.name} to {target.name}", source.layout, target.layout)
    pages = int(state.tables.page_counts[state.tables.row(sequence_id)])
    if pages > target.num_pages:
        raise SequenceTooLarge(target.name, pages, target.num_pages)
    check_ready(draft, target)
    if len(state.handoffs) + len(begun) >= state.config.handoffs_max:
        raise TooMany("handoffs", state.config.handoffs_max)
    handoff_id = state.next_handoff + len(begun)
    draft.events.append(ev.HandoffBegun(handoff_id, sequence_id, target.index))
    return handoff_id


def _abort_asked(draft: Draft, handoff_id: int) -> None:
    handoff = draft.state.handoff(handoff_id)
    if handoff.state is HandoffState.ABORTED or handoff_id in draft.aborted:
        raise WrongState("handoff", handoff_id, "one that is not over", "aborted")
    _abort(draft, handoff_id, "asked", "asked for by the client")


def _abort(draft: Draft, handoff_id: int, code: str, reason: str) -> None:
    draft.aborted[handoff_id] = None
    draft.events.append(ev.HandoffAborted(handoff_id, code, reason))


def _pulled(draft: Draft, handoff_id: int, worker: int, pool: int) -> None:
    """A worker reports its pull. A report for a handoff that is over, or was never this worker's, changes nothing."""
    handoff = draft.state.handoffs.get(handoff_id)
    if handoff is None or handoff.state is not HandoffState.MOVING or handoff.target != pool or worker in handoff.pulled:
        return
    draft.events.append(ev.HandoffPulled(handoff_id, worker))
    everywhere = all(each in handoff.pulled or each == worker for each in draft.live_workers(pool))
    if everywhere and lives.is_current(draft, handoff.source):
        draft.events.append(ev.HandoffResident(handoff_id))


def _advance(draft: Draft, handoff_id: int, sequence_id: int, target: int, at: HandoffState) -> None:
    """Carry a handoff as far as it goes now: prefilling to sealed to reserving to moving."""
    state = draft.state
    sequence = state.sequences[sequence_id]
    if sequence_id in draft.cut:
        return  # the next acknowledgement tells how much of it is written
    if at is HandoffState.PREFILLING:
        if sequence_id in draft.grown or draft.written_tokens(sequence) < state.tables.length(sequence_id):
            return
        draft.events.append(ev.HandoffSealed(handoff_id))
    if not lives.is_current(draft, sequence.pool):
        return
    if draft.published_pages(sequence) < sequence.shared and not sequence.unlisted:
        return  # a fork may publish these pages for both, and a handoff's pages have to stay as they are: it will be soon
    length = state.tables.length(sequence_id)
    pool = state.pools[target]
    total = int(state.tables.page_counts[state.tables.row(sequence_id)])
    if total > pool.num_pages:
        error = SequenceTooLarge(pool.name, total, pool.num_pages)  # it grew after the handoff was asked for
        _abort(draft, handoff_id, error.code, error.text)
        return
    pages = draft.pool(target)
    tokens = bytes(sequence.tokens[: length * TOKEN_BYTES])
    found = pages.match(sequence.namespace, tokens, length // pool.page_size)
    shared = found.pages()
    pinned = pages.pin(found.nodes, found.last_pages)
    account = pages.account(sequence.namespace)
    if pages.can_take(total - len(shared), account) < total - len(shared):
        pages.unpin(pinned)
        if at is not HandoffState.RESERVING:
            draft.events.append(ev.HandoffReserving(handoff_id))
        return
    fresh = pages.take(total - len(shared), account)
    draft.events.append(ev.HandoffMoving(handoff_id, shared, fresh))


# --- what follows from any command -----------------------------------------------------------------------------------------------


def _settle_pages(draft: Draft) -> None:
    """Pages leave quarantine, and the index learns of pages that have been written."""
    publishable = bool(draft.written)
    for pool in draft.state.pools:
        if pool.quarantine:
            _release(draft, pool)
        if pool.publishable:
            publishable = True
    if publishable:
        _publish(draft)


def _settle_handoffs(draft: Draft) -> None:
    """Handoffs go on as far as they can; aborted ones end once nobody can be reading for them."""
    state = draft.state
    for handoff in state.handoffs.values():
        if handoff.state is HandoffState.ABORTED and draft.acked(handoff.target) >= handoff.version:
            draft.events.append(ev.HandoffEnded(handoff.handoff_id))
    lives.settle_pulled(draft)
    waiting = (HandoffState.PREFILLING, HandoffState.SEALED, HandoffState.RESERVING)
    for handoff in state.handoffs.values():
        if handoff.state in waiting and handoff.handoff_id not in draft.aborted:
            _advance(draft, handoff.handoff_id, handoff.sequence_id, handoff.target, handoff.state)
    for event in list(draft.events):
        if isinstance(event, ev.HandoffBegun):
            _advance(draft, event.handoff, event.sequence, event.target, HandoffState.PREFILLING)


def _release(draft: Draft, pool: Pool) -> None:
    acked = draft.acked(pool.index)
    serials: list[int] = []
    pages: list[np.ndarray] = []
    for serial, entry in pool.quarantine.items():
        if entry.version > acked:
            break  # entries are in order of version
        serials.append(serial)
        pages.append(entry.pages)
    if serials:
        draft.events.append(ev.PagesReleased(pool.index, np.array(serials, np.int64)))
        draft.pool(pool.index).free.push(np.concatenate(pages))


def _publish(draft: Draft) -> None:
    """Pages that are full, acknowledged by every worker and of known tokens enter the prefix index.

    Two sequences that attach the same page at the same place in one batch cannot both be decided against a state that has neither:
    the second waits for the next command.
    """
    state = draft.state
    attached: set[tuple[Any, int, bytes]] = set()
    candidates: dict[int, None] = {}
    for pool in state.pools:
        candidates.update(pool.publishable)
    candidates.update(dict.fromkeys(draft.written))
    for sequence_id in candidates:
        if not draft.alive(sequence_id) or state.sequences[sequence_id].holds or sequence_id in draft.published:
            continue
        sequence = state.sequences[sequence_id]
        if sequence.unlisted:
            continue
        pool = state.pools[sequence.pool]
        step = pool.prefix.page_bytes
        first = sequence.published
        last = state.publishable_pages(sequence, draft.written_tokens(sequence))
        if last <= first:
            continue
        pages = state.tables.pages_of(sequence_id)[first:last]
        tokens = bytes(sequence.tokens[first * step : last * step])
        node, at = sequence.node, 0
        end: tuple[Any, int] = (node, node.count)
        while at < len(pages):
            key = tokens[at * step : (at + 1) * step]
            child = node.children.get(key) if end[1] == node.count else None
            if child is None:
                if (*end, key) in attached:
                    pages = pages[:at]
                else:
                    attached.add((*end, key))
                break
            count = min(pool.prefix.equal_pages(child, tokens, at * step), len(pages) - at)
            pages[at : at + count] = np.frombuffer(child.ids, PAGE_ID)[:count]
            draft.pool(pool.index).pin([child], count)
            node, at, end = child, at + count, (child, count)
        if len(pages):
            draft.published[sequence_id] = first + len(pages)
            draft.events.append(ev.PagesPublished(sequence_id, first, pages))
            if sequence.shared > first:
                publish_kin(draft, sequence, first, pages, first + at)


_DECIDERS: dict[type, Any] = {
    Step: _step,
    Join: _join,
    Ack: _ack,
    WorkerGone: _gone,
    Tick: _tick,
    SetQuota: set_quota,
    Flush: flush,
}
