"""Redis or Postgres away: 503 with Retry-After, never 401, running streams go on or say so, recovery by
itself."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.gateway.directory import PgDirectory
from infra.local.redis import EmbeddedRedis
from tests.controlplane.gateway.harness import CHAT, Job, Machine, Running, running, text_of, until


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[EmbeddedRedis]:
    """A server that the test may stop and start."""
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    yield server
    server.destroy()


def restart(server: EmbeddedRedis) -> None:
    server.start()
    server.wait_ready()


async def ready(gw: Running) -> bool:
    return (await gw.http.get("/readyz")).status_code == 200


async def test_redis_away_is_a_503_and_it_recovers_by_itself(own_redis: EmbeddedRedis) -> None:
    async with running(own_redis.url()) as gw:
        machine = Machine(own_redis.url())
        await machine.start()
        assert (await gw.post(CHAT)).status_code == 200
        own_redis.stop()
        await until(lambda: not gw.gateway.redis.connected)
        for _ in range(3):
            response = await gw.post(CHAT)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "cell_unavailable")
            assert int(response.headers["retry-after"]) >= 1
        assert (await gw.http.get("/readyz")).status_code == 503
        assert (await gw.http.get("/healthz")).status_code == 200
        assert (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 200, "needs no Redis"
        restart(own_redis)
        await until(lambda: ready(gw))

        async def served() -> bool:
            return (await gw.post(CHAT)).status_code == 200

        await until(served)
        assert not gw.gateway.inbox.streams
        await machine.stop()


async def test_running_stream_survives_a_restart_with_the_log(own_redis: EmbeddedRedis) -> None:
    """The journal is in the append-only file; what was published meanwhile is read from it."""
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await job.emit("before ")
        await go.wait()
        await until(lambda: _try(job.emit("after")))
        await until(lambda: _try(job.finish()))

    async with running(own_redis.url()) as gw:
        machine = Machine(own_redis.url())
        machine.behaviour = wait
        await machine.start()
        async with gw.stream(CHAT) as events:
            await events.next()
            assert text_of([await events.next()]) == "before "
            own_redis.stop()
            await until(lambda: not gw.gateway.redis.connected)
            restart(own_redis)
            go.set()
            assert text_of(await events.rest()) == "after"
        await machine.stop()


async def test_redis_that_came_back_empty_ends_streams_with_a_retryable_error(
    own_redis: EmbeddedRedis,
) -> None:
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await job.emit("before ")
        await go.wait()

    async with running(own_redis.url()) as gw:
        machine = Machine(own_redis.url())
        machine.behaviour = wait
        await machine.start()
        async with gw.stream(CHAT) as events:
            await events.next()
            await events.next()
            await gw.redis.flushall()
            error = (await events.rest())[-1]["error"]
            assert (error["code"], error["type"]) == ("request_lost", "service_unavailable")
            assert error["retry_after_ms"] > 0, (
                "a client that has its headers learns here that it may try again"
            )
        await machine.stop()


async def test_redis_away_for_long_ends_streams_with_a_retryable_error(own_redis: EmbeddedRedis) -> None:
    async def wait(job: Job) -> None:
        await job.emit("before ")
        await job.cancelled.wait()

    async with running(own_redis.url(), redis_grace_s=1) as gw:
        machine = Machine(own_redis.url())
        machine.behaviour = wait
        await machine.start()
        async with gw.stream(CHAT) as events:
            await events.next()
            await events.next()
            own_redis.stop()
            assert (await events.rest())[-1]["error"]["code"] == "cell_unavailable"
        restart(own_redis)
        await until(lambda: not gw.gateway.ends.n_orphans)
        lease = machine.keys.lease(machine.jobs[0].id)

        async def marked() -> bool:
            return await gw.redis.hget(lease, "cancel") == b"1"

        await until(marked)  # its next flush is told, should nobody have heard the word itself
        await machine.stop()


async def test_interrupted_subscription_is_made_up_for_at_once(gw: Running, machine: Machine) -> None:
    """Only the subscription breaks: keys are read again, and streams read what they missed from the
    journal."""
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await job.emit("before ")
        await go.wait()
        await job.emit("after", lost=True)
        await job.finish(lost=True)
        await gw.redis.client_kill_filter(_type="pubsub")

    machine.behaviour = wait
    gw.gateway.watch._stall_s = 60
    async with gw.stream(CHAT) as events:
        await events.next()
        await events.next()
        n_found = gw.directory.n_found
        gw.directory.change(gw.key, revoked_at_ms=1)
        go.set()
        assert text_of(await events.rest()) == "after"
    assert (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 401
    assert gw.directory.n_found == n_found + 1


async def test_a_subscription_that_is_back_first_waits_for_the_connection_that_reads_journals(
    gw: Running, machine: Machine
) -> None:
    go, done = asyncio.Event(), asyncio.Event()

    async def wait(job: Job) -> None:
        await job.emit("before ")
        await go.wait()
        await job.emit("after", lost=True)
        await job.finish(lost=True)
        done.set()

    machine.behaviour = wait
    gw.gateway.watch._stall_s = 60
    async with gw.stream(CHAT) as events:
        await events.next()
        await events.next()
        go.set()
        await done.wait()
        client = gw.gateway.redis
        client._conn.abort()
        await until(lambda: not client.connected)
        gw.gateway.inbox.catch_up_all()
        assert text_of(await events.rest()) == "after"


@pytest.mark.parametrize(("temperature", "goes_on"), [(0, True), (0.7, False), (None, False)])
async def test_an_answer_whose_end_redis_forgot_goes_on_only_if_it_comes_out_the_same(
    gw: Running, machine: Machine, temperature: float | None, goes_on: bool
) -> None:
    """Redis came back without the last second of its log: the replica makes the missing tokens anew."""
    seen = asyncio.Event()

    async def wait(job: Job) -> None:
        for text in ("one ", "two "):
            await job.emit(text)
        await seen.wait()
        await gw.redis.hset(machine.keys.lease(job.id), "n", 1)
        await gw.redis.ltrim(machine.keys.journal(job.id), 0, 0)
        gw.gateway.inbox.catch_up_all()
        await until(lambda: not any(s.catching_up for s in gw.gateway.inbox.streams.values()))
        job.offset = 1
        for text in ("two ", "three"):
            await job.emit(text)
        await job.finish()

    machine.behaviour = wait
    async with gw.stream({**CHAT, "temperature": temperature}) as events:
        while (text := text_of([await events.next()])) != "two ":
            assert text in ("", "one ")
        seen.set()
        rest = await events.rest()
    if goes_on:
        assert text_of(rest) == "three"
    else:
        assert (rest[-1]["error"]["code"], text_of(rest[:-1])) == ("answer_lost", "")


async def test_gateway_starts_without_redis(own_redis: EmbeddedRedis) -> None:
    url = own_redis.url()
    own_redis.stop()
    async with running(url) as gw:
        assert (await gw.post(CHAT)).status_code == 503
        restart(own_redis)
        await until(lambda: ready(gw))
        machine = Machine(url)
        await machine.start()
        assert (await gw.post(CHAT)).status_code == 200
        await machine.stop()


async def test_postgres_away_serves_known_keys_and_503s_unknown_ones(gw: Running, machine: Machine) -> None:
    never_seen = gw.directory.add_key()
    assert (await gw.post(CHAT)).status_code == 200
    gw.directory.up = False
    gw.gateway.key_cache.doubt_all()
    assert (await gw.post(CHAT)).status_code == 200
    response = await gw.http.post("/v1/chat/completions", json=CHAT, headers=gw.auth(never_seen))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "auth_unavailable")
    assert int(response.headers["retry-after"]) >= 1
    gw.directory.up = True
    response = await gw.http.post("/v1/chat/completions", json=CHAT, headers=gw.auth(never_seen))
    assert response.status_code == 200


async def test_postgres_away_never_denies_a_model_that_may_be_younger_than_the_cache(
    gw: Running, machine: Machine
) -> None:
    unknown = {**CHAT, "model": "made-a-moment-ago"}
    assert (await gw.post(CHAT)).status_code == 200
    assert (await gw.post(unknown)).status_code == 404
    gw.directory.up = False
    gw.gateway.key_cache.doubt_all()
    response = await gw.post(unknown)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
    assert int(response.headers["retry-after"]) >= 1
    one = await gw.http.get("/v1/models/made-a-moment-ago", headers=gw.auth())
    assert one.status_code == 503
    assert (await gw.post(CHAT)).status_code == 200, "what is known is served"
    gw.directory.up = True
    assert (await gw.post(unknown)).status_code == 404


async def test_directory_without_postgres_says_so_in_time() -> None:
    from controlplane.gateway.directory import DirectoryUnavailable
    from infra.local.ports import free_port

    directory = PgDirectory(f"postgresql://nobody:x@127.0.0.1:{free_port()}/none", timeout_s=0.3)
    await directory.open()
    try:
        async with asyncio.timeout(30):
            with pytest.raises(DirectoryUnavailable):
                await directory.find("a" * 12, (bytes(32),))
            with pytest.raises(DirectoryUnavailable):
                await directory.changes(None)
        assert not directory.up
    finally:
        await directory.close()


async def _try(work: object) -> bool:
    import redis.asyncio as aioredis

    try:
        return await work in ("a", "d")  # type: ignore[misc]
    except (aioredis.ConnectionError, aioredis.ResponseError):
        await asyncio.sleep(0.05)
        return False
