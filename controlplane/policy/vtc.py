"""The virtual token counter of the paper, one level, charged as tokens are made. Pure.

VTC, arXiv:2401.00588, algorithm 2, held against its reference (Ying1123/VTC-artifact, vtc_req_queue.py). The house
runs its descendant fairness.py (a hierarchy, bands, charged at dispatch by prediction); this one is what that is
compared with, in the simulator.
"""

from __future__ import annotations

from collections import deque
from typing import Final

PROMPT_PRICE: Final = 1.0
OUTPUT_PRICE: Final = 2.0


class Vtc:
    """Requests of clients; the head of the client with the least service per weight is next."""

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        *,
        prompt_price: float = PROMPT_PRICE,
        output_price: float = OUTPUT_PRICE,
    ) -> None:
        self.counters: dict[str, float] = {}
        self._weights = weights or {}
        self._prompt_price = prompt_price
        self._output_price = output_price
        self._lines: dict[str, deque[int]] = {}  # of clients that wait
        self._last_left: str | None = None

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def waiting(self) -> frozenset[str]:
        """Clients with requests that wait."""
        return frozenset(self._lines)

    def add(self, client: str, request: int) -> None:
        """A request arrives. A client that had none waiting is lifted: its idleness earned nothing."""
        line = self._lines.get(client)
        if line is None:
            others = [self.counters[other] for other in self._lines]
            if others:
                base = min(others)
            else:  # nobody waits: level with who left last
                base = self.counters[self._last_left] if self._last_left is not None else 0.0
            self.counters[client] = max(self.counters.get(client, 0.0), base)
            line = self._lines[client] = deque()
        line.append(request)

    def add_first(self, client: str, request: int) -> None:
        """One whose replica was lost: before all others of its client, without a lift."""
        self.counters.setdefault(client, 0.0)
        self._lines.setdefault(client, deque()).appendleft(request)

    def take(self) -> tuple[str, int]:
        """The next request and its client, ties by name. Its prompt must be charged before the next is taken.
        ValueError when nobody waits."""
        client = min(self._lines, key=lambda name: (self.counters[name], name))
        line = self._lines[client]
        request = line.popleft()
        if not line:
            del self._lines[client]
            self._last_left = client
        return client, request

    def charge(self, client: str, *, n_prompt: int = 0, n_output: int = 0) -> None:
        """It was served so many tokens."""
        cost = self._prompt_price * n_prompt + self._output_price * n_output
        self.counters[client] = self.counters.get(client, 0.0) + cost / self._weights.get(client, 1.0)
