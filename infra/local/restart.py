"""When to start a process again that died. Pure: instants come in, an answer goes out.

Called by the supervisor.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RestartPolicy:
    """Up to `n_deaths` within `window_s` are answered by a restart, the last one of them is not."""

    n_deaths: int = 5
    window_s: float = 60.0
    first_delay_s: float = 0.25
    longest_delay_s: float = 8.0

    def delay_s(self, deaths_s: Sequence[float], now_s: float) -> float | None:
        """Seconds to wait before the next start, doubling with each recent death; None: give up.

        `deaths_s`: instants of all deaths so far on the clock of `now_s`, the one just seen included.
        """
        n_recent = sum(1 for died_s in deaths_s if now_s - died_s < self.window_s)
        if n_recent >= self.n_deaths:
            return None
        return float(min(self.longest_delay_s, self.first_delay_s * 2 ** max(0, n_recent - 1)))


NEVER = RestartPolicy(n_deaths=1)
