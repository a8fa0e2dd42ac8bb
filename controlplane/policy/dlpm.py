"""Deficit longest prefix match: what is cached goes first, as long as its client has credit. Pure.

DLPM, arXiv:2501.14312. The house has its idea as the locality window of fairness.py; this is the paper's rule, which
that is compared with in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable

from controlplane.policy.vtc import OUTPUT_PRICE, PROMPT_PRICE


class Dlpm:
    """Requests of clients in the order of their arrival, and each client's deficit.

    Of the requests whose client has credit, the one with the longest cached beginning is next. Where nobody who waits
    has credit, all of them get `quantum` (in prompt tokens) until somebody has. What is computed is charged: prompt
    tokens that were not cached, and output tokens as they come.
    """

    def __init__(self, quantum: float = 4096.0) -> None:
        if quantum <= 0:
            raise ValueError(f"quantum = {quantum}: must be positive")
        self.quantum = quantum
        self.credits: dict[str, float] = {}
        self._waiting: dict[int, str] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, client: str, request: int) -> None:
        self.credits.setdefault(client, 0.0)
        self._waiting[request] = client

    def add_first(self, client: str, request: int) -> None:
        """One whose replica was lost."""
        self.credits.setdefault(client, 0.0)
        self._waiting = {request: client, **self._waiting}

    def take(self, n_cached: Callable[[int], int]) -> tuple[str, int]:
        """The next request and its client; `n_cached` says how many tokens of a request's prompt are in the cache.
        Its prompt must be charged before the next is taken. ValueError when nobody waits."""
        if not self._waiting:
            raise ValueError("nobody waits")
        clients = set(self._waiting.values())
        least = max(self.credits[client] for client in clients)
        if least <= 0:  # as often as it takes for one of them, at once
            n_refills = int(-least // self.quantum) + 1
            for client in clients:
                self.credits[client] += n_refills * self.quantum
        allowed = [r for r, client in self._waiting.items() if self.credits[client] > 0]
        request = max(allowed, key=n_cached)  # the first of equals: the earliest
        return self._waiting.pop(request), request

    def charge(self, client: str, *, n_prompt: int = 0, n_output: int = 0) -> None:
        """It was served so many tokens that were not cached."""
        cost = PROMPT_PRICE * n_prompt + OUTPUT_PRICE * n_output
        self.credits[client] = self.credits.get(client, 0.0) - cost
