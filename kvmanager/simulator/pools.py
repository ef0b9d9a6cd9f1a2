"""Pools as a run draws them: few pages, of one size or of several, so that handoffs regather them, and in a format or in two."""

from __future__ import annotations

import random
from typing import Any

from kvmanager.config import PoolConfig
from kvmanager.simulator.books import PAGE

__all__ = ["CONVERTED", "draw_formats", "draw_pool", "draw_sizes", "format_of"]

CONVERTED = ("wide", "narrow")  # the only pair of formats, source and target, between which pages are converted


def draw_sizes(rng: random.Random) -> tuple[int, ...]:
    """What a run's pools may draw their page sizes from; half of the runs have one for all. 24 divides no other, nor they it."""
    return rng.choice(((PAGE,), (PAGE,), (PAGE // 4, PAGE), (PAGE // 2, PAGE, PAGE + PAGE // 2, 2 * PAGE)))


def draw_formats(seed: int) -> tuple[str, ...]:
    """Of pools A, B and C; a quarter of the runs has two. Drawn from the seed alone, beside everything else."""
    return random.Random(f"{seed} formats").choice((("wide",) * 3,) * 3 + (("wide", "narrow", "wide"),))


def draw_pool(rng: random.Random, name: str, sizes: tuple[int, ...], pages: int, formats: tuple[str, ...], **more: Any) -> PoolConfig:
    """A pool of as many tokens as `pages` pages of PAGE slots, or a little more. Its layout is what its workers join with: contents agree,
    page sizes and formats may differ."""
    size, form = rng.choice(sizes), formats["ABC".index(name)]
    layout = f"latents:{form}/p{size}" + ("<wide" if form == "narrow" else "")
    return PoolConfig(name, max(3, -(-pages * PAGE // size)), page_size=size, layout=layout, **more)


def format_of(pool: PoolConfig) -> str:
    return pool.layout.split(":")[1].split("/")[0]
