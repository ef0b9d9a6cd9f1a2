"""Events: the only thing that changes state. A batch of them is one version; its bytes are what is applied and published.

Each event is a NamedTuple of fixed fields; `batch` has their codes and bytes. A new meaning gets a new event, and fields are never added
to an old one.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple, TypeAlias

import numpy as np

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
    """A worker with fresh memory. `memory` says how others reach it: opaque bytes here, a peer's business. `client` asked for it."""

    worker: int
    name: str
    pool: int
    layout: str
    memory: bytes
    lease_ms: int
    client: int


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
    """Not sealed before the sequence has `until` tokens. If `target` fails it, it may go to another pool of `group`, but not to those in
    `tried`. `cause`: "" if the sequence's owner asked for it, "drain", or the code of the aborted handoff that it follows."""

    handoff: int
    sequence: int
    target: int
    until: int
    group: str
    tried: Ints32
    cause: str


class HandoffReserved(NamedTuple):
    """The target has these pages already, and these are to be pulled into once it moves."""

    handoff: int
    shared: Ints32
    fresh: Ints32


class HandoffSealed(NamedTuple):
    handoff: int


class HandoffReserving(NamedTuple):
    handoff: int


class HandoffMoving(NamedTuple):
    """`shared` are pages that the target already has; `fresh` are to be pulled into, the first `kept` of which were reserved, behind the
    first `skipped` that were. pullers[i], a worker of the target, pulls from worker sources[i]."""

    handoff: int
    shared: Ints32
    fresh: Ints32
    kept: int
    skipped: int
    pullers: Ints64
    sources: Ints64


class HandoffFailed(NamedTuple):
    """The worker's try number `attempt`, from 0 on, ended without success, and nothing of it can land any more: it pulls again, from worker
    `source`."""

    handoff: int
    worker: int
    attempt: int
    source: int
    reason: str


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


class PoolDraining(NamedTuple):
    """Nothing new comes into the pool, and what is in it goes elsewhere; `client` asked for that, and is told when it is empty. 0: no more."""

    pool: int
    client: int


class PoolDrained(NamedTuple):
    """No sequence and no handoff holds anything in it."""

    pool: int


class HandoffStreaming(NamedTuple):
    """What was reserved may be pulled into from now on, as far as the source's workers say that it is written there. pullers[i], a worker of
    the target, pulls from worker sources[i]. A hint: whoever does not heed it pulls everything once the handoff moves."""

    handoff: int
    pullers: Ints64
    sources: Ints64


class LayersWritten(NamedTuple):
    """In a step that it is still running, the worker has written the first layers[i] layers of the first tokens[i] tokens of the sequence of
    handoffs[i]; what it acknowledged of it before is there in all layers."""

    worker: int
    handoffs: Ints64
    tokens: Ints64
    layers: Ints64


class LinkChosen(NamedTuple):
    """The worker reaches the pages of worker `peer` by this transport, and says why by this one. The newest word counts."""

    worker: int
    peer: int
    transport: str
    reason: str


class PageBytesTold(NamedTuple):
    """A page of the pool, all layers of it, takes so many bytes of a worker's memory."""

    pool: int
    page_bytes: int


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
    joined: int


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
    """What a pool has counted: tokens that prompts did not compute because part of a page was copied; pages that handoffs have moved into
    it, and those that were there already."""

    pool: int
    tokens_copied: int
    pages_moved: int
    pages_spared: int


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
    """`holds`: it has a place in the target's index and pages there. pullers, sources and failures belong together."""

    handoff: int
    sequence: int
    namespace: bytes
    owner: int
    source: int
    target: int
    state: int
    version: int
    since_ms: int
    until: int
    load: int
    group: str
    tried: Ints32
    length: int
    source_pages: Ints32
    source_indexed: int
    source_node: int
    holds: int
    target_shared: int
    target_pages: Ints32
    target_fresh: int
    target_node: int
    flushed: int
    streaming: int
    reach_tokens: int
    reach_layers: int
    pullers: Ints64
    sources: Ints64
    failures: Ints64
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
