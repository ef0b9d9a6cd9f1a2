"""Commands: what clients and workers ask for. Frozen values, typed and bounded when they are made, whoever makes them.

`KVManager` and `KVClient` build the same objects, so bad input gets the same InvalidValue, naming the field, with or without a wire.
How they travel: `kvmanager.machine.command_wire`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from kvmanager.arrays import INT64_MAX, as_distinct_ids, as_ids, as_tokens, ones
from kvmanager.arrays import as_ints as _as_ints
from kvmanager.config import MAX_SLOTS, check_int, check_name
from kvmanager.errors import InvalidValue
from kvmanager.machine.checks import as_pair, as_pairs, check_bytes, check_list
from kvmanager.pages.eviction import PRIORITY_MAX, PRIORITY_MIN

__all__ = [
    "Ack",
    "Command",
    "Drain",
    "Enqueue",
    "Flush",
    "HandOff",
    "Join",
    "Open",
    "Pin",
    "SetQuota",
    "Step",
    "Tick",
    "WorkerGone",
    "as_tokens",
    "check_prompt",
]

TENANT_BYTES_MAX = 256
EXTRAS_MAX = 1024
MEMORY_BYTES_MAX = 4096
REASON_MAX = 500  # characters of why a pull failed
LAYER_REPORTS_MAX = 4096  # in one acknowledgement
LAYERS_MAX = 1 << 16
LINKS_MAX = 256  # peers of which one worker has said how it reaches them: the newest are kept
LINK_REASON_MAX = 300  # characters of why it is that transport
PAGE_BYTES_MAX = 1 << 40
LEASE_MAX = 1 << 40  # milliseconds or versions
Tokens: TypeAlias = np.ndarray | bytes | list[int] | tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Open:
    """Open a sequence.

    tokens   prompt token ids, int32 [n], n >= 1
    pool     name of the pool that will compute it; empty leaves the choice among the pools of `group` to the manager
    tenant   salt: sequences of different tenants never share pages (at most 256 bytes)
    extra    whatever else must be equal to share anything at all, such as a LoRA id (at most 256 bytes)
    chunk    slots to reserve at once beyond the cached tokens, capped at the rest of the prompt; 0 reserves none
    group    any ready pool of this group, by the longest match and the least load (see `placement`); instead of a pool
    wait     if another sequence is computing pages of this prompt already, refuse with PrefixPending instead of computing them again
    priority   of its pages once they are cached, -8..7: lower ones are evicted first, and pages of several openers keep the highest
    waiting  its id in the waiting queue, which it leaves if it is opened; 0, or one that is gone, is none
    extras   (key, start, stop) each: what else must be equal for tokens [start, stop), such as an image hash (1..256 bytes). What comes
             before `start` is shared regardless; what follows depends on it
    reserve  tokens that it will have beyond the prompt: pages for all of them are taken at once, and growing so far never fails for want
             of pages; 0 reserves none

    At least the prompt's last token is never taken from the cache: somebody has to compute its logits.
    """

    tokens: Any
    pool: str = ""
    tenant: bytes = b""
    extra: bytes = b""
    chunk: int = 0
    group: str = ""
    wait: bool = True
    priority: int = 0
    waiting: int = 0
    extras: Any = ()
    reserve: int = 0

    def __post_init__(self) -> None:
        check_prompt("open", self)
        check_int("open.reserve", self.reserve, 0, 1 << 24)
        check_int("open.chunk", self.chunk, 0, 1 << 24)
        if not isinstance(self.wait, bool):
            raise InvalidValue("open.wait", "true or false", repr(self.wait)[:80])
        check_int("open.priority", self.priority, PRIORITY_MIN, PRIORITY_MAX)
        check_int("open.waiting", self.waiting, 0, INT64_MAX)


def check_prompt(name: str, prompt: Any) -> None:
    """What Open and Enqueue have in common."""
    tokens = as_tokens(f"{name}.tokens", prompt.tokens)
    if not len(tokens):
        raise InvalidValue(f"{name}.tokens", "at least one token", "none")
    object.__setattr__(prompt, "tokens", tokens)
    if prompt.pool != "" or prompt.group == "":  # exactly one is named
        check_name(f"{name}.pool", prompt.pool)
    if prompt.group != "":
        check_name(f"{name}.group", prompt.group)
        if prompt.pool:
            raise InvalidValue(f"{name}.group", "a pool, or else a group", "both")
    if prompt.tenant != b"":
        object.__setattr__(prompt, "tenant", check_bytes(f"{name}.tenant", prompt.tenant, TENANT_BYTES_MAX))
    if prompt.extra != b"":
        object.__setattr__(prompt, "extra", check_bytes(f"{name}.extra", prompt.extra, TENANT_BYTES_MAX))
    if not isinstance(prompt.extras, (list, tuple)) or prompt.extras:
        object.__setattr__(prompt, "extras", _check_extras(f"{name}.extras", prompt.extras, len(tokens)))


def _check_extras(name: str, value: object, count: int) -> list[tuple[bytes, int, int]]:
    """(key, start, stop) each, sorted by start: their order says nothing."""
    ranges = []
    items = check_list(name, value)
    if len(items) > EXTRAS_MAX:
        raise InvalidValue(name, f"at most {EXTRAS_MAX} ranges", len(items))
    for number, item in enumerate(items):
        if not isinstance(item, (list, tuple)) or len(item) != 3:
            raise InvalidValue(f"{name}[{number}]", "(key, start, stop)", repr(item)[:80])
        key = check_bytes(f"{name}[{number}]", item[0], TENANT_BYTES_MAX)
        if not key:
            raise InvalidValue(f"{name}[{number}]", "a key of at least one byte", "none")
        start = check_int(f"{name}[{number}]", item[1], 0, count - 1)
        ranges.append((key, start, check_int(f"{name}[{number}]", item[2], start + 1, count)))
    return sorted(ranges, key=lambda item: (item[1], item[2], item[0]))


@dataclass(frozen=True, slots=True, eq=False)
class Enqueue:
    """A prompt waits in the scheduler's queue: its cached pages are spared by eviction while anything else can go (see `queue_hint`).

    tokens, pool, tenant, extra, group, extras   as they will be in its Open
    front    before all that wait already, not behind them

    A hint, never a promise. It is given once, and named by its id from then on: `Open.waiting` or `Step.dequeue` end it.
    """

    tokens: Any
    pool: str = ""
    tenant: bytes = b""
    extra: bytes = b""
    group: str = ""
    front: bool = False
    extras: Any = ()

    def __post_init__(self) -> None:
        check_prompt("enqueue", self)
        if not isinstance(self.front, bool):
            raise InvalidValue("enqueue.front", "true or false", repr(self.front)[:80])


@dataclass(frozen=True, slots=True, eq=False)
class Pin:
    """Keep a prefix cached: as many leading pages of it as are in the pool's index now (see `pins`).

    tokens, pool, tenant, extra, extras   the prefix; or else
    sequence     what the index has of this open sequence, which the same step may close
    lease_ms     let go after so many milliseconds, 0 for never
    lease_steps  let go after so many versions, 0 for never
    session      a name within the tenant (at most 256 bytes): the pin takes the place of those of the session's that are a prefix of it
    """

    tokens: Any = ()
    pool: str = ""
    tenant: bytes = b""
    extra: bytes = b""
    sequence: int = 0
    lease_ms: int = 0
    lease_steps: int = 0
    session: bytes = b""
    extras: Any = ()

    def __post_init__(self) -> None:
        check_int("pin.sequence", self.sequence, 0, INT64_MAX)
        tokens = as_tokens("pin.tokens", self.tokens)
        if self.sequence:
            given = {"tokens": tokens, "pool": self.pool, "tenant": self.tenant, "extra": self.extra, "extras": self.extras}
            for name, value in given.items():
                if len(value):
                    raise InvalidValue(f"pin.{name}", "a sequence, or else a prefix", "both")
        elif not len(tokens):
            raise InvalidValue("pin.tokens", "at least one token", "none")
        else:
            check_name("pin.pool", self.pool)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "extras", _check_extras("pin.extras", self.extras, len(tokens)))
        for name in ("tenant", "extra", "session"):
            object.__setattr__(self, name, check_bytes(f"pin.{name}", getattr(self, name), TENANT_BYTES_MAX))
        check_int("pin.lease_ms", self.lease_ms, 0, LEASE_MAX)
        check_int("pin.lease_steps", self.lease_steps, 0, LEASE_MAX)


@dataclass(frozen=True, slots=True)
class HandOff:
    """Move a sequence to another pool.

    pool     the target's name; or else
    group    any other pool of this group, "*" for any at all: the one with room that has most of the sequence already and the least load. If
             it fails the handoff, the manager tries the others, each once
    reserve  take the target's pages now, for all tokens known of the sequence, and move once those are computed: so that nothing is computed
             that has nowhere to go. Refused with OutOfPages if they are not there
    stream   with `reserve`: the target pulls what is written already, chunk by chunk and by groups of layers, while the rest is computed
    """

    sequence: int
    pool: str = ""
    group: str = ""
    reserve: bool = False
    stream: bool = False

    def __post_init__(self) -> None:
        check_int("hand_off.sequence", self.sequence, 1, INT64_MAX)
        if self.pool != "" or self.group == "":  # exactly one is named
            check_name("hand_off.pool", self.pool)
        if self.group != "":
            check_name("hand_off.group", self.group)
            if self.pool:
                raise InvalidValue("hand_off.group", "a pool, or else a group", "both")
        for name in ("reserve", "stream"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidValue(f"hand_off.{name}", "true or false", repr(getattr(self, name))[:80])
        if self.stream and not self.reserve:
            raise InvalidValue("hand_off.stream", "false without hand_off.reserve: there would be no pages to stream into", "true")


@dataclass(frozen=True, eq=False, init=False)
class Step:
    """One scheduler step for the whole batch, in this order: close, abort, truncate, tokens, unpin, release, pin, hand_off, grow, fork,
    open, dequeue, enqueue.

    close        sequence ids, int64: what they have in the prefix index stays cached for others
    forget       sequence ids, int64: closed too, and what nobody else holds, waits for or continues leaves the index
    abort        handoff ids, int64
    tokens       (sequence id, token ids) pairs: ids of decoded tokens, appended after those known
    hand_off     HandOff objects, or (sequence id, target pool name) pairs
    grow         sequence ids, int64, each once
    grow_counts  slots for each, int64, >= 1; None is one each
    opens        Open objects
    unpin        pin ids, int64
    release      (tenant, session) pairs, bytes: all pins of the session
    pin          Pin objects
    dequeue      ids of waiting prompts that wait no longer, int64
    enqueue      Enqueue objects: what this step evicts is chosen before they are looked at
    truncate     (sequence id, new length) pairs, int64 [n, 2], each sequence once; length >= 1: the sequence is its first tokens again,
                 and token ids known beyond them are forgotten
    fork         (sequence id, children) pairs, int64 [n, 2], or sequence ids for one child each: the children begin as the sequence was
                 before this step's growth
    seen         version of the newest reply that the sender acts on: StaleEpoch if it was lost with its host, or if its last command was
                 carried out later, and is one that it had given up; 0 is not checked
    victims      if pages run out, propose whom to preempt (see victims)

    Running sequences come before new ones: if pages run out, opens are refused first. An item that cannot be done is listed in the
    reply and harms no other; a value that is malformed rejects the whole step and changes nothing.
    """

    opens: Any = ()
    grow: Any = ()
    grow_counts: Any = None
    close: Any = ()
    tokens: Any = ()
    hand_off: Any = ()
    abort: Any = ()
    dequeue: Any = ()
    enqueue: Any = ()
    truncate: Any = ()
    fork: Any = ()
    forget: Any = ()
    pin: Any = ()
    unpin: Any = ()
    release: Any = ()
    seen: int = 0
    victims: bool = False

    steady: bool = field(init=False, default=True, repr=False)  # nothing but growth

    def __init__(
        self,
        opens: Any = (),
        grow: Any = (),
        grow_counts: Any = None,
        close: Any = (),
        tokens: Any = (),
        hand_off: Any = (),
        abort: Any = (),
        dequeue: Any = (),
        enqueue: Any = (),
        truncate: Any = (),
        fork: Any = (),
        forget: Any = (),
        pin: Any = (),
        unpin: Any = (),
        release: Any = (),
        seen: int = 0,
        victims: bool = False,
    ) -> None:
        # Most steps give two or three of the fields: what is not given is the class's, empty and checked once for all.
        own = self.__dict__
        if seen:
            own["seen"] = check_int("step.seen", seen, 0, INT64_MAX)
        elif type(seen) is not int:
            raise InvalidValue("step.seen", f"an int in 0..{INT64_MAX}", repr(seen))
        if victims is not False:
            if not isinstance(victims, bool):
                raise InvalidValue("step.victims", "true or false", repr(victims)[:80])
            own["victims"] = victims
        own["grow"] = grow = as_distinct_ids("step.grow", grow)
        own["grow_counts"] = counts = (
            ones(len(grow)) if grow_counts is None else _as_ints("step.grow_counts", grow_counts, "<i8", 1, 1 << 24)
        )
        if len(counts) != len(grow):
            raise InvalidValue("step.grow_counts", f"{len(grow)} counts, one for each sequence", len(counts))
        if not (
            opens
            is close
            is forget
            is tokens
            is hand_off
            is abort
            is dequeue
            is enqueue
            is truncate
            is fork
            is pin
            is unpin
            is release
            is _NOTHING
        ):
            given = opens, close, forget, tokens, hand_off, abort, dequeue, enqueue, truncate, fork, pin, unpin, release
            for (name, check), value in zip(_STEP_CHECKS, given, strict=True):
                if value is not _NOTHING:
                    own[name] = value = check(value)
                    if len(value):
                        own["steady"] = False

    def sizes(self) -> list[tuple[str, int]]:
        """The lists that were given, and how many items each has."""
        return [(name, len(value)) for name, value in self.__dict__.items() if name not in _NO_LISTS]


_NO_LISTS = ("grow_counts", "seen", "victims", "steady")


def _objects(name: str, cls: type) -> Callable[[object], list[Any]]:
    def check(value: object) -> list[Any]:
        items = check_list(name, value)
        for item in items:
            if not isinstance(item, cls):
                raise InvalidValue(name, f"{cls.__name__} objects", type(item).__name__)
        return items

    return check


def _ids(name: str) -> Callable[[object], np.ndarray]:
    return lambda value: as_ids(name, value)


def _check_release(value: object) -> list[tuple[bytes, bytes]]:
    release = []
    for number, item in enumerate(check_list("step.release", value)):
        pair = as_pair(f"step.release[{number}]", item)
        tenant, session = (check_bytes(f"step.release[{number}]", each, TENANT_BYTES_MAX) for each in pair)
        release.append((tenant, session))
    return release


def _check_tokens(value: object) -> list[tuple[int, np.ndarray]]:
    items = check_list("step.tokens", value)
    if {*map(type, items)} == {tuple} and {*map(len, items)} == {2}:
        try:
            return [(check_int("step.tokens", sequence, 1, INT64_MAX), as_tokens("step.tokens", ids)) for sequence, ids in items]
        except InvalidValue:
            pass  # below, which of them: a name for each takes longer than all the rest
    tokens = []
    for number, item in enumerate(items):
        sequence, ids = as_pair(f"step.tokens[{number}]", item)
        tokens.append((check_int(f"step.tokens[{number}]", sequence, 1, INT64_MAX), as_tokens(f"step.tokens[{number}]", ids)))
    return tokens


def _check_hand_off(value: object) -> list[HandOff]:
    hand_off = []
    for number, item in enumerate(check_list("step.hand_off", value)):
        if not isinstance(item, HandOff):
            sequence, pool = as_pair(f"step.hand_off[{number}]", item)
            check_int(f"step.hand_off[{number}]", sequence, 1, INT64_MAX)
            item = HandOff(sequence, check_name(f"step.hand_off[{number}]", pool))
        hand_off.append(item)
    return hand_off


def _check_truncate(value: object) -> np.ndarray:
    truncate = as_pairs("step.truncate", value, 1 << 24)
    if len(truncate) > 1 and len(np.unique(truncate[:, 0])) != len(truncate):
        raise InvalidValue("step.truncate", "each sequence once", "a sequence twice")
    return truncate


def _check_fork(value: object) -> np.ndarray:
    return as_pairs("step.fork", value, MAX_SLOTS, default=1)


_NOTHING: tuple[()] = ()  # the default of a Step's fields
# How each field of a Step is checked that is not about growth, in the order of Step's `given`.
_STEP_CHECKS: tuple[tuple[str, Callable[[object], Any]], ...] = (
    ("opens", _objects("step.opens", Open)),
    ("close", _ids("step.close")),
    ("forget", _ids("step.forget")),
    ("tokens", _check_tokens),
    ("hand_off", _check_hand_off),
    ("abort", _ids("step.abort")),
    ("dequeue", _ids("step.dequeue")),
    ("enqueue", _objects("step.enqueue", Enqueue)),
    ("truncate", _check_truncate),
    ("fork", _check_fork),
    ("pin", _objects("step.pin", Pin)),
    ("unpin", _ids("step.unpin")),
    ("release", _check_release),
)
for _name, _check in _STEP_CHECKS:
    if isinstance(_check(_NOTHING), np.ndarray):
        setattr(Step, _name, _check(_NOTHING))


@dataclass(frozen=True, slots=True)
class Join:
    """A worker with fresh page memory joins a pool.

    layout    fingerprint of its latent layout; the first worker's becomes the pool's
    memory    how peers reach its pages, opaque to the manager (at most 4096 bytes)
    lease_ms  acknowledge at least this often or be fenced; 0 takes the manager's default
    page_bytes  of one page in all layers, the same for all workers of the pool: what is counted in pages is told in bytes too; 0 is unknown
    seen      version of the newest reply that the sender has seen. A worker of this name and client that joined later is this one: an
              earlier request was given up, and carried out all the same. 0: the sender does not say
    """

    name: str
    pool: str
    layout: str
    memory: bytes = b""
    lease_ms: int = 0
    seen: int = 0
    page_bytes: int = 0

    def __post_init__(self) -> None:
        check_int("join.page_bytes", self.page_bytes, 0, PAGE_BYTES_MAX)
        check_name("join.name", self.name)
        check_name("join.pool", self.pool)
        check_name("join.layout", self.layout)
        object.__setattr__(self, "memory", check_bytes("join.memory", self.memory, MEMORY_BYTES_MAX))
        check_int("join.lease_ms", self.lease_ms, 0, 86_400_000)
        check_int("join.seen", self.seen, 0, INT64_MAX)


def _check_failed(value: object) -> list[tuple[int, int, str]]:
    failed = []
    for number, item in enumerate(check_list("ack.failed", value)):
        if not isinstance(item, (list, tuple)) or len(item) != 3:
            raise InvalidValue(f"ack.failed[{number}]", "(handoff, try, reason)", repr(item)[:80])
        handoff, attempt, reason = item
        check_int(f"ack.failed[{number}]", handoff, 1, INT64_MAX)
        check_int(f"ack.failed[{number}]", attempt, 0, 1 << 20)
        if not isinstance(reason, str) or len(reason) > REASON_MAX:
            raise InvalidValue(f"ack.failed[{number}]", f"a reason of at most {REASON_MAX} characters", repr(reason)[:80])
        failed.append((handoff, attempt, reason.encode(errors="replace").decode()))  # a lone surrogate has no place in a log
    return failed


def _check_layers(value: object) -> list[tuple[int, int, int]]:
    reports = check_list("ack.layers", value)
    if len(reports) > LAYER_REPORTS_MAX:
        raise InvalidValue("ack.layers", f"at most {LAYER_REPORTS_MAX} reports", len(reports))
    layers = []
    for number, item in enumerate(reports):
        name = f"ack.layers[{number}]"
        if not isinstance(item, (list, tuple)) or len(item) != 3:
            raise InvalidValue(name, "(handoff, tokens, layers)", repr(item)[:80])
        handoff, tokens, count = item
        layers.append((check_int(name, handoff, 1, INT64_MAX), check_int(name, tokens, 1, 1 << 24), check_int(name, count, 1, LAYERS_MAX)))
    return layers


def _check_links(value: object) -> list[tuple[int, str, str]]:
    links = []
    for number, item in enumerate(check_list("ack.links", value)):
        where = f"ack.links[{number}]"
        if number == LINKS_MAX:
            raise InvalidValue("ack.links", f"at most {LINKS_MAX} peers", "more")
        if not isinstance(item, (list, tuple)) or len(item) != 3:
            raise InvalidValue(where, "(worker, transport, reason)", repr(item)[:80])
        peer, transport, reason = item
        check_int(where, peer, 1, INT64_MAX)
        check_name(where, transport)
        if not isinstance(reason, str) or len(reason) > LINK_REASON_MAX:
            raise InvalidValue(where, f"a reason of at most {LINK_REASON_MAX} characters", repr(reason)[:80])
        links.append((peer, transport, reason.encode(errors="replace").decode()))
    return links


@dataclass(frozen=True, slots=True, eq=False)
class Ack:
    """A worker has finished every step up to `version` and will refuse any that it has not seen yet.

    ids, tokens   int64 [n]: sequence ids[i] is written up to tokens[i]
    pulled        handoff ids whose pages have arrived and were verified
    failed        (handoff id, try, reason): tries of pulls that have ended without success, of which nothing can land any more
    layers        (handoff id, tokens, layers): of the sequence of a streamed handoff, written so far in a step that is not finished: the
                  first `layers` layers of its first `tokens` tokens (at most 4096 of these)
    epoch         the life of the manager that the worker follows (see Replica); 0 says that it has followed but one
    as_of         version of the tables that `tokens` speak of, at least `version`; 0 means `version` itself
    links         (worker, transport, reason): how this worker reaches another's pages, once it has chosen. Of workers that are gone: ignored
    """

    worker: int
    version: int
    ids: Any = ()
    tokens: Any = ()
    pulled: Any = ()
    epoch: int = 0
    as_of: int = 0
    failed: Any = ()
    layers: Any = ()
    links: Any = ()

    def __post_init__(self) -> None:
        check_int("ack.worker", self.worker, 1, INT64_MAX)
        check_int("ack.epoch", self.epoch, 0, INT64_MAX)
        check_int("ack.as_of", self.as_of, 0, INT64_MAX)
        check_int("ack.version", self.version, 0, INT64_MAX)
        ids, tokens = as_ids("ack.ids", self.ids), _as_ints("ack.tokens", self.tokens, "<i8", 0, 1 << 24)
        if len(ids) != len(tokens):
            raise InvalidValue("ack.tokens", f"{len(ids)} lengths, one for each sequence", len(tokens))
        object.__setattr__(self, "ids", ids)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "pulled", as_ids("ack.pulled", self.pulled))
        object.__setattr__(self, "failed", _check_failed(self.failed) if self.failed != () else ())
        object.__setattr__(self, "layers", _check_layers(self.layers) if self.layers != () else ())
        object.__setattr__(self, "links", _check_links(self.links) if self.links != () else ())


@dataclass(frozen=True, slots=True)
class WorkerGone:
    """The worker is known to touch nothing any more: its process was reaped, or it drained. A silent one is not known to be gone.

    epoch  a life of the manager in which the worker had this id; 0 is not checked
    """

    worker: int
    epoch: int = 0

    def __post_init__(self) -> None:
        check_int("gone.epoch", self.epoch, 0, INT64_MAX)
        check_int("gone.worker", self.worker, 1, INT64_MAX)


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes: leases that ended are noticed."""


@dataclass(frozen=True, slots=True)
class SetQuota:
    """So many pages of a pool for a tenant, held by its sequences or cached for it; see `tenants`.

    tenant  None is every tenant that has no quota of its own
    pages   None is no limit
    pool    its name, or empty for all pools
    """

    tenant: bytes | None
    pages: int | None
    pool: str = ""

    def __post_init__(self) -> None:
        if self.tenant is not None:
            object.__setattr__(self, "tenant", check_bytes("quota.tenant", self.tenant, TENANT_BYTES_MAX))
        if self.pages is not None:
            check_int("quota.pages", self.pages, 0, 2**31 - 1)
        check_name("quota.pool", self.pool, allow_empty=True)


@dataclass(frozen=True, slots=True)
class Flush:
    """The prefix index forgets everything that it has of a tenant, in a pool or in all (empty); see `tenants`."""

    tenant: bytes
    pool: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tenant", check_bytes("flush.tenant", self.tenant, TENANT_BYTES_MAX))
        check_name("flush.pool", self.pool, allow_empty=True)


@dataclass(frozen=True, slots=True)
class Drain:
    """Empty a pool while everybody goes on, so that its workers can leave; see `drains`.

    pool     its name; or else
    worker   one of its workers: ranks of a pool hold the same bytes, so they leave together
    stop     no more: it takes sequences again
    """

    pool: str = ""
    worker: int = 0
    stop: bool = False

    def __post_init__(self) -> None:
        check_int("drain.worker", self.worker, 0, INT64_MAX)
        check_name("drain.pool", self.pool, allow_empty=bool(self.worker))
        if self.pool and self.worker:
            raise InvalidValue("drain.worker", "a pool, or else a worker", "both")
        if not isinstance(self.stop, bool):
            raise InvalidValue("drain.stop", "true or false", repr(self.stop)[:80])


Command: TypeAlias = Step | Join | Ack | WorkerGone | Tick | SetQuota | Flush | Drain
