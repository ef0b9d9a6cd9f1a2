"""The scheduler's waiting queue as a hint: cached pages that waiting prompts would use are spared while anything else can go.

A hint, never a promise: when only spared pages are left, they are evicted, those of the prompt farthest back in the queue first.

A waiting prompt stands at the node where its cached pages end (`Waiting.node`), and is listed by every node above that it would use
(`Node.waiters`, the nearest in the queue first). Nodes are split where a waiting prompt ends or turns off, so a node's pages are all wanted
by the same prompts. What it would use next it seeks there: `Node.sought` lists prompts by the token ids of their next page. So a page that
is published later finds, with one look into a dict, the prompts that have been waiting for it; and one that is evicted sends its
prompts back to the node above. Enqueueing costs one match, whatever else there is.

Spared pages have no list of their own: those for which a prompt is the first in the queue are a stretch of its path, leaf first.

Here are the books of one pool. Called by apply only, except `victims`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from kvmanager.errors import InvariantBroken

if TYPE_CHECKING:
    from kvmanager.pages.accounts import Account
    from kvmanager.pages.prefix import Node, PrefixIndex

__all__ = ["Prompt", "Waiters", "Waiting", "WaitingQueue"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt in the scheduler's queue, as it was given once: `tokens` are all of its token ids, `pools` those that may compute it."""

    waiting_id: int
    client: int
    namespace: bytes
    tokens: bytes
    pools: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Waiting:
    """A prompt that waits, in one pool. `tokens` are its whole pages (little-endian int32), of which `at` bytes are cached up to `node`."""

    waiting_id: int
    namespace: bytes
    tokens: bytes
    node: Node
    at: int = 0


Waiters: TypeAlias = OrderedDict[int, Waiting]


class WaitingQueue:
    """The waiting prompts of one pool, nearest first."""

    __slots__ = ("entries", "prefix")

    def __init__(self, prefix: PrefixIndex) -> None:
        self.prefix = prefix
        self.entries: Waiters = OrderedDict()

    def victims(self, acked: int, account: Account | None = None) -> Iterator[Node]:
        """Spared nodes, or those of one account, that nobody holds and whose last use every worker has acknowledged, first to go first."""
        for waiting in reversed(self.entries.values()):
            node = waiting.node
            if account is not None and node.account is not account:
                continue
            while node.waiters is not None and not node.refs and next(iter(node.waiters)) == waiting.waiting_id:
                if node.last_used > acked:
                    break  # and what is above was used no earlier
                yield node
                node = node.parent or node

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def enqueue(self, waiting_id: int, namespace: bytes, tokens: bytes, front: bool) -> None:
        """A prompt begins to wait, behind all others or before them."""
        waiting = Waiting(waiting_id, namespace, tokens, self.prefix.enter(namespace))
        self.entries[waiting_id] = waiting
        if front:
            self.entries.move_to_end(waiting_id, last=False)
        self._advance(waiting, front)

    def dequeue(self, waiting_id: int, version: int) -> None:
        """It waits no longer. That counts as a use of the pages that were spared for it."""
        waiting = self.entries.pop(waiting_id)
        self._stop_seeking(waiting)
        for node in waiting.node.path():
            waiters = node.waiters or OrderedDict()
            if waiters.pop(waiting_id, None) is None:
                raise InvariantBroken(f"waiting prompt {waiting_id}: not listed by the node of page {node.pages[0]} on its path")
            node.last_used = version
            if not waiters:
                node.waiters = None
                if not node.refs:
                    self.prefix.loosen(node)
        self.prefix.leave(waiting.namespace)

    def published(self, node: Node, child: Node) -> None:
        """`child` is new below `node`: whoever sought it may use it from now on."""
        if node.sought is None:
            return
        group = node.sought.pop(child.tokens[: self.prefix.page_bytes], None)
        if not node.sought:
            node.sought = None
        for waiting in group.values() if group is not None else ():
            self._advance(waiting, False)  # the group comes in the order of the queue

    def cut(self, node: Node, pages_left: int) -> None:
        """The last pages of a leaf are about to be evicted, or all of it: the prompts that would have used them seek them again."""
        waiters = node.waiters
        if waiters is None:
            return  # nobody can be seeking anything below it either
        left = pages_left * self.prefix.page_bytes
        lost = len(node.tokens) - left
        key = node.tokens[left : left + self.prefix.page_bytes]
        for waiting in waiters.values():  # all of them end here: it is a leaf
            waiting.at -= lost
        if pages_left:
            node.sought = {key: OrderedDict(waiters)}
            return
        parent = node.parent
        if parent is None:
            raise InvariantBroken("waiting prompts: a root is listed as one of their pages")
        for waiting in waiters.values():
            waiting.node = parent
        node.waiters = node.sought = None
        if parent.sought is None:
            parent.sought = {}
        parent.sought[key] = waiters

    def split(self, upper: Node, lower: Node) -> None:
        """`upper` took over the first pages of `lower`."""
        if lower.waiters is not None:
            upper.waiters = OrderedDict(lower.waiters)

    def start_over(self, roots: dict[bytes, Node]) -> None:
        """The index has nothing any more below these roots: who waits there waits for everything."""
        for waiting in self.entries.values():
            if waiting.namespace in roots:
                waiting.node, waiting.at = roots[waiting.namespace], 0
                self._seek(waiting, False)

    def _advance(self, waiting: Waiting, front: bool) -> None:
        """Follow the prompt's pages down the tree as far as they are cached."""
        prefix, tokens, step = self.prefix, waiting.tokens, self.prefix.page_bytes
        while waiting.at < len(tokens):
            child = waiting.node.children.get(tokens[waiting.at : waiting.at + step])
            if child is None:
                break
            count = min(prefix.equal_pages(child, tokens, waiting.at), (len(tokens) - waiting.at) // step)
            child = prefix.split(child, count)
            if child.waiters is None:
                prefix.withhold(child)
                child.waiters = OrderedDict()
            child.waiters[waiting.waiting_id] = waiting
            if front:
                child.waiters.move_to_end(waiting.waiting_id, last=False)
            waiting.node, waiting.at = child, waiting.at + count * step
        self._seek(waiting, front)

    def _seek(self, waiting: Waiting, front: bool) -> None:
        if waiting.at < len(waiting.tokens):
            if waiting.node.sought is None:
                waiting.node.sought = {}
            key = waiting.tokens[waiting.at : waiting.at + self.prefix.page_bytes]
            group = waiting.node.sought.setdefault(key, OrderedDict())
            group[waiting.waiting_id] = waiting
            if front:
                group.move_to_end(waiting.waiting_id, last=False)

    def _stop_seeking(self, waiting: Waiting) -> None:
        if waiting.at < len(waiting.tokens):
            sought = waiting.node.sought or {}
            key = waiting.tokens[waiting.at : waiting.at + self.prefix.page_bytes]
            group = sought.get(key) or OrderedDict()
            if group.pop(waiting.waiting_id, None) is None:
                raise InvariantBroken(f"waiting prompt {waiting.waiting_id}: not listed where its cached pages end")
            if not group:
                del sought[key]
                if not sought:
                    waiting.node.sought = None
