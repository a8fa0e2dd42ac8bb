"""`manage.py quarantine` on a live stack of its own: the whole way with streams running, and a change of mind.

Its pool may have more than one machine: with one, the successor takes the place of what leaves, and nothing may stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.stack import ROOT, BenchStack, bench_stack

pytestmark = [pytest.mark.stack, pytest.mark.full, pytest.mark.timeout(900)]
N_STREAMS = 32


@pytest.fixture(scope="module")
def roomy() -> Iterator[BenchStack]:
    with bench_stack("toy", env_of=lambda _: {"CORRAL_MAX_MACHINES": "3"}) as running:
        yield running


def test_a_quarantined_machine_is_replaced_before_it_drains_and_no_stream_notices(roomy: BenchStack) -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "drill", "quarantine", "--streams", str(N_STREAMS), "--json"],
        cwd=ROOT, env=dict(roomy.env), capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    report: dict[str, Any] = json.loads(done.stdout)
    totals = report["totals"]
    for key in ("n_finished", "n_equal", "n_billed_once"):
        assert totals[key] == N_STREAMS, key
    for key in ("n_failed", "n_tokens_lost", "n_tokens_duplicated", "n_billed_twice", "n_not_billed"):
        assert totals[key] == 0, key
    assert totals["n_interrupted"] == N_STREAMS * 3 // 4, "all but the short ones were handed over"
    assert report["runs"][0]["notes"]["replacement"].startswith("served before the drain")


def test_one_that_may_stay_after_all_serves_on(
    roomy: BenchStack, eventually: Callable[[Callable[[], object], str], None]
) -> None:
    def machines() -> dict[str, dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(roomy.manage("quarantine", "--json"))
        return {row["machine"]: row for row in rows}

    eventually(lambda: {row["state"] for row in machines().values()} == {"ready"}, "the pool is quiet")
    mid = next(iter(machines()))
    told = roomy.manage_json("quarantine", mid, "--reason", "only a fright")
    assert (told["state"], told["reason"]) == ("draining", "quarantined: by hand: only a fright")
    assert roomy.manage_json("quarantine", mid, "--lift")["state"] == "ready"
    with pytest.raises(RuntimeError, match="not quarantined by hand"):
        roomy.manage("quarantine", mid, "--lift")
    # An agent that still believed in its end would have it leave again with its next beat, and end all it runs.
    agent = next(beat for beat in roomy.agent_beats() if f"mch_{beat.machine}" == mid)

    def has_beaten_on() -> bool:
        now = next((beat for beat in roomy.agent_beats() if beat.machine == agent.machine), None)
        return now is not None and now.seq > agent.seq + 3 and now.ends_in_ms is None

    eventually(has_beaten_on, "its agent beats on and knows of no end")
    row = machines()[mid]
    assert (row["state"], row["reason"]) == ("ready", "")
