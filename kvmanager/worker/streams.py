"""Streams: how far one handoff has been pulled before it moves, and what to pull next. Tokens and layers only; `replica` knows the pages.

    layers      0 ┌───────────────────┬───────────┬─ ─ ─ ─ ─
                  │ pulled            │ pulled    │ being
    `depth`       │                   ├───────────┤ computed
                  │                   │
                  └───────────────────┴─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─
    tokens      start               full        part

A chunk of a prompt is written layer by layer, so what is written is such a staircase too: all layers of the chunks that are finished, the
first layers of the one that is not. Each piece is a rectangle of it, pulled after its source said that it was written; one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Piece", "Stream"]


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
            if self.written >= self.part:
                self.piece = Piece(self.full, self.part, self.depth)
            elif self.reach >= self.part and self.layers > self.depth:
                self.piece = Piece(self.full, self.part, self.depth, self.layers)
        elif self.written > self.full:
            self.piece = Piece(self.full, self.written)
        elif self.reach > self.full and self.layers:
            self.piece = Piece(self.full, self.reach, 0, self.layers)
        return self.piece

    def pulled(self) -> None:
        """The piece is there."""
        if self.piece is not None:
            if self.piece.end_layer:
                self.part, self.depth = self.piece.stop, self.piece.end_layer
            else:
                self.full, self.part, self.depth = self.piece.stop, max(self.part, self.piece.stop), 0
            self.piece = None
