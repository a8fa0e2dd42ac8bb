"""Line, step and bar charts as SVG text, for report.py: pure text out, no library, no script.

Colours come from the page's CSS variables (`--c0` …), so that a chart follows the reader's light or dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 920
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 34
N_COLOURS: Final = 8


@dataclass(frozen=True, slots=True)
class Line:
    """Points in data units. `is_step`: each value holds until the next; `is_area`: filled down to zero."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_step: bool = False
    is_area: bool = False
    is_dashed: bool = False


def chart(lines: Sequence[Line], *, unit: str, height: int = 240, percent: bool = False) -> str:
    """Lines over time (seconds on the x axis). `percent`: the y axis ends at 100 %, and begins where the data does."""
    points = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not points:
        return '<p class="none">nothing to draw</p>'
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    x_high = x_high if x_high > x_low else x_low + 1
    y_high = 1.0 if percent else max(y for _, y in points) * 1.05 or 1.0
    y_low = min(min(y for _, y in points), 0.9) if percent else 0.0
    y_ticks = ticks(y_low, y_high)
    if percent:
        y_low = min(y_low, y_ticks[0])
    plot_w, plot_h = WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def x_of(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * plot_w

    def y_of(y: float) -> float:
        return _TOP + (1 - (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)) * plot_h

    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(unit)} over time">']
    for y in y_ticks:
        text = f"{y:.4g}" if not percent else f"{y:.4%}".rstrip("0%").rstrip(".") + " %"
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{text}</text>')
    scale, name = (86400.0, "d") if x_high - x_low > 3 * 86400 else (3600.0, "h")
    if x_high - x_low < 7200:
        scale, name = 60.0, "min"
    for x in ticks(x_low / scale, x_high / scale, 8):
        at = x_of(x * scale)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_TOP + plot_h}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{x:.4g} {name}</text>'
        )
    parts.append(f'<text class="unit" x="{_LEFT}" y="{height - 3}">{escape(unit)}</text>')
    for line in lines:
        parts.append(_path(line, x_of, y_of, _TOP + plot_h))
    parts.append("</svg>")
    return "".join(parts)


def bars(rows: Sequence[tuple[str, float, str]], *, colour: int = 0, mark: float | None = None) -> str:
    """Horizontal bars: (name, value, text beside it). `mark` draws a line there, for a target."""
    high = max([value for _, value, _ in rows if math.isfinite(value)] + [mark or 0.0, 1e-12])
    left, row_h = 150, 22
    height = row_h * len(rows) + 8
    room = WIDTH - left - 230
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bars">']
    for at, (name, value, text) in enumerate(rows):
        y = at * row_h + 4
        length = max(value, 0.0) / high * room if math.isfinite(value) else 0.0
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y + 2}" width="{max(length, 1):.1f}" height="{row_h - 7}" fill="var(--c{colour})"/>'
        )
        parts.append(f'<text x="{left + length + 6:.1f}" y="{y + 14}">{escape(text)}</text>')
    if mark is not None:
        x = left + mark / high * room
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
    parts.append("</svg>")
    return "".join(parts)


def legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<span><i class="{"dash" if line.is_dashed else ""}" style="--c:var(--c{line.colour})"></i>'
        f"{escape(line.name)}</span>"
        for line in lines
    )
    return f'<div class="legend">{items}</div>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within the range, at most about `most`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _path(line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float], floor: float) -> str:
    points = [(x_of(x), y_of(y)) for x, y in line.points if math.isfinite(y)]
    if not points:
        return ""
    words = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for x, y in points[1:]:
        words.append(f"H{x:.1f}V{y:.1f}" if line.is_step else f"L{x:.1f} {y:.1f}")
    style = f"stroke:var(--c{line.colour})" + (";stroke-dasharray:5 4" if line.is_dashed else "")
    drawn = f'<path class="line" style="{style}" d="{"".join(words)}"/>'
    if line.is_area:
        area = "".join(words) + f"V{floor:.1f}H{points[0][0]:.1f}Z"
        drawn = f'<path class="area" style="fill:var(--c{line.colour})" d="{area}"/>' + drawn
    return drawn
