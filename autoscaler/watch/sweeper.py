"""Keeps the fair queues' memory with those that use it: forgets counters that say no more than none would.

Called by the watcher once a second; a step is one short script call, and deployments take turns. What is
forgotten and why is in workers/lua/sweep.lua; nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from autoscaler.cell import Cell

FIELDS_A_STEP = 256


class Sweeper:
    """Where the round stands."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._deployment = ""
        self._cursor = "0"

    def step(self, deployments: Sequence[str]) -> int:
        """The next stretch of one deployment's counters; how many were forgotten. Raises redis.RedisError."""
        ids = sorted(deployments)
        if not ids:
            return 0
        if self._cursor == "0" or self._deployment not in ids:
            self._deployment = next((did for did in ids if did > self._deployment), ids[0])
            self._cursor = "0"
        self._cursor, n_forgotten = self._cell.sweep_counters(self._deployment, self._cursor, FIELDS_A_STEP)
        return n_forgotten
