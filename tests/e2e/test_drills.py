"""Drills on the live stack: what `manage.py drill` promises, with few streams here and with 64 under `full`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import psycopg
import pytest

from benchmarks.stack import ROOT, BenchStack
from infra.local.preflight import engine_verdict, gather

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def drill(stack: BenchStack, name: str, *options: str) -> dict[str, Any]:
    """The report of a drill that must pass, however slow the machine: time is judged in `test_seven_silent_deaths`."""
    done = subprocess.run(
        [sys.executable, "manage.py", "drill", name, *options, "--json"],
        cwd=ROOT, env=dict(stack.env), capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["passed"]
    return report


def assert_nothing_lost(report: dict[str, Any], n_streams: int) -> None:
    totals = report["totals"]
    for key in ("n_finished", "n_equal", "n_billed_once"):
        assert totals[key] == n_streams * report["n_runs"], key
    for key in ("n_failed", "n_tokens_lost", "n_tokens_duplicated", "n_billed_twice", "n_not_billed"):
        assert totals[key] == 0, key


@pytest.mark.parametrize("name", ["kill-worker", "kill-engine", "duplicate"])
def test_streams_survive_and_the_drill_leaves_nothing_behind(
    stack: BenchStack, operator: psycopg.Connection, name: str
) -> None:
    report = drill(stack, name, "--streams", "8", "--tokens", "200", "--within-s", "60")
    assert_nothing_lost(report, 8)
    assert report["recovery_limit_s"] == 60.0
    assert report["runs"][0]["fault"]
    assert report["totals"]["n_interrupted"] == 8, "every stream was struck"
    live = (
        "SELECT count(*) FROM autoscaler_replica r JOIN deployments_deployment d ON d.id = r.deployment_id "
        "WHERE d.name LIKE 'drill-%' AND (r.phase NOT IN ('stopped', 'failed') OR d.deleted_at IS NULL)"
    )
    assert operator.execute(live).fetchone() == (0,)


@pytest.mark.parametrize(
    ("name", "option", "value", "says"),
    [
        ("kill-worker", "--streams", "0", "--streams 0: give 1 to 1000"),
        ("kill-worker", "--within-s", "601", "--within-s 601: give up to 600 seconds"),
        ("kill-postgres", "--within-s", "9", "--within-s: kill-postgres is not judged by its silence"),
    ],
)
def test_a_drill_that_cannot_be_carried_out_says_so_and_is_no_pass(
    stack: BenchStack, name: str, option: str, value: str, says: str
) -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "drill", name, option, value],
        cwd=ROOT, env=dict(stack.env), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["kill-engine", "hang-engine", "spot-notice", "duplicate", "kill-agent", "poison"]
)
def test_sixty_four_streams(stack: BenchStack, name: str) -> None:
    # A replacement takes 20 s on a busy machine: streams that have ended before the drain are handed to nobody.
    longer = ("--tokens", "3000") if name == "spot-notice" else ()
    assert_nothing_lost(drill(stack, name, *longer), 64)


@pytest.mark.full
def test_seven_silent_deaths(stack: BenchStack) -> None:
    report = drill(stack, "kill-worker", "--repeats", "7")
    assert_nothing_lost(report, 64)
    assert report["recovery_limit_s"] == 5.0, "which the drill has judged"


@pytest.mark.full
@pytest.mark.engine
@pytest.mark.parametrize("name", ["kill-worker", "kill-engine"])
def test_the_real_engine_goes_on_with_the_same_text(stack: BenchStack, name: str) -> None:
    runs, why = engine_verdict(gather())
    if not runs:
        pytest.skip(f"the engine cannot run on this machine: {why}")
    report = drill(stack, name, "--engine", "vllm", "--model", "tiny", "--tokens", "300")
    assert_nothing_lost(report, 64)


@pytest.mark.full
def test_an_earlier_version_is_upgraded_under_sixty_four_streams() -> None:
    inside = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD~1"], cwd=ROOT, capture_output=True, check=False
    )
    if inside.returncode:
        pytest.skip("no history here to check an earlier version out of")
    done = subprocess.run(
        [sys.executable, "manage.py", "drill", "rolling-upgrade", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    report = json.loads(done.stdout)
    assert_nothing_lost(report, 64)
    assert report["runs"][0]["beside"]["n_refused"] == 0
