"""What a backend's attention does besides softmax(scale * q k) v: how its bits may depend on the batch, and how scores are changed or left out.

Owns the options' limits; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvmanager.errors import InvalidValue

__all__ = ["PIECE_TOKENS_MULTIPLE", "Options", "piece_tokens"]

PIECE_TOKENS_MULTIPLE = 256  # a pair of the Hopper kernel's largest tiles; every other tile divides it
PIECE_TOKENS_MAX = 2**20
SLIDING_WINDOW_MAX = 2**30
_PIECE_TOKENS = ((16, 1024), (64, 2048), (2**31, 4096))  # by heads at most: what a piece costs besides its latents grows with its rows


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one backend; each is refused by name where it is out of range.

    batch_invariant   a query token's bits depend on what it sees alone: not on the batch, nor on which step computes it
    invariant_tokens  under batch_invariant: latents between two places where a sequence is cut; None: by the number of heads
    logit_soft_cap    scores s become cap * tanh(s / cap); None: as they are
    sliding_window    query tokens see so many latents at most, their own included; None: all before them
    has_sink          each head has one more logit in the denominator, of no value (the backend holds them)
    """

    batch_invariant: bool = False
    invariant_tokens: int | None = None
    logit_soft_cap: float | None = None
    sliding_window: int | None = None
    has_sink: bool = False

    def __post_init__(self) -> None:
        tokens, cap, window = self.invariant_tokens, self.logit_soft_cap, self.sliding_window
        if not isinstance(self.batch_invariant, bool):
            raise InvalidValue("batch_invariant", "True or False", self.batch_invariant)
        if tokens is not None:
            if not self.batch_invariant:
                raise InvalidValue("invariant_tokens", "None without batch_invariant", tokens)
            if not _is_int(tokens, PIECE_TOKENS_MAX) or tokens % PIECE_TOKENS_MULTIPLE:
                raise InvalidValue("invariant_tokens", f"a multiple of {PIECE_TOKENS_MULTIPLE} up to {PIECE_TOKENS_MAX}", tokens)
        if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int | float) or not math.isfinite(cap) or cap <= 0):
            raise InvalidValue("logit_soft_cap", "a positive number or None", cap)
        if window is not None and not _is_int(window, SLIDING_WINDOW_MAX):
            raise InvalidValue("sliding_window", f"an integer from 1 to {SLIDING_WINDOW_MAX} or None", window)


def _is_int(value: object, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high


def piece_tokens(options: Options, num_heads: int) -> int:
    """Latents between two places where a batch-invariant backend cuts a sequence; 0: wherever the schedule likes."""
    if not options.batch_invariant:
        return 0
    return options.invariant_tokens or next(tokens for heads_max, tokens in _PIECE_TOKENS if num_heads <= heads_max)
