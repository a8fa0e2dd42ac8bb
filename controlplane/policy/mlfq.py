"""Skip-join multi-level feedback queue: shortest first without any prediction. Pure.

The rules of FastServe (arXiv:2305.05920, algorithm 1). Run by the simulator beside the production order; it needs an
engine that can put a request aside at the end of its quantum. Work is counted in the unit of the caller, the same for
quanta and first iterations (the simulator: decode steps of one sequence).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class _Entry:
    level: int
    since_s: float  # in its level since then


class SkipJoinMlfq:
    """Who runs next, by level, first in first out inside a level.

    Level k allows `quantum * ratio**k` of work. A request joins the first level whose quantum covers its first
    iteration (the prompt, whose length is known: that is the skip), and is demoted by one when it has used its quantum.
    Who has waited `starve_s` in a level is promoted to the first. The last level has no quantum.
    """

    def __init__(
        self, *, n_levels: int = 6, quantum: float = 32.0, ratio: float = 2.0, starve_s: float = 60.0
    ) -> None:
        if n_levels < 1 or quantum <= 0 or ratio <= 1 or starve_s <= 0:
            raise ValueError(
                f"n_levels = {n_levels}, quantum = {quantum}, ratio = {ratio}, starve_s = {starve_s}: at least 1 "
                "level, a positive quantum and time, and a ratio above 1"
            )
        self._quanta = [quantum * ratio**k for k in range(n_levels)]
        self._starve_s = starve_s
        self._lines: list[deque[int]] = [deque() for _ in range(n_levels)]
        self._entries: dict[int, _Entry] = {}  # of those that wait
        self._levels: dict[int, int] = {}  # of all that have not ended

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._entries)

    def level(self, request: int) -> int:
        return self._levels[request]

    def quantum(self, request: int) -> float | None:
        """Work it may do before it is put aside; None: as much as it likes."""
        level = self._levels[request]
        return None if level == len(self._quanta) - 1 else self._quanta[level]

    def join(self, request: int, first_iteration: float, now_s: float) -> None:
        """A new request, whose first iteration takes so much work."""
        last = len(self._quanta) - 1
        level = next((k for k in range(last) if self._quanta[k] >= first_iteration), last)
        self._wait(request, level, now_s)

    def demote(self, request: int) -> int:
        """It has used its quantum: its level from now on."""
        self._levels[request] = min(self._levels[request] + 1, len(self._quanta) - 1)
        return self._levels[request]

    def must_yield(self, request: int) -> bool:
        """Whether one who waits goes before this running request: any of its own level or of one above."""
        return any(self._lines[level] for level in range(self._levels[request] + 1))

    def wait(self, request: int, now_s: float) -> None:
        """It was put aside, or its replica was lost: to the end of its level."""
        self._wait(request, self._levels[request], now_s)

    def take(self, now_s: float) -> int:
        """The next to run. IndexError when nobody waits."""
        self._promote(now_s)
        line = next((line for line in self._lines if line), None)
        if line is None:
            raise IndexError("nobody waits")
        request = line.popleft()
        del self._entries[request]
        return request

    def end(self, request: int) -> None:
        """It has ended."""
        del self._levels[request]

    def _wait(self, request: int, level: int, now_s: float) -> None:
        self._levels[request] = level
        self._entries[request] = _Entry(level, now_s)
        self._lines[level].append(request)

    def _promote(self, now_s: float) -> None:
        """The oldest of a level stand first, so each line is looked at only as far as it starves."""
        for line in self._lines[1:]:
            while line and now_s - self._entries[line[0]].since_s >= self._starve_s:
                self._wait(line.popleft(), 0, now_s)
