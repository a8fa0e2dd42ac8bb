"""When the cell's Redis runs short of memory: journals of requests that have ended are given up early.

They are what a cell holds most of: an answer stays for 15 minutes so that its client may come back for it. Called by
watcher.py once a second. A Redis that is full refuses writes, and then every stream of the cell stands still: losing
the way back to finished answers is the smaller harm. Journals of running requests are never touched.
"""

from __future__ import annotations

from typing import Final

import structlog

from autoscaler.cell import Cell

log = structlog.get_logger("corral.autoscaler")

SHORT_RATIO: Final = 0.7  # of what Redis may use
VERY_SHORT_RATIO: Final = 0.85
SHORT_LIFE_MS: Final = 60_000  # enough for a client that reconnects at once
VERY_SHORT_LIFE_MS: Final = 5_000  # enough for a gateway that fills a gap
CALLS_PER_TURN: Final = 10  # of some thousand keys each: keeps up with thousands of requests a second


class MemoryKeeper:
    """Of one cell."""

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._cursor = 0
        self._is_short = False

    def look(self) -> int:
        """One turn, bounded; how many journals will go sooner. Raises redis.RedisError."""
        ratio = self._cell.memory_used_ratio()
        is_short = ratio >= SHORT_RATIO
        if is_short != self._is_short:
            self._is_short = is_short
            log.warning("cell.memory_short" if is_short else "cell.memory_enough", used_ratio=round(ratio, 3))
        if not is_short:
            return 0
        life_ms = SHORT_LIFE_MS if ratio < VERY_SHORT_RATIO else VERY_SHORT_LIFE_MS
        n_shortened = 0
        for _ in range(CALLS_PER_TURN):
            self._cursor, n = self._cell.shorten_journals(self._cursor, life_ms)
            n_shortened += n
            if self._cursor == 0:
                break
        return n_shortened
