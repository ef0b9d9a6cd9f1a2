"""Prefix index of one pool: a radix tree whose edges hold runs of whole pages with their token ids.

Owns which cached page stands for which tokens. Sharing needs equality: a page is found only through the complete token ids (and the
namespace: tenant salt and extra key) of everything before and in it, compared as bytes; Python's dict compares after hashing.

Every open sequence that uses indexed pages holds one reference on each node from its last one up to the root, so references never
grow downwards. A node's pages all have the same holders, priority and waiting prompts: a match that ends inside a run splits it. Nodes
without holders stand in `order` or are spared for the `queue`: see `eviction` and `queue_hint`.

Nothing here does IO or reads a clock; "time" is the version of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from kvmanager.errors import InvariantBroken
from kvmanager.pages.accounts import Account, Accounts, tenant_of
from kvmanager.pages.eviction import PRIORITY_MIN, LinkedOrder, Ring
from kvmanager.pages.extras import Extras
from kvmanager.pages.neighbours import Neighbours
from kvmanager.pages.queue_hint import Waiters, WaitingQueue
from kvmanager.pages.remnants import Remnants

__all__ = ["TOKEN_BYTES", "Match", "Node", "PrefixIndex"]

TOKEN_BYTES = 4  # token ids are little-endian int32
ID_BYTES = 4  # and so are page ids
PAGE_ID = np.dtype("<i4")
NO_PAGES = np.zeros(0, PAGE_ID)
NO_CHILDREN: Mapping[bytes, Node] = MappingProxyType({})


class Node:
    """A run of pages. `tokens` are the token ids of exactly these pages, `ids` the page ids; children are keyed by their first page's tokens.

    Both are bytes (little-endian int32): compared, cut and joined in one go, and a fraction of the size of lists. A root has no pages;
    its `tokens` are its namespace.
    """

    __slots__ = (
        "account",
        "after",
        "before",
        "children",
        "ids",
        "last_used",
        "marks",
        "parent",
        "pins",
        "priority",
        "refs",
        "sought",
        "tokens",
        "waiters",
    )

    def __init__(
        self, parent: Node | None, tokens: bytes, ids: bytes, refs: int = 0, last_used: int = 0, priority: int = PRIORITY_MIN
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.ids = ids
        self.children: Mapping[bytes, Node] = NO_CHILDREN  # most nodes are leaves, and a dict each would be as large as all the rest
        self.refs = refs
        self.last_used = last_used
        self.priority = priority  # whoever holds it raises it
        self.before: Node | Ring | None = None  # its neighbours in the order of eviction, if it stands in it
        self.after: Node | Ring | None = None
        self.pins = 0  # pins among its holders
        self.account: Account | None = parent.account if parent is not None else None  # its tenant's, if that has a quota
        self.marks: dict[int, int] | None = None  # see remnants
        self.waiters: Waiters | None = None  # prompts in the queue that would use its pages, nearest first
        self.sought: dict[bytes, Waiters] | None = None  # those that end here, by the page that they would use next

    def adopt(self, child: Node, page_bytes: int) -> None:
        """`child` stands below this node from now on, whoever stood at its place before."""
        if self.children is NO_CHILDREN:
            self.children = {}
        self.children[child.tokens[:page_bytes]] = child  # type: ignore[index]

    def disown(self, child: Node, page_bytes: int) -> None:
        del self.children[child.tokens[:page_bytes]]  # type: ignore[attr-defined]
        if not self.children:
            self.children = NO_CHILDREN

    @property
    def count(self) -> int:
        """Pages in the run."""
        return len(self.ids) // ID_BYTES

    @property
    def pages(self) -> list[int]:
        """Page ids of the run, for those who are in no hurry."""
        return np.frombuffer(self.ids, PAGE_ID).tolist()

    def runs(self) -> list[bytes]:
        """Token ids of the pages from the root to the end of this node, a run each."""
        found, node, parent = [], self, self.parent
        while parent is not None:
            found.append(node.tokens)
            node, parent = parent, parent.parent
        found.reverse()
        return found

    def path(self) -> Iterator[Node]:
        """This node and its ancestors, deepest first, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Match:
    """What the index knows of a prompt: nodes from the root on, how many pages of the last one agree, and how many agree in all."""

    __slots__ = ("_count", "_pages", "last_pages", "nodes")

    def __init__(self, nodes: list[Node], last_pages: int, count: int) -> None:
        self.nodes = nodes
        self.last_pages = last_pages
        self._count = count
        self._pages: np.ndarray | None = None

    def page_count(self) -> int:
        return self._count

    def pages(self) -> np.ndarray:
        """Ids of the pages that agree, int32, read-only."""
        if self._pages is None:
            ids = b"".join([node.ids for node in self.nodes])  # of the last node perhaps too many
            self._pages = np.frombuffer(ids, PAGE_ID, self._count)
        return self._pages


class PrefixIndex:
    """The tree, the page -> node map, the order of eviction and the waiting prompts of one pool."""

    def __init__(self, page_size: int, num_pages: int, extras: Extras | None = None, remnants_bytes_max: int = 0) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.num_pages = num_pages
        self.roots: dict[bytes, Node] = {}
        self.node_of = np.empty(num_pages, object)  # by page, None where it is not indexed; untouched memory costs nothing
        self.pages_indexed = 0
        self.extras = extras or Extras()  # the manager's: of which pages count as users
        self.order = LinkedOrder()
        self.neighbours: Neighbours | None = None  # kept by pools that match below a page
        self.queue = WaitingQueue(self)
        self.accounts = Accounts()
        self.namespaces: dict[bytes, dict[bytes, None]] = {}  # tenant -> its namespaces in `roots`
        self.remnants = Remnants(self.page_bytes, remnants_bytes_max)

    def victims(self, acked: int, account: Account | None = None) -> Iterator[Node]:
        """Nodes, or those of one account, that may be evicted once all their children are, first to go first.

        A page is safe to reuse only if every worker has acknowledged the version in which it lost its last owner: until then a step
        in flight may read it.
        """
        yield from (self.order if account is None else account.order).victims(acked)
        yield from self.queue.victims(acked, account)

    # --- reading -------------------------------------------------------------------------------------------------------------

    def match(self, namespace: bytes, tokens: bytes, pages_max: int, trimmed: dict[Node, int] | None = None) -> Match:
        """Longest run of indexed pages equal to the start of `tokens` (little-endian int32), at most `pages_max` pages.

        trimmed: pages that a command being decided leaves of a node it evicts from.
        """
        step, at, last = self.page_bytes, 0, 0
        nodes: list[Node] = []
        node = self.roots.get(namespace)
        limit = min(pages_max * step, len(tokens) - len(tokens) % step)
        startswith = tokens.startswith
        while node is not None and at < limit and not trimmed:  # whole runs, one comparison each
            child = node.children.get(tokens[at : at + step])
            if child is None:
                break
            run = child.tokens
            end = at + len(run)
            if end > limit or not startswith(run, at):
                break
            nodes.append(child)
            node, at = child, end
        while node is not None and at < limit:
            node = node.children.get(tokens[at : at + step])
            if node is None:
                break
            count = node.count
            usable = trimmed.get(node, count) if trimmed else count
            found = min(usable, (limit - at) // step, self.equal_pages(node, tokens, at))
            if found == 0:
                break
            nodes.append(node)
            at, last = at + found * step, found
            if found < count:
                break
        return Match(nodes, last or (nodes[-1].count if nodes else 0), at // step)

    def equal_pages(self, node: Node, tokens: bytes, at: int) -> int:
        """How many leading pages of the node's run equal tokens[at:], by bytes."""
        if tokens.startswith(node.tokens, at):  # the whole run in one comparison
            return len(node.ids) // ID_BYTES
        low, high, step = 1, len(node.ids) // ID_BYTES, self.page_bytes  # the first page is equal: it was the key
        while low < high:  # most pages of a long run differ only near its end: halve
            middle = (low + high + 1) // 2
            if tokens.startswith(node.tokens[: middle * step], at):
                low = middle
            else:
                high = middle - 1
        return low

    # --- changes: called by apply only ---------------------------------------------------------------------------------------

    def enter(self, namespace: bytes) -> Node:
        """The root of a namespace, for one more sequence in it. Its `refs` count those, so that empty namespaces go away."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Node(None, namespace, b"")
            tenant = tenant_of(namespace)
            self.namespaces.setdefault(tenant, {})[namespace] = None
            root.account = self.accounts.enter(tenant)
        root.refs += 1
        return root

    def leave(self, namespace: bytes) -> None:
        """One sequence less in the namespace."""
        root = self.roots[namespace]
        root.refs -= 1
        if not root.refs and not root.children:
            self._uproot(root)

    def _uproot(self, root: Node) -> None:
        """Nobody is in the namespace any more."""
        del self.roots[root.tokens]
        tenant = tenant_of(root.tokens)
        left = self.namespaces[tenant]
        del left[root.tokens]
        if not left:
            del self.namespaces[tenant]
        if root.account is not None:
            root.account.roots -= 1
            self.accounts.settle(root.account)

    def acquire(self, namespace: bytes, pages: np.ndarray, version: int, priority: int) -> Node:
        """Enter the namespace and hold these pages, which lead in it; gives the node where they end.

        No token is compared here: that was decided, and the pages say where in the tree it ended.
        """
        root = self.enter(namespace)
        if not len(pages):
            return root
        wanted = pages.astype(PAGE_ID, copy=False).tobytes()
        end: Node | None = self.node_of[pages[-1]]
        above: list[Node] = []
        node = end.parent if end is not None else None
        while node is not None and node.parent is not None:
            above.append(node)
            node = node.parent
        found = b"".join([each.ids for each in reversed(above)])
        rest = len(wanted) - len(found)
        if end is None or node is not root or rest <= 0 or found + end.ids[:rest] != wanted:
            raise InvariantBroken(f"prefix index: expected pages {pages[:8]}... from the root of their namespace on")
        node = self.split(end, rest // ID_BYTES)
        self.hold(node, version, priority)
        return node

    def hold(self, node: Node, version: int, priority: int) -> None:
        """One more holder of this node and everything above it, which get its priority if it is higher than theirs."""
        parent = node.parent
        while parent is not None:  # the root has none, and is not held
            if node.refs == 0:
                self.withhold(node)
            node.refs += 1
            node.last_used = version
            node.priority = max(node.priority, priority)
            node, parent = parent, parent.parent

    def withhold(self, node: Node) -> None:
        """It is held or spared from now on: not in the order of eviction."""
        self.order.discard(node)
        if node.account is not None:
            node.account.order.discard(node)

    def loosen(self, node: Node) -> None:
        """Nobody holds it any more: the last in the order of eviction, unless it is spared for the queue."""
        if node.waiters is None:
            self.order.add(node)
            if node.account is not None:
                node.account.order.add(node)

    def loosen_all(self, nodes: list[Node]) -> None:
        """Nobody holds these, nor is one of them spared; first to go first."""
        self.order.extend(nodes)
        if self.accounts.of:
            for node in nodes:
                if node.account is not None:
                    node.account.order.add(node)

    def release(self, node: Node, version: int) -> None:
        """One holder less. Nodes that nobody holds any more stay cached."""
        parent = node.parent
        while parent is not None:
            self._drop(node, version)
            node, parent = parent, parent.parent

    def shorten(self, node: Node, page_count: int, version: int) -> Node:
        """A holder that ends at `node` lets go of the last `page_count` pages of its path; gives the node where it ends now."""
        while page_count >= node.count and node.parent is not None:
            page_count -= node.count
            self._drop(node, version)
            node = node.parent
        if page_count:
            upper = self.split(node, node.count - page_count)
            self._drop(node, version)  # the lower half
            node = upper
        return node

    def _drop(self, node: Node, version: int) -> None:
        node.refs -= 1
        if node.refs < 0:
            raise InvariantBroken(f"prefix index: node of page {node.pages[0]} released more often than held")
        if node.refs == 0:
            node.last_used = version
            self.loosen(node)

    def touch(self, node: Node, version: int) -> None:
        """As if held and released in this version: nobody evicts it before every worker has acknowledged that."""
        for each in node.path():
            if each.refs or each.last_used == version:
                break  # held, and so is everything above; or released just now, behind everything below
            each.last_used = version
            if each.waiters is None:
                self.order.touch(each)
                if each.account is not None:
                    each.account.order.touch(each)

    def split(self, node: Node, page_count: int) -> Node:
        """The node that ends after `page_count` pages of `node`: itself, or a new parent that takes those pages over.

        The lower half stays the same object: sequences that end there keep pointing at the right place. The caller takes hold of
        the upper half at once, or spares it, so it never has to be put into the middle of the order of eviction.
        """
        if page_count == node.count:
            return node
        parent, cut = node.parent, page_count * self.page_bytes
        if parent is None:
            raise InvariantBroken("prefix index: the root has no pages to split")
        upper = Node(parent, node.tokens[:cut], node.ids[: page_count * ID_BYTES])
        upper.refs, upper.last_used, upper.priority, upper.pins = node.refs, node.last_used, node.priority, node.pins
        self.queue.split(upper, node)
        self.remnants.split(upper, node, page_count)
        parent.adopt(upper, self.page_bytes)
        node.parent, node.tokens, node.ids = upper, node.tokens[cut:], node.ids[page_count * ID_BYTES :]
        self.adopt(upper, node)
        self.node_of[np.frombuffer(upper.ids, PAGE_ID)] = upper
        return upper

    def publish(self, node: Node, tokens: bytes, pages: np.ndarray, version: int, priority: int) -> Node:
        """Continue below `node` (held by the publisher) with pages: equal ones already indexed are taken instead of the given.

        `pages[i]` stands for tokens[i * page]. The caller has decided the same walk and lists the indexed ids. Gives the new end.
        """
        at, step, ids = 0, self.page_bytes, pages.astype(PAGE_ID, copy=False).tobytes()
        while at < len(pages):
            child = node.children.get(tokens[at * step : (at + 1) * step])
            if child is None:
                break
            count = min(self.equal_pages(child, tokens, at * step), len(pages) - at)
            child = self.split(child, count)
            if child.ids != ids[at * ID_BYTES : (at + count) * ID_BYTES]:
                raise InvariantBroken(f"prefix index: expected pages {child.pages[:8]}..., event says {pages[at : at + count][:8]}...")
            if child.refs == 0:
                self.withhold(child)
            child.refs += 1
            child.last_used = version
            child.priority = max(child.priority, priority)
            node, at = child, at + count
        if at == len(pages):
            return node
        rest_tokens, rest = tokens[at * step : len(pages) * step], ids[at * ID_BYTES :]
        alone = node.parent is not None and not node.children and node.refs == 1 and node.waiters is None
        if alone and node.priority == priority:  # only the publisher ends here: one longer run
            node.tokens += rest_tokens
            node.ids += rest
            self.node_of[pages[at:]] = node
        else:
            child = Node(node, rest_tokens, rest)
            self.adopt(node, child)
            child.refs, child.last_used, child.priority = 1, version, priority
            self.node_of[pages[at:]] = child
            self.queue.published(node, child)
            node = child
        self.pages_indexed += len(pages) - at
        self.extras.count(rest_tokens, 1)
        return node

    def adopt(self, parent: Node, child: Node) -> None:
        """`child` is new below `parent`."""
        parent.adopt(child, self.page_bytes)
        if self.neighbours is not None:
            self.neighbours.add(parent, child.tokens[: self.page_bytes])

    def adopt_all(self, parent: Node, children: list[Node]) -> None:
        """Leaves of one page each are new below `parent`."""
        if parent.children is NO_CHILDREN:
            parent.children = {}
        parent.children.update(zip([child.tokens for child in children], children, strict=True))  # type: ignore[attr-defined]
        if self.neighbours is not None:
            for child in children:
                self.neighbours.add(parent, child.tokens)

    def forget_end(self, node: Node, version: int) -> np.ndarray:
        """Forget `node` and what is above it as far as nobody holds it, waits for it or continues it; gives the pages."""
        gone: list[bytes] = []
        while node.parent is not None and not node.refs and not node.children and node.waiters is None:
            parent = node.parent
            gone.append(node.ids)
            self._cut(node, node.count, version)
            node = parent
        if gone:
            self.remnants.clear()  # they name tokens, and what is forgotten is not to be told
        pages = np.frombuffer(b"".join(gone), PAGE_ID)
        self.node_of[pages] = None
        self.pages_indexed -= len(pages)
        return pages

    def evict(self, pages: np.ndarray, version: int) -> None:
        """Forget these pages, one after the other: each is the last of a leaf that nobody holds when its turn comes."""
        nodes: list[Node | None] = self.node_of[pages].tolist()
        at, last, ids = 0, len(nodes), pages[::-1].tobytes()  # backwards: a run loses its end first
        while at < last:
            node, stop = nodes[at], at + 1
            while stop < last and nodes[stop] is node:
                stop += 1
            gone = ids[(last - stop) * ID_BYTES : (last - at) * ID_BYTES]
            if node is None or node.children or node.refs or not node.ids.endswith(gone):
                raise InvariantBroken(f"prefix index: page {pages[at]} is not the free end of the tree")
            self._cut(node, stop - at, version)
            at = stop
        self.node_of[pages] = None
        self.pages_indexed -= last

    def _cut(self, node: Node, count: int, version: int) -> None:
        """Forget the last `count` pages of a free leaf."""
        self.queue.cut(node, node.count - count)
        if node.account is not None:
            node.account.pages -= count
        self.extras.count(node.tokens[-count * self.page_bytes :], -1)
        if count < node.count:
            first = len(node.tokens) - count * self.page_bytes
            self.remnants.trimmed(node, node.count - count, node.tokens[first : first + self.page_bytes], version)
            node.ids = node.ids[: -count * ID_BYTES]
            node.tokens = node.tokens[: -count * self.page_bytes]
            return
        self.withhold(node)
        parent = node.parent
        if parent is None:
            raise InvariantBroken("prefix index: the root has no pages to forget")
        key = node.tokens[: self.page_bytes]
        self.remnants.removed(node, parent, key, version)
        parent.disown(node, self.page_bytes)
        if self.neighbours is not None:
            self.neighbours.remove(parent, key)
        if parent.parent is None and not parent.children and not parent.refs:
            self._uproot(parent)

    def nodes_of(self, tenant: bytes) -> list[Node]:
        """All nodes of a tenant, its roots first, parents before children, in an order that depends on content alone."""
        nodes = [self.roots[namespace] for namespace in sorted(self.namespaces.get(tenant, {}))]
        for node in nodes:
            nodes += [node.children[key] for key in sorted(node.children)]
        return nodes

    def forget(self, tenant: bytes) -> np.ndarray:
        """Forget what a tenant has in the index; gives those pages. Holders that go on do so without: they are given the bare root."""
        nodes = self.nodes_of(tenant)
        roots = {node.tokens: node for node in nodes if node.parent is None}
        for node in nodes[len(roots) :]:
            self.withhold(node)
            self.extras.count(node.tokens, -1)
        pages = np.frombuffer(b"".join([node.ids for node in nodes]), PAGE_ID)
        self.node_of[pages] = None
        self.pages_indexed -= len(pages)
        if self.neighbours is not None:
            self.neighbours.drop(nodes)
        for root in roots.values():
            root.children, root.sought = {}, None
        self.queue.start_over(roots)
        self.remnants.clear()  # they name tokens, and what is forgotten is not to be told
        for root in roots.values():
            if not root.refs:
                self._uproot(root)
        return pages

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """All nodes, parents first, in an order that depends on content alone: (namespace, node)."""
        for namespace in sorted(self.roots):
            stack = [self.roots[namespace]]
            while stack:
                node = stack.pop()
                if node.parent is not None:
                    yield namespace, node
                if node.children:
                    stack += _by_page(list(node.children.values()))


def _by_page(nodes: list[Node]) -> list[Node]:
    """By the first page of each, descending."""
    if len(nodes) < 2:
        return nodes
    firsts = np.frombuffer(b"".join([node.ids[:ID_BYTES] for node in nodes]), PAGE_ID)
    return [nodes[place] for place in np.argsort(-firsts).tolist()]
