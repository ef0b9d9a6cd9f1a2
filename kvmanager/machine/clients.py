"""Clients: who is remembered, for how long, and with how much undelivered news.

A client that sends nothing for its lease's length is taken to have died: its sequences are closed. That is safe where a worker's silence
is not, because a scheduler touches no pages.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmanager.errors import TooMany
from kvmanager.machine import events as ev
from kvmanager.machine.draft import Draft
from kvmanager.machine.state import Client, Notice, State
from kvmanager.machine.waiting import leave

__all__ = ["EMBEDDED", "NOTICES_MAX", "expire", "forget_for", "is_overdue", "tell"]

EMBEDDED = 1  # the embedding program's id: it lives as long as its manager
NOTICES_MAX = 1024  # undelivered ones of one client


def _overdue(state: State, now_ms: int) -> list[int]:
    """Clients whose lease has ended. The table is in order of last use, so this looks no further than the first that is not among them."""
    lease_ms = state.config.client_lease_ms
    found: list[int] = []
    if lease_ms:
        for client in state.clients.values():
            if client.client_id != EMBEDDED:
                if now_ms - client.seen_ms <= lease_ms:
                    break
                found.append(client.client_id)
    return found


def is_overdue(state: State, now_ms: int) -> bool:
    return bool(_overdue(state, now_ms))


def expire(draft: Draft, now_ms: int, sender: int, close: Callable[[int], None]) -> None:
    """Close what clients whose lease has ended had open, and forget them. Whoever sent this very command is alive."""
    state = draft.state
    gone = dict.fromkeys(client for client in _overdue(state, now_ms) if client != sender)
    if not gone:
        return
    for sequence in state.sequences.values():
        if sequence.owner in gone and draft.alive(sequence.sequence_id):
            close(sequence.sequence_id)
    draft.events += [ev.ClientForgotten(client) for client in gone]
    draft.forgotten.update(gone)


def forget_for(draft: Draft, newcomer: int) -> None:
    """Make room for a client that is not in the table: the one idle longest is forgotten if it is full.

    Where clients have leases, one with open sequences is not forgotten: nobody would notice its end then. Raises TooMany.
    """
    state = draft.state
    if newcomer in state.clients or len(state.clients) - len(draft.forgotten) < state.config.clients_max:
        return
    owners = dict.fromkeys(sequence.owner for sequence in state.sequences.values()) if state.config.client_lease_ms else {}
    for client in state.clients:
        if client not in owners and client not in draft.forgotten:
            draft.events.append(ev.ClientForgotten(client))
            draft.forgotten[client] = None
            return
    raise TooMany("clients", state.config.clients_max)


def tell(client: Client, notice: Notice) -> None:
    """One more piece of news. Of too many the oldest go, and a notice in their place says how many."""
    notices = client.notices
    notices.append(notice)
    if len(notices) > NOTICES_MAX:
        before = notices[0].handoff if notices[0].kind == "dropped" else 0
        count = before + (1 if before else 2)
        notices[:2] = [Notice("dropped", 0, count, f"{count} older notices were dropped: nobody fetched them", "dropped")]


def notify(state: State, client_id: int, notice: Notice) -> None:
    client = state.clients.get(client_id)
    if client is not None:
        tell(client, notice)


# --- apply -----------------------------------------------------------------------------------------------------------------------


def apply_answered(state: State, event: ev.ClientAnswered) -> None:
    client = state.clients.pop(event.client, None) or Client(event.client)
    state.clients[event.client] = client  # last in the dict: the first is the one idle longest
    client.number, client.version, client.reply = event.number, state.version, event.reply
    client.seen_ms = state.now_ms
    del client.notices[: event.notices]


def apply_forgotten(state: State, event: ev.ClientForgotten) -> None:
    for waiting_id in [prompt.waiting_id for prompt in state.waiting.values() if prompt.client == event.client]:
        leave(state, waiting_id)
    del state.clients[event.client]
