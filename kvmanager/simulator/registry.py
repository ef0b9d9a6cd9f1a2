"""Where operations say what they add to a simulated day; `operations` holds one file for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["ACTIONS", "DRAWS", "FOLLOWERS", "HEALERS", "REFUSALS", "Action", "action", "draws", "follows", "heals", "refused"]


class Action(NamedTuple):
    """Something that may happen on its own. One of `rates` is drawn for a day: 0 among them means that some days are free of it."""

    name: str
    rates: tuple[float, ...]
    call: Callable[[Any], None]
    plays_workers: bool


ACTIONS: list[Action] = []
DRAWS: list[Callable[[Any], dict[str, Any]]] = []
FOLLOWERS: dict[type, Callable[[Any, Any, Any], None]] = {}
HEALERS: list[Callable[[Any], list[Any]]] = []
REFUSALS: dict[str, Callable[[Any, Any, dict[str, Any], Any], None]] = {}


def action(*rates: float, plays_workers: bool = False) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """`call(driver)` happens with one of these rates, against the other actions' rates.

    plays_workers  it is a worker's doing; in the simulated system, workers are processes of their own
    """

    def register(call: Callable[[Any], None]) -> Callable[[Any], None]:
        ACTIONS.append(Action(call.__name__, rates, call, plays_workers))
        return call

    return register


def draws(call: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """`call(driver)` gives fields of a Step, drawn from what the model knows to be open."""
    DRAWS.append(call)
    return call


def follows(event: type) -> Callable[[Callable[[Any, Any, Any], None]], Callable[[Any, Any, Any], None]]:
    """`call(model, event, turn)` keeps the model's books for one kind of event, and demands what must hold at it."""

    def register(call: Callable[[Any, Any, Any], None]) -> Callable[[Any, Any, Any], None]:
        FOLLOWERS[event] = call
        return call

    return register


def heals(call: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
    """`call(driver)` gives commands that end what would otherwise stay for good, once faults are over; none when nothing is left."""
    HEALERS.append(call)
    return call


def refused(code: str) -> Callable[[Callable[[Any, Any, dict[str, Any], Any], None]], Callable[[Any, Any, dict[str, Any], Any], None]]:
    """`call(model, item, details, turn)` demands what must hold where an item of a step (an Open, ...) was refused with this code."""

    def register(call: Callable[[Any, Any, dict[str, Any], Any], None]) -> Callable[[Any, Any, dict[str, Any], Any], None]:
        REFUSALS[code] = call
        return call

    return register
