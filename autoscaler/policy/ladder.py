"""Which rung an idle deployment's spare rests on as time passes: serving, asleep, process ready, on disk, nothing.

Each rung costs something an hour and takes something to wake from; a schedule says from which idle age on which rung is
held. Without history it descends along the lower envelope of (price x age + cost of waking), which never costs more
than twice what one who knows the gap would pay (ski rental with several slopes: Irani, Shukla and Gupta, 2003). With
history it is the cheapest schedule for the gaps seen so far, by backward induction over their histogram; it may climb
again before the next request is likely (the pre-warming of Shahrad et al., ATC 20, over more than two rungs). Pure.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Bin edges of idle gaps: 1 s to three days, half an octave apart; below the first and beyond the last are bins too.
EDGES_S: Final = (0.0, *(2 ** (i / 2) for i in range(37)))
N_BINS: Final = len(EDGES_S)
MIN_GAPS: Final = 8.0  # weight of history below which it is not trusted
KEEP: Final = 0.995  # of the old weight per new gap: half is forgotten after 140
PRIOR: Final = 1.0  # gap, spread over all bins, so that nothing counts as impossible


@dataclass(frozen=True, slots=True)
class Rung:
    """usd_per_h: what resting there costs. wake_s: until the first token of a request that finds it there."""

    name: str
    usd_per_h: float
    wake_s: float

    def __post_init__(self) -> None:
        if self.usd_per_h < 0 or self.wake_s < 0:
            raise ValueError(f"rung {self.name}: price and time to wake must not be negative")


@dataclass(frozen=True, slots=True)
class Stakes:
    """What waking costs: a request that misses the TTFT target, each second of it, the machine that is busy waking."""

    ttft_target_s: float
    late_usd: float
    late_usd_per_s: float
    waking_usd_per_h: float

    def late(self, wait_s: float) -> float:
        """USD for the wait of one request."""
        over_s = wait_s - self.ttft_target_s
        return self.late_usd + over_s * self.late_usd_per_s if over_s > 0 else 0.0

    def wake_usd(self, rung: Rung) -> float:
        return self.late(rung.wake_s) + rung.wake_s * self.waking_usd_per_h / 3600

    def climb_usd(self, low: Rung, high: Rung) -> float:
        """Waking it part of the way before anybody asks: the machine's time only."""
        return max(low.wake_s - high.wake_s, 0.0) * self.waking_usd_per_h / 3600


@dataclass(frozen=True, slots=True)
class Gaps:
    """Idle gaps seen: fading weight by bin of EDGES_S."""

    weights: tuple[float, ...] = (0.0,) * N_BINS

    def seen(self, gap_s: float) -> Gaps:
        """With one more, half of it in the bins beside its own: the next gap will not be just as long."""
        weights = [w * KEEP for w in self.weights]
        at = max(bisect.bisect_right(EDGES_S, gap_s) - 1, 0)
        for i, share in ((at - 1, 0.25), (at, 0.5), (at + 1, 0.25)):
            weights[min(max(i, 0), N_BINS - 1)] += share
        return Gaps(tuple(weights))

    @property
    def weight(self) -> float:
        return sum(self.weights)


@dataclass(frozen=True, slots=True)
class Step:
    """From this idle age on, this rung."""

    from_s: float
    rung: Rung


@dataclass(frozen=True, slots=True)
class Rest:
    """Steps by age, the first from 0. expected_usd: per gap, None where history does not say."""

    steps: tuple[Step, ...]
    expected_usd: float | None
    reason: str

    def at(self, idle_s: float) -> Rung:
        return self.steps[bisect.bisect_right([s.from_s for s in self.steps], idle_s) - 1].rung


def rest(rungs: Sequence[Rung], stakes: Stakes, gaps: Gaps, *, climbs: bool = True) -> Rest:
    """The schedule for the next gap; without `climbs` it only descends. ValueError without a rung."""
    useful = efficient(rungs)
    if gaps.weight < MIN_GAPS:
        return Rest(
            envelope(useful, stakes), None, f"{gaps.weight:.1f} gaps seen, {MIN_GAPS:g} needed: envelope"
        )
    steps, usd = cheapest(useful, stakes, gaps, climbs=climbs)
    names = ", ".join(f"{s.rung.name} from {s.from_s:.0f} s" for s in steps)
    return Rest(steps, usd, f"{gaps.weight:.1f} gaps seen: {names}")


def efficient(rungs: Sequence[Rung]) -> tuple[Rung, ...]:
    """Dearest first, without those that another beats in price and in time to wake."""
    if not rungs:
        raise ValueError("rungs: at least one")
    kept: list[Rung] = []
    for rung in sorted(rungs, key=lambda r: (r.usd_per_h, r.wake_s, r.name)):
        if not kept or rung.wake_s < kept[-1].wake_s:
            kept.append(rung)
    return tuple(reversed(kept))


def envelope(rungs: Sequence[Rung], stakes: Stakes) -> tuple[Step, ...]:
    """Descend whenever another rung's line is the lowest: at most twice the cost of knowing the gap."""
    hours, at = 0.0, min(rungs, key=lambda r: (stakes.wake_usd(r), r.usd_per_h))
    steps = [Step(0.0, at)]
    while True:
        best: tuple[float, float, Rung] | None = None
        for rung in rungs:
            if rung.usd_per_h < at.usd_per_h:
                crossing = (stakes.wake_usd(rung) - stakes.wake_usd(at)) / (at.usd_per_h - rung.usd_per_h)
                if best is None or (crossing, rung.usd_per_h) < best[:2]:
                    best = (crossing, rung.usd_per_h, rung)
        if best is None:
            return tuple(steps)
        hours, at = max(best[0], hours), best[2]
        steps = [s for s in steps if s.from_s < hours * 3600] + [Step(hours * 3600, at)]


def cheapest(
    rungs: Sequence[Rung], stakes: Stakes, gaps: Gaps, *, climbs: bool = True
) -> tuple[tuple[Step, ...], float]:
    """Steps at bin edges with the least expected cost for these gaps, and that cost in USD per gap.

    Rungs dearest first.

    Backward induction: value[bin][rung] is the cost to come of an idle spare that reaches the bin on the rung. Within a
    bin a gap ends at its middle on average; beyond the last edge it lasts as long again.
    """
    weights = [w + PRIOR / N_BINS for w in gaps.weights]
    n = len(rungs)
    wake = [stakes.wake_usd(r) for r in rungs]
    climb = [[stakes.climb_usd(low, high) for high in rungs] for low in rungs]
    after = [0.0] * n
    left = 0.0
    choices: list[list[int]] = []
    for i in reversed(range(N_BINS)):
        left += weights[i]
        ends = weights[i] / left  # of those that reach the bin
        is_last = i == N_BINS - 1
        hours = (EDGES_S[i] if is_last else EDGES_S[i + 1] - EDGES_S[i]) / 3600
        held_h = hours if is_last else hours * (1 - ends / 2)
        stay = [rungs[k].usd_per_h * held_h + ends * wake[k] + (1 - ends) * after[k] for k in range(n)]
        # Ties: where it is already, then the cheaper rung.
        best = [
            min((stay[k] + climb[j][k], k != j, -k) for k in range(0 if climbs else j, n)) for j in range(n)
        ]
        choices.append([-found[2] for found in best])
        after = [found[0] for found in best]
    at = min(range(n), key=lambda k: rungs[k].wake_s)  # a request has just been served
    total = after[at]
    steps: list[Step] = []
    for i, choice in enumerate(reversed(choices)):
        if choice[at] != at or not steps:
            at = choice[at]
            steps.append(Step(EDGES_S[i], rungs[at]))
    return tuple(steps), total


def gap_usd(steps: Sequence[Step], stakes: Stakes, gap_s: float) -> float:
    """What one gap costs under a schedule: resting, climbing and waking (climbs that are done when the gap ends)."""
    usd, before = 0.0, None
    for i, step in enumerate(steps):
        if step.from_s > gap_s:
            break
        end_s = steps[i + 1].from_s if i + 1 < len(steps) else gap_s
        usd += step.rung.usd_per_h * (min(end_s, gap_s) - step.from_s) / 3600
        usd += stakes.climb_usd(before, step.rung) if before is not None else 0.0
        before = step.rung
    assert before is not None
    return usd + stakes.wake_usd(before)
