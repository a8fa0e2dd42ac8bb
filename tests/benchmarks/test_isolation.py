"""`bench isolation`: when the victim noticed too much, and when the weights were kept."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.isolation import FIGURES, OTHER, VICTIM, WEIGHTS, bodies, figures_of, goals


def arm(first_ms: float, gap_ms: float) -> dict[str, Any]:
    run = dict.fromkeys(FIGURES, 1.0) | {"first_p99_ms": first_ms, "gap_p99_ms": gap_ms, "n_refused": 2}
    return figures_of([run, run, run])


def reached(first_ms: float, gap_ms: float, n_other: int) -> list[bool]:
    arms = {"alone": {VICTIM: arm(1000, 20)}, "attacked": {VICTIM: arm(first_ms, gap_ms)}}
    weights = {name: {"weight": WEIGHTS[name], "tokens": n} for name, n in ((VICTIM, 1000), (OTHER, n_other))}
    return [row["reached"] for row in goals(arms, weights)]


@pytest.mark.parametrize(
    ("first_ms", "gap_ms", "n_other", "expected"),
    [
        (1200, 24, 3150, [True, True, True]),
        (1210, 20, 3000, [False, True, True]),
        (900, 24.5, 3000, [True, False, True]),
        (900, 20, 3160, [True, True, False]),
        (900, 20, 2840, [True, True, False]),
    ],
)
def test_each_promise_is_judged_by_itself(
    first_ms: float, gap_ms: float, n_other: int, expected: list[bool]
) -> None:
    assert reached(first_ms, gap_ms, n_other) == expected


def test_refusals_of_all_runs_are_told() -> None:
    assert arm(1, 1)["refused"] == 6


def test_answers_differ_in_length_and_prompts_share_no_beginning() -> None:
    sent = [json.loads(body) for body in bodies("acme/m", 20)]
    assert len({body["max_tokens"] for body in sent}) > 10
    assert len({body["messages"][0]["content"][:10] for body in sent}) == len(sent)
