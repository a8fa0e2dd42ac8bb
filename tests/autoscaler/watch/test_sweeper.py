"""Counters of the fair queues are forgotten in turns, deployment by deployment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autoscaler.cell import Cell
from autoscaler.watch.sweeper import FIELDS_A_STEP, Sweeper
from workers.keys import CellKeys

KEYS = CellKeys("c0")


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    cell = Cell(redis_url, KEYS)
    yield cell
    cell.redis.close()


def counters(cell: Cell, deployment: str) -> dict[bytes, bytes]:
    return cell.redis.hgetall(f"{KEYS.prefix}dep:{deployment}:v")  # type: ignore[return-value]


def test_what_is_at_or_below_a_newcomers_start_is_forgotten_in_short_steps(cell: Cell) -> None:
    n_flows = 4 * FIELDS_A_STEP
    for deployment in ("d1", "d2"):
        fields: dict[str, int] = {f"0o{n:032x}": n for n in range(n_flows)}
        cell.redis.hset(
            f"{KEYS.prefix}dep:{deployment}:v", mapping=fields | {"0O": 99, "w": 0, "t": 3, "nx": 1}
        )
    sweeper = Sweeper(cell)
    n_steps = n_forgotten = 0
    while n_forgotten < 200:
        forgotten = sweeper.step(("d2", "d1"))
        assert forgotten <= 100
        n_forgotten += forgotten
        n_steps += 1
        assert n_steps < 40, "every deployment has its turn"
    assert n_steps > 4, "no step walks all fields"
    for deployment in ("d1", "d2"):
        left = counters(cell, deployment)
        assert len(left) == n_flows - 100 + 4
        assert {b"0O", b"w", b"t", b"nx"} <= left.keys()
        assert cell.redis.pttl(f"{KEYS.prefix}dep:{deployment}:v") > 0, "and goes with its deployment"


def test_flows_that_wait_keep_their_counter(cell: Cell) -> None:
    v = f"{KEYS.prefix}dep:d1:v"
    cell.redis.hset(v, mapping={"0oidle": 5, "0owaits": 5, "0oahead": 6, "0ko:waits": 1, "0ko:idle": 1})
    cell.redis.zadd(f"{KEYS.prefix}dep:d1:o:0", {"waits": 5})
    cell.redis.zadd(f"{KEYS.prefix}dep:d1:k:0:o", {"waits": 1})
    assert Sweeper(cell).step(("d1",)) == 2
    assert counters(cell, "d1") == {b"0owaits": b"5", b"0oahead": b"6", b"0ko:waits": b"1"}


def test_without_deployments_nothing_happens(cell: Cell) -> None:
    assert Sweeper(cell).step(()) == 0
