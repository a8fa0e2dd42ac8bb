"""The KV blocks of one simulated engine that more than one request may share.

Blocks in use are pinned; blocks that nobody uses stay until room is needed, least recently used first. Used by
enginemodel.py only, and by the clairvoyant bound of the routing tables with an unlimited size.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

BLOCK: Final = 512  # tokens; the unit of the published block hashes (Mooncake, FAST 25)


class PrefixCache:
    """Blocks by id. `n_pinned` and `n_idle` count blocks."""

    __slots__ = ("_idle", "_pins")

    def __init__(self) -> None:
        self._pins: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def n_pinned(self) -> int:
        return len(self._pins)

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    def match(self, prefix: tuple[int, ...]) -> int:
        """How many leading blocks are here."""
        pins, idle = self._pins, self._idle
        n = 0
        for block in prefix:
            if block not in pins and block not in idle:
                break
            n += 1
        return n

    def n_new_pins(self, prefix: tuple[int, ...]) -> int:
        """How many blocks would be pinned that are not pinned now."""
        pins = self._pins
        return sum(1 for block in prefix if block not in pins)

    def pin(self, prefix: tuple[int, ...]) -> None:
        pins, idle = self._pins, self._idle
        for block in prefix:
            n = pins.get(block)
            if n is None:
                idle.pop(block, None)
                pins[block] = 1
            else:
                pins[block] = n + 1

    def unpin(self, prefix: tuple[int, ...]) -> None:
        """Leading blocks become the most recently used: a prefix without its beginning is of no use."""
        pins, idle = self._pins, self._idle
        for block in reversed(prefix):
            n = pins[block] - 1
            if n:
                pins[block] = n
            else:
                del pins[block]
                idle[block] = None

    def evict(self, n_blocks: int) -> None:
        """Drop that many idle blocks, or all there are."""
        idle = self._idle
        for _ in range(min(n_blocks, len(idle))):
            idle.popitem(last=False)

    def clear(self) -> None:
        self._pins.clear()
        self._idle.clear()
