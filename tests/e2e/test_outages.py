"""A gateway, Redis or Postgres lost under load: `manage.py drill` against the test's own stack, a few streams here,
64 in the long suite. What each promises is in infra/drills/catalog.py; the verdict is the drill's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.stack import ROOT, BenchStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]


def drill(stack: BenchStack, name: str, *args: str) -> dict[str, Any]:
    """The drill's report; fails with its problems when a promise was broken."""
    done = subprocess.run(
        [sys.executable, "manage.py", "drill", name, "--json", *args],
        cwd=ROOT, env=dict(stack.env), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, report["problems"]) == (0, []), report
    return report


def test_clients_of_a_killed_gateway_get_the_rest_from_the_other(stack: BenchStack) -> None:
    totals = drill(stack, "kill-gateway", "--streams", "8", "--tokens", "200")["totals"]
    assert (totals["n_finished"], totals["n_equal"], totals["n_billed_once"]) == (8, 8, 8)


def test_an_empty_redis_costs_retryable_errors_and_no_replica(stack: BenchStack) -> None:
    report = drill(stack, "lose-redis", "--streams", "8", "--tokens", "200")
    totals, [run] = report["totals"], report["runs"]
    assert totals["n_failed_retryably"] == totals["n_failed"] > 0
    assert (totals["n_401"], run["beside"]["n_401"]) == (0, 0)
    assert totals["n_billed_once"] == totals["n_finished"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["kill-gateway", "kill-redis", "trim-redis", "lose-redis", "kill-postgres"])
def test_the_whole_drill_with_64_streams(stack: BenchStack, name: str) -> None:
    report = drill(stack, name)
    if name != "lose-redis":
        assert report["totals"]["n_equal"] == 64
