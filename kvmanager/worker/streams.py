"""Streams: how far one handoff has been pulled before it moves, and what to pull next. Tokens and layers only; `replica` knows the pages.

    layers      0 ┌───────────────────┬───────────┬─ ─ ─ ─ ─
                  │ pulled            │ pulled    │ being
    `depth`       │                   ├───────────┤ computed
                  │                   │
                  └───────────────────┴─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
    tokens      start               full        part

A chunk of a prompt is written layer by layer, so what is written is such a staircase too: all layers of the chunks that are finished, the
first layers of the one that is not. Each piece is a rectangle of it, pulled after its source said that it was written; one at a time.

Once everything is written, what is left may go `by_layers`: all tokens to the depth of those that are deepest, then group by group, so that
whoever computes layer 0 next need not wait for the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["LAYERS_ALL", "Piece", "Stream"]

LAYERS_ALL = 1 << 30  # more layers than a model has: all of them are there


class Piece(NamedTuple):
    """Tokens [first, stop) of layers [first_layer, end_layer); an end of 0 is the last layer's."""

    first: int
    stop: int
    first_layer: int = 0
    end_layer: int = 0


@dataclass(slots=True)
class Stream:
    """start     tokens that the target has, or that are somebody else's to pull
    limit        tokens that fit the target's pages
    full         tokens of which all layers have been pulled
    part, depth  tokens of which the first `depth` layers have been
    written      tokens of which the source has written all layers
    reach, layers  tokens of which it has written the first `layers`
    piece        what is being pulled, or is to be next
    group, num_layers  layers of a piece, and how many there are; a group of 0 pulls what is left at once
    """

    start: int
    limit: int
    full: int = 0
    part: int = 0
    depth: int = 0
    written: int = 0
    reach: int = 0
    layers: int = 0
    piece: Piece | None = None
    group: int = 0
    num_layers: int = 0

    def __post_init__(self) -> None:
        self.full = self.part = self.start

    def note_written(self, tokens: int) -> None:
        self.written = max(self.written, min(tokens, self.limit))
        if self.written >= self.reach:
            self.reach, self.layers = self.written, 0

    def note_layers(self, tokens: int, layers: int) -> None:
        """A report that is older than what is known already changes nothing."""
        tokens = min(tokens, self.limit)
        if tokens > self.reach:
            self.reach, self.layers = tokens, layers
        elif tokens == self.reach > self.written:
            self.layers = max(self.layers, layers)

    def cut(self, tokens: int) -> None:
        """From here on the source has it in other pages now, or the target wants it in others: what was pulled of that does not count."""
        self.full = min(self.full, max(tokens, self.start))
        if self.part > max(tokens, self.start):
            self.part, self.depth = self.full, 0
        self.piece = None

    def shared(self, tokens: int) -> None:
        """The target has so many by itself now."""
        self.start = tokens
        self.full, self.part = max(self.full, tokens), max(self.part, tokens)
        if self.part == self.full:
            self.depth = 0

    def advance(self) -> Piece | None:
        """The next piece, if there is one: the rest of what is half there comes first."""
        self.piece = None
        if self.part > self.full:
            if self.group and self.written > self.part:
                self.piece = Piece(self.part, self.written, 0, self.depth)
            elif self.written >= self.part:
                self.piece = self._down(self.full, self.part, self.depth)
            elif self.reach >= self.part and self.layers > self.depth:
                self.piece = Piece(self.full, self.part, self.depth, self.layers)
        elif self.written > self.full:
            self.piece = self._down(self.full, self.written, 0)
        elif self.reach > self.full and self.layers:
            self.piece = Piece(self.full, self.reach, 0, self.layers)
        return self.piece

    def _down(self, first: int, stop: int, depth: int) -> Piece:
        """What of these tokens comes below `depth`: the next group of layers, or all that is left."""
        end = depth + self.group
        return Piece(first, stop, depth, end if self.group and end < self.num_layers else 0)

    def by_layers(self, num_layers: int, group: int) -> None:
        """Everything is written: what is left comes in the order in which it is computed with."""
        self.num_layers, self.group = num_layers, group

    def layers_there(self) -> int:
        """Leading layers of which all tokens have been pulled; LAYERS_ALL if every layer has."""
        if self.full >= self.limit:
            return LAYERS_ALL
        return self.depth if self.part >= self.limit else 0

    def pulled(self) -> None:
        """The piece is there."""
        if self.piece is not None:
            stop = max(self.piece.stop, self.full)  # what the target turned out to share while this was pulled may reach further
            if not self.piece.end_layer:
                self.full, self.part, self.depth = stop, max(self.part, stop), 0
            elif stop > self.full:
                self.part, self.depth = stop, self.piece.end_layer
            self.piece = None
