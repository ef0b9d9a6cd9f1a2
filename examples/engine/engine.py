"""Engine: a fleet and its scheduler as one object, for programs that have prompts and want tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kvmanager import KVClient, PoolConfig
from kvmanager.attention.layout import check_page_size
from kvmanager.errors import InvalidValue
from kvmanager.examples.engine.channel import SchedulerChannel
from kvmanager.examples.engine.launch import Fleet
from kvmanager.examples.engine.request import Request
from kvmanager.examples.engine.scheduler import Scheduler, WorkerNotReady

__all__ = ["Engine", "EngineConfig"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One engine: n prefill workers and m decode workers, or workers that do both; a pool of pages each.

    devices        of the workers in the order of `pools()`, if they are not all on `device`
    mixed_workers  workers that prefill and decode in the same steps, in pools of decode_pages: instead of the others, to compare
    page_size      token slots a page, one that the kernels take
    decode_page_size  the same of the decode workers' pools, and of mixed ones; 0: as the others. Pages are regathered on their way
    prefill_pages, decode_pages  pages of each worker's pool
    chunk_tokens   prompt tokens a prefill step computes at most
    stream_layers  prompts go to their decode worker while they are computed, whole chunks and groups of so many layers; 0: once they are
    decode_early   the first decode step begins on layer 0 when layer 0 is there, while the rest of the pages and of the protocol is on its way
    lease_ms       a worker silent for this long is fenced by the manager
    """

    model: Path
    device: str = "cpu"
    dtype: str = "float32"
    prefill_workers: int = 1
    decode_workers: int = 1
    page_size: int = 16
    prefill_pages: int = 256
    decode_pages: int = 256
    chunk_tokens: int = 64
    lease_ms: int = 10_000
    keep_logits: bool = False
    keep_latents: bool = False
    mixed_workers: int = 0
    devices: tuple[str, ...] = ()
    stream_layers: int = 0
    decode_page_size: int = 0
    decode_early: bool = False

    def __post_init__(self) -> None:
        least = 0 if self.mixed_workers else 1
        for name, low in (("prefill_workers", least), ("decode_workers", least), ("chunk_tokens", 1), ("mixed_workers", 0)):
            if getattr(self, name) < low:
                raise InvalidValue(name, f"at least {low}", getattr(self, name))
        workers = self.prefill_workers + self.decode_workers + self.mixed_workers
        if self.devices and len(self.devices) != workers:
            raise InvalidValue("devices", f"one for each of {workers} workers, or none", len(self.devices))
        check_page_size(self.page_size)  # here, and not minutes later in a worker's log
        if self.decode_page_size:
            check_page_size(self.decode_page_size, "decode_page_size")

    def pools(self) -> list[PoolConfig]:
        """prefill0, prefill1, ..., decode0, decode1, ..., mixed0, ..."""
        roles = (
            ("prefill", self.prefill_workers, self.prefill_pages, self.page_size),
            ("decode", self.decode_workers, self.decode_pages, self.decode_page_size or self.page_size),
            ("mixed", self.mixed_workers, self.decode_pages, self.decode_page_size or self.page_size),
        )
        return [PoolConfig(f"{role}{number}", pages, size, role) for role, count, pages, size in roles for number in range(count)]

    @property
    def tokens_max(self) -> int:
        """Of a request, new ones included: what fits each pool."""
        return min(pool.num_pages * pool.page_size for pool in self.pools())


class Engine:
    """Starts everything; `submit`, then `turn` until `idle`. Use it in a `with` block: leaving it ends all processes.

    Raises RuntimeError, with the log of the process concerned, if something does not come up.
    """

    def __init__(self, config: EngineConfig, on_event: Callable[[str], None] = lambda text: None) -> None:
        self.config = config
        pools = config.pools()
        self.fleet = Fleet()
        self._open: list[Any] = [self.fleet.stop]
        try:
            self.fleet.start_manager(pools, lease_ms=config.lease_ms)
            self.client = KVClient(self.fleet.manager_address, timeout_ms=30_000, resend_ms=200)
            self._open.append(self.client.disconnect)
            channel = SchedulerChannel(self.fleet.scheduler_address)
            self._open.append(channel.close)
            for pool, device in zip(pools, config.devices or [config.device] * len(pools), strict=True):
                self.fleet.start_worker(
                    pool.name,
                    config.model,
                    device=device,
                    dtype=config.dtype,
                    max_tokens=max(256, config.chunk_tokens),
                    lease_ms=config.lease_ms,
                    keep_logits=config.keep_logits,
                    stream_layers=config.stream_layers,
                    decode_early=config.decode_early,
                )
            self.scheduler = Scheduler(
                self.client,
                channel,
                self.fleet,
                {pool.name: pool.group for pool in pools},
                page_size=min(pool.page_size for pool in pools),
                chunk_tokens=config.chunk_tokens,
                keep_latents=config.keep_latents,
                stream=config.stream_layers > 0,
                decode_early=config.decode_early,
                on_event=on_event,
            )
            try:
                self.scheduler.wait_ready(120)
            except WorkerNotReady as error:
                raise RuntimeError(f"{error}\n{self.fleet.log(error.pool)}") from None
        except BaseException:
            self.close()
            raise

    def submit(self, prompt: list[int], max_new_tokens: int) -> Request:
        """Queue a prompt. Raises InvalidValue if it can never fit a pool."""
        needed = len(prompt) + max_new_tokens
        slots = self.config.tokens_max
        if not prompt or needed > slots:
            raise InvalidValue("prompt", f"1..{slots} tokens, prompt and {max_new_tokens} new ones together", needed)
        return self.scheduler.submit(prompt, max_new_tokens)

    def turn(self) -> None:
        self.scheduler.turn()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def close(self) -> None:
        while self._open:
            self._open.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
