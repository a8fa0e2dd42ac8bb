"""What a deployment's load will be when a machine ordered now could serve, and how far off that usually is. Pure.

Four rules foretell the load `lead_s` ahead: it stays; it goes on as it has; it moves as it does at this time of day; as
it does at this hour of the week. Each is held to what came, and the one with the least absolute error speaks, so a
season that does not exist costs nothing. Errors are kept relative to the square root of what was foretold, which is how
a sum of independent requests scatters: the share of spare capacity falls as a deployment grows (square-root
staffing; Halfin and Whitt 1981). Until it has been checked often enough the answer is None, "cannot tell".

Called by replicas.py in every tick; the memory is small enough to be stored with every decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

DAY_S: Final = 86400.0
BIN_S: Final = 1800.0  # of the day's profile
HOUR_S: Final = 3600.0  # of the week's
N_DAY: Final = 48
N_WEEK: Final = 168
N_PENDING: Final = 12  # forecasts under way
NEWEST: Final = 0.5  # weight of the newest day or week in a profile: the one before counts half as much
N_PROVEN: Final = 20  # forecasts checked before any is believed
ERROR_WEIGHT: Final = 0.005  # of the newest error: about the last two hundred count, an hour of ticks
NORMAL: Final = 1.2533  # deviation over mean absolute error of a normal distribution
RULES: Final = ("stays", "goes on", "time of day", "hour of week")


@dataclass(frozen=True, slots=True)
class Pending:
    """What each rule said of the load at `due_at_s`."""

    due_at_s: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ForecastMemory:
    """Bounded: two profiles (0 = never seen), a few forecasts under way, one mean absolute error per rule (absolute,
    because one jump must not set the reserve for hours)."""

    at_s: float = 0.0
    level: float = 0.0  # the load, smoothed over a twelfth of the lead: a jump must not wait
    slope_per_s: float = 0.0  # smoothed over several
    day: tuple[float, ...] = (0.0,) * N_DAY
    week: tuple[float, ...] = (0.0,) * N_WEEK
    bin_sum: float = 0.0  # of the half hour under way
    bin_n: int = 0
    hour_sum: float = 0.0
    hour_n: int = 0
    pending: tuple[Pending, ...] = ()
    errors: tuple[float, ...] = ()
    n_checked: int = 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Load at `lead_s` from now: expected, and its deviation. `rule` spoke."""

    load: float
    deviation: float
    rule: str

    def high(self, n_deviations: float) -> float:
        return max(self.load + n_deviations * self.deviation, 0.0)


def learn(
    now_s: float, load: float, lead_s: float, memory: ForecastMemory | None, served: float | None = None
) -> ForecastMemory:
    """One observation more: `load` in requests at `now_s`, of which `served` found a place (all, if not given).

    A backlog is no demand: profiles and errors are made of what was served. Looks backwards in time are ignored.
    """
    served = load if served is None else served
    if memory is None:
        return ForecastMemory(at_s=now_s, level=load)
    passed_s = now_s - memory.at_s
    if passed_s <= 0:
        return memory
    memory = _profile(now_s, served, memory)
    level = memory.level + (load - memory.level) * _weight(passed_s, lead_s / 12)
    slope = (level - memory.level) / passed_s
    memory = replace(
        memory,
        at_s=now_s,
        level=level,
        slope_per_s=memory.slope_per_s + (slope - memory.slope_per_s) * _weight(passed_s, 3 * lead_s),
    )
    memory = _check(now_s, served, served < load, memory)
    if len(memory.pending) < N_PENDING and (
        not memory.pending or now_s + lead_s - memory.pending[-1].due_at_s >= lead_s / N_PENDING
    ):
        said = Pending(now_s + lead_s, _foretell(now_s, lead_s, memory))
        memory = replace(memory, pending=(*memory.pending, said))
    return memory


def forecast(now_s: float, lead_s: float, memory: ForecastMemory) -> Forecast | None:
    """What the best rule says; None until N_PROVEN forecasts were checked."""
    if memory.n_checked < N_PROVEN:
        return None
    best = min(range(len(memory.errors)), key=lambda i: (memory.errors[i], i))
    load = _foretell(now_s, lead_s, memory)[best]
    return Forecast(load, NORMAL * memory.errors[best] * math.sqrt(max(load, 1.0)), RULES[best])


def _foretell(now_s: float, lead_s: float, memory: ForecastMemory) -> tuple[float, ...]:
    level = memory.level
    return (
        level,
        max(level + memory.slope_per_s * lead_s, 0.0),
        level * _ratio(memory.day, BIN_S, now_s, lead_s),
        level * _ratio(memory.week, HOUR_S, now_s, lead_s),
    )


def _check(now_s: float, load: float, is_capped: bool, memory: ForecastMemory) -> ForecastMemory:
    """Hold what is due against what came; capped by what could be served, it says nothing of forecasts above it."""
    due = [p for p in memory.pending if p.due_at_s <= now_s]
    if not due:
        return memory
    errors, n = memory.errors, memory.n_checked
    for said in due:
        if is_capped and load < max(said.values):
            continue
        missed = tuple(abs(load - value) / math.sqrt(max(value, 1.0)) for value in said.values)
        n += 1
        weight = max(ERROR_WEIGHT, 1 / n)  # the first ones count as their plain mean
        errors = tuple(
            round(old + (new - old) * weight, 4) for old, new in zip(errors or missed, missed, strict=True)
        )
    rest = tuple(p for p in memory.pending if p.due_at_s > now_s)
    return replace(memory, pending=rest, errors=errors, n_checked=min(n, 10_000))


def _profile(now_s: float, load: float, memory: ForecastMemory) -> ForecastMemory:
    """Add to the half hour and the hour under way; one that is over goes into its profile."""
    day, week = memory.day, memory.week
    bin_sum, bin_n, hour_sum, hour_n = memory.bin_sum, memory.bin_n, memory.hour_sum, memory.hour_n
    if now_s // BIN_S != memory.at_s // BIN_S:
        day, bin_sum, bin_n = _fold(day, int(memory.at_s // BIN_S) % N_DAY, bin_sum, bin_n), 0.0, 0
    if now_s // HOUR_S != memory.at_s // HOUR_S:
        week, hour_sum, hour_n = _fold(week, int(memory.at_s // HOUR_S) % N_WEEK, hour_sum, hour_n), 0.0, 0
    return replace(
        memory,
        day=day,
        week=week,
        bin_sum=bin_sum + load,
        bin_n=bin_n + 1,
        hour_sum=hour_sum + load,
        hour_n=hour_n + 1,
    )


def _fold(profile: tuple[float, ...], at: int, total: float, n: int) -> tuple[float, ...]:
    if not n:
        return profile
    mean = max(total / n, 0.01)  # 0 means never seen
    old = profile[at]
    value = mean if old == 0 else old + (mean - old) * NEWEST
    return (*profile[:at], round(value, 2), *profile[at + 1 :])


def _ratio(profile: tuple[float, ...], step_s: float, now_s: float, lead_s: float) -> float:
    """How the profile moves over the lead; 1 where it was never seen. At most fourfold either way."""
    now, then = _at(profile, step_s, now_s), _at(profile, step_s, now_s + lead_s)
    if now is None or then is None:
        return 1.0
    return min(max(then / now, 0.25), 4.0)


def _at(profile: tuple[float, ...], step_s: float, at_s: float) -> float | None:
    """Between the middles of two steps."""
    place = at_s / step_s - 0.5
    low = math.floor(place)
    a, b = profile[low % len(profile)], profile[(low + 1) % len(profile)]
    if a == 0 or b == 0:
        return None
    return a + (b - a) * (place - low)


def _weight(passed_s: float, over_s: float) -> float:
    return 1 - math.exp(-passed_s / max(over_s, 1e-9))
