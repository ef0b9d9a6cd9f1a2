"""Clients are remembered with their news, and forgotten with it: by the table's bound, or when their lease ends."""

from __future__ import annotations

from kvmanager.machine import events as ev
from kvmanager.simulator.books import Turn
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import follows


@follows(ev.ClientAnswered)
def answered(model: Model, event: ev.ClientAnswered, turn: Turn) -> None:
    model.clients[event.client] = None


@follows(ev.ClientForgotten)
def forgotten(model: Model, event: ev.ClientForgotten, turn: Turn) -> None:
    model.clients.pop(event.client)
    model.notices.pop(event.client, None)
    model.waiting = {waiting: client for waiting, client in model.waiting.items() if client != event.client}
