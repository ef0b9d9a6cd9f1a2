"""What several operations draw by: handoffs take many commands, and on some days hardly anybody gets in their way."""

from __future__ import annotations

from typing import Any

from kvmanager.simulator.books import Text

__all__ = ["spares", "streams_prompts"]


def spares(driver: Any, text: Text | None) -> bool:
    """Whether a sequence that is handed off, or has just been, is let alone this time."""
    care = driver.drawn("care for handoffs", 0, 0.95, 0.99)
    return text is not None and bool(text.handoff or text.arrived) and driver.rng.random() < care


def streams_prompts(driver: Any) -> float:
    """The chance that a prompt which is not computed yet is handed off now, and streamed."""
    return float(driver.drawn("prompts that are streamed", 0, 0.5, 1, 1))
