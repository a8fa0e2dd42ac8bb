"""The report of a drill: what it adds to the verdicts of its runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from controlplane.drills.report import as_table, over
from infra.drills.catalog import DRILLS
from infra.drills.run import Result
from infra.drills.scene import Strike
from infra.drills.verdict import Verdict

FACTS: dict[str, Any] = {
    "n_streams": 2,
    "n_tokens": 9,
    "versions": {"python": "3.11"},
    "running": {"redis": 7},
}


def a_run(recovery_s: float = 1.0, *problems: str) -> Result:
    verdict = Verdict(
        2,
        n_finished=2,
        n_equal=2,
        n_billed_once=2,
        n_interrupted=2,
        n_went_on=2,
        recovery_median_s=recovery_s,
        recovery_worst_s=recovery_s + 1,
        problems=list(problems),
    )
    strike = Strike()
    strike.done("SIGKILL to somebody")
    strike.notes["agent"] = "adopted"
    return Result(verdict, strike, reference_s=1.0, run_s=2.0, tokens_per_s=50.0)


def test_one_broken_promise_in_one_run_fails_the_drill() -> None:
    assert over("kill-worker", DRILLS["kill-worker"], "toy", [a_run(), a_run()], FACTS)["passed"]
    report = over("kill-worker", DRILLS["kill-worker"], "toy", [a_run(), a_run(1.0, "billed twice")], FACTS)
    assert not report["passed"]
    assert report["problems"] == ["run 2: billed twice"]


def test_recovery_is_judged_over_all_runs_where_the_drill_has_a_limit() -> None:
    drill = replace(DRILLS["kill-worker"], recovery_limit_s=5.0)
    slow = [a_run(s) for s in (1.0, 5.1, 9.0)]
    assert over("x", drill, "toy", slow, FACTS)["problems"] == [
        "the next token came after 5.10 s (median), allowed 5 s"
    ]
    assert over("x", drill, "toy", [a_run(s) for s in (1.0, 4.9, 9.0)], FACTS)["passed"]
    assert over("x", drill, "vllm", slow, FACTS)["passed"], (
        "the limit is for the engine that costs nothing to start"
    )


def test_totals_are_sums_over_runs() -> None:
    totals = over("kill-worker", DRILLS["kill-worker"], "toy", [a_run()] * 3, FACTS)["totals"]
    assert (totals["n_streams"], totals["n_finished"], totals["n_billed_once"]) == (6, 6, 6)


@pytest.mark.parametrize(("problems", "word"), [((), "PASSED"), (("it broke",), "FAILED")])
def test_the_table_says_what_was_done_and_how_it_ended(problems: tuple[str, ...], word: str) -> None:
    text = as_table(over("kill-worker", DRILLS["kill-worker"], "toy", [a_run(1.0, *problems)], FACTS))
    for expected in (f"kill-worker: {word}", "SIGKILL to somebody", "2 of 2 finished", "redis 7", "adopted"):
        assert expected in text
    assert all(problem in text for problem in problems)


@pytest.mark.parametrize(
    ("n_went_on", "recovery_s", "says"),
    [
        (0, None, "none: no stream went on"),
        (2, None, "no pause: 2 of 2 streams went on"),
        (1, 0.4, "0.40 s after the fault (median)"),
        (1, 0.4, "1 did not go on"),
    ],
)
def test_a_stream_that_did_not_go_on_is_not_told_as_one_that_went_on_at_once(
    n_went_on: int, recovery_s: float | None, says: str
) -> None:
    result = a_run()
    result.verdict.n_went_on = n_went_on
    result.verdict.recovery_median_s = result.verdict.recovery_worst_s = recovery_s
    report = over("lose-redis", DRILLS["lose-redis"], "toy", [result], FACTS)
    line = next(line for line in as_table(report).splitlines() if "next token" in line)
    assert says in line
    assert report["recovery_median_s"] == recovery_s
