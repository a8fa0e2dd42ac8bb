"""How evenly work was spread over the replicas of a run: an observer of the world, for the routing tables.

Load twice: as tokens computed (prompt tokens not found in the cache, and output), over the whole run and in windows of
a minute; and as requests running, over time. Each as the most loaded replica over the mean. Replicas must not change.
"""

from __future__ import annotations

from autoscaler.sim.job import Job
from autoscaler.sim.world import World


class Balance:
    """`window_s` long windows count by the work in them; requests running count while there is one per replica."""

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self.peak_running = 0
        self._used: list[int] = []
        self._at_s = 0.0
        self._running_sum = self._running_s = 0.0
        self._window_end_s = window_s
        self._before: list[int] = []
        self._windows_sum = self._windows_work = 0.0
        self._output: dict[int, int] = {}
        self._world: World | None = None

    @property
    def running(self) -> float:
        """Mean over time of the fullest replica's requests over the mean replica's; 1 when nothing ran."""
        return self._running_sum / self._running_s if self._running_s else 1.0

    @property
    def work(self) -> float:
        """Tokens computed in the whole run: the busiest replica over the mean."""
        return _ratio(self._totals())

    @property
    def windows(self) -> float:
        """The same in whole windows."""
        return self._windows_sum / self._windows_work if self._windows_work else 1.0

    def on_event(self, world: World) -> None:
        now_s, used = world.kernel.now_s, self._used
        if now_s > self._at_s:
            n = sum(used)
            if n >= len(used) > 0:
                self._running_sum += (now_s - self._at_s) * max(used) * len(used) / n
                self._running_s += now_s - self._at_s
            self._at_s = now_s
        self._used = used = [len(replica.jobs) for replica in world.replicas.values()]
        self.peak_running = max(self.peak_running, max(used, default=0))
        self._world = world
        if now_s >= self._window_end_s:
            self._close(now_s)

    def on_end(self, world: World, job: Job) -> None:
        self._output[job.replica] = self._output.get(job.replica, 0) + job.n_output

    def _close(self, now_s: float) -> None:
        self._window_end_s = now_s + self.window_s
        total = self._totals()
        before = self._before or [0] * len(total)
        new = [t - b for t, b in zip(total, before, strict=True)]
        self._windows_sum += _ratio(new) * sum(new)
        self._windows_work += sum(new)
        self._before = total

    def _totals(self) -> list[int]:
        """Tokens computed so far by each replica."""
        replicas = self._world.replicas.values() if self._world is not None else ()
        return [r.engine.n_prefilled_tokens + self._output.get(r.id, 0) for r in replicas]


def _ratio(values: list[int]) -> float:
    return max(values) * len(values) / sum(values) if sum(values) else 1.0
