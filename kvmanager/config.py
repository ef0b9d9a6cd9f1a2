"""Configuration of a manager: its pools and every bound it keeps. Frozen values, checked once, opening nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvmanager.errors import InvalidValue

__all__ = ["ManagerConfig", "PoolConfig", "check_int", "check_name", "config_from_mapping"]

PAGE_SIZE_MAX = 1024  # what a pool counts in; what kernels can compute with is the latent layout's to check
PLACEMENTS = ("prefix", "round_robin")
MAX_SLOTS = 1 << 20  # sequence ids carry their table slot in 20 bits


def check_int(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int within low..high, or InvalidValue naming the field. bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidValue(name, f"an int in {low}..{high}", repr(value))
    return value


def check_name(name: str, value: object, longest: int = 64, allow_empty: bool = False) -> str:
    """`value` as printable text of 1..longest characters, or InvalidValue naming the field."""
    if not isinstance(value, str) or len(value) > longest or (not value and not allow_empty) or not value.isprintable():
        raise InvalidValue(name, f"printable text of {0 if allow_empty else 1}..{longest} characters", repr(value)[:80])
    return value


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Pages of one group of workers that hold the same bytes under the same ids.

    name        how commands name the pool
    num_pages   pages in the pool, 1..2**31-1
    page_size   token slots a page, 1..1024; a worker's kernels may take fewer sizes (LatentLayout says which)
    group       pools that may serve the same request share a group
    workers     tensor-parallel workers that hold copies; the pool is ready once that many are alive
    layout      fingerprint of the latent layout; "" takes that of the first worker to join
    tenant_quota   pages that each tenant may have, unless it is given a quota of its own; -1 for no limit
    partial_match  a prompt that agrees with at least so many leading tokens of a cached page copies them and goes on from there (see
                   partial), 0..1024; 0 never copies: only whole pages are shared
    """

    name: str
    num_pages: int
    page_size: int = 64
    group: str = "default"
    workers: int = 1
    layout: str = ""
    tenant_quota: int = -1
    partial_match: int = 0

    def __post_init__(self) -> None:
        check_name("pool.name", self.name)
        check_name("pool.group", self.group)
        check_int("pool.num_pages", self.num_pages, 1, 2**31 - 1)
        check_int("pool.page_size", self.page_size, 1, PAGE_SIZE_MAX)
        check_int("pool.workers", self.workers, 1, 1024)
        check_name("pool.layout", self.layout, allow_empty=True)
        check_int("pool.tenant_quota", self.tenant_quota, -1, 2**31 - 1)
        check_int("pool.partial_match", self.partial_match, 0, PAGE_SIZE_MAX)


@dataclass(frozen=True, slots=True)
class ManagerConfig:
    """What one manager owns and every bound it keeps.

    sequences_max        open sequences at once
    sequence_tokens_max  tokens of one sequence
    batch_max            items of one kind (opens, grows, ...) in one step
    workers_max, clients_max, handoffs_max   entries in those tables; the oldest idle client is forgotten when its table is full
    extras_max           different extra keys of token ranges in use: in open sequences, waiting prompts and cached pages
    waiting_max, waiting_tokens_max   prompts in the waiting queue, and their tokens together
    quotas_max           tenants with a quota of their own, in each pool
    pins_max             pins at once
    pin_percent, pin_percent_all   of a pool's pages that the pins of one tenant, and of all together, may hold
    message_bytes_max    one message on the wire
    lease_ms             a worker that does not acknowledge for this long is fenced
    client_lease_ms      a client that sends no command for this long is taken for dead and its sequences are closed; 0: never
    handoff_timeout_ms   a moving handoff that gets no further for this long is aborted; 0: never
    handoff_wait_ms      the same for one that waits for tokens to be written or for pages of its target
    handoff_prefill_ms   the same for one whose source has tokens to write and reports neither more tokens nor more layers; 0: never
    handoff_tries        times that one worker tries one pull
    drain_at_once        sequences that leave a draining pool at a time
    heartbeat_ms         an idle publisher says where it stands this often
    log_bytes_max        end of the log that is kept in memory, for replicas that missed something
    inflight_wait_ms     a prompt waits for pages that another sequence computes while that puts a page into the index at least this
                         often; 0: nobody ever waits
    inflight_tokens_min  and only for at least so many tokens
    remnants_bytes_max   what a pool remembers of evicted prefixes for `explain`
    explain_across_tenants   whether `explain` may say that another tenant has the same tokens cached
    placement            how an open that names a group gets its pool: "prefix" by match and load (see placement), or "round_robin"
    placement_match_weight, placement_load_weight   of a cached token and of a token of load, in 0..1,000,000
    """

    pools: tuple[PoolConfig, ...]
    sequences_max: int = 4096
    sequence_tokens_max: int = 1 << 20
    batch_max: int = 4096
    workers_max: int = 256
    clients_max: int = 1024
    handoffs_max: int = 4096
    extras_max: int = 1 << 18
    waiting_max: int = 4096
    waiting_tokens_max: int = 1 << 26
    quotas_max: int = 4096
    pins_max: int = 4096
    pin_percent: int = 25
    pin_percent_all: int = 75
    message_bytes_max: int = 64 << 20
    lease_ms: int = 10_000
    client_lease_ms: int = 0
    handoff_timeout_ms: int = 5_000
    handoff_wait_ms: int = 60_000
    handoff_prefill_ms: int = 5_000
    handoff_tries: int = 3
    drain_at_once: int = 32
    heartbeat_ms: int = 200
    log_bytes_max: int = 4 << 20
    inflight_wait_ms: int = 2_000
    inflight_tokens_min: int = 1
    remnants_bytes_max: int = 4 << 20
    explain_across_tenants: bool = False
    placement: str = "prefix"
    placement_match_weight: int = 1
    placement_load_weight: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.pools, tuple) or not 1 <= len(self.pools) <= 1024:
            raise InvalidValue("pools", "1..1024 pools", len(self.pools) if isinstance(self.pools, tuple) else repr(self.pools)[:80])
        for pool in self.pools:
            if not isinstance(pool, PoolConfig):
                raise InvalidValue("pools", "PoolConfig values", type(pool).__name__)
        names = [pool.name for pool in self.pools]
        for name in names:
            if names.count(name) > 1:
                raise InvalidValue("pools", "distinct names", name)
        check_int("sequences_max", self.sequences_max, 1, MAX_SLOTS)
        check_int("sequence_tokens_max", self.sequence_tokens_max, 1, 1 << 24)
        check_int("batch_max", self.batch_max, 1, MAX_SLOTS)
        check_int("workers_max", self.workers_max, 1, 1 << 16)
        check_int("clients_max", self.clients_max, 1, 1 << 16)
        check_int("handoffs_max", self.handoffs_max, 1, 1 << 20)
        check_int("extras_max", self.extras_max, 0, 1 << 30)
        check_int("waiting_max", self.waiting_max, 0, 1 << 20)
        check_int("waiting_tokens_max", self.waiting_tokens_max, 0, 1 << 32)
        check_int("quotas_max", self.quotas_max, 0, 1 << 20)
        check_int("pins_max", self.pins_max, 0, 1 << 20)
        check_int("pin_percent", self.pin_percent, 0, 100)
        check_int("pin_percent_all", self.pin_percent_all, 0, 100)
        check_int("message_bytes_max", self.message_bytes_max, 4096, 1 << 30)
        check_int("lease_ms", self.lease_ms, 10, 86_400_000)
        check_int("client_lease_ms", self.client_lease_ms, 0, 86_400_000)
        check_int("handoff_timeout_ms", self.handoff_timeout_ms, 0, 86_400_000)
        check_int("handoff_wait_ms", self.handoff_wait_ms, 0, 86_400_000)
        check_int("handoff_prefill_ms", self.handoff_prefill_ms, 0, 86_400_000)
        check_int("handoff_tries", self.handoff_tries, 1, 1000)
        check_int("drain_at_once", self.drain_at_once, 1, 1 << 20)
        check_int("heartbeat_ms", self.heartbeat_ms, 5, 60_000)
        check_int("log_bytes_max", self.log_bytes_max, 0, 1 << 30)
        check_int("inflight_wait_ms", self.inflight_wait_ms, 0, 86_400_000)
        check_int("inflight_tokens_min", self.inflight_tokens_min, 1, 1 << 24)
        check_int("remnants_bytes_max", self.remnants_bytes_max, 0, 1 << 40)
        if not isinstance(self.explain_across_tenants, bool):
            raise InvalidValue("explain_across_tenants", "true or false", repr(self.explain_across_tenants)[:80])
        if self.placement not in PLACEMENTS:
            raise InvalidValue("placement", f"one of {', '.join(PLACEMENTS)}", repr(self.placement)[:80])
        check_int("placement_match_weight", self.placement_match_weight, 0, 1_000_000)
        check_int("placement_load_weight", self.placement_load_weight, 0, 1_000_000)


def _build(where: str, cls: type, values: Mapping[str, Any]) -> Any:
    allowed = {item.name for item in fields(cls)}
    for key in values:
        if key not in allowed:
            raise InvalidValue(f"{where}.{key}", f"one of {', '.join(sorted(allowed))}", "an unknown key")
    try:
        return cls(**values)
    except InvalidValue as error:
        raise InvalidValue(f"{where}: {error.field}", str(error.details["expected"]), error.details["got"]) from None
    except TypeError as error:  # a required key is missing
        raise InvalidValue(where, "all required keys (name, num_pages)", str(error)) from None


def config_from_mapping(values: Mapping[str, Any]) -> ManagerConfig:
    """A config as read from TOML or JSON: `{"pools": [{"name": ..., "num_pages": ...}, ...], "lease_ms": ...}`.

    Raises InvalidValue naming the table, the key and the limit.
    """
    if not isinstance(values, Mapping):
        raise InvalidValue("config", "a table", type(values).__name__)
    pools = values.get("pools")
    if not isinstance(pools, list) or not pools:
        raise InvalidValue("config.pools", "a list of at least one table", repr(pools)[:80])
    built = []
    for number, pool in enumerate(pools):
        if not isinstance(pool, Mapping):
            raise InvalidValue(f"config.pools[{number}]", "a table", repr(pool)[:80])
        built.append(_build(f"config.pools[{number}]", PoolConfig, pool))
    return _build("config", ManagerConfig, {**values, "pools": tuple(built)})
