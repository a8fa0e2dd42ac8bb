"""A client that comes back for what has ended: the same bytes, charged once, or a word why not."""

import asyncio

import pytest

from tests.controlplane.gateway.harness import (
    CHAT,
    DEPLOYMENT,
    KEYS,
    Job,
    Machine,
    Running,
    text_of,
    until,
)
from tests.controlplane.gateway.resume.story import (
    AS_STREAMED,
    BUDGET,
    Teller,
    charged,
    read,
    settle,
)
from workers import scripts
from workers.contract import FinishReason, WireError, encode


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
