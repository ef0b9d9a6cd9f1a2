"""What a worker's process should find in its environment when it starts: later is too late, the C library reads it once."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["STREAMING_BYTES", "worker_environment"]

STREAMING_BYTES = 1 << 18  # a page of 16 slots in 4 layers is smaller, and is better kept in the cache
_TUNABLE = "glibc.cpu.x86_non_temporal_threshold"


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment`, and in it that memcpy writes past the cache from STREAMING_BYTES on.

    glibc does so from three quarters of the shared cache on (190 MB on the processors measured), which no page reaches; below that every line
    written is read from memory first. One thread that pulls pages over shared memory reaches 57 % of a large memcpy without this and
    over 90 % with it (docs/transports.md). A threshold that is set already stays. Elsewhere than on x86 with glibc it means nothing.

    Source: The GNU C Library manual, "Memory Related Tunables" and "Hardware Capability Tunables"."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _TUNABLE not in tunables:
        tunables = ":".join(filter(None, [tunables, f"{_TUNABLE}={STREAMING_BYTES:#x}"]))
    return {**environment, "GLIBC_TUNABLES": tunables}
