"""Which replicas probably hold the beginning of a prompt, as far as one gateway gave it to them: pure.

Kept by a gateway's route table (and by the simulator's router) from what it bound itself. It forgets as an engine's
cache does, least recently used first within the replica's own size, so that affinity does not outlive what it is for.
A wrong guess costs a detour or a prompt computed again, never a wrong answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Final

MAX_REPLICAS: Final = 1_024


class _Held:
    """Prefixes of one replica, the least recently used first, with the tokens each stands for beyond the one before."""

    __slots__ = ("bit", "capacity_tokens", "keys", "n_tokens")

    def __init__(self, bit: int, capacity_tokens: int) -> None:
        self.bit = bit
        self.capacity_tokens = capacity_tokens
        self.keys: OrderedDict[Hashable, int] = OrderedDict()
        self.n_tokens = 0


class PrefixMap:
    """Prefixes by replica. Those of a prompt come shortest first, with the tokens at which each ends; two are equal
    only where all before is (chained hashes)."""

    __slots__ = ("_free", "_held", "_holders", "_names", "_next", "capacity_tokens", "max_keys")

    def __init__(self, capacity_tokens: int, max_keys: int = 4_096) -> None:
        """Of one replica: the tokens its cache holds, unless it says otherwise, and the prefixes remembered at
        most."""
        self.capacity_tokens = capacity_tokens
        self.max_keys = max_keys
        self._held: dict[Hashable, _Held] = {}
        self._names: dict[int, Hashable] = {}  # by bit
        self._holders: dict[Hashable, int] = {}  # prefix -> bits of the replicas that hold it
        self._free: list[int] = []
        self._next = 0

    def matches(self, prefixes: Sequence[Hashable]) -> dict[Hashable, int]:
        """For each replica that holds any of them: how many, counted from the shortest."""
        found: dict[Hashable, int] = {}
        holders, names, seen = self._holders, self._names, 0
        for n in range(len(prefixes), 0, -1):
            new = holders.get(prefixes[n - 1], 0) & ~seen
            while new:
                bit = new & -new
                found[names[bit]] = n
                seen |= bit
                new ^= bit
        return found

    def held(self, replica: Hashable, prefixes: Sequence[Hashable]) -> int:
        """How many of them, counted from the shortest, this replica holds."""
        held = self._held.get(replica)
        if held is not None:
            for n in range(len(prefixes), 0, -1):
                if prefixes[n - 1] in held.keys:
                    return n
        return 0

    def note(
        self, replica: Hashable, prefixes: Sequence[Hashable], ends: Sequence[int], capacity_tokens: int = 0
    ) -> None:
        """The replica, whose cache holds `capacity_tokens` (0: it did not say), is given a prompt with these prefixes.
        Beyond MAX_REPLICAS replicas nothing is remembered."""
        held = self._held.get(replica)
        if held is None:
            held = self._enter(replica)
            if held is None:
                return
        if capacity_tokens > 0:
            held.capacity_tokens = capacity_tokens
        keys, holders, bit = held.keys, self._holders, held.bit
        for n in range(
            len(prefixes) - 1, -1, -1
        ):  # the shortest last: without it the longer ones are of no use
            key = prefixes[n]
            if key in keys:
                keys.move_to_end(key)
                continue
            size = ends[n] - (ends[n - 1] if n else 0)
            keys[key] = size
            held.n_tokens += size
            holders[key] = holders.get(key, 0) | bit
        while held.n_tokens > held.capacity_tokens or len(keys) > self.max_keys:
            self._drop(held, *keys.popitem(last=False))

    def forget(self, replica: Hashable) -> None:
        """It is gone, asleep or restarted: its cache is empty."""
        held = self._held.pop(replica, None)
        if held is not None:
            while held.keys:
                self._drop(held, *held.keys.popitem(last=False))
            del self._names[held.bit]
            self._free.append(held.bit)

    def replicas(self) -> set[Hashable]:
        return set(self._held)

    def _enter(self, replica: Hashable) -> _Held | None:
        if self._free:
            bit = self._free.pop()
        elif self._next < MAX_REPLICAS:
            bit = 1 << self._next
            self._next += 1
        else:
            return None
        self._names[bit] = replica
        held = self._held[replica] = _Held(bit, self.capacity_tokens)
        return held

    def _drop(self, held: _Held, key: Hashable, size: int) -> None:
        held.n_tokens -= size
        left = self._holders[key] & ~held.bit
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]
