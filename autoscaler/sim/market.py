"""Spot capacity by zone as recorded, and what it does to machines that run there.

A zone's capacity is a step function; a drop below what is held takes the newest machines away, `notice_s` after telling
them (0: no word at all). A zone that is about to drop gives nothing new. Prices are constant per zone or a series. Read
from the availability and preemption files of docs/simulator.md.
"""

from __future__ import annotations

import bisect
import json
import math
from dataclasses import dataclass
from pathlib import Path

from autoscaler.sim.workload import WorkloadError, open_text


class MarketError(ValueError):
    """A file that is not a capacity trace: says which and why."""


@dataclass(frozen=True, slots=True)
class Zone:
    """`capacity[i]` machines could be had from `i * gap_s` on. USD per machine hour."""

    name: str
    gap_s: float
    capacity: tuple[int, ...]
    usd_per_h: float

    def at(self, now_s: float) -> int:
        """Machines that can be held now; nothing after the recording's end."""
        index = int(now_s // self.gap_s)
        return self.capacity[index] if 0 <= index < len(self.capacity) else 0

    @property
    def end_s(self) -> float:
        return len(self.capacity) * self.gap_s

    def drops(self) -> tuple[tuple[float, int], ...]:
        """(instant, new capacity) at each fall."""
        found = []
        for index in range(1, len(self.capacity)):
            if self.capacity[index] < self.capacity[index - 1]:
                found.append((index * self.gap_s, self.capacity[index]))
        return tuple(found)

    def window(self, start_s: float, length_s: float) -> Zone:
        """The recording from `start_s` on, wrapped around at its end, so that any start gives a full window."""
        n = len(self.capacity)
        first, count = int(start_s // self.gap_s), math.ceil(length_s / self.gap_s)
        return Zone(
            self.name, self.gap_s, tuple(self.capacity[(first + i) % n] for i in range(count)), self.usd_per_h
        )


def read_zone(path: Path, *, usd_per_h: float, machines_per_unit: int = 1) -> Zone:
    """A zone of one recorded file. `machines_per_unit`: what an availability of 1 is taken to mean, because a probe of
    one machine cannot tell how many there were; an assumption that every table states."""
    try:
        with open_text(path) as lines:
            document = json.load(lines)
    except WorkloadError as error:
        raise MarketError(str(error)) from None
    except ValueError:
        raise MarketError(
            f"{path.name}: is no JSON; a capacity file has metadata.gap_seconds and data"
        ) from None
    document = document if isinstance(document, dict) else {}
    metadata = document.get("metadata")
    (gap_s,) = _numbers([metadata.get("gap_seconds") if isinstance(metadata, dict) else None]) or (0.0,)
    counts = _numbers(document.get("data"))
    if gap_s <= 0 or not counts:
        raise MarketError(
            f"{path.name}: needs metadata.gap_seconds (a number above 0) and data (a list of counts, none negative)"
        )
    capacity = tuple(int(count) * machines_per_unit for count in counts)
    if document.get("prices"):
        known = [price for price in _numbers([p or 0 for p in document["prices"]]) if price]
        if not known:
            raise MarketError(f"{path.name}: prices: give a list of USD an hour, or leave it out")
        usd_per_h = sum(known) / len(known)
    return Zone(path.name.removesuffix(".gz").removesuffix(".json"), gap_s, capacity, usd_per_h)


def _numbers(values: object) -> tuple[float, ...]:
    """Finite numbers, none negative; none at all where anything else stands."""
    if not isinstance(values, list):
        return ()
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return ()
    return found if all(math.isfinite(value) and value >= 0 for value in found) else ()


@dataclass(frozen=True, slots=True)
class Steps:
    """A step function of time: `values[i]` from `at_s[i]` on; before the first instant the first value."""

    at_s: tuple[float, ...]
    values: tuple[int, ...]

    def __call__(self, now_s: float) -> int:
        return self.values[max(bisect.bisect_right(self.at_s, now_s) - 1, 0)]

    def least(self, from_s: float, until_s: float) -> int:
        """The lowest value at any instant of the span."""
        first = max(bisect.bisect_right(self.at_s, from_s) - 1, 0)
        return min(self.values[first : max(bisect.bisect_left(self.at_s, until_s), first + 1)])
