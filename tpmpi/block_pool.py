"""Whose the blocks of the KV cache are: free, held by requests, or kept for requests that begin alike.

Full blocks of tokens are kept in a tree by what they hold, as long as nobody needs the room: the longest unused goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from tpmpi.kv_cache import LayerGroup, pinned_blocks

PARTIAL_CHOICES = 8  # blocks that are looked at for a beginning in common, where no whole block fits


class Node:
    """As many tokens as a block holds, after those of the node above, and the blocks that keep their keys and values."""

    __slots__ = ('tokens', 'parent', 'children', 'users', 'computed', 'blocks', 'readers')

    def __init__(self, tokens: tuple[int, ...], parent: Node | None, groups: int):
        self.tokens, self.parent = tokens, parent
        self.children: dict[tuple[int, ...], Node] = {}
        self.users = 0  # running requests that begin like this
        self.computed = False  # a request has computed it: others need not wait for it
        self.blocks: list[int | None] = [None] * groups  # in each group of layers; None: not kept
        self.readers = [0] * groups  # running requests that read that block


class BlockPool:
    """The numbers of the cache's blocks: free, held by requests, or kept for those that begin alike."""

    def __init__(self, num_blocks: int, block: int, groups: tuple[LayerGroup, ...]):
        self.num_blocks, self.block, self.groups = num_blocks, block, groups
        self.free = list(range(num_blocks - 1, -1, -1))
        self.root = Node((), None, len(groups))
        self.long_root = Node((), None, len(groups))  # of keys that were turned as those of long texts are
        self.idle: OrderedDict[tuple[Node, int], None] = OrderedDict()  # blocks without readers, the longest unused first

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A block's number; the longest unused block of the tree goes where none is free."""
        if not self.free:
            (node, group), _ = self.idle.popitem(last=False)
            self.free.append(node.blocks[group])
            node.blocks[group] = None
            self._prune(node)
        return self.free.pop()

    def add(self, parent: Node, tokens: tuple[int, ...]) -> Node:
        """A node that has neither users nor blocks yet."""
        node = parent.children[tokens] = Node(tokens, parent, len(self.groups))
        return node

    def enter(self, node: Node) -> None:
        """A request begins like this.  To be called from the tree's root on, and `leave` towards it."""
        node.users += 1

    def leave(self, node: Node) -> None:
        """A request that began like this is over, or sent back."""
        node.users -= 1
        self._prune(node)

    def give(self, node: Node, group: int, number: int) -> None:
        """A request's own block becomes the node's; the request is its reader."""
        node.blocks[group], node.readers[group] = number, 1

    def hold(self, node: Node, group: int) -> None:
        """One reader more of the node's block."""
        node.readers[group] += 1
        if node.readers[group] == 1:
            del self.idle[node, group]

    def let_go(self, node: Node, group: int) -> None:
        """One reader less.  To be called for a request's last block first, so that the last go first, too."""
        node.readers[group] -= 1
        if node.readers[group] == 0:
            self.idle[node, group] = None

    def _prune(self, node: Node) -> None:
        """What holds nothing, leads to nothing and is nobody's leaves the tree."""
        while node.parent is not None and not (node.users or node.children or any(b is not None for b in node.blocks)):
            del node.parent.children[node.tokens]
            node = node.parent

    def first_seen(self, group: int, position: int) -> int:
        """The first block that a query there reads, of those that are not pinned."""
        window = self.groups[group].window
        return 0 if window is None else max(0, position - window + 1) // self.block

    def pinned(self, group: int) -> int:
        """The first blocks, which every query reads."""
        return pinned_blocks(self.groups[group].sinks, self.block)

    def match(self, tokens: list[int], most: int, root: Node | None = None, copying: bool = True
              ) -> tuple[list[Node], Node | None, int, bool]:
        """What the tree holds of a beginning of at most `most` tokens.

        Returns nodes such that a request can go on behind them: of each group all blocks that it would read are kept; if
        `copying`, a node that agrees for some tokens more, and how many these are; and whether there would be clearly more
        if another request had been computed.
        """
        path, node, at = [], root or self.root, 0
        kept, best = [0] * len(self.groups), 0  # blocks at the path's end without a gap; the longest path to go on behind
        while at + self.block <= most:
            child = node.children.get(tuple(tokens[at:at + self.block]))
            if child is None:
                break
            if not child.computed:
                return path[:best], None, 0, True
            path.append(child)
            node, at = child, at + self.block
            kept = [0 if number is None else count + 1 for count, number in zip(kept, child.blocks, strict=True)]
            if self._can_go_on(kept, path, at):
                best = len(path)
        rest, choice, common, coming, looked = tuple(tokens[at:min(most, at + self.block)]), None, 0, 0, 0
        for child in reversed(node.children.values()):
            same = next((i for i, (a, b) in enumerate(zip(child.tokens, rest, strict=False)) if a != b), len(rest))
            if not child.computed:
                coming = max(coming, same)
            elif copying and same > common and None not in child.blocks:
                choice, common = child, same
            looked += child.computed
            if looked == PARTIAL_CHOICES:
                break
        if choice is not None and not self._can_go_on(kept, path, at + common):
            choice, common = None, 0
        return path if choice is not None else path[:best], choice, common, coming > common + self.block // 4

    def _can_go_on(self, kept: list[int], path: list[Node], position: int) -> bool:
        """Whether all blocks of the path that a query at `position`, behind it, reads are kept; `kept` of them at its end."""
        return all(count >= len(path) - self.first_seen(group, position)
                   and all(node.blocks[group] is not None for node in path[:self.pinned(group)])
                   for group, count in enumerate(kept))
