"""How figures are written."""

from datetime import timedelta

import pytest
from django.utils import timezone

from controlplane.console.templatetags import figures

NOW = timezone.now()


@pytest.mark.parametrize(
    ("filter_name", "value", "text"),
    [
        ("usd", 1_234_500_000_000, "$1,234.50"),
        ("usd", 1, "$0.000000001"),
        ("usd", None, "–"),
        ("usd_short", 12_345_678_901, "$12.35"),
        ("usd_short", 58_300_000, "$0.0583"),
        ("usd_short", 20_000_000, "$0.02"),
        ("usd_short", 500_000_000, "$0.50"),
        ("usd_short", 15_000, "$0.000015"),
        ("usd_short", 0, "$0.00"),
        ("usd_short", -2_000_000_000, "-$2.00"),
        ("count", 1_234, "1,234"),
        ("count", 1_234_567, "1.23 M"),
        ("count", 5_600_000_000, "5.60 B"),
        ("count", None, "–"),
        ("rate", 0, "0.0"),
        ("rate", 0.183, "0.18"),
        ("rate", 12.34, "12.3"),
        ("rate", 1234.5, "1,234"),
        ("ms", 840, "840 ms"),
        ("ms", 1_250, "1.25 s"),
        ("ms", 2_000, "2 s"),
        ("ms", 125_000, "2 min 5 s"),
        ("ms", None, "–"),
        ("tone", "ready", "ok"),
        ("tone", "no such phase", "rest"),
        ("result_words", "stop", "done"),
        ("result_words", "length", "max tokens"),
        ("result_words", "error", "error"),
        ("stage_words", "loading_model", "loading the model"),
        ("stage_words", "some_new_stage", "some new stage"),
    ],
)
def test_figures(filter_name: str, value: object, text: str) -> None:
    assert getattr(figures, filter_name)(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "now"), (12, "12 s ago"), (90, "1 min ago"), (7_300, "2 h ago"), (200_000, "2 d ago"), (-5, "now")],
)
def test_ages(seconds: int, text: str) -> None:
    assert figures.ago(NOW - timedelta(seconds=seconds), NOW) == text


def test_what_never_was_and_what_never_ends() -> None:
    assert figures.ago(None, NOW) == figures.until(None, NOW) == "never"
    assert figures.until(NOW + timedelta(minutes=59, seconds=30), NOW) == "in 59 min"
    assert figures.age(NOW - timedelta(hours=5), NOW) == "5 h"
    assert figures.percent_of(1, 0) == 0
