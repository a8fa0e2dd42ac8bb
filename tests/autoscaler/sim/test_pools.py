"""Fleets of several kinds in a simulation: sized to keep their promise, judged by every request, told to the user."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from autoscaler.gpumix import cheapest
from autoscaler.policy.gpumix import Fleet, Kind, Promise, buckets, single
from autoscaler.sim.pools import judge, poisson, sized
from autoscaler.sim.replicas import kinds
from autoscaler.sim.workload import WorkloadError, read_sizes
from controlplane.policy.perfmodel import StepModel

FAST = Kind("fast", 4.0, StepModel(0.004, 0.006, 2e-5, 1e-5, 1e-8, 1e-9), 400_000)
SLOW = Kind("slow", 1.0, StepModel(0.010, 0.030, 2e-4, 1e-5, 5e-8, 1e-8), 60_000)
SIZES = [(100, 100)] * 60 + [(300, 400)] * 30 + [(6000, 50)] * 10
PROMISE = Promise(0.06, 2.0)


def test_a_sized_fleet_keeps_its_promise_to_requests_it_was_not_planned_with() -> None:
    found = sized(cheapest, [FAST, SLOW], SIZES, 20.0, PROMISE, seconds=90, seeds=(1, 2))
    alone = sized(single, [FAST, SLOW], SIZES, 20.0, PROMISE, seconds=90, seeds=(1, 2))
    assert found is not None and alone is not None
    fleet, _, wanted = found
    kept = judge(fleet, [FAST, SLOW], wanted, poisson(SIZES, 20.0, 150, 9), PROMISE, 9)
    assert kept.n > 2000
    assert kept.both >= 0.98
    assert fleet.usd_per_h <= alone[0].usd_per_h


def test_a_fleet_too_small_is_seen_to_break_its_promise() -> None:
    wanted = buckets(SIZES, 20.0)
    starved = Fleet({"slow": 1, "fast": 1}, [{"slow": 1.0}, {"slow": 1.0}, {"fast": 1.0}], 5.0)
    kept = judge(starved, [FAST, SLOW], wanted, poisson(SIZES, 60.0, 90, 1), PROMISE, 1)
    assert kept.ttft < 0.5
    # Nobody keeps the promise to 120 % of the requests.
    assert sized(cheapest, [FAST], SIZES, 20.0, PROMISE, kept_share=1.2, seconds=40, seeds=(1,)) is None


def test_a_size_without_a_bucket_goes_where_larger_ones_go() -> None:
    wanted = buckets([(6000, 50)], 5.0)
    plan = Fleet({"fast": 1}, [{"fast": 1.0}], 4.0)
    kept = judge(plan, [FAST, SLOW], wanted, poisson([(10, 5), (9000, 3)], 2.0, 90, 1), PROMISE, 1)
    assert kept.n > 80


def test_kinds_are_those_on_which_the_weights_fit_with_a_price_each() -> None:
    assert [kind.name for kind in kinds("llama-3.1-70b", ["l4", "h100_sxm"], [1, 4])] == ["4xh100_sxm"]
    assert kinds("llama-3.1-8b", ["h100_pcie"], prices={"h100_pcie": 2.5})[0].usd_per_h == 2.5
    with pytest.raises(ValueError, match="h100_pcie: has no price"):
        kinds("llama-3.1-8b", ["h100_pcie"])


def test_sizes_are_read_from_tables_of_lengths_and_others_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "lengths.csv"
    table.write_text("row,input_tokens,output_tokens\n0,12,7\n1,0,3\n")
    assert read_sizes(table) == [(12, 7), (1, 3)]
    table.write_text("row,length\n0,12\n")
    with pytest.raises(WorkloadError, match="input_tokens"):
        read_sizes(table)
    table.write_text("row,input_tokens,output_tokens\n0,twelve,7\n")
    with pytest.raises(WorkloadError, match="line 2"):
        read_sizes(table)


def test_the_command_recommends_a_fleet_and_where_each_size_goes(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n" + "300,100\n" * 40 + "3000,50\n" * 5)
    out = io.StringIO()
    args = ("--requests", str(path), "--rate", "10", "--gpus", "l4,h100_pcie=3", "--json")
    call_command("gpu_mix", *args, stdout=out, stderr=io.StringIO())
    report = json.loads(out.getvalue())
    assert report["mix"]["usd_per_h"] <= report["single"]["usd_per_h"]
    assert sum(row["requests_per_s"] for row in report["mix"]["routing"]) == pytest.approx(10, abs=0.01)
    for bad, told in (("h100_pcie", "no price"), ("abacus", "catalogue")):
        with pytest.raises(CommandError, match=told):
            call_command(
                "gpu_mix", "--requests", str(path), "--rate", "1", "--gpus", bad, stderr=io.StringIO()
            )
    with pytest.raises(CommandError, match="keeps the promise"):
        call_command(
            "gpu_mix", "--requests", str(path), "--rate", "1", "--itl-s", "0.001", stderr=io.StringIO()
        )
