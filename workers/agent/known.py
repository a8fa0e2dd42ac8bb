"""A replica as its agent knows it, and when the agent has waited long enough for it.

Kept by replicas.py, filled by fetching.py. Holds no I/O and no process.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from workers.agent.plan import Life
from workers.contract import ReplicaSpec, ReplicaStatus
from workers.failure import ReplicaFailure
from workers.modelcache.uses import Claim


@dataclass(slots=True)
class Known:
    """A replica this agent knows. Instants are monotonic seconds."""

    spec: ReplicaSpec
    life: Life
    pid: int = 0
    started_at_s: float = 0.0
    end: ReplicaStatus | None = None
    stages_ms: dict[str, int] = field(default_factory=dict)
    failure: ReplicaFailure | None = None  # why we ended it, if we did
    task: asyncio.Task[None] | None = None
    claim: Claim | None = None  # keeps its model version on the disk
    arriving: bool = False  # forked, and its weights are still being fetched
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gpus: list[str] = field(default_factory=list)  # its own among several


@dataclass(frozen=True, slots=True)
class Limits:
    """Patience of the agent, in seconds."""

    start_s: float = 600.0  # a large model from a cold disk
    beat_s: float = 15.0  # a front that has not turned its loop for so long is dead to the world


def judge(
    known: Known, beat_at_s: float | None, ready: bool, now_s: float, limits: Limits
) -> ReplicaFailure | None:
    """Why it is to be killed: no readiness in time, or no sign of life since."""
    if not ready and now_s - known.started_at_s > limits.start_s:
        return ReplicaFailure("start_timeout", f"the replica was not ready within {limits.start_s:.0f} s")
    if ready and beat_at_s is not None and now_s - beat_at_s > limits.beat_s:
        return ReplicaFailure(
            "front_hung", f"the replica showed no sign of life for {now_s - beat_at_s:.0f} s"
        )
    return None


def ms_since(started_s: float) -> int:
    """Milliseconds since an instant of the monotonic clock."""
    return round((time.monotonic() - started_s) * 1000)
