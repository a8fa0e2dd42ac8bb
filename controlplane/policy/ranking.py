"""A set ordered by score, ties by name, as a Redis sorted set is: pure.

Under the fair queue of the simulator. A heap whose stale entries are dropped when they surface: `put`, `drop`
and `first` take O(log n), amortised.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush


class Ranking:
    """Names by integer score."""

    __slots__ = ("_heap", "_scores")

    def __init__(self) -> None:
        self._scores: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._scores)

    def __contains__(self, name: str) -> bool:
        return name in self._scores

    def put(self, name: str, score: int) -> None:
        """Add it, or change its score."""
        if self._scores.get(name) == score:
            return
        self._scores[name] = score
        heappush(self._heap, (score, name))
        if len(self._heap) > 2 * len(self._scores) + 64:
            self._heap = [(score, name) for name, score in self._scores.items()]
            heapify(self._heap)

    def drop(self, name: str) -> bool:
        """Remove it; whether it was there."""
        return self._scores.pop(name, None) is not None

    def score(self, name: str) -> int:
        """KeyError when it is not there."""
        return self._scores[name]

    def first(self) -> str:
        """The lowest. IndexError when there is none."""
        heap = self._heap
        while self._scores.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        return heap[0][1]

    def least(self) -> int | None:
        """The lowest score; None when there is none."""
        return self._scores[self.first()] if self._scores else None

    def lowest(self, n: int) -> list[str]:
        """The lowest `n`, in order."""
        found: list[tuple[int, str]] = []
        while len(found) < min(n, len(self._scores)):
            name = self.first()
            entry = heappop(self._heap)
            if not found or found[-1] != entry:  # the same entry may lie in the heap twice
                found.append((entry[0], name))
        for entry in found:
            heappush(self._heap, entry)
        return [name for _, name in found]

    def items(self) -> dict[str, int]:
        """Name -> score, in no particular order."""
        return dict(self._scores)
