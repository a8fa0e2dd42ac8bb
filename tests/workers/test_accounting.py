"""What is announced again, and what must not be."""

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.workers.serving import Cell, Serving, serving
from tests.workers.waiting import until
from workers.accounting import Accounting
from workers.spool import Spool


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def accounting(front: Serving, path: Path) -> tuple[Clock, Spool, Accounting]:
    clock = Clock()
    spool = Spool(path, max_bytes=100_000, now_s=clock)
    made = Accounting(spool, front.client, front.config.keys, "r1", front.config.tuning)
    clock.now_s = 11
    return clock, spool, made


async def test_confirmed_end_is_announced_again_until_acknowledged(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit()
        await front.deliver(request)
        event = front.spool.pending()[0].event
        cell.r.delete(cell.keys.machine("m1").usage)
        clock, spool, keeper = accounting(front, tmp_path / "x")
        clock.now_s = 0
        spool.begin(request, 1, event)
        spool.confirm(request)
        await keeper.tick()
        assert cell.usage() == []
        clock.now_s = 11
        await keeper.tick()
        await keeper.tick()  # not due again
        assert [usage.request_id for usage in cell.usage()] == [request]
        cell.r.rpush(cell.keys.machine("m1").ack("r1"), request)
        clock.now_s = 1000
        await keeper.tick()
        assert len(spool) == 0 and len(cell.usage()) == 1


@pytest.mark.parametrize(
    ("state", "epoch", "announced", "kept"),
    [
        ("done", 1, True, True),  # accepted, only the answer was lost
        ("claimed", 1, False, True),  # not accepted; the reaper decides
        ("bound", 1, False, True),
        ("claimed", 2, False, False),  # served again under a newer epoch
        ("", 0, False, False),  # moved to another machine
    ],
)
async def test_unconfirmed_end_is_judged_by_the_lease(
    cell: Cell, tmp_path: Path, state: str, epoch: int, announced: bool, kept: bool
) -> None:
    async with serving(cell, tmp_path) as front:
        clock, spool, keeper = accounting(front, tmp_path / "x")
        clock.now_s = 0
        spool.begin("a" * 32, 1, b"event")
        if state:
            lease = cell.keys.machine("m1").lease("a" * 32)
            cell.r.hset(lease, mapping={"epoch": epoch, "state": state})
        clock.now_s = 11
        await keeper.tick()
        assert (cell.r.xlen(cell.keys.machine("m1").usage) == 1) is announced
        assert (len(spool) == 1) is kept


async def test_announcements_are_bounded_per_tick(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        clock, spool, keeper = accounting(front, tmp_path / "x")
        clock.now_s = 0
        for i in range(250):
            spool.begin(str(i), 1, b"event")
            spool.confirm(str(i))
        clock.now_s = 11
        await keeper.tick()
        assert cell.r.xlen(cell.keys.machine("m1").usage) == 100


async def test_usage_reaches_the_disk_by_itself_and_an_idle_spool_wakes_nobody(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.accounting._SYNC_S", 0)
    async with serving(cell, tmp_path) as front:
        _, spool, keeper = accounting(front, tmp_path / "x")
        written: list[int] = []
        real = spool.write_out

        def on_disk(n: int) -> bool:
            return (tmp_path / "x").read_bytes().count(b"event") == n and not spool.dirty

        monkeypatch.setattr(spool, "write_out", lambda: (written.append(1), real()))
        syncing = asyncio.create_task(keeper.sync_forever())
        for n in range(1, 4):
            spool.begin(f"r{n}", 1, b"event")
            await until(partial(on_disk, n), "usage on disk")
        n_written = len(written)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(written) == n_written <= 4
        syncing.cancel()


async def test_redis_away_ends_the_tick_and_nothing_else(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        clock, spool, keeper = accounting(front, tmp_path / "x")
        clock.now_s = 0
        spool.begin("a", 1, b"event")
        spool.confirm("a")
        clock.now_s = 11
        await front.client.close()
        await keeper.tick()
        assert len(spool) == 1


async def test_after_a_lost_connection_all_is_announced_at_once(cell: Cell, tmp_path: Path) -> None:
    """The Redis that is back may be another one, or an empty one."""
    async with serving(cell, tmp_path) as front:
        request = cell.admit()
        await front.deliver(request)
        event = front.spool.pending()[0].event
        clock, spool, keeper = accounting(front, tmp_path / "x")
        clock.now_s = 100
        spool.begin(request, 1, event)
        spool.confirm(request)
        cell.r.delete(cell.keys.machine("m1").usage)
        await keeper.tick()
        assert cell.usage() == [], "not due"
        assert front.client._conn is not None
        front.client._conn.abort()
        await until(lambda: front.client.n_disconnects == 1 and front.client.connected, "connected again")
        await keeper.tick()
        await keeper.tick()
        assert [usage.request_id for usage in cell.usage()] == [request], "and once"
