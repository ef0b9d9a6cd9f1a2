"""Draft: what a command being decided has already spoken for, laid over a state that stays as it is.

`decide` must not write, and yet the tenth item of a step has to see what the first nine took. A draft keeps that difference: pages
popped and pushed, nodes trimmed or pinned, acknowledgements that just came in. It is thrown away with the command.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kvmanager.errors import KVError, OutOfPages, OverQuota, WrongState
from kvmanager.machine import events as ev
from kvmanager.machine.state import NEVER, State, tenant_of
from kvmanager.pages.accounts import Account
from kvmanager.pages.extras import ExtrasDraft
from kvmanager.pages.pool import PageStack, Pool
from kvmanager.pages.prefix import ID_BYTES, NO_PAGES, PAGE_ID, TOKEN_BYTES, Match, Node
from kvmanager.pages.sequences import Sequence

__all__ = ["Cut", "Draft", "PagesDraft", "PinsDraft", "PoolDraft", "StackDraft"]


class StackDraft:
    """A stack as it will be: pops come from what was pushed here first, then from the base, which stays untouched."""

    def __init__(self, base: list[int]) -> None:
        self.base = base
        self.left = len(base)
        self.pushed: list[int] = []

    def __len__(self) -> int:
        return self.left + len(self.pushed)

    def push(self, values: list[int]) -> None:
        self.pushed.extend(values)

    def pop(self, count: int) -> list[int]:
        """`count` values, the top first. The caller has checked that there are so many."""
        from_pushed = min(count, len(self.pushed))
        taken = self.pushed[len(self.pushed) - from_pushed :][::-1]
        del self.pushed[len(self.pushed) - from_pushed :]
        rest = count - from_pushed
        taken += self.base[self.left - rest : self.left][::-1]
        self.left -= rest
        return taken


class PagesDraft:
    """The same for a stack of free pages, which go by the hundred."""

    def __init__(self, base: PageStack) -> None:
        self.base = base
        self.left = len(base)
        self.pushed = NO_PAGES

    def __len__(self) -> int:
        return self.left + len(self.pushed)

    def push(self, pages: np.ndarray) -> None:
        self.pushed = np.concatenate([self.pushed, pages]) if len(self.pushed) else pages

    def pop(self, count: int) -> np.ndarray:
        """`count` pages, int32, the top first. The caller has checked that there are so many."""
        from_pushed = min(count, len(self.pushed))
        rest = count - from_pushed
        self.left -= rest
        below = self.base.look(rest, self.left + rest)
        if not from_pushed:
            return below.copy()  # the stack is written when the event is applied
        keep = len(self.pushed) - from_pushed
        taken, self.pushed = self.pushed[keep:][::-1], self.pushed[:keep]
        return np.concatenate([taken, below]) if rest else taken


class Candidates:
    """Nodes that may be evicted, in order: those looked at already, of which something may be left, and those that follow."""

    __slots__ = ("ahead", "further")

    def __init__(self, further: Iterator[Node]) -> None:
        self.ahead: deque[Node] = deque()
        self.further = further


class PoolDraft:
    """Pages of one pool under a command: the free stack, and which cached pages give way."""

    def __init__(self, draft: Draft, pool: Pool) -> None:
        self.pool = pool
        self.events = draft.events
        self._draft = draft
        self.free = PagesDraft(pool.free)
        self.trimmed: dict[Node, int] = {}  # pages that remain of a node
        self._pinned: dict[Node, int] = {}  # leading pages of a node that this command matched: not to be evicted by it
        self._kept: list[tuple[list[Node], int]] = []  # the same, not yet written in there: mostly nobody asks
        self.evictable = pool.cached  # an upper bound that makes hopeless searches cheap
        self.candidates: dict[Account | None, Candidates] = {}  # among all that is cached (None), and among a tenant's own
        self.charged: dict[Account, int] = {}  # pages that a tenant with a quota gets
        self.newcomers: dict[bytes, Account] = {}

    @cached_property
    def acked(self) -> int:
        """What was last used up to this version may be evicted. Most commands never ask."""
        # Until every worker has acknowledged this life, one may be touching what a lost end of the log gave it: nothing is evicted.
        acked = self._draft.reusable(self.pool.index)
        return acked if acked >= self._draft.state.begun else -1

    def match(self, namespace: bytes, tokens: bytes, pages_max: int) -> Match:
        return self.pool.prefix.match(namespace, tokens, pages_max, self.trimmed)

    @property
    def pinned(self) -> dict[Node, int]:
        for nodes, last_pages in self._kept:
            for node in nodes:
                pages = node.count if node is not nodes[-1] else last_pages
                self._pinned[node] = max(self._pinned.get(node, 0), pages)
        self._kept.clear()
        return self._pinned

    def keep(self, nodes: list[Node], last_pages: int) -> None:
        """Evict nothing of these nodes, of the last one so many pages, for the rest of the command."""
        self._kept.append((nodes, last_pages))

    def pin(self, nodes: list[Node], last_pages: int) -> list[tuple[Node, int]]:
        """As `keep`, until `unpin` is given what this gives: what was kept of them before."""
        pinned = self.pinned
        before = [(node, pinned.get(node, 0)) for node in nodes]
        self.keep(nodes, last_pages)
        return before

    def unpin(self, before: list[tuple[Node, int]]) -> None:
        """Take back a `pin`; the last one first."""
        pinned = self.pinned
        pinned.update(before)

    def account(self, namespace: bytes) -> Account | None:
        """The account of a namespace's tenant, None if it has no quota."""
        accounts = self.pool.prefix.accounts
        if not accounts.of and accounts.everybody < 0:
            return None
        tenant = tenant_of(namespace)
        found = self.newcomers.get(tenant) or accounts.find(tenant)
        if found is not None and tenant not in accounts.of:
            self.newcomers[tenant] = found
        return found

    def _victims(self, account: Account | None = None) -> Iterator[tuple[Node, int]]:
        """(node, pages that may go), first to go first, leaves before their parents; of a tenant alone, if one is named.

        Each node is looked up once for a whole command.
        """
        among = self.candidates.get(account)
        if among is None:
            among = self.candidates[account] = Candidates(self.pool.prefix.victims(self.acked, account))
        pinned = self.pinned
        while among.ahead and self.trimmed.get(among.ahead[0], 1) == 0:
            among.ahead.popleft()
        for node in among.ahead:
            loose = self.trimmed.get(node, node.count) - pinned.get(node, 0)
            if loose > 0:
                yield node, loose
        for node in among.further:
            among.ahead.append(node)
            loose = self.trimmed.get(node, node.count) - pinned.get(node, 0)
            if loose > 0:
                yield node, loose

    def quota_left(self, count: int, account: Account) -> int:
        """How many of `count` pages a tenant may have yet, giving up its own cached ones if need be."""
        left = account.quota - account.pages - self.charged.get(account, 0)
        if left < count:
            for _, loose in self._victims(account):
                left += loose
                if left >= count:
                    return count
        return max(min(left, count), 0)

    def over_quota(self, count: int, account: Account) -> OverQuota:
        """Why a tenant cannot have `count` pages."""
        kept = account.pages + self.charged.get(account, 0) - sum(loose for _, loose in self._victims(account))
        return OverQuota(self.pool.name, account.tenant, kept + count, account.quota)

    def refusal(self, count: int, account: Account | None) -> KVError:
        """Why `can_take` gave less."""
        if account is not None and self.quota_left(count, account) < count:
            return self.over_quota(count, account)
        return OutOfPages(self.pool.name, count, self.can_take(count, None), self.pool.quarantined)

    def make_room(self, count: int, account: Account) -> None:
        """Charge a tenant with `count` pages that it takes, and evict its own cached ones as far as its quota asks for it."""
        if not count:
            return  # it may be over its quota, by one that was set lower
        over = account.pages + self.charged.get(account, 0) + count - account.quota
        if over > 0:
            self._evict(over, account)
        self.charged[account] = self.charged.get(account, 0) + count

    def can_take(self, count: int, account: Account | None = None) -> int:
        """How many of `count` pages a tenant could have now, by evicting if need be. No account: it has no quota, or that was seen to."""
        if account is not None:
            count = self.quota_left(count, account)
        have = len(self.free)
        if have >= count:
            return count
        if self.evictable > 0:
            for _, loose in self._victims():
                have += loose
                if have >= count:
                    return count
        return have

    def take(self, count: int, account: Account | None = None) -> np.ndarray:
        """`count` pages, int32, after `can_take` said so; logs what has to be evicted for them."""
        if account is not None:
            self.make_room(count, account)
        if count > len(self.free):
            self._evict(count - len(self.free), None)
        return self.free.pop(count)

    def _evict(self, short: int, account: Account | None) -> None:
        """So many pages more are free, of what a tenant has cached or of what anybody has."""
        evicted: list[bytes] = []
        for node, loose in self._victims(account):
            gone, left = min(short, loose), self.trimmed.get(node, node.count)
            ids = node.ids[(left - gone) * ID_BYTES : left * ID_BYTES]
            evicted.append(ids if gone == 1 else np.frombuffer(ids, PAGE_ID)[::-1].tobytes())  # the run's end first
            self.trimmed[node] = left - gone
            if node.account is not None:
                self.charged[node.account] = self.charged.get(node.account, 0) - gone
            short -= gone
            if not short:
                break
        pages = np.frombuffer(b"".join(evicted), PAGE_ID)
        self.evictable -= len(pages)
        self.free.push(pages)
        self.events.append(ev.PagesEvicted(self.pool.index, pages))


class Cut(NamedTuple):
    """A truncation: tokens and leading pages that stay, and the copy of the last page, or -1 and -1."""

    length: int
    page_count: int
    source: int
    target: int


@dataclass(slots=True)
class PinsDraft:
    """Pins that a command ends and begins, and the distinct pages that makes."""

    ended: dict[int, None] = field(default_factory=dict)
    begun: int = 0
    less: dict[Node, int] = field(default_factory=dict)  # pins that a node loses
    fresh: dict[Node, int] = field(default_factory=dict)  # leading pages of a node that get a pin
    change: dict[tuple[int, bytes], int] = field(default_factory=dict)  # (pool, tenant) -> pinned pages


class Draft:
    """The difference between the state and what it will be once the events decided so far are applied."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.version = state.version + 1
        self.events: list[Any] = []
        self.acks: dict[int, int] = {}  # worker -> version
        self.dead: dict[int, None] = {}
        self.fenced: dict[int, None] = {}
        self.forgotten: dict[int, None] = {}  # clients
        self.written: dict[int, dict[int, int]] = {}  # sequence -> worker -> tokens
        self.appended: dict[int, int] = {}  # sequence -> token ids that become known
        self.opened = 0
        self.flying: dict[Any, tuple[int, bytes]] = {}  # place of a page in the index -> the sequence opened to compute it, its prompt
        self.examined: list[Any] = []  # for each open that was tried: the placement.Look that was chosen, or would have been, or None
        self.load_change: dict[int, int] = {}  # pool -> tokens
        self.closed: dict[int, None] = {}
        self.closed_last: list[int] = []  # sequences whose end comes last in the batch
        self.grown: dict[int, None] = {}
        self.aborted: dict[int, None] = {}
        self.begun: dict[int, ev.HandoffBegun] = {}  # sequence -> its handoff
        self.reserved: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # handoff begun -> pages of its target: there before, taken for it
        self.redirected: dict[int, str] = {}  # aborted handoff that is to begin anew elsewhere -> code of the abort
        self.draining: dict[int, bool] = {}  # pool -> whether it is, if this command says so
        self.incoming: dict[int, int] = {}  # pool -> tokens that begin to move to it
        self.dequeued: dict[int, None] = {}
        self.enqueued = 0
        self.waiting_change = 0  # tokens of waiting prompts
        self._cut: dict[int, Cut] = {}  # sequences that are truncated
        self._cuts: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # the same in columns, if all were cut at once: see cut_all
        self.cut_pages: dict[int, int] = {}  # pool -> pages that they need for copies
        self.published: dict[int, int] = {}  # sequence -> pages in the index
        self.copies: dict[int, dict[int, tuple[int, int]]] = {}  # pool -> target page -> (source page, tokens)
        self._pools: dict[int, PoolDraft] = {}

    # What most commands never ask for is made for those that do.

    @cached_property
    def slots(self) -> StackDraft:
        return StackDraft(self.state.free_slots)

    @cached_property
    def extras(self) -> ExtrasDraft:
        return ExtrasDraft(self.state.extras, self.state.config.extras_max)

    @cached_property
    def pins(self) -> PinsDraft:
        return PinsDraft()

    def name_extras(self, tokens: np.ndarray) -> None:
        """Extra keys that a prompt to be taken is the first to use are named before it."""
        named = self.extras.to_name(tokens)
        if named is not None:
            self.events.append(ev.ExtrasNamed(*named))

    def pool(self, index: int) -> PoolDraft:
        found = self._pools.get(index)
        if found is None:
            found = self._pools[index] = PoolDraft(self, self.state.pools[index])
        return found

    def acked(self, pool: int) -> int:
        """As State.acked, with what this command brings."""
        workers = self.state.workers
        return min(
            (max(workers[each].acked, self.acks.get(each, 0)) for each in self.state.pool_workers[pool] if each not in self.dead),
            default=NEVER,
        )

    def reusable(self, pool: int) -> int:
        """As State.reusable, with what this command brings."""
        acked, begun = self.acked(pool), self.state.begun
        for each in self.state.unsettled:
            if self.acks.get(each, 0) < begun and each not in self.dead:
                return min(acked, begun - 1)
        return acked

    def live_workers(self, pool: int) -> list[int]:
        return [each for each in self.state.live_workers(pool) if each not in self.dead and each not in self.fenced]

    def written_tokens(self, sequence: Sequence) -> int:
        """As State.written, with what this command brings."""
        news = self.written.get(sequence.sequence_id)
        if news is None:
            return self.state.written(sequence)
        return min(
            (max(sequence.written.get(each, 0), news.get(each, 0)) for each in self.live_workers(sequence.pool)),
            default=0,
        )

    def alive(self, sequence_id: int) -> bool:
        return sequence_id in self.state.sequences and sequence_id not in self.closed

    def length(self, sequence_id: int) -> int:
        """Tokens of a sequence after this step's truncation, before its growth."""
        cut = self.cut.get(sequence_id)
        return cut.length if cut is not None else self.state.tables.length(sequence_id)

    def cut_all(self, ids: np.ndarray, lengths: np.ndarray, page_counts: np.ndarray) -> None:
        """All of this step's truncations, without copies, in columns (int64 [n])."""
        self._cuts = ids, lengths, page_counts

    @property
    def cut(self) -> dict[int, Cut]:
        """This step's truncations, by sequence."""
        if self._cuts is not None and not self._cut:
            columns = [column.tolist() for column in self._cuts]
            self._cut.update((each, Cut(length, pages, -1, -1)) for each, length, pages in zip(*columns, strict=True))
        return self._cut

    def has_cuts(self) -> bool:
        return self._cuts is not None or bool(self._cut)

    def lay_cuts_over(self, sequence_ids: np.ndarray, lengths: np.ndarray, page_counts: np.ndarray) -> None:
        """Write what this step's truncations leave over what the tables say of these sequences."""
        if self._cuts is None:
            cuts = self._cut.values()
            columns = (self._cut, (cut.length for cut in cuts), (cut.page_count for cut in cuts))
            ids, left, kept = (np.fromiter(column, np.int64, len(cuts)) for column in columns)
        else:
            ids, left, kept = self._cuts
        order = np.argsort(ids)
        places = order[np.minimum(ids.searchsorted(sequence_ids, sorter=order), len(ids) - 1)]
        hit = ids[places] == sequence_ids
        lengths[hit], page_counts[hit] = left[places[hit]], kept[places[hit]]

    def known(self, sequence: Sequence) -> int:
        """Leading tokens whose ids are known."""
        known = len(sequence.tokens) // TOKEN_BYTES
        cut = self.cut.get(sequence.sequence_id)
        return (min(known, cut.length) if cut is not None else known) + self.appended.get(sequence.sequence_id, 0)

    def published_pages(self, sequence: Sequence) -> int:
        return self.published.get(sequence.sequence_id, sequence.published)

    def copy(self, pool: int, source: int, target: int, tokens: int) -> None:
        """The workers are to copy the first slots of a page before they write anything of this step."""
        copies = self.copies.setdefault(pool, {})
        copies[target] = copies[source][0] if source in copies else source, tokens

    def active_handoff(self, sequence: Sequence) -> int:
        """The handoff that the sequence is in, 0 if none."""
        begun = self.begun.get(sequence.sequence_id)
        if begun is not None:
            return 0 if begun.handoff in self.aborted else begun.handoff
        return sequence.handoff if sequence.handoff not in self.aborted else 0

    def refuse_handed_off(self, sequence: Sequence) -> None:
        """Raises WrongState if a handoff reads the sequence's pages, or will: its table has to stay as it is."""
        active = self.active_handoff(sequence)
        if active or sequence.holds:
            got = f"handoff {active}" if active else "an aborted handoff that may still read them"
            raise WrongState("sequence", sequence.sequence_id, "pages that no handoff holds", got)
