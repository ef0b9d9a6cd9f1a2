"""Prefix index of one pool: a radix tree whose edges hold runs of whole pages with their token ids.

Owns which cached page stands for which tokens. Sharing needs equality: a page is found only through the complete token ids (and the
namespace: tenant salt and extra key) of everything before and in it, compared as bytes; Python's dict compares after hashing.

Every open sequence that uses indexed pages holds one reference on each node from its last one up to the root, so references never
grow downwards. A node's pages all have the same holders: a match that ends inside a run splits it. Nodes without holders wait in
`lru`, oldest first; because `release` lets go of children before parents, the oldest is always a leaf.

Nothing here does IO or reads a clock; "time" is the version of the step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from kvmanager.errors import InvariantBroken

__all__ = ["TOKEN_BYTES", "Match", "Node", "PrefixIndex"]

TOKEN_BYTES = 4  # token ids are little-endian int32


class Node:
    """A run of pages. `tokens` are the ids of exactly these pages; children are keyed by the ids of their first page."""

    __slots__ = ("children", "last_used", "pages", "parent", "refs", "tokens")

    def __init__(self, parent: Node | None, tokens: bytes, pages: list[int]) -> None:
        self.parent = parent
        self.tokens = tokens
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.refs = 0
        self.last_used = 0

    def path(self) -> Iterator[Node]:
        """This node and its ancestors, deepest first, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Match:
    """What the index knows of a prompt: nodes from the root on, and how many pages of the last one agree."""

    __slots__ = ("last_pages", "nodes")

    def __init__(self, nodes: list[Node], last_pages: int) -> None:
        self.nodes = nodes
        self.last_pages = last_pages

    def page_count(self) -> int:
        return sum(len(node.pages) for node in self.nodes[:-1]) + (self.last_pages if self.nodes else 0)

    def pages(self) -> list[int]:
        found: list[int] = []
        for node in self.nodes[:-1]:
            found += node.pages
        if self.nodes:
            found += self.nodes[-1].pages[: self.last_pages]
        return found


class PrefixIndex:
    """The tree, the page -> node map and the least-recently-used order of one pool."""

    def __init__(self, page_size: int) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.roots: dict[bytes, Node] = {}
        self.node_of: dict[int, Node] = {}
        self.lru: OrderedDict[Node, None] = OrderedDict()

    # --- reading -------------------------------------------------------------------------------------------------------------

    def match(self, namespace: bytes, tokens: bytes, pages_max: int, trimmed: dict[Node, int] | None = None) -> Match:
        """Longest run of indexed pages equal to the start of `tokens` (little-endian int32), at most `pages_max` pages.

        trimmed: pages that a command being decided leaves of a node it evicts from.
        """
        step, at, nodes, last = self.page_bytes, 0, [], 0
        node = self.roots.get(namespace)
        limit = min(pages_max * step, len(tokens) - len(tokens) % step)
        while node is not None and at < limit:
            node = node.children.get(tokens[at : at + step])
            if node is None:
                break
            usable = len(node.pages) if trimmed is None else trimmed.get(node, len(node.pages))
            last = min(usable, (limit - at) // step, self.equal_pages(node, tokens, at))
            if last == 0:
                break
            nodes.append(node)
            at += last * step
            if last < len(node.pages):
                break
        return Match(nodes, last if nodes and last else (len(nodes[-1].pages) if nodes else 0))

    def equal_pages(self, node: Node, tokens: bytes, at: int) -> int:
        """How many leading pages of the node's run equal tokens[at:], by bytes."""
        if tokens.startswith(node.tokens, at):  # the whole run in one comparison
            return len(node.pages)
        low, high, step = 1, len(node.pages), self.page_bytes  # the first page is equal: it was the key
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
            root = self.roots[namespace] = Node(None, b"", [])
        root.refs += 1
        return root

    def leave(self, namespace: bytes) -> None:
        """One sequence less in the namespace."""
        root = self.roots[namespace]
        root.refs -= 1
        if not root.refs and not root.children:
            del self.roots[namespace]

    def acquire(self, namespace: bytes, tokens: bytes, page_count: int, version: int) -> tuple[Node, list[int]]:
        """Enter the namespace and hold the first `page_count` pages of `tokens`; gives the node where they end, and the pages."""
        root = self.enter(namespace)
        found = self.match(namespace, tokens, page_count)
        pages = found.pages()
        if len(pages) != page_count:
            raise InvariantBroken(f"prefix index: expected {page_count} pages, found {len(pages)}")
        if not found.nodes:
            return root, pages
        node = self._split(found.nodes[-1], found.last_pages)
        self.hold(node, version)
        return node, pages

    def hold(self, node: Node, version: int) -> None:
        """One more holder of this node and everything above it."""
        for each in node.path():
            if each.refs == 0:
                self.lru.pop(each, None)
            each.refs += 1
            each.last_used = version

    def release(self, node: Node, version: int) -> list[int]:
        """One holder less; gives the pages that nobody holds any more. They stay cached, newest at the end of `lru`."""
        loose: list[int] = []
        for each in node.path():
            each.refs -= 1
            if each.refs < 0:
                raise InvariantBroken(f"prefix index: node of page {each.pages[0]} released more often than held")
            if each.refs == 0:
                each.last_used = version
                self.lru[each] = None
                loose += each.pages
        return loose

    def _split(self, node: Node, page_count: int) -> Node:
        """The node that ends after `page_count` pages of `node`: itself, or a new parent that takes those pages over.

        The lower half stays the same object: sequences that end there keep pointing at the right place. The caller takes hold of
        the upper half at once, so it never has to be put into the middle of `lru`.
        """
        if page_count == len(node.pages):
            return node
        parent, cut = node.parent, page_count * self.page_bytes
        if parent is None:
            raise InvariantBroken("prefix index: the root has no pages to split")
        upper = Node(parent, node.tokens[:cut], node.pages[:page_count])
        upper.refs, upper.last_used = node.refs, node.last_used
        parent.children[node.tokens[: self.page_bytes]] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], node.pages[page_count:]
        upper.children[node.tokens[: self.page_bytes]] = node
        for page in upper.pages:
            self.node_of[page] = upper
        return upper

    def publish(self, node: Node, tokens: bytes, pages: list[int], version: int) -> Node:
        """Continue below `node` (held by the publisher) with pages: equal ones already indexed are taken instead of the given.

        `pages[i]` stands for tokens[i * page]. The caller has decided the same walk and lists the indexed ids. Gives the new end.
        """
        at, step = 0, self.page_bytes
        while at < len(pages):
            child = node.children.get(tokens[at * step : (at + 1) * step])
            if child is None:
                break
            count = min(self.equal_pages(child, tokens, at * step), len(pages) - at)
            child = self._split(child, count)
            if child.pages != pages[at : at + count]:
                raise InvariantBroken(f"prefix index: expected pages {child.pages[:8]}..., event says {pages[at : at + count][:8]}...")
            if child.refs == 0:
                self.lru.pop(child, None)
            child.refs += 1
            child.last_used = version
            node, at = child, at + count
        if at == len(pages):
            return node
        rest_tokens, rest = tokens[at * step : len(pages) * step], pages[at:]
        if node.parent is not None and not node.children and node.refs == 1:  # only the publisher ends here: one longer run
            node.tokens += rest_tokens
            node.pages = node.pages + rest
        else:
            node.children[rest_tokens[:step]] = child = Node(node, rest_tokens, rest)
            child.refs, child.last_used = 1, version
            node = child
        for page in rest:
            self.node_of[page] = node
        return node

    def evict(self, page: int) -> None:
        """Forget one page: the last of a leaf that nobody holds."""
        node = self.node_of.pop(page, None)
        if node is None or node.children or node.refs or node.pages[-1] != page:
            raise InvariantBroken(f"prefix index: page {page} is not the free end of the tree")
        node.pages = node.pages[:-1]
        if node.pages:
            node.tokens = node.tokens[: -self.page_bytes]
            return
        self.lru.pop(node, None)
        parent = node.parent
        if parent is None:
            raise InvariantBroken(f"prefix index: page {page} belongs to a root")
        del parent.children[node.tokens[: self.page_bytes]]
        if parent.parent is None and not parent.children and not parent.refs:
            self.roots = {namespace: root for namespace, root in self.roots.items() if root is not parent}

    def drop_all(self) -> list[int]:
        """Forget everything (the pool's memory is gone); gives the cached pages. No node may be held, no sequence open."""
        loose = [page for node in self.lru for page in node.pages]
        if len(loose) != len(self.node_of):
            raise InvariantBroken("prefix index: dropped while somebody holds pages")
        self.roots, self.node_of, self.lru = {}, {}, OrderedDict()
        return loose

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """All nodes, parents first, in an order that depends on content alone: (namespace, node)."""
        for namespace in sorted(self.roots):
            stack = [self.roots[namespace]]
            while stack:
                node = stack.pop()
                if node.parent is not None:
                    yield namespace, node
                stack += [node.children[key] for key in sorted(node.children, reverse=True)]
