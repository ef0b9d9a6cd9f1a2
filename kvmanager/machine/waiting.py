"""Waiting prompts: how a prompt enters the scheduler's queue, as the manager knows it, and how it leaves.

Each is given once and named by its id from then on, so a queue of a thousand prompts costs what changes in it. It ends when its prompt is
opened (`Open.waiting`), when somebody takes it out, or with its client. What it does for eviction is in `queue_hint`.
"""

from __future__ import annotations

import numpy as np

from kvmanager.errors import InvalidValue, TooMany, Unknown
from kvmanager.machine import events as ev
from kvmanager.machine.commands import Enqueue
from kvmanager.machine.draft import Draft
from kvmanager.machine.state import State, encode_namespace
from kvmanager.pages.prefix import TOKEN_BYTES
from kvmanager.pages.queue_hint import Prompt

__all__ = ["apply_dequeued", "apply_enqueued", "dequeue", "enqueue", "leave", "leave_queue"]


# --- called by decide ------------------------------------------------------------------------------------------------------------


def enqueue(draft: Draft, command: Enqueue, client: int) -> int:
    """The id of a prompt that waits from now on. Raises InvalidValue, Unknown, TooMany."""
    state, config = draft.state, draft.state.config
    count = len(command.tokens)
    if count > config.sequence_tokens_max:
        raise InvalidValue("enqueue.tokens", f"at most {config.sequence_tokens_max} tokens", count)
    pools = [state.pool(command.pool)] if command.pool else state.groups.get(command.group, [])
    if not pools:
        raise Unknown("group", command.group)
    if len(state.waiting) - len(draft.dequeued) + draft.enqueued >= config.waiting_max:
        raise TooMany("waiting prompts", config.waiting_max)
    if state.waiting_tokens + draft.waiting_change + count > config.waiting_tokens_max:
        raise TooMany("tokens of waiting prompts", config.waiting_tokens_max)
    tokens = draft.extras.write_in(command.tokens, command.extras)
    waiting_id = state.next_waiting + draft.enqueued
    draft.enqueued += 1
    draft.waiting_change += count
    where = np.array([pool.index for pool in pools], np.int32)
    namespace = encode_namespace(command.tenant, command.extra)
    draft.name_extras(tokens)
    draft.events.append(ev.PromptEnqueued(waiting_id, client, where, namespace, tokens, int(command.front)))
    return waiting_id


def dequeue(draft: Draft, waiting_id: int) -> None:
    """Raises Unknown for a prompt that does not wait (any more)."""
    if not leave_queue(draft, waiting_id):
        raise Unknown("waiting prompt", waiting_id)


def leave_queue(draft: Draft, waiting_id: int) -> bool:
    """The prompt waits no longer; false if it did not. A hint that is gone is no reason to refuse anything."""
    prompt = draft.state.waiting.get(waiting_id)
    if prompt is None or waiting_id in draft.dequeued or prompt.client in draft.forgotten:
        return False
    draft.dequeued[waiting_id] = None
    draft.waiting_change -= len(prompt.tokens) // TOKEN_BYTES
    draft.events.append(ev.PromptsDequeued(np.array([waiting_id], np.int64)))
    return True


# --- called by apply -------------------------------------------------------------------------------------------------------------


def apply_enqueued(state: State, event: ev.PromptEnqueued) -> None:
    pools = tuple(event.pools.tolist())
    data = event.tokens.astype("<i4").tobytes()
    prompt = Prompt(event.waiting, event.client, event.namespace, data, pools)
    state.next_waiting = event.waiting + 1
    state.waiting[event.waiting] = prompt
    if event.front:
        state.waiting.move_to_end(event.waiting, last=False)
    state.waiting_tokens += len(event.tokens)
    state.extras.count(data, 1)
    for index in pools:
        prefix = state.pools[index].prefix
        # At least the last token is always computed: the page that holds it is never taken from the cache.
        usable = (len(data) - TOKEN_BYTES) // prefix.page_bytes * prefix.page_bytes
        prefix.queue.enqueue(event.waiting, event.namespace, data[:usable], bool(event.front))


def apply_dequeued(state: State, event: ev.PromptsDequeued) -> None:
    for waiting_id in event.waiting.tolist():
        leave(state, waiting_id)


def leave(state: State, waiting_id: int) -> None:
    prompt = state.waiting.pop(waiting_id)
    state.waiting_tokens -= len(prompt.tokens) // TOKEN_BYTES
    state.extras.count(prompt.tokens, -1)
    for index in prompt.pools:
        state.pools[index].prefix.queue.dequeue(waiting_id, state.version)
