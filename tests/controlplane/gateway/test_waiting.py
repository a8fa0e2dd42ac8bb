"""Requests that wait: the queue, the stages a client is told, failures that end the wait, deadlines."""

import asyncio
import json
import time

import msgspec
import pytest

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    Job,
    Machine,
    Running,
    running,
    text_of,
    until,
)
from workers.contract import Notice, Stage, WireError, encode


async def announce(gw: Running, **fields: object) -> None:
    stage = Stage(deployment=DEPLOYMENT, **fields)  # type: ignore[arg-type]
    await gw.redis.publish(KEYS.stage_channel, msgspec.json.encode(stage))


async def queued(gw: Running, n: int = 1) -> None:
    async def waits() -> bool:
        return await gw.redis.zcard(KEYS.queue(DEPLOYMENT)) == n

    await until(waits)


async def test_streaming_client_is_told_stages_until_the_answer_comes(gw: Running, redis_url: str) -> None:
    machine = Machine(redis_url)
    async with gw.stream(CHAT) as events:
        assert events.status == 200, "headers come early while nothing is ready"
        assert await events.comment() == "corral stage=waiting"
        await announce(gw, stage="launching_machine")
        assert await events.comment() == "corral stage=launching_machine"
        await announce(gw, stage="loading_model", eta_ms=900, at_ms=time.time_ns() // 1_000_000)
        comment = await events.comment()
        stage, eta = comment.rsplit("=", 1)
        assert stage == "corral stage=loading_model eta_ms"
        assert 0 <= int(eta) <= 900
        assert (await events.comment()).startswith("corral stage=loading_model"), "repeated to keep it alive"
        await machine.start()
        assert text_of(await events.rest()) == "one two three"
    await machine.stop()


async def test_stage_that_stands_already_is_told(gw: Running) -> None:
    await gw.redis.hset(KEYS.stage(DEPLOYMENT), mapping={"stage": "waking", "eta_ms": 1500})
    async with gw.stream(CHAT) as events:
        seen = [await events.comment() for _ in range(2)]
    assert "corral stage=waking eta_ms=1500" in seen


async def test_client_that_does_not_stream_waits_silently(gw: Running, redis_url: str) -> None:
    sending = asyncio.ensure_future(gw.post(CHAT))
    await queued(gw)
    await announce(gw, stage="loading_model")
    machine = Machine(redis_url)
    await machine.start()
    assert (await sending).status_code == 200
    await machine.stop()


async def test_failed_stage_is_a_503_with_its_reason(gw: Running) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(max_concurrency=1))
    sending = asyncio.ensure_future(gw.post(CHAT))
    await queued(gw)
    await announce(gw, stage="failed", code="bad_weights", message="the weights are broken", retry_after_s=7)
    response = await sending
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "bad_weights"
    assert response.json()["error"]["message"] == "the weights are broken"
    assert response.headers["retry-after"] == "7"
    await queued(gw, 0)
    key = next(iter(gw.directory.records.values())).key.id

    async def released() -> bool:
        return (await gw.limit("key", key)).get(b"conc", b"0") == b"0"

    await until(released)


async def test_failed_stage_after_the_headers_is_an_error_event(gw: Running) -> None:
    async with gw.stream(CHAT) as events:
        await events.comment()
        await announce(gw, stage="failed", code="out_of_memory", message="no memory")
        rest = await events.rest()
    assert [e["error"]["code"] for e in rest] == ["out_of_memory"]


async def test_failure_that_stands_refuses_at_once_until_a_retry_may_help(gw: Running) -> None:
    now_ms = time.time_ns() // 1_000_000
    row = {
        "stage": "failed",
        "code": "bad_weights",
        "message": "broken",
        "retry_after_s": 60,
        "at_ms": now_ms,
    }
    await gw.redis.hset(KEYS.stage(DEPLOYMENT), mapping=row)
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "bad_weights")
    await gw.redis.hset(KEYS.stage(DEPLOYMENT), "at_ms", now_ms - 61_000)
    sending = asyncio.ensure_future(gw.post(CHAT))
    await queued(gw)
    sending.cancel()


async def test_failed_stage_leaves_a_running_request_alone(gw: Running, redis_url: str) -> None:
    """It waited, was bound, and only then the failure (of another replica) is announced."""
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await go.wait()
        await job.finish("done", n=1)

    machine = Machine(redis_url)
    machine.behaviour = wait
    sending = asyncio.ensure_future(gw.post(CHAT))
    await queued(gw)
    await machine.start()
    await until(lambda: machine.jobs)
    await announce(gw, stage="failed", code="bad_weights")
    await announce(gw, stage="failed", code="bad_weights")
    go.set()
    assert (await sending).json()["choices"][0]["message"]["content"] == "done"
    await machine.stop()


async def test_failed_stage_ends_requests_that_a_dead_replica_gave_back(
    gw: Running, machine: Machine
) -> None:
    """It was running, its replica died, and no other can be started."""

    async def begin(job: Job) -> None:
        await job.emit("begun ")

    machine.behaviour = begin
    async with gw.stream(CHAT) as events:
        await events.next()
        await events.next()
        await machine.withdraw()
        await queued(gw)

        async def told() -> bool:
            await announce(gw, stage="failed", code="bad_weights", message="broken")
            return await gw.redis.zcard(KEYS.queue(DEPLOYMENT)) == 0

        await until(told)
        assert (await events.rest())[-1]["error"]["code"] == "bad_weights"


async def test_failed_stage_ends_who_waits_behind_a_busy_replica(gw: Running, redis_url: str) -> None:
    async def hold(job: Job) -> None:
        await job.cancelled.wait()

    machine = Machine(redis_url)
    machine.behaviour = hold
    await machine.start(slots=1)
    busy = asyncio.ensure_future(gw.post(CHAT))
    await until(lambda: machine.jobs)
    waiting = asyncio.ensure_future(gw.post(CHAT))
    await queued(gw)
    await announce(gw, stage="failed", code="gone", message="the deployment was deleted")
    assert (await waiting).json()["error"]["code"] == "gone"
    assert not busy.done()
    busy.cancel()
    await machine.stop()


async def test_notice_ends_a_request_with_its_error(gw: Running) -> None:
    sending = asyncio.ensure_future(gw.post(CHAT))
    await queued(gw)
    (request,) = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    notice = Notice(
        request=request.decode(), error=WireError(500, "poison_request", "it killed two replicas")
    )
    await gw.redis.publish(KEYS.notice_channel(gw.gateway.id), encode(notice))
    response = await sending
    assert (response.status_code, response.json()["error"]["code"]) == (500, "poison_request")


async def test_junk_on_the_control_channels_changes_nothing(gw: Running, machine: Machine) -> None:
    for channel in (
        KEYS.stage_channel,
        KEYS.invalidate_channel,
        KEYS.route_channel,
        KEYS.notice_channel(gw.gateway.id),
    ):
        for junk in (b"", b"\xff\xfe", b"{}", b"[1,2]"):
            await gw.redis.publish(channel, junk)
    assert (await gw.post(CHAT)).status_code == 200
    assert gw.gateway.subscriber.n_callback_errors == 0


async def test_slot_that_frees_goes_to_who_waits(gw: Running, redis_url: str) -> None:
    machine = Machine(redis_url)
    await machine.start(slots=1)
    responses = await asyncio.gather(*(gw.post(CHAT) for _ in range(5)))
    assert [r.status_code for r in responses] == [200] * 5
    await machine.stop()


async def test_request_past_its_deadline_is_a_504_and_is_cancelled(redis_url: str) -> None:
    async with running(redis_url, request_timeout_s=1) as gw:
        response = await gw.post(CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        await queued(gw, 0)
        machine = Machine(redis_url)

        async def hang(job: Job) -> None:
            await job.cancelled.wait()

        machine.behaviour = hang
        await machine.start()
        assert (await gw.post(CHAT)).status_code == 504
        await until(machine.jobs[0].cancelled.is_set)
        await machine.stop()


async def test_full_queue_is_a_503(redis_url: str) -> None:
    async with running(redis_url, queue_bound=1) as gw:
        first = asyncio.ensure_future(gw.post(CHAT))
        await queued(gw)
        response = await gw.post(CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
        assert int(response.headers["retry-after"]) >= 1
        first.cancel()


async def test_silence_between_tokens_is_filled_with_comments_the_sdk_survives(
    gw: Running, machine: Machine
) -> None:
    """After the first event a comment must not be followed by a blank line."""
    go = asyncio.Event()

    async def pause(job: Job) -> None:
        await job.emit("a")
        await go.wait()
        await job.emit("b")
        await job.finish()

    machine.behaviour = pause
    raw = b""
    async with gw.http.stream(
        "POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=gw.auth()
    ) as response:
        async for chunk in response.aiter_bytes():
            raw += chunk
            if b"\n: corral" in raw:
                go.set()
    before, _, after = raw.partition(b"\n: corral stage=running\n")
    assert before.endswith(b"\n"), "it stands between two events"
    assert after.startswith((b": corral", b"id: ")), "and no blank line follows"


@pytest.mark.parametrize("streaming", [False, True])
async def test_one_line_is_logged_per_request_and_no_text(
    gw: Running, machine: Machine, streaming: bool
) -> None:
    await gw.post({**CHAT, "stream": streaming})
    line = json.loads(json.dumps(msgspec.to_builtins(gw.log.lines[0])))
    assert (line["status"], line["finish"], line["n_prompt"], line["n_completion"]) == (200, "stop", 7, 3)
    assert line["request"].startswith("req_")
    assert line["deployment"] == "dep_" + DEPLOYMENT
    assert line.get("stream", False) == streaming
    assert "Hello" not in json.dumps(line)
    assert gw.key not in json.dumps(line)
