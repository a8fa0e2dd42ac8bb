"""A gateway, Redis or Postgres lost under load: `manage.py drill` against the test's own stack, a few streams here,
64 in the long suite. What each promises is in infra/drills/catalog.py; the verdict is the drill's.
"""

from __future__ import annotations

import pytest

from benchmarks.stack import BenchStack
from tests.e2e.test_drills import assert_nothing_lost, drill

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def test_clients_of_a_killed_gateway_get_the_rest_from_the_other(stack: BenchStack) -> None:
    assert_nothing_lost(drill(stack, "kill-gateway", "--streams", "8", "--tokens", "200"), 8)


def test_an_empty_redis_costs_retryable_errors_and_no_replica(stack: BenchStack) -> None:
    report = drill(stack, "lose-redis", "--streams", "8", "--tokens", "200")
    totals, [run] = report["totals"], report["runs"]
    assert totals["n_failed_retryably"] == totals["n_failed"] > 0
    assert (totals["n_401"], run["beside"]["n_401"]) == (0, 0)
    assert totals["n_billed_once"] == totals["n_finished"]


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        "kill-gateway",
        "kill-redis",
        "trim-redis",
        "promote-redis",
        "lose-redis",
        "kill-postgres",
        "kill-control",
    ],
)
def test_the_whole_drill_with_64_streams(stack: BenchStack, name: str) -> None:
    report = drill(stack, name)
    if name in ("kill-gateway", "kill-postgres", "kill-control"):
        assert_nothing_lost(report, 64)
