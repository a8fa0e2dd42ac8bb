"""A client that comes back for what was cut off: a new request goes on after the last token."""

import asyncio
import json
from typing import Any

import pytest

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import (
    CHAT,
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
    STORY,
    Teller,
    charged,
    is_done,
    key_of,
    read,
)
from workers.contract import FinishReason


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
