"""Truncation: a sequence becomes its first tokens again, as after rejected drafts of speculative decoding or a turn taken back.

Pages wholly beyond the new length are let go; pages that were reserved for a known output length stay. The page in which the new end
lies is written into next, so it must be the sequence's own: if it is in the prefix index, or was shared by a fork, the sequence gets a
copy.

Slots beyond the new length will be written again with other tokens. What workers say about the old ones must then not count for the
new ones, however late it arrives: each truncation is remembered as a *cut* (version, tokens that stayed) until every worker has
acknowledged it, and what a worker says about an older version counts only up to the cuts that it had not seen.
"""

from __future__ import annotations

import numpy as np

from kvmanager.errors import InvalidValue, OutOfPages, Unknown
from kvmanager.machine import events as ev
from kvmanager.machine.draft import Cut, Draft
from kvmanager.machine.owners import note_place, note_publishable
from kvmanager.machine.state import State
from kvmanager.pages.prefix import TOKEN_BYTES
from kvmanager.pages.sequences import SLOT_MASK, Sequence
from kvmanager.tables import div_ceil

__all__ = ["CUTS_MAX", "apply_truncated", "believed", "decide_truncated", "truncate", "truncate_all"]

CUTS_MAX = 64  # of one sequence; what a worker says about versions before the oldest counts for nothing


def truncate(draft: Draft, sequence_id: int, length: int) -> None:
    """Cut one sequence in the draft. Raises Unknown, WrongState, InvalidValue, OutOfPages; the draft is as before then."""
    if not draft.alive(sequence_id):
        raise Unknown("sequence", sequence_id)
    state = draft.state
    sequence = state.sequences[sequence_id]
    draft.refuse_handed_off(sequence)
    row = state.tables.row(sequence_id)
    have = int(state.tables.lengths[row])
    if length > have:
        raise InvalidValue("step.truncate", f"at most the {have} tokens of sequence {sequence_id}", length)
    pool = state.pools[sequence.pool]
    full, part = divmod(length, pool.page_size)
    keep = div_ceil(length, pool.page_size)
    source = -1
    published = draft.published_pages(sequence)
    if max(published, sequence.shared) <= full:
        keep = max(keep, min(sequence.reserved, int(state.tables.page_counts[row])))
    elif part:  # also where all forks are gone by now: a step of theirs that is in flight may be reading the page
        wanted = draft.cut_pages.get(pool.index, 0) + 1
        if draft.pool(pool.index).can_take(wanted) < wanted:
            raise OutOfPages(pool.name, 1, 0, pool.quarantined)
        source, draft.cut_pages[pool.index] = int(state.tables.pages[row, full]), wanted
    draft.cut[sequence_id] = Cut(length, keep, source, -1)
    forgotten = len(sequence.tokens) // TOKEN_BYTES - length
    if forgotten > 0:
        draft.load_change[pool.index] = draft.load_change.get(pool.index, 0) - forgotten


def truncate_all(draft: Draft, pairs: np.ndarray) -> bool:
    """Cut all of them at once if that takes no copies and refuses nobody, as after rejected drafts. False: nothing was decided.

    pairs  int64 [n, 2]: sequence ids, each once, and new lengths
    """
    state, tables = draft.state, draft.state.tables
    if draft.closed or draft.published:
        return False
    ids, lengths = pairs[:, 0].copy(), pairs[:, 1].copy()
    if not tables.known(ids).all():
        return False
    rows = ids & SLOT_MASK
    if (lengths > tables.lengths[rows]).any():
        return False
    sizes = state.page_sizes(rows)
    full, sequences = lengths // sizes, state.sequences
    forgotten: dict[int, int] = {}
    for sequence_id, pages, length in zip(ids.tolist(), full.tolist(), lengths.tolist(), strict=True):
        sequence = sequences[sequence_id]
        if sequence.published > pages or sequence.shared > pages or sequence.reserved or sequence.handoff or sequence.holds:
            return False
        extra = len(sequence.tokens) // TOKEN_BYTES - length
        if extra > 0:
            forgotten[sequence.pool] = forgotten.get(sequence.pool, 0) + extra
    for pool, count in forgotten.items():
        draft.load_change[pool] = draft.load_change.get(pool, 0) - count
    keeps, none = -(-lengths // sizes), np.full(len(ids), -1, np.int32)
    draft.cut_all(ids, lengths, keeps)
    draft.events.append(ev.SequencesTruncated(ids, lengths, keeps, none, none))
    return True


def decide_truncated(draft: Draft) -> None:
    """Log all cuts of the step as one event, and before it the evictions for their fresh pages."""
    cuts = draft.cut
    if not cuts:
        return
    for index, wanted in draft.cut_pages.items():
        taken = iter(draft.pool(index).take(wanted, None).tolist())
        for sequence_id, cut in cuts.items():
            if cut.source >= 0 and draft.state.sequences[sequence_id].pool == index:
                cuts[sequence_id] = cut._replace(target=next(taken))
                draft.copy(index, cut.source, cuts[sequence_id].target, cut.length % draft.state.pools[index].page_size)
    lengths, keeps, sources, targets = (np.array(column, np.int64) for column in zip(*cuts.values(), strict=True))
    ids = np.fromiter(cuts, np.int64, len(cuts))
    draft.events.append(ev.SequencesTruncated(ids, lengths, keeps, sources.astype(np.int32), targets.astype(np.int32)))


def apply_truncated(state: State, event: ev.SequencesTruncated) -> None:
    tables = state.tables
    rows = tables.rows(event.ids)
    acked = [state.acked(pool.index) for pool in state.pools]
    full_pages = event.lengths // state.page_sizes(rows)
    starts = np.where(event.targets >= 0, full_pages, event.page_counts)  # the first page that it owns no more
    columns = (event.ids, rows, event.lengths, full_pages, starts, tables.page_counts[rows], event.targets)
    for sequence_id, row, length, full, start, had, target in zip(*(column.tolist() for column in columns), strict=True):
        sequence = state.sequences[sequence_id]
        pool = state.pools[sequence.pool]
        if start < had:
            gone = tables.pages[row, start:had]
            indexed = max(sequence.published - start, 0)
            pool.unshare(gone[:indexed])  # those without an owner are cached now
            if target >= 0:
                pool.take([target], sequence.node.account)
            pool.put_in_quarantine(state.version, pool.unshare(gone[indexed:]), sequence.node.account)
        if full < sequence.published:
            sequence.node = pool.prefix.shorten(sequence.node, sequence.published - full, state.version)
            sequence.published = full
        sequence.shared = min(sequence.shared, full)
        extra = len(sequence.tokens) // TOKEN_BYTES - length
        if extra > 0:
            state.extras.count(sequence.tokens[length * TOKEN_BYTES :], -1)
            del sequence.tokens[length * TOKEN_BYTES :]
            pool.load -= extra
        _remember(state, sequence, full * pool.page_size if target >= 0 else length, acked[sequence.pool])
        if sequence_id in pool.publishable:
            note_publishable(state, sequence)
        if extra > 0 or sequence.published == full:
            note_place(state, sequence)
    tables.truncate(event.ids, event.lengths, event.page_counts, event.targets)


def _remember(state: State, sequence: Sequence, stayed: int, acked: int) -> None:
    """Tokens [0, stayed) are as they were; all others are to be written again before they count."""
    for worker, tokens in sequence.written.items():
        if tokens > stayed:
            sequence.written[worker] = stayed
    cuts = sequence.cuts
    while cuts and (cuts[0][0] <= acked or len(cuts) >= CUTS_MAX):
        sequence.cut_floor = cuts.pop(0)[0]
    while cuts and cuts[-1][1] >= stayed:
        cuts.pop()  # whoever has not seen that one has not seen this one either
    cuts.append((state.version, stayed))


def believed(sequence: Sequence, tokens: int, as_of: int) -> int:
    """How many of `tokens` count that a worker calls written, on tables of version `as_of`."""
    if as_of < sequence.cut_floor:
        return 0
    for version, stayed in reversed(sequence.cuts):
        if version <= as_of:
            break
        tokens = min(tokens, stayed)
    return tokens
