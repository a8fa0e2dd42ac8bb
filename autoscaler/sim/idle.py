"""What an idle policy costs and how often it makes requests wait, on recorded arrivals of many deployments.

Each deployment has one spare that serves while requests run, rests between them as its policy says, and wakes for the
next one; requests that come while it wakes wait for the rest of it. The ladder is the production policy
(policy/ladder.py); the others are the rules it is compared with. Called by the study `ladder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from autoscaler.policy.ladder import Gaps, Rung, Stakes, Step, efficient, envelope, rest

# One gap more hardly moves a long history: planned again only so often once so many were seen.
SETTLED, REPLAN_EVERY = 64, 8


class Idle(Protocol):
    """Keeps one deployment's history. `steps` is asked when the spare becomes idle, `seen` told how long it was."""

    def steps(self) -> Sequence[Step]: ...

    def seen(self, gap_s: float) -> None: ...


class Fixed:
    """The same steps always: always on, zero at once, or kept alive for so long."""

    def __init__(self, *steps: Step) -> None:
        self._steps = steps

    def steps(self) -> Sequence[Step]:
        return self._steps

    def seen(self, gap_s: float) -> None:
        pass


class Ladder:
    """policy/ladder.py with its memory. `learns` False: its envelope for ever."""

    def __init__(self, rungs: Sequence[Rung], stakes: Stakes, *, learns: bool = True) -> None:
        self.rungs, self.stakes, self.learns = rungs, stakes, learns
        self.gaps = Gaps()
        self._n_seen = 0
        self._steps: Sequence[Step] = envelope(efficient(rungs), stakes)

    def steps(self) -> Sequence[Step]:
        return self._steps

    def seen(self, gap_s: float) -> None:
        if not self.learns:
            return
        self.gaps = self.gaps.seen(gap_s)
        self._n_seen += 1
        if self._n_seen <= SETTLED or self._n_seen % REPLAN_EVERY == 0:
            self._steps = rest(self.rungs, self.stakes, self.gaps).steps


class HybridHistogram:
    """The policy of Shahrad et al. (ATC 20): one-minute bins of four hours; pre-warm at the 5th percentile less a
    tenth, keep alive to the 99th and a tenth; the fixed keep-alive while the histogram says nothing.

    Says nothing: fewer than two gaps, a coefficient of variation of the bins below 2, or more than half the gaps out of
    range (where the paper forecasts with ARIMA; left out here).
    """

    BINS = 240

    def __init__(self, warm: Rung, cold: Rung, keep_alive_s: float = 4 * 3600.0) -> None:
        self.warm, self.cold, self.keep_alive_s = warm, cold, keep_alive_s
        self.counts = [0] * self.BINS
        self.n_out = 0

    def seen(self, gap_s: float) -> None:
        minute = int(gap_s // 60)
        if minute < self.BINS:
            self.counts[minute] += 1
        else:
            self.n_out += 1

    def steps(self) -> Sequence[Step]:
        n = sum(self.counts)
        mean = n / self.BINS
        spread = math.sqrt(sum((c - mean) ** 2 for c in self.counts) / self.BINS)
        if n < 2 or self.n_out > n or spread < 2 * mean:
            return (Step(0.0, self.warm), Step(self.keep_alive_s, self.cold))
        head_s, tail_s = self._percentile(0.05) * 60 * 0.9, (self._percentile(0.99) + 1) * 60 * 1.1
        if head_s < 60:  # rounded down to a bin: nothing is gained by going cold
            return (Step(0.0, self.warm), Step(tail_s, self.cold))
        return (Step(0.0, self.cold), Step(head_s, self.warm), Step(tail_s, self.cold))

    def _percentile(self, q: float) -> int:
        wanted, sofar = q * sum(self.counts), 0
        for minute, count in enumerate(self.counts):
            sofar += count
            if sofar >= wanted:
                return minute
        return self.BINS - 1


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a deployment: when, and how long it runs once served."""

    at_s: float
    runs_s: float


@dataclass(slots=True)
class Books:
    """What was counted from `count_from_s` on. `idle_usd`: resting, climbing and waking; running is not in it."""

    n_requests: int = 0
    n_late: int = 0
    late_usd: float = 0.0
    idle_usd: float = 0.0
    usd_by_rung: dict[str, float] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)

    def add(self, rung: str, usd: float) -> None:
        self.idle_usd += usd
        self.usd_by_rung[rung] = self.usd_by_rung.get(rung, 0.0) + usd

    @property
    def total_usd(self) -> float:
        """With what the late requests are worth."""
        return self.idle_usd + self.late_usd


def replay(
    deployments: Sequence[Sequence[Call]],
    make: Callable[[], Idle],
    stakes: Stakes,
    *,
    count_from_s: float,
    until_s: float,
) -> Books:
    """Every deployment by itself, each with a policy of its own; calls in order of time."""
    books = Books()
    for calls in deployments:
        _one(calls, make(), stakes, books, count_from_s, until_s)
    return books


def _one(
    calls: Sequence[Call], policy: Idle, stakes: Stakes, books: Books, count_from_s: float, until_s: float
) -> None:
    idle_from_s: float | None = None  # None: before the first request, when nothing is there
    ready_s = 0.0
    for call in calls:
        if call.at_s >= until_s:
            break
        counts = call.at_s >= count_from_s
        if idle_from_s is None or call.at_s >= idle_from_s:
            steps = policy.steps()
            if idle_from_s is None:
                wake_s = max(step.rung.wake_s for step in steps)
                idle_from_s = call.at_s
            else:
                gap_s = call.at_s - idle_from_s
                wake_s = _rest(steps, gap_s, idle_from_s, stakes, books, count_from_s)
                policy.seen(gap_s)
            ready_s = call.at_s + wake_s
            if counts:
                books.add("waking", wake_s * stakes.waking_usd_per_h / 3600)
        wait_s = max(ready_s - call.at_s, 0.0)
        if counts:
            books.n_requests += 1
            books.waits_s.append(wait_s)
            books.n_late += wait_s > stakes.ttft_target_s
            books.late_usd += stakes.late(wait_s)
        idle_from_s = max(idle_from_s, call.at_s + wait_s + call.runs_s)
    if idle_from_s is not None and idle_from_s < until_s:
        _rest(policy.steps(), until_s - idle_from_s, idle_from_s, stakes, books, count_from_s)


def _rest(
    steps: Sequence[Step], gap_s: float, from_s: float, stakes: Stakes, books: Books, count_from_s: float
) -> float:
    """Books one gap; seconds until a request at its end is served. A climb begins early enough to be done at its step;
    a request in the middle of it waits for what is left."""
    wake_s = steps[0].rung.wake_s
    for i, step in enumerate(steps):
        before = steps[i - 1].rung if i else step.rung
        climb_s = max(before.wake_s - step.rung.wake_s, 0.0)
        began_s = max(step.from_s - climb_s, 0.0)
        if gap_s < began_s:
            break
        climbed_s = min(gap_s - began_s, climb_s)
        if climb_s and from_s + began_s >= count_from_s:
            books.add("waking", climbed_s * stakes.waking_usd_per_h / 3600)
        wake_s = max(before.wake_s - climbed_s, step.rung.wake_s) if climb_s else step.rung.wake_s
        end_s = min(steps[i + 1].from_s if i + 1 < len(steps) else gap_s, gap_s)
        rested_s = min(end_s - step.from_s, from_s + end_s - count_from_s)
        if rested_s > 0:
            books.add(step.rung.name, rested_s * step.rung.usd_per_h / 3600)
        if climb_s == 0 and gap_s < step.from_s:
            break
    return wake_s
