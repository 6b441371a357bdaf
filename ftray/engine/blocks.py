"""KV blocks by number: free, held (by one answer or, as a shared prefix, by several), or kept for their prefix."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Counts who holds which block, and keeps named blocks that nobody holds until their place is needed."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}
        # Named blocks nobody holds, the one least recently held first.
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be taken: nobody holds them."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Those of them that keep a prefix."""
        return len(self._kept)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks whose contents are anything."""
        assert count <= self.num_free, "more blocks taken than are free"
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def give(self, blocks: Sequence[int]) -> None:
        """Hold blocks no longer."""
        # Later blocks are of no use without the earlier ones, so they are given up first.
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._names:
                self._kept[block] = None
            else:
                self._free.append(block)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Blocks of the longest prefix that is here; nothing is held by that."""
        found = []
        for name in names:
            if (block := self._by_name.get(name)) is None:
                break
            found.append(block)
        return found

    def num_kept_of(self, blocks: Iterable[int]) -> int:
        """How many of these nobody holds."""
        return sum(block in self._kept for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Hold blocks that were found, with whoever else does."""
        for block in blocks:
            self._kept.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1

    def name(self, block: int, name: bytes) -> None:
        """Say what a held block contains, once it is written. A second block of the same contents stays unnamed."""
        if name not in self._by_name and block not in self._names:
            self._by_name[name] = block
            self._names[block] = name

    def forget(self, blocks: Iterable[int]) -> None:
        """Find these no more: what they contain is not to be trusted."""
        for block in blocks:
            self._forget(block)
            if block in self._kept:
                del self._kept[block]
                self._free.append(block)

    def _forget(self, block: int) -> None:
        if (name := self._names.pop(block, None)) is not None:
            del self._by_name[name]
