"""A client that comes back: attached, replayed or continued through any gateway process, charged once."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    Events,
    Job,
    Machine,
    Running,
    running,
    text_of,
    until,
)
from workers import scripts
from workers.contract import Ask, FinishReason, WireError, encode, encode_ask

WORDS = [f"w{i} " for i in range(8)]
STORY = "".join(WORDS)
STREAM = {**CHAT, "stream": True}
AS_STREAMED = httpx.Request("POST", "http://x", json=STREAM).content  # the bytes that `Running.stream` sends
BUDGET = LimitsRow(budget_nano=1_000_000)  # one nano-dollar a prompt token, two a completion token


class Teller:
    """Tells the same story on every attempt, as far as it may; a cancelled job ends as a replica's does."""

    def __init__(self, machine: Machine) -> None:
        self.may_tell = 0
        self.machine = machine
        machine.behaviour = self.tell

    async def tell(self, job: Job) -> None:
        while job.offset < len(WORDS):
            while job.offset >= self.may_tell and not job.cancelled.is_set():
                await asyncio.sleep(0.002)
            if job.cancelled.is_set() or await job.emit(WORDS[job.offset]) == "c":
                await job.finish(reason=FinishReason.ABORT)
                return
        await job.finish()

    @property
    def jobs(self) -> list[Job]:
        return self.machine.jobs


@pytest.fixture
def teller(machine: Machine) -> Teller:
    return Teller(machine)


@pytest.fixture
async def other(gw: Running, redis_url: str) -> AsyncIterator[Running]:
    """Another gateway process of the cell, as far as Redis can tell; its clients hold the same keys."""
    async with running(redis_url, gw.directory, name="gw-other") as it:
        it.key = gw.key
        yield it


async def read(events: Events, n: int) -> str:
    """Text of the next `n` events that have any."""
    text = ""
    while n:
        piece = text_of([await events.next()])
        text += piece
        n -= bool(piece)
    return text


def key_of(gw: Running, key: str | None = None) -> str:
    from controlplane.tenants import api_keys

    lookup = api_keys.lookup_of(key or gw.key)
    assert lookup
    return gw.directory.records[lookup].key.id


async def state_of(gw: Running, request: str) -> bytes:
    return (await gw.record(request)).get(b"state", b"")


async def settle(gw: Running, request: str) -> None:
    await gw.redis.evalsha(scripts.SETTLE.sha, 0, KEYS.prefix, 1, request, 0, 0, 0, 60_000)


def is_done(gw: Running, request: str) -> Callable[[], Any]:
    async def done() -> bool:
        return await state_of(gw, request) == b"done"

    return done


async def charged(gw: Running) -> int:
    """What the key was charged, once nothing is held any more; its slot and its concurrency are free."""
    limits: dict[bytes, bytes] = {}

    async def is_settled() -> bool:
        nonlocal limits
        limits = await gw.limit("key", key_of(gw))
        return limits[b"held"] == b"0"

    await until(is_settled)
    assert int(limits[b"conc"]) == 0
    assert int(await gw.redis.hget(KEYS.replica("r1"), "used")) == 0
    return int(limits[b"spent"])


# -- it still runs


async def test_reconnect_through_another_gateway_gets_the_rest_and_the_first_client_is_told(
    gw: Running, other: Running, teller: Teller
) -> None:
    gw.key = other.key = gw.directory.add_key(key_limits=BUDGET)
    teller.may_tell = 3
    async with gw.stream(CHAT) as first:
        assert await read(first, 3) == "w0 w1 w2 "
        async with other.stream(CHAT, **{"last-event-id": first.ids[2]}) as second:
            assert second.response.headers["x-corral-resumed"] == "attached"
            assert second.response.headers["x-request-id"] == "req_" + teller.jobs[0].id
            assert await read(second, 1) == "w2 ", "what the first client had not seen"
            teller.may_tell = 8
            assert text_of(await second.rest()) == "w3 w4 w5 w6 w7 "
        [error] = await first.rest()
        assert error["error"]["code"] == "superseded"
    assert second.ids[-1] == f"{teller.jobs[0].id}.8.2"
    assert len(teller.jobs) == 1
    assert not teller.jobs[0].cancelled.is_set(), "the first gateway's late cancel changed nothing"
    assert await charged(gw) == 7 + 2 * 8
    assert not gw.gateway.inbox.streams
    assert not other.gateway.inbox.streams


@pytest.mark.parametrize("hears_moves", [True, False])
async def test_reconnect_to_the_same_gateway_also_when_the_word_to_the_replica_is_lost(
    gw: Running, teller: Teller, hears_moves: bool
) -> None:
    teller.machine.hears_moves = hears_moves
    teller.may_tell = 2
    async with gw.stream(CHAT) as first:
        await read(first, 2)
        async with gw.stream(CHAT, **{"last-event-id": first.ids[1]}) as second:
            assert await read(second, 1) == "w1 "
            teller.may_tell = 8
            assert text_of(await second.rest()) == STORY[6:]
        assert (await first.rest())[-1]["error"]["code"] == "superseded"
    assert len(teller.jobs) == 1
    await until(lambda: not gw.gateway.inbox.streams)


async def test_gateway_that_dies_cancels_nothing_and_the_other_settles(
    gw: Running, other: Running, teller: Teller, monkeypatch: pytest.MonkeyPatch
) -> None:
    gw.key = other.key = gw.directory.add_key(key_limits=BUDGET)
    teller.may_tell = 3
    monkeypatch.setattr(gw.gateway.ends, "give_up", lambda stream: None)  # what a dead process does
    async with gw.stream(CHAT) as first:
        await read(first, 3)
        last = first.ids[-1]
    teller.may_tell = 5
    await until(lambda: teller.jobs[0].offset == 5)
    async with other.stream(CHAT, **{"last-event-id": last}) as second:
        teller.may_tell = 8
        assert text_of(await second.rest()) == "w3 w4 w5 w6 w7 "
    assert await charged(gw) == 7 + 2 * 8
    gw.gateway.inbox.streams.clear()


async def test_gateway_that_stops_leaves_streams_running_to_be_collected(
    gw: Running, other: Running, teller: Teller
) -> None:
    teller.may_tell = 3
    async with gw.stream(CHAT) as first:
        await read(first, 3)
        gw.gateway.end_streams()
        [error] = await first.rest()
        assert (error["error"]["code"], "Last-Event-ID" in error["error"]["message"]) == (
            "gateway_stopping",
            True,
        )
    async with other.stream(CHAT, **{"last-event-id": first.ids[-1]}) as second:
        teller.may_tell = 8
        assert text_of(await second.rest()) == "w3 w4 w5 w6 w7 "
    assert len(teller.jobs) == 1
    await until(lambda: not gw.gateway.inbox.streams)


async def test_plain_request_sent_twice_at_once_is_generated_once(
    gw: Running, other: Running, teller: Teller
) -> None:
    headers = {"idempotency-key": "order-1"}
    first, second = (
        asyncio.ensure_future(gw.post(CHAT, **headers)),
        asyncio.ensure_future(other.post(CHAT, **headers)),
    )
    await until(lambda: teller.jobs and (gw.gateway.resumer.n_resumed or other.gateway.resumer.n_resumed))
    teller.may_tell = 8
    answers = [await first, await second]
    assert len(teller.jobs) == 1
    by_status = sorted(answers, key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in by_status] == [200, 409]
    assert by_status[0].json()["choices"][0]["message"]["content"] == STORY
    assert by_status[1].json()["error"]["code"] == "superseded"
    assert by_status[1].headers["x-should-retry"] == "false"
    third = await gw.post(CHAT, **headers)
    assert third.content == by_status[0].content


async def test_end_that_was_sent_elsewhere_just_as_the_client_came_back_is_found_soon(redis_url: str) -> None:
    """The stall check is far off, and no further frame will tell."""
    may_end = asyncio.Event()

    async def lose_the_end(job: Job) -> None:
        await may_end.wait()
        await job.finish("done", n=1, lost=True)

    async with running(redis_url, stall_s=60) as gw:
        machine = Machine(redis_url)
        machine.behaviour = lose_the_end
        await machine.start()
        headers = {"idempotency-key": "k"}
        first = asyncio.ensure_future(gw.post(CHAT, **headers))
        await until(lambda: machine.jobs)
        second = asyncio.ensure_future(gw.post(CHAT, **headers))
        await until(lambda: gw.gateway.resumer.n_resumed)
        await until(lambda: not any(s.catching_up for s in gw.gateway.inbox.streams.values()))
        may_end.set()
        assert (await second).json()["choices"][0]["message"]["content"] == "done"
        assert (await first).status_code == 409
        await machine.stop()


# -- it has ended


async def test_every_event_id_leads_to_exactly_the_events_after_it(
    gw: Running, other: Running, machine: Machine
) -> None:
    async def tell(job: Job) -> None:
        await job.emit("one ")
        await job.emit("two three ", 2)
        await job.emit("", 1)  # half a character
        await job.finish("four", n=0)

    machine.behaviour = tell
    body = {**CHAT, "stream_options": {"include_usage": True}}
    async with gw.stream(body) as events:
        whole = await events.rest()
    ids = events.ids
    assert [i.partition(".")[2] for i in ids] == ["0", "1", "3", "4.1", "4.2", "4.3"]
    for at, seen in enumerate(ids):
        async with other.stream(body, **{"last-event-id": seen}) as again:
            assert again.response.headers["x-corral-resumed"] == "replayed"
            assert await again.rest() == whole[at + 1 :], seen
        assert again.ids == ids[at + 1 :]
    assert len(machine.jobs) == 1


async def test_token_probabilities_go_on_at_the_right_place(gw: Running, machine: Machine) -> None:
    async def tell(job: Job) -> None:
        for word in ("one ", "two ", "three"):
            await job.emit(word, logprobs=[[word, -0.5, []]])
        await job.finish()

    machine.behaviour = tell
    body = {"model": "tiny", "prompt": "Say", "logprobs": 0}
    async with gw.stream(body, "/v1/completions") as events:
        whole = await events.rest()
    async with gw.stream(body, "/v1/completions", **{"last-event-id": events.ids[1]}) as again:
        assert await again.rest() == whole[2:]
    assert whole[2]["choices"][0]["logprobs"]["text_offset"] == [8]


async def test_answer_is_replayed_byte_for_byte_and_charged_once(
    gw: Running, other: Running, teller: Teller
) -> None:
    gw.key = other.key = gw.directory.add_key(key_limits=BUDGET)
    teller.may_tell = 8
    first = await gw.post(CHAT, **{"idempotency-key": "k"})
    again = await other.post(CHAT, **{"idempotency-key": "k"})
    assert (first.status_code, first.content) == (200, again.content)
    assert first.headers["x-request-id"] == again.headers["x-request-id"]
    assert "x-corral-resumed" not in first.headers
    assert again.headers["x-corral-resumed"] == "replayed"
    assert len(teller.jobs) == 1
    assert other.gateway.ends.n_settled == 0
    assert await charged(gw) == 7 + 2 * 8


async def test_stream_is_replayed_from_its_start_with_the_key(
    gw: Running, other: Running, teller: Teller
) -> None:
    teller.may_tell = 8
    async with gw.stream(CHAT, **{"idempotency-key": "k"}) as first:
        whole = await first.rest()
    async with other.stream(CHAT, **{"idempotency-key": "k"}) as second:
        assert await second.rest() == whole
    async with other.stream(CHAT, **{"idempotency-key": "k", "last-event-id": first.ids[4]}) as third:
        assert await third.rest() == whole[5:]
    assert second.ids == first.ids


async def test_refusal_of_the_replica_is_replayed_a_failure_of_ours_is_tried_again(
    gw: Running, machine: Machine
) -> None:
    errors = [
        WireError(500, "internal_error", "no"),
        WireError(400, "context_length_exceeded", "long", "messages"),
    ]

    async def fail(job: Job) -> None:
        await job.finish(reason=FinishReason.ERROR, error=errors[len(machine.jobs) - 1], n_prompt=0)

    machine.behaviour = fail
    headers = {"idempotency-key": "k"}
    codes = [(await gw.post(CHAT, **headers)).status_code for _ in range(4)]
    assert codes == [500, 400, 400, 400]
    assert len(machine.jobs) == 2


async def test_request_that_nobody_will_serve_is_not_tried_again(gw: Running, teller: Teller) -> None:
    """Poison: its reason stays in its record."""
    teller.may_tell = 2
    async with gw.stream(CHAT, **{"idempotency-key": "k"}) as first:
        await read(first, 2)
        poison = encode(WireError(500, "request_poison", "it killed two replicas"))
        withdraw = (scripts.WITHDRAW.sha, 0, KEYS.prefix, 1)
        await gw.redis.evalsha(*withdraw, "r1", "dead", 1, poison)
        await gw.redis.evalsha(scripts.ENROL.sha, 0, KEYS.prefix, 1, "r2", "m2", DEPLOYMENT, 4)
        prefix = KEYS.machine("m2").prefix
        await gw.redis.evalsha(scripts.CLAIM.sha, 0, prefix, 1, teller.jobs[0].id, 2, "r2")
        given_up = await gw.redis.evalsha(*withdraw, "r2", "dead", 1, poison)
        assert given_up[2] == 1
        waiting = asyncio.ensure_future(gw.post(AS_STREAMED, **{"idempotency-key": "k"}))
        await settle(gw, teller.jobs[0].id)  # as the watcher does
        assert (await waiting).status_code == 500
        for headers in ({"idempotency-key": "k"}, {"last-event-id": first.ids[-1]}):
            async with gw.stream(CHAT, **headers) as again:
                assert again.status == 500
                assert "request_poison" in (await again.response.aread()).decode()


async def test_request_that_waited_too_long_may_try_again_under_its_key(gw: Running, redis_url: str) -> None:
    sending = asyncio.ensure_future(gw.post(CHAT, **{"idempotency-key": "k"}))
    await until(lambda: gw.redis.zcard(KEYS.queue(DEPLOYMENT)))
    (request,) = await gw.redis.zrange(KEYS.queue(DEPLOYMENT), 0, -1)
    error = encode(WireError(504, "timeout", "waited too long"))
    await gw.redis.hset(KEYS.request(request.decode()), "error", error)
    await settle(gw, request.decode())
    sending.cancel()
    machine = Machine(redis_url)
    await machine.start()
    assert (await gw.post(CHAT, **{"idempotency-key": "k"})).status_code == 200
    await machine.stop()


@pytest.mark.parametrize("temperature", [0, 1])
async def test_event_that_redis_has_forgotten_is_made_anew_only_where_that_gives_the_same(
    gw: Running, teller: Teller, temperature: float
) -> None:
    """Redis came back without the end of its log: the client has seen three tokens, the journal has one."""
    teller.may_tell = 1
    body = {**CHAT, "temperature": temperature}
    async with gw.stream(body) as first:
        await read(first, 1)
        async with gw.stream(body, **{"last-event-id": f"{teller.jobs[0].id}.3"}) as again:
            if temperature:
                assert again.status == 503
                assert "answer_lost" in (await again.response.aread()).decode()
            else:
                teller.may_tell = 8
                assert text_of(await again.rest()) == "w3 w4 w5 w6 w7 "


async def test_answer_that_is_not_kept_is_gone(gw: Running, teller: Teller) -> None:
    teller.may_tell = 8
    for zero_retention, code in ((False, "answer_expired"), (True, "answer_not_kept")):
        gw.key = gw.directory.add_key(zero_retention=zero_retention)
        await gw.post(CHAT, **{"idempotency-key": code})
        await gw.redis.delete(teller.machine.keys.journal(teller.jobs[-1].id))
        again = await gw.post(CHAT, **{"idempotency-key": code})
        assert (again.status_code, again.json()["error"]["code"]) == (410, code)


# -- it was cut off


async def test_disconnect_cancels_and_a_reconnect_continues(
    gw: Running, other: Running, teller: Teller
) -> None:
    gw.key = other.key = gw.directory.add_key(key_limits=BUDGET)
    body = {**CHAT, "stream_options": {"include_usage": True}}
    teller.may_tell = 3
    async with gw.stream(body) as first:
        assert await read(first, 2) == "w0 w1 "
    first_id = teller.jobs[0].id
    await until(is_done(gw, first_id))
    teller.may_tell = 6
    async with other.stream(body, **{"last-event-id": f"{first_id}.2"}) as second:
        assert second.response.headers["x-corral-resumed"] == "continued"
        assert await read(second, 4) == "w2 w3 w4 w5 "
    await until(lambda: teller.jobs[1].cancelled.is_set(), 5)
    teller.may_tell = 8
    async with gw.stream(body, **{"last-event-id": second.ids[-1]}) as third:
        rest = await third.rest()
    assert text_of(rest) == "w6 w7 "
    assert rest[-2]["usage"] == {
        "prompt_tokens": 7, "completion_tokens": 8, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 0}
    }  # fmt: skip
    assert {event["id"] for event in rest[:-1]} == {"chatcmpl-" + first_id}
    assert third.ids == [f"{first_id}.{n}" for n in (7, 8, "8.2", "8.3")]
    last = teller.jobs[2].envelope
    assert (last.continues, last.n_carried, last.n_carried_prompt) == (first_id, 6, 7)
    assert len({job.id for job in teller.jobs}) == 3
    assert await charged(gw) == 7 + 2 * 8, "the prompt once, every token once"
    async with other.stream(body, **{"last-event-id": f"{first_id}.0"}) as again:
        assert text_of(await again.rest()) == STORY


async def test_reconnect_before_the_cancelled_request_has_ended_waits_for_that(
    gw: Running, machine: Machine
) -> None:
    may_end = asyncio.Event()

    async def slow_to_end(job: Job) -> None:
        if job.offset == 0:
            await job.emit("a ")
            await job.cancelled.wait()
            await may_end.wait()
            await job.finish(reason=FinishReason.ABORT)
        else:
            await job.finish("b", n=1)

    machine.behaviour = slow_to_end
    async with gw.stream(CHAT) as first:
        await read(first, 1)
    await until(lambda: machine.jobs[0].cancelled.is_set())
    again = asyncio.ensure_future(gw.post(AS_STREAMED, **{"last-event-id": first.ids[-1]}))
    calls = gw.gateway.redis.evalsha
    seen: list[Any] = []
    gw.gateway.redis.evalsha = lambda *args: seen.append(args) or calls(*args)  # type: ignore[method-assign]
    await until(lambda: len(seen) >= 2)  # it asks again and again
    assert not again.done()
    may_end.set()
    assert '"content":"b"' in (await again).text


async def test_two_reconnects_at_once_continue_once(gw: Running, other: Running, teller: Teller) -> None:
    teller.may_tell = 3
    async with gw.stream(CHAT) as first:
        await read(first, 3)
    await until(is_done(gw, teller.jobs[0].id))
    headers = {"last-event-id": first.ids[-1]}
    both = [asyncio.ensure_future(g.post(AS_STREAMED, **headers)) for g in (gw, other)]
    await until(lambda: len(teller.jobs) == 2)
    teller.may_tell = 8
    answers = [await answer for answer in both]
    assert len(teller.jobs) == 2
    complete = [a for a in answers if a.status_code == 200 and a.text.endswith("[DONE]\n\n")]
    refused = [a for a in answers if a not in complete]
    assert complete
    for answer in refused:
        assert answer.status_code == 503 or '"superseded"' in answer.text


@pytest.mark.parametrize(
    "fields",
    [{"seed": 1, "temperature": 0.7}, {"repetition_penalty": 1.2, "presence_penalty": 0.1}],
    ids=["seed", "penalties"],
)
async def test_what_cannot_be_continued_exactly_is_a_409_that_says_why(
    gw: Running, teller: Teller, fields: dict[str, Any]
) -> None:
    teller.may_tell = 3
    async with gw.stream({**CHAT, **fields}) as first:
        await read(first, 3)
    await until(is_done(gw, teller.jobs[0].id))
    async with gw.stream({**CHAT, **fields}, **{"last-event-id": first.ids[-1]}) as again:
        assert again.status == 409
        error = json.loads(await again.response.aread())["error"]
    assert error["code"] == "cannot_continue"
    assert next(iter(fields.keys() - {"temperature", "repetition_penalty"})) in error["message"]
    assert len(teller.jobs) == 1


async def test_refused_continuation_can_be_tried_again(gw: Running, teller: Teller) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(max_concurrency=1))
    teller.may_tell = 3
    async with gw.stream(CHAT) as first:
        await read(first, 3)
    first_id = teller.jobs[0].id
    await until(is_done(gw, first_id))
    await gw.redis.hset(KEYS.limits("key", key_of(gw)), "conc", 1)
    async with gw.stream(CHAT, **{"last-event-id": first.ids[-1]}) as refused:
        assert refused.status == 429
    assert b"next" not in await gw.record(first_id)
    assert not await gw.redis.keys(KEYS.journal("*"))
    await gw.redis.hset(KEYS.limits("key", key_of(gw)), "conc", 0)
    teller.may_tell = 8
    async with gw.stream(CHAT, **{"last-event-id": first.ids[-1]}) as again:
        assert text_of(await again.rest()) == "w3 w4 w5 w6 w7 "


# -- keys


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


# -- GET /v1/requests/<id>/events


async def test_events_of_a_request_are_read_by_its_id(gw: Running, other: Running, teller: Teller) -> None:
    teller.may_tell = 3
    async with gw.stream({**CHAT, "stream_options": {"include_usage": True}}) as first:
        whole = [await first.next() for _ in range(4)]
        path = f"/v1/requests/{first.response.headers['x-request-id']}/events"
        async with other.http.stream("GET", path, headers=other.auth()) as response:
            teller.may_tell = 8
            events = await Events(response).rest()
        assert events[:4] == whole
        assert text_of(events) == STORY
        assert events[-2]["usage"]["completion_tokens"] == 8
        assert (await first.rest())[-1]["error"]["code"] == "superseded"
    again = await gw.http.get(path, headers={**gw.auth(), "last-event-id": f"{teller.jobs[0].id}.8"})
    assert (again.headers["content-type"], again.text.count("data: ")) == (
        "text/event-stream; charset=utf-8",
        3,
    )
    for wrong, status in (("req_1", 400), ("req_" + "f" * 32, 404)):
        assert (await gw.http.get(f"/v1/requests/{wrong}/events", headers=gw.auth())).status_code == status
    foreign = await gw.http.get(path, headers={**gw.auth(), "last-event-id": f"{'f' * 32}.1"})
    assert foreign.status_code == 400
    assert (await gw.http.post(path, headers=gw.auth())).headers["allow"] == "GET"
    assert (await gw.http.get(path)).status_code == 401


async def test_what_was_cut_off_needs_its_body_to_go_on(gw: Running, teller: Teller) -> None:
    teller.may_tell = 3
    async with gw.stream(CHAT) as first:
        await read(first, 3)
    await until(is_done(gw, teller.jobs[0].id))
    answer = await gw.http.get(f"/v1/requests/req_{teller.jobs[0].id}/events", headers=gw.auth())
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "body_needed")


# -- the published SDK


async def test_sdk_goes_on_with_its_last_event_id(gw: Running, other: Running, teller: Teller) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    teller.may_tell = 3
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=0) as sdk:
        create = sdk.chat.completions.create
        stream = await create(
            model="tiny", messages=messages, stream=True, extra_headers={"Idempotency-Key": "k"}
        )
        seen = ""
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            if seen == "w0 w1 w2 ":
                break
        await stream.close()
    teller.may_tell = 8
    request = teller.jobs[0].id
    async with AsyncOpenAI(api_key=gw.key, base_url=other.url + "/v1", max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(
            model="tiny", messages=messages, stream=True, extra_headers={"Last-Event-ID": f"{request}.3"}
        )
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
        with pytest.raises(openai.ConflictError, match="another body"):
            await sdk.chat.completions.create(
                model="tiny", messages=messages, extra_headers={"Idempotency-Key": "k"}
            )
    assert seen == STORY
    assert len(teller.jobs) == 1
