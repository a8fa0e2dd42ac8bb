"""Every kind of limit at every level, on a virtual clock: who refuses, what is told, and when it is over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import redis

from tests.workers.test_scripts import KEYS, Cell
from workers import scripts

SCOPES = ("key", "prj", "org")
IDS = {"key": "k1", "prj": "p1", "org": "o1"}


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    with redis.Redis.from_url(redis_url) as client:
        yield Cell(client)


def _heads(verdict: list[Any]) -> list[list[int]]:
    """[cap, remaining, ms until full] of requests, input and output tokens."""
    at = {b"bound": 4, b"queued": 5, b"refused": 6, b"full": 3, b"late": 3}[verdict[0]]
    found = [int(number) for number in verdict[at:]]
    return [found[0:3], found[3:6], found[6:9]] if found else []


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("limit", "cap", "name", "row"),
    [
        ("rpm", 3, b"requests_per_minute", 0),
        ("in", 35, b"input_tokens_per_minute", 1),
        ("out", 70, b"output_tokens_per_minute", 2),
    ],
)
def test_a_rate_refuses_tells_and_is_over_when_it_said(
    cell: Cell, scope: str, limit: str, cap: int, name: bytes, row: int
) -> None:
    """Three requests of 10 prompt and 20 output tokens fit; the fourth does after the time it was told."""
    limits = {f"{scope}_{limit}": cap}
    cost = (1, 10, 20)[row]
    for n in range(1, 4):
        admitted = cell.admit(f"q{n}", **limits)
        assert admitted[0] == b"queued"
        level = float(cell.limit(scope, IDS[scope])[(b"rq", b"in", b"out")[row]])
        assert level == cap - n * cost, "what is enforced"
        assert _heads(admitted)[row] == [cap, level, -(-n * cost * 60_000 // cap)], "is what is told"
        assert [head for i, head in enumerate(_heads(admitted)) if i != row] == [[-1, -1, -1]] * 2
    refused = cell.admit("q4", **limits)
    assert refused[:3] == [b"refused", scope.encode(), name]
    assert _heads(refused)[row][:2] == [cap, cap - 3 * cost], "a refusal takes nothing"
    retry_ms = refused[3]
    assert 0 < retry_ms <= 60_000
    cell.now_ms += retry_ms - 1
    assert cell.admit("q4", **limits)[0] == b"refused"
    cell.now_ms += 1
    assert cell.admit("q4", **limits)[0] == b"queued"


@pytest.mark.parametrize("scope", SCOPES)
def test_concurrency_refuses_until_one_ends(cell: Cell, scope: str) -> None:
    limits = {f"{scope}_conc": 2}
    cell.admit("q1", **limits)
    cell.now_ms += 3_000
    cell.settle("q1")
    cell.admit("q2", **limits)
    cell.admit("q3", **limits)
    refused = cell.admit("q4", **limits)
    assert refused[:3] == [b"refused", scope.encode(), b"concurrency"]
    assert refused[3] == 1_500, "two that usually take three seconds: one ends within half of that"
    cell.settle("q2")
    assert cell.admit("q4", **limits)[0] == b"queued"


@pytest.mark.parametrize("scope", SCOPES)
def test_money_refuses_until_there_is_more(cell: Cell, scope: str) -> None:
    cell.run(scripts.SEED, KEYS.prefix, scope, IDS[scope], 0)
    assert cell.admit("q1", **{f"{scope}_budget": 60})[0] == b"queued"
    refused = cell.admit("q2", **{f"{scope}_budget": 60})
    assert refused[:6] == [b"refused", scope.encode(), b"budget", -1, 60, 10], "no time helps: no Retry-After"
    assert cell.admit("q3", **{f"{scope}_budget": 100})[0] == b"queued"


def test_the_tightest_level_is_told(cell: Cell) -> None:
    admitted = cell.admit("q1", key_rpm=100, prj_rpm=7, org_rpm=50, key_in=500, org_in=90, prj_out=200)
    assert [head[:2] for head in _heads(admitted)] == [[7, 6], [90, 80], [200, 180]]


def test_the_limit_that_takes_longest_is_the_one_that_is_told(cell: Cell) -> None:
    """Whoever waits for it finds the others open too."""
    limits = {"key_rpm": 60, "prj_in": 15, "org_rpm": 1}
    cell.admit("q1", **limits)
    refused = cell.admit("q2", **limits)
    assert refused[:4] == [b"refused", b"org", b"requests_per_minute", 60_000]
    cell.now_ms += 60_000
    assert cell.admit("q2", **limits)[0] == b"queued"


def test_money_that_is_gone_is_told_before_any_rate(cell: Cell) -> None:
    """No time helps: a client that waits for the rate would wait in vain."""
    cell.run(scripts.SEED, KEYS.prefix, "org", "o1", 100)
    assert cell.admit("q1", key_rpm=0, org_budget=100)[1:3] == [b"org", b"budget"]


def test_without_limits_nothing_is_told(cell: Cell) -> None:
    assert _heads(cell.admit("q1")) == []
