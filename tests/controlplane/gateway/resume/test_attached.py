"""A client that comes back while its request still runs: it moves to whoever asked last."""

import asyncio

import pytest

from tests.controlplane.gateway.harness import (
    CHAT,
    Job,
    Machine,
    Running,
    running,
    text_of,
    until,
)
from tests.controlplane.gateway.resume.story import (
    BUDGET,
    STORY,
    Teller,
    charged,
    read,
)


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
