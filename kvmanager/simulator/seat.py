"""Seat: a scheduler in the simulated system. It draws its commands by the same `operations` as a day does, from what is its own.

What it knows of its sequences is read from the model, as if every reply had come at once: a real scheduler knows no more, and one that
knows less would ask for less. Whatever changes between drawing a command and its arrival, the manager has to cope with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmanager.errors import KVError, ManagerUnreachable, StaleEpoch
from kvmanager.machine.command_wire import command_to_wire
from kvmanager.machine.commands import Command, Step
from kvmanager.simulator.books import PAGE, Move, Text
from kvmanager.simulator.caller import Caller
from kvmanager.simulator.model import Model
from kvmanager.simulator.registry import ACTIONS, DRAWS, HEALERS
from kvmanager.simulator.world import World

__all__ = ["Seat"]


class View:
    """The model as one client sees it: its own sequences and handoffs."""

    def __init__(self, model: Model, seat: Seat) -> None:
        self._model, self._seat = model, seat

    @property
    def texts(self) -> dict[int, Text]:
        client = self._seat.caller.client
        return {sequence: text for sequence, text in self._model.texts.items() if text.owner == client}

    @property
    def moves(self) -> dict[int, Move]:
        texts = self.texts
        return {handoff: move for handoff, move in self._model.moves.items() if move.sequence in texts}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Seat:
    """The `driver` that operations draw for.

    order    passes a step on to the workers that are to run it
    heir_of  clients that died in this place: it closes what they have left
    """

    def __init__(
        self,
        world: World,
        model: Model,
        caller: Caller,
        order: Callable[[int, str], None],
        of_the_day: dict[str, Any],
        heir_of: tuple[int, ...],
    ) -> None:
        self.world, self.caller, self.heir_of = world, caller, heir_of
        self.rng = world.rng
        self.config = model.config
        self.books = model
        self.model: Any = View(model, self)
        self.of_the_day = of_the_day
        self.documents: list[list[int]] = of_the_day["documents"]
        self.last_grow: tuple[list[int], list[int]] = ([], [])
        self.resting = self.healing = False  # it closes what is not being handed off, and asks for nothing more; it closes all
        self.seen = 1
        # It draws from the model as if every reply had come. What it has given up it has not seen; the manager says so, unless a lost
        # host took that very command with it: nobody could have acted on it then.
        chances = world.faults.chances
        self._may_go_back = chances["crash"] > 0 and chances["torn"] > 0
        self._unsure = False
        self._order = order
        self._weights = [30.0, *(self.drawn(f"rate of {each.name}", *each.rates) for each in self._actions())]
        self._think()

    @staticmethod
    def _actions() -> list[Any]:
        return [each for each in ACTIONS if not each.plays_workers]

    def drawn(self, name: str, *choices: Any) -> Any:
        if name not in self.of_the_day:
            self.of_the_day[name] = self.rng.choice(choices)
        return self.of_the_day[name]

    def _think(self) -> None:
        if self.caller.alive:
            think_us = 200_000 if self.resting and not self.healing else self.drawn("think", 2_000, 8_000)
            self.world.after(int(self.rng.random() * think_us), self._act)

    def _act(self) -> None:
        if not self.caller.alive:
            return
        # Where clients have leases, nobody but the manager looks after what the dead have left.
        orphans = (
            [] if self.config.client_lease_ms else [sequence for sequence, text in self.books.texts.items() if text.owner in self.heir_of]
        )
        if self.healing:
            if self.model.texts or orphans:
                self.send(Step(close=[*self.model.texts, *orphans]))
            elif commands := [command for healer in HEALERS for command in healer(self)]:
                self.send(commands[0])
        elif self.resting:
            self.send(Step(close=[sequence for sequence, text in self.model.texts.items() if not text.handoff]))
        elif self._unsure and self._may_go_back:
            self.send(Step())
        elif orphans and self.rng.random() < 0.1:
            self.send(Step(close=orphans))
        else:
            self.rng.choices([Seat.step, *(each.call for each in self._actions())], self._weights)[0](self)
        if self.caller.idle:
            self._think()

    def step(self) -> None:
        fields: dict[str, Any] = {}
        for draw in DRAWS:
            fields.update(draw(self))
        self.send(Step(**fields))

    def send(self, command: Command, client: int = 0) -> None:
        """Ask, and go on when the reply has come."""
        body = command_to_wire(command)
        if isinstance(command, Step):
            body["seen"] = self.seen
        patience_us = 0 if self.healing else self.drawn("patience", 0, 20_000, 100_000)
        self.caller.ask(body, self._answered, patience_us)

    def ask(self, message: dict[str, Any]) -> None:
        self.caller.ask(message, lambda answer: self._think())

    def _answered(self, reply: dict[str, Any] | KVError) -> None:
        self._unsure = isinstance(reply, ManagerUnreachable)
        if isinstance(reply, StaleEpoch):
            self.seen = reply.details["version"]
        if not isinstance(reply, KVError):
            self.seen = max(self.seen, reply["version"])
            self._order(reply["version"], self.caller.name)
        self._think()


def draw_documents(rng: Any) -> list[list[int]]:
    """What prompts begin with: two texts of few letters, so that prompts agree for a while and then don't."""
    return [[rng.choice((1, 2)) for _ in range(6 * PAGE)] for _ in range(2)]
