"""Drills whose machines are bought in a simulated region: weights from a real S3 server, notices as AWS gives them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.stack import ROOT

pytestmark = [pytest.mark.stack, pytest.mark.full, pytest.mark.timeout(900)]


def drill(name: str, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "manage.py", "drill", name, "--region", *options, "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("name", ["spot-notice", "spot-event"])
def test_a_bought_machine_is_replaced_before_it_drains_and_no_stream_notices(name: str) -> None:
    report = drill(name, "--streams", "32")
    totals, region = report["totals"], report["region"]
    for key in ("n_finished", "n_equal", "n_billed_once"):
        assert totals[key] == 32, key
    for key in ("n_failed", "n_tokens_lost", "n_tokens_duplicated", "n_billed_twice", "n_not_billed"):
        assert totals[key] == 0, key
    assert totals["n_interrupted"] == 24, "all but the short ones were handed over"
    assert report["runs"][0]["notes"]["replacement"].startswith("served before the drain")
    # The drained machine and its successor, and at most each machine that was bought: a spare fetches ahead.
    assert 2 <= region["n_fetched_weights"] <= region["n_bought"]
    for key in ("n_bought_twice", "n_unknown", "n_left"):
        assert region[key] == 0, key
