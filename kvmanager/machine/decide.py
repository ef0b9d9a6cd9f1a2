"""decide: what a command makes happen, as events. Reads the state, never writes it; all choices are made here.

An item of a step that cannot be done becomes a refusal in the reply. A command that cannot be done at all raises a KVError, and
nothing has changed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgpack

from kvmanager.errors import (
    BadMessage,
    InvalidValue,
    KVError,
)
from kvmanager.machine import clients, drains, handoffs, lives, pins
from kvmanager.machine import events as ev
from kvmanager.machine.admission import admit
from kvmanager.machine.batch import EventBatch
from kvmanager.machine.closing import close, forget
from kvmanager.machine.commands import Ack, Command, Drain, Flush, Join, SetQuota, Step, Tick, WorkerGone
from kvmanager.machine.copies import decide_copies
from kvmanager.machine.draft import Draft
from kvmanager.machine.forks import fork
from kvmanager.machine.growth import append_tokens, grow, grow_all
from kvmanager.machine.handoffs import abort_asked, hand_off, settle_handoffs
from kvmanager.machine.publishing import settle_pages
from kvmanager.machine.state import State
from kvmanager.machine.tenants import flush, set_quota
from kvmanager.machine.truncation import decide_truncated, truncate, truncate_all
from kvmanager.machine.victims import choose_victims
from kvmanager.machine.waiting import dequeue, enqueue
from kvmanager.machine.workers import ack, gone, join, lose_pool

__all__ = ["Decision", "carry_out", "decide"]


class Decision(NamedTuple):
    """The batch to apply and publish, or None for a request that was answered before; and the reply's bytes."""

    batch: EventBatch | None
    reply: bytes


_PACK_VERSION = msgpack.Packer(use_bin_type=True).pack  # most replies are a version alone, and making a packer takes longer than that


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
    data = _PACK_VERSION(reply) if len(reply) == 1 else msgpack.packb(reply, use_bin_type=True)
    clients.forget_for(draft, client)
    draft.events.append(ev.ClientAnswered(client, number, len(notices), data))
    return Decision(EventBatch(state.epoch, draft.version, now_ms, draft.events), data)


def carry_out(state: State, command: Command, now_ms: int, client: int) -> tuple[Draft, dict[str, Any]]:
    """What happens, as events in a draft, and the reply to it; all but the books of who asked."""
    draft = Draft(state)
    if isinstance(command, Step):
        if command.seen:
            lives.check_seen(state, command.seen, client)
        settle_pages(draft)  # before the step takes pages: what it evicts must not be what is being published
    reply = _DECIDERS[type(command)](draft, command, max(now_ms, state.now_ms), client)
    if isinstance(command, Flush):
        return draft, reply  # what was flushed must not be found once more: the next command goes on
    if not isinstance(command, Step):
        settle_pages(draft)
    settle_handoffs(draft)
    draft.events += [ev.SequenceClosed(sequence_id, 3) for sequence_id in draft.closed_last]
    return draft, reply


def _tick(draft: Draft, command: Tick, now_ms: int, client: int) -> dict[str, Any]:
    for worker in draft.state.workers.values():
        if not worker.fenced and now_ms > worker.deadline_ms:
            lose_pool(draft, worker.pool, f"worker {worker.name} stopped acknowledging")
            draft.fenced[worker.worker_id] = None
            draft.events.append(ev.WorkerFenced(worker.worker_id))
    handoffs.expire(draft, now_ms)
    pins.expire(draft, now_ms)
    clients.expire(draft, now_ms, client, lambda sequence_id: close(draft, sequence_id, 2))
    drains.go_on(draft)
    return {}


# --- one scheduler step ----------------------------------------------------------------------------------------------------------


def _step(draft: Draft, command: Step, now_ms: int, client: int) -> dict[str, Any]:
    limit = draft.state.config.batch_max
    if command.steady and 0 < len(command.grow) <= limit and grow_all(draft, command):
        return {}  # the steady decode step: nothing below would find anything to do
    for name, size in command.sizes():
        if size > limit:
            raise InvalidValue(f"step.{name}", f"at most {limit} items", size)
    reply: dict[str, Any] = {}
    refused: list[list[Any]] = []

    def attempt(kind: str, index: int, call: Any, *args: Any) -> Any:
        try:
            return call(draft, *args)
        except KVError as error:
            refused.append([kind, index, error.code, error.text, error.details])
            return None

    for index, sequence_id in enumerate(command.close.tolist()):
        attempt("close", index, close, sequence_id)
    for index, sequence_id in enumerate(command.forget.tolist()):
        attempt("forget", index, forget, sequence_id)
    for index, handoff_id in enumerate(command.abort.tolist()):
        attempt("abort", index, abort_asked, handoff_id)
    if len(command.truncate) and not truncate_all(draft, command.truncate):
        for index, (sequence_id, length) in enumerate(command.truncate.tolist()):
            attempt("truncate", index, truncate, sequence_id, length)
        decide_truncated(draft)
    for index, (sequence_id, tokens) in enumerate(command.tokens):
        attempt("tokens", index, append_tokens, sequence_id, tokens)
    for index, pin_id in enumerate(command.unpin.tolist()):
        attempt("unpin", index, pins.unpin, pin_id)
    for index, (tenant, session) in enumerate(command.release):
        attempt("release", index, pins.end_session, tenant, session)
    if command.pin:
        reply["pinned"] = [attempt("pin", index, pins.pin, item, client, now_ms) for index, item in enumerate(command.pin)]
    if command.hand_off:
        made = [attempt("hand_off", index, hand_off, item) or (0, "") for index, item in enumerate(command.hand_off)]
        reply["handoffs"], reply["targets"] = [each[0] for each in made], [each[1] for each in made]
    if len(command.grow) and not grow_all(draft, command):
        grow(draft, command, refused)
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


_DECIDERS: dict[type, Any] = {
    Step: _step,
    Join: join,
    Ack: ack,
    WorkerGone: gone,
    Tick: _tick,
    Drain: drains.drain,
    SetQuota: set_quota,
    Flush: flush,
}
