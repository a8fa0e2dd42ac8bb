"""Two live cells with a Redis each and one Postgres: a tenant spread over both, and one cell's Redis lost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.stack import ROOT

pytestmark = [pytest.mark.stack, pytest.mark.full, pytest.mark.timeout(900)]


def test_limits_hold_over_both_and_a_lost_redis_touches_its_own_streams_only() -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "bench", "cells", "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert [goal for goal in report["goals"] if not goal["reached"]] == []
    assert len(report["limits"]) == 4
