"""Orders of waiting requests, for world.py."""

from __future__ import annotations

from collections import deque

from autoscaler.sim.job import Job
from autoscaler.sim.world import Replica


class Fcfs:
    """First come, first served; what lost its replica goes first again."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def push(self, job: Job, now_s: float) -> None:
        if job.n_attempts:
            self._jobs.appendleft(job)
        else:
            self._jobs.append(job)

    def pop(self, replica: Replica, now_s: float) -> Job | None:
        return self._jobs.popleft() if self._jobs else None

    def on_bound(self, job: Job, now_s: float) -> None:
        pass

    def on_end(self, job: Job, now_s: float) -> None:
        pass
