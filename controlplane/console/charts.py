"""Geometry of the console's charts: numbers in, SVG coordinates out. Pure; templates draw them.

Coordinates are in a fixed view box; the page stretches it. Empty or flat input gives a flat line, never an
error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

SPARK_WIDTH: Final = 240
SPARK_HEIGHT: Final = 48
_PAD: Final = 2.5  # room for the stroke


@dataclass(frozen=True, slots=True)
class Spark:
    """A sparkline: the line itself, and the closed area below it, as SVG path data."""

    line: str
    area: str
    flat: bool  # nothing but zeros
    width: int = SPARK_WIDTH
    height: int = SPARK_HEIGHT


@dataclass(frozen=True, slots=True)
class Segment:
    """Part of a bar. `series` is its index, for the colour."""

    x: float
    y: float
    width: float
    height: float
    series: int


@dataclass(frozen=True, slots=True)
class Bar:
    """One column of a bar chart; `x`, `width`: its slot, which also takes the pointer."""

    label: str
    x: float
    width: float
    total: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Bars:
    """A stacked bar chart. `ticks` are (y, value) of the grid lines, bottom first."""

    bars: tuple[Bar, ...]
    series: tuple[str, ...]
    ticks: tuple[tuple[float, int], ...]
    width: int
    height: int


def spark(values: Sequence[float]) -> Spark:
    """Path of `values`, oldest first, scaled to their own maximum; the baseline is zero."""
    points = list(values) or [0.0]
    if len(points) == 1:
        points = points * 2
    top = max(max(points), 0.0)
    step = SPARK_WIDTH / (len(points) - 1)
    usable = SPARK_HEIGHT - 2 * _PAD

    def y(value: float) -> float:
        return SPARK_HEIGHT - _PAD - (max(value, 0.0) / top * usable if top else 0.0)

    line = _smooth([(index * step, y(value)) for index, value in enumerate(points)])
    area = f"{line}L{SPARK_WIDTH} {SPARK_HEIGHT}L0 {SPARK_HEIGHT}Z"
    return Spark(line=line, area=area, flat=not top)


def bars(
    labels: Sequence[str], series: Mapping[str, Sequence[int]], *, width: int = 960, height: int = 220
) -> Bars:
    """Stacked columns, one per label; each series has one value per label. Values are whole and not negative."""
    totals = [sum(values[index] for values in series.values()) for index in range(len(labels))]
    top = nice_ceiling(max(totals, default=0))
    slot = width / max(len(labels), 1)
    gap = min(slot * 0.3, 14)
    columns = []
    for index, label in enumerate(labels):
        y = float(height)
        segments = []
        for number, values in enumerate(series.values()):
            size = values[index] / top * height
            if size > 0:
                y -= size
                segments.append(Segment(_r(index * slot + gap / 2), _r(y), _r(slot - gap), _r(size), number))
        columns.append(Bar(label, _r(index * slot), _r(slot), totals[index], tuple(segments)))
    ticks = tuple((_r(height - height * part / 4), top * part // 4) for part in range(5))
    return Bars(tuple(columns), tuple(series), ticks, width, height)


def nice_ceiling(value: int) -> int:
    """The smallest of 4, 8, 12, 20, 40, 80, 120, 200, … that is at least `value`: quarters of it are round."""
    scale = 4
    while True:
        for factor in (1, 2, 3, 5):
            if scale * factor >= value:
                return scale * factor
        scale *= 10


def _smooth(points: Sequence[tuple[float, float]]) -> str:
    """Path through the points with level tangents at each, so that it never overshoots them."""
    x0, y0 = points[0]
    path = [f"M{_r(x0)} {_r(y0)}"]
    for (ax, ay), (bx, by) in pairwise(points):
        middle = _r((ax + bx) / 2)
        path.append(f"C{middle} {_r(ay)} {middle} {_r(by)} {_r(bx)} {_r(by)}")
    return "".join(path)


def _r(value: float) -> float:
    return round(value, 1)
