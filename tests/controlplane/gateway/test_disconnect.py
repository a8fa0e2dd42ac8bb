"""A client that leaves: its request ends in the queue or on the replica, and what was produced is settled."""

import asyncio
import time

import pytest

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import CHAT, DEPLOYMENT, KEYS, Job, Machine, Running, until
from workers.contract import FinishReason


async def run_until_cancelled(job: Job) -> None:
    """Generates until its flush or the control channel says that the client has gone."""
    while not job.cancelled.is_set():
        if await job.emit("x ") == "c":
            break
        await asyncio.sleep(0.005)
    await job.finish(reason=FinishReason.ABORT)


@pytest.mark.parametrize("streaming", [False, True])
async def test_running_request_is_aborted_and_billed_by_what_it_produced(
    gw: Running, machine: Machine, streaming: bool
) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=1_000_000))
    machine.behaviour = run_until_cancelled
    sending = asyncio.ensure_future(gw.post({**CHAT, "stream": streaming}))
    await until(lambda: machine.jobs and machine.jobs[0].offset >= 3)
    sending.cancel()
    await until(machine.jobs[0].cancelled.is_set)
    await until(lambda: not gw.gateway.inbox.streams)
    job = machine.jobs[0]

    async def settled() -> bool:
        return (await gw.record(job.id))[b"state"] == b"done"

    await until(settled)
    limits = await gw.limit("key", job.envelope.key)
    assert int(limits[b"spent"]) == 7 + 2 * job.offset
    assert limits[b"held"] == b"0"
    assert int(await gw.redis.hget(KEYS.replica("r1"), "used")) == 0
    await until(lambda: gw.log.lines and gw.log.lines[-1].code == "client_gone")


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_end_that_comes_after_the_watch_has_looked_is_settled(
    gw: Running, machine: Machine, streaming: bool
) -> None:
    """An engine step is long enough for that. Here nobody makes up for it, as intake does a second later."""
    may_end = asyncio.Event()

    async def end_late(job: Job) -> None:
        while not job.cancelled.is_set():
            await job.emit("x ")
            await asyncio.sleep(0.005)
        await may_end.wait()
        await job.finish(reason=FinishReason.ABORT)

    machine.behaviour = end_late
    sending = asyncio.ensure_future(gw.post({**CHAT, "stream": streaming}))
    await until(lambda: machine.jobs and machine.jobs[0].offset >= 3)
    sending.cancel()
    await until(machine.jobs[0].cancelled.is_set)
    (stream,) = gw.gateway.inbox.streams.values()
    assert stream.abandoned
    gw.gateway.watch.look(time.monotonic())
    may_end.set()
    await until(lambda: stream.settled)

    async def settled() -> bool:
        return (await gw.record(machine.jobs[0].id))[b"state"] == b"done"

    await until(settled)
    await until(lambda: not gw.gateway.inbox.streams)


async def test_waiting_request_leaves_the_queue_and_costs_nothing(gw: Running) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(budget_nano=1_000_000, max_concurrency=1))
    sending = asyncio.ensure_future(gw.post(CHAT))
    await until(lambda: gw.redis.zcard(KEYS.queue(DEPLOYMENT)))
    (request,) = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    sending.cancel()

    async def settled() -> bool:
        return (await gw.record(request.decode())).get(b"state") == b"done"

    await until(settled)
    assert await gw.redis.zcard(KEYS.queue(DEPLOYMENT)) == 0
    assert not await gw.redis.exists(KEYS.body(request.decode()))
    key = (await gw.record(request.decode()))[b"key"].decode()
    limits = await gw.limit("key", key)
    assert (limits[b"spent"], limits[b"held"], limits[b"conc"]) == (b"0", b"0", b"0")
    await until(lambda: not gw.gateway.inbox.streams)


async def test_request_cancelled_before_the_replica_took_it_is_not_served(
    gw: Running, redis_url: str
) -> None:
    """Bound, its message still in the replica's queue: the claim says that it was cancelled."""
    from workers import scripts

    await gw.redis.script_load(scripts.ENROL.source)
    await gw.redis.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, 1, "r1", "m1", DEPLOYMENT, 4)
    sending = asyncio.ensure_future(gw.post(CHAT))
    await until(lambda: gw.redis.llen("t0:m:m1:replica.r1"))
    sending.cancel()

    async def marked() -> bool:
        (lease,) = await gw.redis.keys("t0:m:m1:req:*")
        return await gw.redis.hget(lease, "cancel") == b"1"

    await until(marked)
    machine = Machine(redis_url)
    await machine.start()

    async def taken() -> bool:
        return await gw.redis.llen("t0:m:m1:replica.r1") == 0

    await until(taken)
    assert machine.jobs == []
    await machine.stop()
