"""How often a management token may call: a token bucket each, in this process, for a bounded number of them.

Called by middleware.py once the caller is known, so that nobody uses up another's share with a wrong secret. What is
configured is configured at the pace of people and deploy tools; this bounds a loop that has gone wild.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Final
from uuid import UUID

MAX_CALLERS: Final = 10_000  # the least recently seen is forgotten, and begins with a full bucket


class CallerLimits:
    """Buckets by caller. `rate_per_s` refills, `burst` is the most that lies in one."""

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._levels: OrderedDict[UUID, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: UUID, now_s: float | None = None) -> float:
        """0 if the call may go on, else the seconds after which one may."""
        now_s = time.monotonic() if now_s is None else now_s
        with self._lock:
            level, at_s = self._levels.pop(caller, (self.burst, now_s))
            level = min(self.burst, level + (now_s - at_s) * self.rate_per_s)
            wait_s = 0.0 if level >= 1 else (1 - level) / self.rate_per_s
            self._levels[caller] = (level if wait_s else level - 1, now_s)
            if len(self._levels) > MAX_CALLERS:
                self._levels.popitem(last=False)
            return wait_s
