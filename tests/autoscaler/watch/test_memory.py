"""Memory of the cell's Redis: short of it, ended answers go first, and running ones never."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autoscaler.cell import Cell
from autoscaler.watch.memory import SHORT_LIFE_MS, VERY_SHORT_LIFE_MS, MemoryKeeper
from workers.keys import LEASE_GC_MS, RETENTION_MS, CellKeys

KEYS = CellKeys("t0")


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url, KEYS)
    before = made.redis.config_get("maxmemory")["maxmemory"]
    yield made
    made.redis.config_set("maxmemory", before)
    made.redis.close()


def bound(cell: Cell, used_ratio: float) -> None:
    """Give Redis so much memory that `used_ratio` of it is used."""
    used = int(cell.redis.info("memory")["used_memory"])
    cell.redis.config_set("maxmemory", int(used / used_ratio))


def journal(cell: Cell, request: str, life_ms: int) -> str:
    key = KEYS.machine("m1").journal(request)
    cell.redis.rpush(key, b"entry")
    cell.redis.pexpire(key, life_ms)
    return key


@pytest.mark.parametrize(("used_ratio", "life_ms"), [(0.75, SHORT_LIFE_MS), (0.9, VERY_SHORT_LIFE_MS)])
def test_ended_answers_go_sooner_the_less_memory_there_is(
    cell: Cell, used_ratio: float, life_ms: int
) -> None:
    ended = [journal(cell, f"ended{i}", RETENTION_MS) for i in range(100)]
    running = journal(cell, "running", LEASE_GC_MS)
    bound(cell, used_ratio)
    assert MemoryKeeper(cell).look() == len(ended)
    assert all(0 < cell.redis.pttl(key) <= life_ms for key in ended)
    assert cell.redis.pttl(running) > RETENTION_MS


def test_with_enough_memory_answers_stay_for_their_clients(cell: Cell) -> None:
    ended = journal(cell, "ended", RETENTION_MS)
    bound(cell, 0.5)
    assert MemoryKeeper(cell).look() == 0
    assert cell.redis.pttl(ended) > SHORT_LIFE_MS


def test_a_redis_without_a_bound_is_never_short(cell: Cell) -> None:
    cell.redis.config_set("maxmemory", 0)
    assert MemoryKeeper(cell).look() == 0
