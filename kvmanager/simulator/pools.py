"""Pools as a run draws them: few pages, of one size or of several, so that handoffs regather them."""

from __future__ import annotations

import random
from typing import Any

from kvmanager.config import PoolConfig
from kvmanager.simulator.books import PAGE

__all__ = ["draw_pool", "draw_sizes", "layout_of"]


def draw_sizes(rng: random.Random) -> tuple[int, ...]:
    """What a run's pools may draw their page sizes from; half of the runs have one for all. 24 divides no other, nor they it."""
    return rng.choice(((PAGE,), (PAGE,), (PAGE // 4, PAGE), (PAGE // 2, PAGE, PAGE + PAGE // 2, 2 * PAGE)))


def draw_pool(rng: random.Random, name: str, sizes: tuple[int, ...], pages: int, **more: Any) -> PoolConfig:
    """A pool of as many tokens as `pages` pages of PAGE slots, or a little more."""
    size = rng.choice(sizes)
    return PoolConfig(name, max(3, -(-pages * PAGE // size)), page_size=size, **more)


def layout_of(pool: PoolConfig) -> str:
    """What its workers join with: contents agree, page sizes may differ."""
    return f"layout/p{pool.page_size}"
