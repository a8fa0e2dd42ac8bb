"""The heartbeats since the last change of slots, taken as one measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from controlplane.policy.slots.types import Beat, Gaps, SlotTarget
from workers.engine.steps import quantile_ms

PERCENTILE: Final = 0.95
# Slots grow to this share of the target and shrink above all of it: between the two nothing moves.
CALM: Final = 0.9
KV_CALM: Final = 0.8  # as the saturation detector of llm-d has it
KV_FULL: Final = 0.95
# The engine's own queue, as a share of the slots (one request at least): more is a queue in the wrong place.
ENGINE_QUEUE: Final = 0.03
JUDGED_BEATS, JUDGED_STEPS = 4, 8  # two seconds of a beat every half second
SURE: Final = 3.0  # standard deviations beyond the 5 % of late steps that chance alone may bring


@dataclass(frozen=True, slots=True)
class Window:
    """The beats since the last change, as one."""

    n_beats: int
    n_steps: int
    batch: float
    typical_ms: float
    p95_ms: float
    engine_queue: float
    kv_used_ratio: float
    n_preempted: int
    wants_more: bool
    n_late: float  # steps longer than the target
    n_late_beats: int  # beats whose own percentile is
    crowded: bool  # most beats saw a queue in the engine, preemptions or a full cache

    @classmethod
    def of(cls, beats: Sequence[Beat], slots: int, target: SlotTarget) -> Window:
        """Of at least one beat, each with a step and a token or more."""
        gaps = _merged(beats)
        n_steps = sum(b.n_steps for b in beats)
        n_tokens = sum(b.n_tokens for b in beats)
        most = len(beats) // 2 + 1
        mark = queue_mark(slots)
        return cls(
            n_beats=len(beats),
            n_steps=n_steps,
            batch=max(n_tokens / n_steps, 1.0),
            typical_ms=typical_ms(gaps),
            p95_ms=quantile_ms(gaps, PERCENTILE),
            engine_queue=sum(b.engine_queue * b.n_steps for b in beats) / n_steps,
            kv_used_ratio=max(b.kv_used_ratio for b in beats),
            n_preempted=sum(b.n_preempted for b in beats),
            wants_more=sum(b.wants_more for b in beats) >= most,
            n_late=n_steps * sum(n for ms, n in gaps if ms > target.itl_ms) / n_tokens,
            n_late_beats=sum(quantile_ms(b.gaps, PERCENTILE) > target.itl_ms for b in beats),
            crowded=sum(
                b.engine_queue > mark or b.n_preempted > 0 or b.kv_used_ratio > KV_FULL for b in beats
            )
            >= most,
        )

    @property
    def is_slow(self) -> bool:
        """Late more often than chance explains, and in most beats: neither one bad beat nor one bad step decides."""
        share, n = 1 - PERCENTILE, self.n_steps
        allowed = share * n + SURE * math.sqrt(share * PERCENTILE * n)
        return n >= JUDGED_STEPS and 2 * self.n_late_beats > self.n_beats and self.n_late > allowed

    def at_ms(self, batch: float, slope_ms: float) -> float:
        """The 95th percentile predicted at another batch size, along the fitted line from what is measured."""
        return max(self.p95_ms + self._spread * slope_ms * (batch - self.batch), 0.0)

    def feasible(self, limit_ms: float, slope_ms: float | None) -> float:
        """The largest batch whose prediction keeps within the limit: along the fitted line; without one in
        proportion, the least that a straight line allows above and the most that it allows below.
        """
        in_proportion = self.batch * limit_ms / max(self.p95_ms, 1e-3)
        if slope_ms is None:
            return in_proportion
        if self._spread * slope_ms < 1e-6:
            return math.inf if self.p95_ms <= limit_ms else 0.0
        on_line = self.batch + (limit_ms - self.p95_ms) / (self._spread * slope_ms)
        return max(on_line, in_proportion) if self.p95_ms <= limit_ms else min(on_line, in_proportion)

    @property
    def _spread(self) -> float:
        return self.p95_ms / max(self.typical_ms, 1e-3)

    def said(self, target: SlotTarget) -> str:
        p95, aim = _short(self.p95_ms), _short(target.itl_ms)
        return f"95 % of gaps within {p95} ms (target {aim}) at {self.batch:.1f} running"


def newest(beats: tuple[Beat, ...]) -> tuple[Beat, ...]:
    """As few of the last beats as make up a judgement."""
    n, n_steps = 0, 0
    while n < len(beats) and (n < JUDGED_BEATS or n_steps < JUDGED_STEPS):
        n += 1
        n_steps += beats[-n].n_steps
    return beats[len(beats) - n :]


def p95_ms(beats: Sequence[Beat]) -> float:
    return quantile_ms(_merged(beats), PERCENTILE)


def typical_ms(gaps: Gaps) -> float:
    """Mean of the gaps up to twice the median: finer than a bucket, and no hiccup of the host moves it."""
    most_ms = 2 * quantile_ms(gaps, 0.5)
    n = sum(n for ms, n in gaps if ms <= most_ms)
    return sum(ms * n for ms, n in gaps if ms <= most_ms) / n if n else 0.0


def queue_mark(slots: int) -> float:
    """More sequences than this in the engine's own queue are too many."""
    return max(1.0, ENGINE_QUEUE * slots)


def _merged(beats: Sequence[Beat]) -> Gaps:
    merged: dict[float, int] = {}
    for beat in beats:
        for ms, n in beat.gaps:
            merged[ms] = merged.get(ms, 0) + n
    return tuple(sorted(merged.items()))


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
