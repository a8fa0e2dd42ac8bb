"""`manage.py bench autoscaler`: every part runs and is printed; its figures are for people."""

from __future__ import annotations

import pytest
from django.core.management import CommandError, call_command

from benchmarks import autoscaler


def test_sizes_and_the_purchase_plan_are_measured_and_printed() -> None:
    report = autoscaler.measure(
        repeats=1, progress=lambda line: None, replicas=60, deployments=12, limit_s=1.0
    )
    assert [(s["replicas"], s["deployments"]) for s in report["sizes"]] == [(6, 1), (20, 4), (60, 12)]
    assert all(s["pass_s"] > 0 for s in report["sizes"])
    bought = report["purchase"]
    assert bought["unmet"] == []
    assert bought["usd_per_h"] <= bought["greedy_usd_per_h"] + 1e-9
    text = autoscaler.as_text(report)
    assert "60 replicas,     12 deployments" in text
    assert "(1 = linear)" in text
    assert "limit 1 s" in text


def test_more_deployments_than_replicas_are_refused() -> None:
    with pytest.raises(CommandError, match="--deployments and --replicas"):
        call_command("bench", "autoscaler", "--replicas", "5", "--deployments", "6")


def test_an_option_that_the_benchmark_does_not_take_is_refused() -> None:
    with pytest.raises(
        CommandError, match="--only: autoscaler does not take it, only coldstart, engine, gateway"
    ):
        call_command("bench", "autoscaler", "--only", "plain")
