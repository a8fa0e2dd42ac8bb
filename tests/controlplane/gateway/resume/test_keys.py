"""Idempotency keys and event ids: whose they are, what they name, and how they are refused or given back."""

import asyncio

import pytest

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    Machine,
    Running,
    running,
    until,
)
from tests.controlplane.gateway.resume.story import (
    BUDGET,
    STORY,
    STREAM,
    Teller,
    charged,
    is_done,
)
from workers.contract import Ask, encode_ask


async def test_client_that_leaves_with_a_key_finds_the_answer_later(
    gw: Running, other: Running, teller: Teller
) -> None:
    gw.key = other.key = gw.directory.add_key(key_limits=BUDGET)
    sending = asyncio.ensure_future(gw.post(CHAT, **{"idempotency-key": "k"}))
    await until(lambda: teller.jobs)
    teller.may_tell = 2
    await until(lambda: teller.jobs[0].offset == 2)
    sending.cancel()
    await until(lambda: gw.log.lines and gw.log.lines[-1].code == "client_gone")
    frame = encode_ask(teller.jobs[0].stream, Ask(8, 7))
    await gw.redis.publish(teller.machine.keys.gateway_channel(teller.jobs[0].gateway), frame)
    await until(lambda: gw.gateway.ends.n_top_ups == 1)  # nobody reads it, and it may still use its money
    teller.may_tell = 8
    await until(is_done(gw, teller.jobs[0].id))
    assert not teller.jobs[0].cancelled.is_set()
    assert await charged(gw) == 7 + 2 * 8
    await until(lambda: not gw.gateway.inbox.streams)
    answer = await other.post(CHAT, **{"idempotency-key": "k"})
    assert answer.json()["choices"][0]["message"]["content"] == STORY
    assert len(teller.jobs) == 1


async def test_kept_request_ends_at_its_deadline_and_can_be_continued(redis_url: str) -> None:
    async with running(redis_url, request_timeout_s=1) as gw:
        machine = Machine(redis_url)
        teller = Teller(machine)
        await machine.start()
        teller.may_tell = 3
        sending = asyncio.ensure_future(gw.post(CHAT, **{"idempotency-key": "k"}))
        await until(lambda: teller.jobs)
        sending.cancel()
        await until(is_done(gw, teller.jobs[0].id))
        assert teller.jobs[0].cancelled.is_set()
        teller.may_tell = 8
        answer = (await gw.post(CHAT, **{"idempotency-key": "k"})).json()
        assert answer["choices"][0]["message"]["content"] == STORY
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["id"] == "chatcmpl-" + teller.jobs[0].id
        assert teller.jobs[1].envelope.n_carried == 3
        await machine.stop()


async def test_whoever_comes_back_waits_for_what_the_time_of_the_request_leaves(
    gw: Running, other: Running
) -> None:
    sending = asyncio.ensure_future(gw.post(CHAT, **{"idempotency-key": "k"}))
    await until(lambda: gw.redis.zcard(KEYS.queue(DEPLOYMENT)))
    [request] = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    record = KEYS.request(request.decode())
    left_ms = await gw.redis.pttl(record)
    await gw.redis.pexpire(record, left_ms - 15_000)  # as if it had been admitted so long ago
    again = asyncio.ensure_future(other.post(CHAT, **{"idempotency-key": "k"}))
    await until(lambda: other.gateway.inbox.streams)
    [stream] = other.gateway.inbox.streams.values()
    timeout_s = other.gateway.config.request_timeout_s
    assert stream.deadline - stream.admitted_at <= timeout_s - 15
    for call in (sending, again):
        call.cancel()


async def test_waiting_request_whose_client_left_with_a_key_runs_when_a_replica_comes(
    gw: Running, other: Running, redis_url: str
) -> None:
    sending = asyncio.ensure_future(gw.post(CHAT, **{"idempotency-key": "k"}))
    await until(lambda: gw.redis.zcard(KEYS.queue(DEPLOYMENT)))
    sending.cancel()
    await until(lambda: gw.log.lines)
    again = asyncio.ensure_future(other.post(CHAT, **{"idempotency-key": "k"}))
    await until(lambda: other.gateway.inbox.streams)
    machine = Machine(redis_url)
    await machine.start()
    assert (await again).json()["choices"][0]["message"]["content"] == "one two three"
    assert len(machine.jobs) == 1
    await machine.stop()


async def test_another_body_is_a_409(gw: Running, teller: Teller) -> None:
    teller.may_tell = 8
    await gw.post(STREAM, **{"idempotency-key": "k"})
    event_id = f"{teller.jobs[0].id}.1"
    for headers in ({"idempotency-key": "k"}, {"last-event-id": event_id}):
        for body in ({**STREAM, "seed": 1}, CHAT):
            answer = await gw.post(body, **headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "body_differs")
            assert answer.headers["x-should-retry"] == "false", "the SDK would send it again at once"
    body = b'{"model":"tiny","prompt":"x","messages":[]}'
    assert (await gw.post(body, path="/v1/completions", **{"idempotency-key": "k"})).status_code == 400
    other_key = await gw.post(STREAM, **{"idempotency-key": "unused", "last-event-id": event_id})
    assert other_key.status_code == 200, "a key never used says nothing"
    await gw.post(STREAM, **{"idempotency-key": "k2"})
    reused = await gw.post(STREAM, **{"idempotency-key": "k2", "last-event-id": event_id})
    assert (reused.status_code, reused.json()["error"]["code"]) == (409, "idempotency_key_reused")


async def test_refused_admission_frees_the_key(gw: Running, teller: Teller) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=0))
    assert (await gw.post(CHAT, **{"idempotency-key": "k"})).status_code == 429
    assert not await gw.redis.keys("t0:idem:*")
    teller.may_tell = 8
    gw.directory.change(gw.key, limits=LimitsRow())
    gw.gateway.key_cache.doubt_all()
    assert (await gw.post(CHAT, **{"idempotency-key": "k"})).status_code == 200


async def test_refused_service_class_frees_the_key(gw: Running, teller: Teller) -> None:
    teller.may_tell = 8
    refused = await gw.post(CHAT, **{"idempotency-key": "k", "x-corral-slo-class": "none-such"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "slo_class_unavailable")
    assert (await gw.post(CHAT, **{"idempotency-key": "k"})).status_code == 200


async def test_key_of_a_request_that_is_being_admitted_is_a_409_with_retry_after(
    gw: Running, teller: Teller
) -> None:
    from controlplane.gateway.identity import Digests
    from tests.controlplane.gateway.harness import PEPPER

    now_ms = (await gw.redis.time())[0] * 1000
    name = KEYS.idempotency("1" * 32, Digests(PEPPER).key(b"k"))
    await gw.redis.set(name, f"{'e' * 32} {now_ms}")
    answer = await gw.post(CHAT, **{"idempotency-key": "k"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "request_in_progress")
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    await gw.redis.set(name, f"{'e' * 32} {now_ms - 10_000}")
    teller.may_tell = 8
    assert (await gw.post(CHAT, **{"idempotency-key": "k"})).status_code == 200, "its gateway died"


async def test_scope_is_the_project(gw: Running, teller: Teller) -> None:
    teller.may_tell = 8
    first = await gw.post(STREAM, **{"idempotency-key": "k"})
    event_id = f"{teller.jobs[0].id}.1"
    path = f"/v1/requests/req_{teller.jobs[0].id}/events"
    teammate = gw.directory.add_key()
    for key in (
        gw.directory.add_key(project="2" * 32),  # same organization
        gw.directory.add_key(project="3" * 32, organization="4" * 32),
    ):
        gw.key = key
        by_event = await gw.post(STREAM, **{"last-event-id": event_id})
        by_path = await gw.http.get(path, headers=gw.auth())
        nobody = await gw.post(STREAM, **{"last-event-id": f"{'f' * 32}.1"})
        assert by_event.status_code == by_path.status_code == nobody.status_code == 404
        assert by_event.content == by_path.content == nobody.content, "existence is not told"
        n_jobs = len(teller.jobs)
        assert (await gw.post(STREAM, **{"idempotency-key": "k"})).status_code == 200
        assert len(teller.jobs) == n_jobs + 1, "its key is its own"
    gw.key = teammate
    assert (await gw.post(STREAM, **{"idempotency-key": "k"})).content == first.content
    assert (await gw.http.get(path, headers=gw.auth())).content == first.content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("last-event-id", "nonsense"),
        ("last-event-id", "f" * 32),
        ("last-event-id", "f" * 32 + ".-1"),
        ("last-event-id", "f" * 32 + ".1.4"),
        ("last-event-id", "F" * 32 + ".1"),
        ("last-event-id", "f" * 32 + "." + "9" * 10),
        ("idempotency-key", ""),
        ("idempotency-key", "x" * 256),
        ("idempotency-key", "tab\tinside"),
    ],
)
async def test_malformed_header_is_a_400_that_names_it(gw: Running, name: str, value: str) -> None:
    answer = await gw.post(CHAT, **{name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].lower() == name
    assert await gw.redis.keys("t0:*") == [b"t0:born"]


async def test_event_id_ahead_of_the_answer_is_a_400(gw: Running, teller: Teller) -> None:
    teller.may_tell = 8
    await gw.post(STREAM, **{"idempotency-key": "k"})
    answer = await gw.post(STREAM, **{"last-event-id": f"{teller.jobs[0].id}.9"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_event_id")
