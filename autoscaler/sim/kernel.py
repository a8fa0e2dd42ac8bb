"""The clock of a simulation: events in time order, ties in the order in which they were scheduled.

Everything in a simulation that happens later goes through one `Kernel`; nothing reads a real clock, so equal seeds give
equal histories. An event cannot be taken back: its handler looks whether it still matters (a version number), which is
cheaper than searching a heap.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Kernel:
    """Virtual time in seconds from 0."""

    __slots__ = ("_heap", "_n", "n_events", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.n_events = 0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._n = 0

    def at(self, at_s: float, handler: Callable[..., object], *args: Any) -> None:
        """Call `handler(*args)` at that instant. ValueError for the past: causes come before effects."""
        if at_s < self.now_s:
            raise ValueError(f"at_s = {at_s}: is before now ({self.now_s})")
        self._n += 1
        heapq.heappush(self._heap, (at_s, self._n, handler, args))

    def after(self, delay_s: float, handler: Callable[..., object], *args: Any) -> None:
        self.at(self.now_s + delay_s, handler, *args)

    @property
    def next_s(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def run(self, until_s: float | None = None, max_events: int | None = None) -> bool:
        """Run to the end, the instant or the number of events; whether events are left."""
        heap = self._heap
        n_left = -1 if max_events is None else max_events
        while heap and n_left:
            if until_s is not None and heap[0][0] > until_s:
                self.now_s = until_s
                return True
            self.now_s, _, handler, args = heapq.heappop(heap)
            self.n_events += 1
            n_left -= 1
            handler(*args)
        if not heap and until_s is not None:
            self.now_s = max(self.now_s, until_s)
        return bool(heap)
