"""Events: the only thing that changes state. A batch of them is one version; its bytes are what is applied and published.

Each event is a NamedTuple with a fixed code and fixed fields. On the wire it is `[code, *fields]` in msgpack; arrays are little-endian
bytes. A code or a field that a reader does not know is an error, never skipped: skipping would make it diverge silently. So a new
meaning gets a new event, and fields are never added to an old one.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

import msgpack
import numpy as np

from kvmanager.errors import BadMessage, InvariantBroken

__all__ = ["EventBatch", "decode_batch", "encode_batch", "same_batch", "unpack"]

I32 = np.dtype("<i4")
I64 = np.dtype("<i8")
# Up to this size a message is unpacked without a look ahead: arrays in arrays that lie about their lengths can claim a few megabytes at most.
SMALL_BYTES = 1024


Ints32: TypeAlias = Annotated[np.ndarray, "int32 [n]"]
Ints64: TypeAlias = Annotated[np.ndarray, "int64 [n]"]


class PoolAdded(NamedTuple):
    pool: int
    name: str
    group: str
    num_pages: int
    page_size: int
    workers: int
    layout: str


class WorkerJoined(NamedTuple):
    """A worker with fresh memory. `memory` says how others reach it: opaque bytes here, a peer's business."""

    worker: int
    name: str
    pool: int
    layout: str
    memory: bytes
    lease_ms: int


class WorkerAcked(NamedTuple):
    """The worker has finished, or will refuse, every step up to `version`. Renews its lease."""

    worker: int
    version: int


class SequencesWritten(NamedTuple):
    """The worker has written sequence ids[i] up to tokens[i]."""

    worker: int
    ids: Ints64
    tokens: Ints64


class WorkerFenced(NamedTuple):
    """Its lease ended: its acknowledgements are void, its pages stay held until it is known dead."""

    worker: int


class WorkerDead(NamedTuple):
    """Known dead (its process was reaped) or known to have drained: it touches nothing any more."""

    worker: int


class SequenceOpened(NamedTuple):
    """`cached` pages come from the prefix index; `fresh` ones make room for tokens up to `length`, which the workers are to write, but for
    the first `copied`, which are copied (see PagesCopied). The table's first `reserved` pages stay however short the sequence is cut.

    `tokens` are the ids that follow on the cached pages: those in them are the index's. A step for the workers if there is anything to write.
    """

    sequence: int
    owner: int
    pool: int
    namespace: bytes
    tokens: Ints32
    cached: Ints32
    fresh: Ints32
    length: int
    priority: int
    copied: int
    reserved: int


class SequencesGrown(NamedTuple):
    """Lengths grow by counts[i]; page_counts[i] of `pages` are appended to sequence i's table. A step for the workers."""

    ids: Ints64
    counts: Ints64
    page_counts: Ints64
    pages: Ints32


class GrownAgain(NamedTuple):
    """The same ids and counts as the last SequencesGrown, nobody needing a page: the steady decode step."""


class GrownFurther(NamedTuple):
    """The same ids and counts as the last SequencesGrown; pages[i] is appended to the table of the at[i]th of its sequences.

    `at` ascends; a sequence that gets several pages stands there as often. A step for the workers.
    """

    at: Ints32
    pages: Ints32


class TokensAppended(NamedTuple):
    """Token ids of decoded tokens become known, after those known so far."""

    sequence: int
    tokens: Ints32


class PagesPublished(NamedTuple):
    """Pages [first, first + len(pages)) of the sequence are now the index's; ids may be those of equal pages already there."""

    sequence: int
    first: int
    pages: Ints32


class SequenceClosed(NamedTuple):
    """reason: 0 finished, 1 lost with its pool's memory, 2 its owner's lease ended, 3 finished and to be forgotten: its pages leave the index,
    from the end up to the first that somebody holds, waits for or continues."""

    sequence: int
    reason: int


class PagesEvicted(NamedTuple):
    pool: int
    pages: Ints32


class PagesReleased(NamedTuple):
    """Quarantine entries, by serial, whose pages are free now."""

    pool: int
    serials: Ints64


class IndexDropped(NamedTuple):
    """The pool's memory is gone or no longer trusted: nothing cached in it may be found."""

    pool: int


class HandoffBegun(NamedTuple):
    handoff: int
    sequence: int
    target: int


class HandoffSealed(NamedTuple):
    handoff: int


class HandoffReserving(NamedTuple):
    handoff: int


class HandoffMoving(NamedTuple):
    """`shared` are pages that the target already has; `fresh` are to be pulled into."""

    handoff: int
    shared: Ints32
    fresh: Ints32


class HandoffPulled(NamedTuple):
    handoff: int
    worker: int


class HandoffResident(NamedTuple):
    handoff: int


class HandoffAborted(NamedTuple):
    """`code` for programs (see state.Notice), `reason` for people."""

    handoff: int
    code: str
    reason: str


class HandoffEnded(NamedTuple):
    """Nobody can be reading the source pages of an aborted handoff any more."""

    handoff: int


class SequencesTruncated(NamedTuple):
    """Sequence ids[i] becomes its first lengths[i] tokens, in its first page_counts[i] pages. If targets[i] is not -1, the last of them is
    that fresh page, of which sources[i] is copied (see PagesCopied): somebody else owns that one as well."""

    ids: Ints64
    lengths: Ints64
    page_counts: Ints64
    sources: Ints32
    targets: Ints32


class SequenceForked(NamedTuple):
    """`children` begin as the first `length` tokens of `parent`: they share its full pages; `fresh[i]` is the last page of children[i],
    and gets a copy of the parent's (see PagesCopied). No fresh pages: the length ends with a page."""

    parent: int
    owner: int
    length: int
    children: Ints64
    fresh: Ints32


class PagesCopied(NamedTuple):
    """Before it writes anything of this step, every worker of the pool copies the first tokens[i] slots, in all layers, of sources[i] to
    targets[i]. A step for the workers, even if they have nothing to write in it."""

    pool: int
    sources: Ints32
    targets: Ints32
    tokens: Ints32


class ClientAnswered(NamedTuple):
    """The client's request `number` got `reply`; a repetition gets the same bytes. The first `notices` of its notices are delivered."""

    client: int
    number: int
    notices: int
    reply: bytes


class ClientForgotten(NamedTuple):
    """Its waiting prompts leave the queue."""

    client: int


class PromptEnqueued(NamedTuple):
    """A prompt waits, behind all others or before them, to be opened in one of these pools. In a snapshot: in the order of the queue."""

    waiting: int
    client: int
    pools: Ints32
    namespace: bytes
    tokens: Ints32
    front: int


class ExtrasNamed(NamedTuple):
    """Negative numbers that stand in prompts for an extra key and its token from now on; see `extras`. ids[i] means sizes[i] of the bytes."""

    next_id: int
    ids: Ints32
    sizes: Ints32
    meanings: bytes


class PromptsDequeued(NamedTuple):
    """They wait no longer: opened, or given up."""

    waiting: Ints64


class QuotaSet(NamedTuple):
    """So many pages of the pool for a tenant, or for everybody who has no quota of its own; -1 is none."""

    pool: int
    tenant: bytes
    everybody: int
    pages: int


class TenantFlushed(NamedTuple):
    """The index forgets what it has of a tenant; open sequences keep what they hold, and it is found by nobody."""

    pool: int
    tenant: bytes


class PinBegun(NamedTuple):
    """These pages, which lead in the namespace, stay cached until the pin ends. Deadlines of 0 are none. In a snapshot: it is held."""

    pin: int
    client: int
    pool: int
    namespace: bytes
    pages: Ints32
    session: bytes
    deadline_ms: int
    deadline_version: int


class PinsEnded(NamedTuple):
    """reason: 0 asked for, 1 the lease ended, 2 lost with what it held, 3 superseded in its session."""

    pins: Ints64
    reason: int


# Snapshot events: they build a state from nothing.


class StateRestored(NamedTuple):
    next_generation: int
    next_worker: int
    next_handoff: int
    free_slots: Ints64
    last_ids: Ints64
    last_counts: Ints64


class PoolRestored(NamedTuple):
    pool: int
    free: Ints32
    next_serial: int
    serials: Ints64
    versions: Ints64
    sizes: Ints64
    pages: Ints32
    publishable: Ints64


class WorkerRestored(NamedTuple):
    worker: int
    acked: int
    deadline_ms: int
    fenced: int


class NodesRestored(NamedTuple):
    """Nodes of a pool's index that are of one namespace, parents first, a column each; numbered from 1 on through the pool's events.

    parents[i] is a number, 0 for the namespace's root; sizes[i] pages of `pages`, and the token ids in them, are node i's.
    """

    pool: int
    namespace: bytes
    parents: Ints64
    sizes: Ints32
    pages: Ints32
    tokens: bytes
    refs: Ints32
    last_used: Ints64
    priorities: Ints32


class LruRestored(NamedTuple):
    """The order of eviction: nodes that nobody holds and nobody waits for, first to go first."""

    pool: int
    nodes: Ints64


class ArrivalsRestored(NamedTuple):
    """The pool's open sequences by priority, each priority's in the order in which they came."""

    pool: int
    sequences: Ints64


class InFlightRestored(NamedTuple):
    """Sequences that hold a place in the pool's books of what is in flight, ascending, and when each came to it."""

    pool: int
    sequences: Ints64
    since_ms: Ints64


class SequenceRestored(NamedTuple):
    sequence: int
    owner: int
    pool: int
    namespace: bytes
    tokens: bytes
    length: int
    pages: Ints32
    published: int
    node: int
    workers: Ints64
    written: Ints64
    handoff: int
    sealed: int
    holds: int
    priority: int


class CountersRestored(NamedTuple):
    """What a pool has counted: tokens that prompts did not compute because part of a page was copied."""

    pool: int
    tokens_copied: int


class SequenceMarksRestored(NamedTuple):
    """What only a sequence has that was forked, truncated or given a reserve, or whose tenant was flushed."""

    sequence: int
    family: int
    shared: int
    reserved: int
    cut_floor: int
    unlisted: int
    cut_versions: Ints64
    cut_lengths: Ints64


class HandoffRestored(NamedTuple):
    handoff: int
    sequence: int
    namespace: bytes
    owner: int
    source: int
    target: int
    state: int
    version: int
    length: int
    source_pages: Ints32
    source_indexed: int
    source_node: int
    target_shared: int
    target_pages: Ints32
    target_node: int
    pulled: Ints64


class AccountRestored(NamedTuple):
    """A tenant with a quota, `own` if it was set for it by name, and the pages that it has."""

    pool: int
    tenant: bytes
    quota: int
    own: int
    pages: int


class PolicyRestored(NamedTuple):
    next_waiting: int
    next_pin: int


class ClientRestored(NamedTuple):
    client: int
    number: int
    version: int
    reply: bytes
    notices: bytes
    seen_ms: int


class EpochBegun(NamedTuple):
    """The manager came back from its journal: this life continues version `last` of epoch `before`. `slots` bounds open sequences.

    Every free page is held until the pool's workers have acknowledged this version: one of them may have been told, by the end of a log
    that was lost with its host, to write into it.
    """

    before: int
    last: int
    slots: int


class LivesRestored(NamedTuple):
    """Earlier lives, oldest first: the last version of each; and the first version of the current one."""

    begun: int
    epochs: Ints64
    lasts: Ints64


# The code is the place in this list: append only.
EVENTS: tuple[type, ...] = (
    PoolAdded,
    WorkerJoined,
    WorkerAcked,
    SequencesWritten,
    WorkerFenced,
    WorkerDead,
    SequenceOpened,
    SequencesGrown,
    GrownAgain,
    TokensAppended,
    PagesPublished,
    SequenceClosed,
    PagesEvicted,
    PagesReleased,
    IndexDropped,
    HandoffBegun,
    HandoffSealed,
    HandoffReserving,
    HandoffMoving,
    HandoffPulled,
    HandoffResident,
    HandoffAborted,
    HandoffEnded,
    ClientAnswered,
    ClientForgotten,
    StateRestored,
    PoolRestored,
    WorkerRestored,
    NodesRestored,
    LruRestored,
    SequenceRestored,
    HandoffRestored,
    ClientRestored,
    EpochBegun,
    LivesRestored,
    InFlightRestored,
    GrownFurther,
    PromptEnqueued,
    PromptsDequeued,
    PolicyRestored,
    SequencesTruncated,
    SequenceForked,
    PagesCopied,
    SequenceMarksRestored,
    PinBegun,
    PinsEnded,
    ArrivalsRestored,
    QuotaSet,
    TenantFlushed,
    AccountRestored,
    ExtrasNamed,
    CountersRestored,
)
_CODE = {cls: code for code, cls in enumerate(EVENTS, 1)}


# For each event: the types of its row on the wire ([code, *fields]), and which of the fields are arrays of what.
_DTYPES: dict[Any, np.dtype] = {Ints32: I32, Ints64: I64}
_KINDS = {cls: tuple(get_type_hints(cls, include_extras=True).values()) for cls in EVENTS}
_ROWS = {cls: [int, *(bytes if kind in _DTYPES else kind for kind in kinds)] for cls, kinds in _KINDS.items()}
_ARRAYS = {cls: [(at, _DTYPES[kind]) for at, kind in enumerate(kinds, 1) if kind in _DTYPES] for cls, kinds in _KINDS.items()}


class EventBatch(NamedTuple):
    """One version: what happened, when (the manager's clock in ms), in which life of the manager."""

    epoch: int
    version: int
    now_ms: int
    events: list[Any]


def _no_ext(code: int, data: bytes) -> object:
    raise BadMessage(f"message: expected no extension types, got type {code}")


def unpack(data: bytes | memoryview) -> Any:
    """The one msgpack value in `data`. Raises BadMessage. Allocates for what is there, not for what a length field claims."""
    try:
        if len(data) > SMALL_BYTES:
            # A walk that builds nothing: arrays in arrays, each claiming as many items as the whole message has bytes, end here.
            walker = msgpack.Unpacker(max_buffer_size=len(data))
            walker.feed(data)
            walker.skip()
        return msgpack.unpackb(data, raw=False, max_ext_len=0, ext_hook=_no_ext, strict_map_key=True)
    except BadMessage:
        raise
    except Exception as error:  # noqa: BLE001 - msgpack raises a dozen kinds; all mean the same here
        raise BadMessage(f"message: {type(error).__name__}: {error}"[:200]) from None


def _pack(event: Any) -> list[Any]:
    """The row of an event. Raises InvariantBroken unless unpacking it gives an equal event: same types, same dtypes, same values.

    So the manager may apply the event itself instead of what its bytes decode to, and still nobody reads another log than it did.
    """
    cls = type(event)
    row = [_CODE[cls], *event]
    for at, dtype in _ARRAYS[cls]:
        value = row[at]
        if type(value) is not np.ndarray or value.ndim != 1 or (value.dtype is not dtype and value.dtype != dtype):
            raise InvariantBroken(f"event {cls.__name__}: expected {dtype.name} [n] as field {at}, got {value!r}"[:200])
        row[at] = value.tobytes()
    if [*map(type, row)] != _ROWS[cls]:
        raise InvariantBroken(f"event {cls.__name__}: expected {_ROWS[cls]}, got {[*map(type, row)]}"[:300])
    return row


def same_batch(one: EventBatch, other: EventBatch) -> bool:
    """Whether they are equal to the last value and dtype."""
    return one[:3] == other[:3] and len(one.events) == len(other.events) and all(map(_same, one.events, other.events))


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    for left, right in zip(one, other, strict=True):
        if type(left) is not type(right):
            return False
        if isinstance(left, np.ndarray):
            if left.dtype != right.dtype or not np.array_equal(left, right):
                return False
        elif left != right:
            return False
    return True


def encode_batch(batch: EventBatch) -> bytes:
    return msgpack.packb([batch.epoch, batch.version, batch.now_ms, [_pack(event) for event in batch.events]], use_bin_type=True)


def decode_batch(data: bytes | memoryview) -> EventBatch:
    """The batch in `data`. Raises BadMessage for anything that is not exactly one."""
    message = unpack(data)
    if type(message) is not list or [*map(type, message)] != [int, int, int, list]:
        raise BadMessage("event batch: expected [epoch, version, now_ms, events]")
    events: list[Any] = []
    for row in message[3]:
        if type(row) is not list or not row or type(row[0]) is not int or not 1 <= row[0] <= len(EVENTS):
            raise BadMessage(f"event: expected [code, *fields] with a code in 1..{len(EVENTS)}")
        cls = EVENTS[row[0] - 1]
        if [*map(type, row)] != _ROWS[cls]:
            expected, got = ([each.__name__ for each in kinds] for kinds in (_ROWS[cls], map(type, row)))
            raise BadMessage(f"event {cls.__name__}: expected {expected}, got {got}"[:300])
        for at, dtype in _ARRAYS[cls]:
            if len(row[at]) % dtype.itemsize:
                raise BadMessage(f"event {cls.__name__}: expected bytes of {dtype.name} as field {at}, got {len(row[at])} bytes")
            row[at] = np.frombuffer(row[at], dtype)
        events.append(tuple.__new__(cls, row[1:]))
    return EventBatch(message[0], message[1], message[2], events)
