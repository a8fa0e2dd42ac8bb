"""Geometry of the charts."""

import re

from hypothesis import given
from hypothesis import strategies as st

from controlplane.console.charts import SPARK_HEIGHT, SPARK_WIDTH, bars, nice_ceiling, spark

NUMBERS = r"-?\d+(?:\.\d+)?"


@given(st.lists(st.floats(0, 1e12), max_size=80))
def test_a_sparkline_stays_in_its_box(values: list[float]) -> None:
    path = spark(values).area
    numbers = [float(each) for each in re.findall(NUMBERS, path)]
    assert all(0 <= x <= SPARK_WIDTH for x in numbers[0::2])
    assert all(0 <= y <= SPARK_HEIGHT for y in numbers[1::2])


def test_the_highest_value_touches_the_top_and_zero_the_bottom() -> None:
    line = spark([0, 10]).line
    assert line.startswith("M0.0 45.5")
    assert line.endswith("240.0 2.5")


def test_nothing_and_zeros_are_a_flat_line() -> None:
    assert spark([]).flat and spark([0, 0, 0]).flat
    assert not spark([0, 1]).flat


@given(st.integers(0, 10**15))
def test_the_ceiling_is_above_near_and_a_multiple_of_four(value: int) -> None:
    top = nice_ceiling(value)
    assert top >= value and top % 4 == 0
    assert value <= 4 or top < 2.1 * value


@given(st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), min_size=1, max_size=31))
def test_bars_are_as_high_as_their_totals(days: list[tuple[int, int]]) -> None:
    chart = bars([str(n) for n in range(len(days))], {"a": [a for a, _ in days], "b": [b for _, b in days]})
    top = chart.ticks[-1][1]
    for bar, (a, b) in zip(chart.bars, days, strict=True):
        assert bar.total == a + b
        assert abs(sum(segment.height for segment in bar.segments) - (a + b) / top * chart.height) < 0.3
        assert all(-0.1 <= segment.y <= chart.height for segment in bar.segments)


def test_a_chart_of_nothing_stands() -> None:
    chart = bars([], {})
    assert chart.bars == () and len(chart.ticks) == 5
