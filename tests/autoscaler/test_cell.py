"""The cell's Redis as the autoscaler uses it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autoscaler.cell import Cell
from autoscaler.cell.routing import BOUND_PER_CALL
from controlplane.policy.flows import Flow, Request
from tests.queueing import CellQueue
from workers.keys import CellKeys


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    cell = Cell(redis_url, CellKeys("t0"))
    yield cell
    cell.redis.close()


def test_a_replica_with_room_for_all_that_waits_is_given_all(cell: Cell) -> None:
    """A script binds a bounded number: nobody waits beside a free slot for the next look."""
    queue = CellQueue(cell.redis)
    n = 2 * BOUND_PER_CALL + 10
    for i in range(n):
        assert queue.admit(Request(f"q{i:04d}", Flow(0, "o", "p", "k"), i, 10, 10), i)[0] == "queued"
    assert cell.enrol(replica="r1", machine="m1", deployment="d1", slots=n + 5) == n
    assert len(cell.redis.smembers(cell.keys.replica_live("r1"))) == n
    assert cell.enrol(replica="r1", machine="m1", deployment="d1", slots=n + 5) == 0
