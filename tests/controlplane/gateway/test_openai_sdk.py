"""The published openai SDK, unchanged, against a gateway: answers, streams, models, exception classes."""

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import Job, Machine, Running

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
async def sdk(gw: Running, machine: Machine) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=0) as client:
        yield client


async def test_chat(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES)
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage and answer.usage.total_tokens == 10
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id and answer._request_id.startswith("req_")


async def test_stream_with_usage(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 3


async def test_stream_that_is_kept_alive_by_comments(sdk: AsyncOpenAI, machine: Machine) -> None:
    """Comments before the first event (no replica) and between events (silence) are invisible to the SDK."""

    async def slow(job: Job) -> None:
        await job.emit("a")
        await asyncio.sleep(0.8)  # several keep-alive intervals of silence are the point
        await job.emit("b")
        await job.finish()

    machine.behaviour = slow
    await machine.withdraw("drain")
    creating = asyncio.ensure_future(
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    )
    stream = await creating
    await machine.enrol()
    assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "ab"


async def test_stream_left_early_cancels(sdk: AsyncOpenAI, machine: Machine) -> None:
    async def endless(job: Job) -> None:
        while await job.emit("x ") == "a":
            await asyncio.sleep(0.005)

    machine.behaviour = endless
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    async for _ in stream:
        break
    await stream.close()
    async with asyncio.timeout(10):
        await machine.jobs[0].cancelled.wait()
    assert [job.cancelled.is_set() for job in machine.jobs] == [True]


async def test_completions(sdk: AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model="tiny", prompt="Say")
    assert answer.choices[0].text == "one two three"
    stream = await sdk.completions.create(model="tiny", prompt="Say", stream=True)
    assert "".join([c.choices[0].text async for c in stream]) == "one two three"


async def test_models(sdk: AsyncOpenAI) -> None:
    assert [m.id async for m in await sdk.models.list()] == ["tiny"]
    assert (await sdk.models.retrieve("tiny")).object == "model"


async def test_errors_are_the_sdks_exceptions(sdk: AsyncOpenAI, gw: Running, machine: Machine) -> None:
    create = sdk.chat.completions.create
    with pytest.raises(openai.NotFoundError) as not_found:
        await create(model="gpt-4o", messages=MESSAGES)
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model="tiny", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError):
        await create(model="tiny", messages=MESSAGES, extra_body={"what_is_this": 1})
    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="sk-wrong").models.list()
    limited = sdk.with_options(api_key=gw.directory.add_key(key_limits=LimitsRow(rpm=0)))
    with pytest.raises(openai.RateLimitError):
        await limited.chat.completions.create(model="tiny", messages=MESSAGES)
    with pytest.raises(openai.APIStatusError) as too_large:
        await create(model="tiny", messages=[{"role": "user", "content": "x" * 5_000_000}])
    assert too_large.value.status_code == 413


async def test_failure_in_the_stream_is_raised(sdk: AsyncOpenAI, machine: Machine) -> None:
    from workers.contract import FinishReason, WireError

    async def break_off(job: Job) -> None:
        await job.emit("part")
        await job.finish(reason=FinishReason.ERROR, error=WireError(500, "engine_died", "it died"))

    machine.behaviour = break_off
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="it died"):
        async for _ in stream:
            pass


async def test_503_is_retried_by_the_sdk(gw: Running, machine: Machine) -> None:
    """Overload passes within the SDK's own retries."""
    config = gw.gateway.config
    gw.gateway.app.n_in_flight = config.max_in_flight
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=5) as client:
        asking = asyncio.ensure_future(client.chat.completions.create(model="tiny", messages=MESSAGES))
        while not gw.log.lines:
            await asyncio.sleep(0.01)
        gw.gateway.app.n_in_flight = 0
        assert (await asking).choices[0].message.content == "one two three"
