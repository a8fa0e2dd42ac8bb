"""What the slots controller is told, and what it remembers from one heartbeat to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from controlplane.policy.slots.fit import StepFit

PATIENCE_FIRST_S: Final = 5.0  # no growth so soon after a shrink
QUIET_FIRST_S: Final = 30.0  # no shrink so soon after shrinks that did not help
NEVER_S: Final = -math.inf

_NO_FIT: Final = StepFit()

Gaps = tuple[tuple[float, int], ...]  # (milliseconds, tokens that came after so long), by rising length


@dataclass(frozen=True, slots=True)
class SlotTarget:
    """What is promised and possible. `itl_ms` 0: no promise, only KV cache and engine queue bind."""

    itl_ms: float
    ceiling: int
    floor: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.floor <= self.ceiling:
            raise ValueError(f"floor {self.floor} and ceiling {self.ceiling}: set 1 <= floor <= ceiling")

    def clamp(self, slots: int) -> int:
        return min(max(slots, self.floor), self.ceiling)


@dataclass(frozen=True, slots=True)
class SlotObservation:
    """One new heartbeat of a replica and what the cell holds of it.

    slots, used: as the cell has them now. n_queued: requests that wait in the deployment's queue. n_steps 0: the
    engine ran nothing, or does not measure. engine_queue: sequences in the engine's own queue, mean over the steps.
    kv_used_ratio: the fullest that the cache was.
    """

    at_s: float
    slots: int
    used: int
    n_queued: int
    n_steps: int = 0
    gaps: Gaps = ()
    engine_queue: float = 0.0
    kv_used_ratio: float = 0.0
    n_preempted: int = 0


@dataclass(frozen=True, slots=True)
class Beat:
    """What one heartbeat adds to a judgement."""

    n_steps: int
    n_tokens: int
    gaps: Gaps
    engine_queue: float
    kv_used_ratio: float
    n_preempted: int
    wants_more: bool


@dataclass(frozen=True, slots=True)
class Shrink:
    """The last shrink for slowness: what it was to better; the slots before the series, and before its futile end."""

    p95_ms: float
    typical_ms: float
    batch: float
    began: int
    helped: int
    n_futile: int = 0


@dataclass(frozen=True, slots=True)
class SlotMemory:
    """What one beat leaves to the next. `slots`: as this controller last set them. Bounded by MAX_BEATS."""

    slots: int
    beats: tuple[Beat, ...] = ()
    above: tuple[Beat, ...] = ()  # while more run than the slots that a shrink left
    fit: StepFit = _NO_FIT
    grown_at_s: float = NEVER_S
    shrunk_at_s: float = NEVER_S
    shrink: Shrink | None = None
    alone_ms: float = 0.0  # 95th percentile of one request alone; 0: not known, or within the promise
    alone_at_s: float = NEVER_S
    patience_s: float = PATIENCE_FIRST_S
    quiet_s: float = QUIET_FIRST_S
    quiet_until_s: float = NEVER_S


Answer = tuple[int, SlotMemory, str]  # slots from now on, what to remember, why
