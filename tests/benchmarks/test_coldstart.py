"""The report of `manage.py bench coldstart`: medians by rung, goals, and what could not be measured."""

from __future__ import annotations

import pytest

from benchmarks import coldstart
from benchmarks.coldstart import Round


def _round(request_ms: float) -> Round:
    return Round(
        request_ms=request_ms,
        command_ms=request_ms - 50,
        cpu_ms={"machine": 600.0, "gateway": 20.0, "web": 0.0},
        stages_ms={"until the replica was ordered": 50.0, "until it was ready": request_ms - 60},
        told=["corral stage=starting_replica eta_ms=200"],
    )


def test_each_rung_has_its_median_its_cpu_and_its_goal() -> None:
    rounds = {"machine_warm_tiny": [_round(ms) for ms in (700, 900, 2000)]}
    report = coldstart._report(rounds, {"machine_warm_smollm2": "no such package"}, 3)
    assert report["machine_warm_tiny_ms"] == {"median": 900, "min": 700, "max": 2000, "n": 3}
    assert report["machine_warm_tiny_cpu_ms"]["median"] == 620
    assert report["goals"] == [
        {"figure": "machine_warm_tiny_ms", "goal_at_most": 1500, "median": 900, "reached": True}
    ]
    said = coldstart.as_text(report)
    assert "machine_warm_tiny: 900 ms (min 700, max 2000, n=3), goal ≤ 1500: reached; CPU 620 ms" in said
    assert "CPU ms: gateway 20, machine 600" in said
    assert "machine_warm_smollm2: NOT measured: no such package" in said


def test_a_rung_that_does_not_exist_is_said_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="none of machine_warm_tiny"):
        coldstart.measure(only="disk")
