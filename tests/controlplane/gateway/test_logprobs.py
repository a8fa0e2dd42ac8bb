"""Token probabilities in OpenAI's shapes, also out of the journal."""

import pytest
from openai import AsyncOpenAI

from controlplane.gateway.logprobs import chat_logprobs, completion_logprobs, tokens_of
from tests.controlplane.gateway.harness import CHAT, Job, Machine, Running, text_of


async def two_tokens(job: Job) -> None:
    await job.emit("a", logprobs=[["a", -0.5, [["a", -0.5], ["b", -1.5]]]])
    await job.emit("\u00e9", lost=True, logprobs=[["\u00e9", float("-inf"), []]])
    await job.finish()


async def test_sdk_reads_them_whole_and_streamed(gw: Running, machine: Machine) -> None:
    machine.behaviour = two_tokens
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=0) as sdk:
        ask = {"model": "tiny", "messages": CHAT["messages"], "logprobs": True, "top_logprobs": 2}
        answer = await sdk.chat.completions.create(**ask)
        whole = answer.choices[0].logprobs
        assert whole and whole.content
        assert [t.token for t in whole.content] == ["a", "\u00e9"]
        assert [t.logprob for t in whole.content] == [-0.5, -9999.0]
        assert whole.content[1].bytes == [0xC3, 0xA9]
        assert [(t.token, t.logprob) for t in whole.content[0].top_logprobs] == [("a", -0.5), ("b", -1.5)]
        streamed = []
        async for chunk in await sdk.chat.completions.create(**ask, stream=True):
            if chunk.choices and chunk.choices[0].logprobs:
                streamed += chunk.choices[0].logprobs.content or []
        assert streamed == whole.content
        legacy = await sdk.completions.create(model="tiny", prompt="x", logprobs=2)
        old = legacy.choices[0].logprobs
        assert old and (old.tokens, old.text_offset) == (["a", "\u00e9"], [0, 1])
        assert old.top_logprobs == [{"a": -0.5, "b": -1.5}, None]
        offsets = []
        async for piece in await sdk.completions.create(model="tiny", prompt="x", logprobs=2, stream=True):
            if piece.choices[0].logprobs:
                offsets += piece.choices[0].logprobs.text_offset or []
        assert offsets == [0, 1]
    assert [job.envelope.sampling.logprobs for job in machine.jobs] == [2, 2, 2, 2]


async def test_request_without_them_gets_none(gw: Running, machine: Machine) -> None:
    assert (await gw.post(CHAT)).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("junk", [[1], [["a"]], [["a", "b", []]], [["a", -1.0, [["x"]]]], [{"token": "a"}]])
async def test_what_has_another_form_is_left_out_and_the_text_is_not(
    gw: Running, machine: Machine, junk: list[object]
) -> None:
    async def spoil(job: Job) -> None:
        await job.emit("text", logprobs=junk)
        await job.finish()

    machine.behaviour = spoil
    async with gw.stream({**CHAT, "logprobs": True}) as events:
        chunks = await events.rest()
    assert text_of(chunks) == "text"
    assert all(c["choices"][0]["logprobs"] is None for c in chunks[:-1])


def test_nothing_is_none() -> None:
    assert tokens_of(None) == []
    assert chat_logprobs([]) is None
    assert completion_logprobs([], 5) is None
