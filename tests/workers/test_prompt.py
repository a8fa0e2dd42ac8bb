"""Long prompts on threads of their own: answers, refusals and endings arrive as those of short ones do."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from workers.contract import Endpoint, RequestEnvelope, Sampling
from workers.engine.base import EngineInputError, EngineProfile
from workers.engine.toy import ToyEngine
from workers.prompt import Prompts

INLINE_BYTES = 100


class Watched(ToyEngine):
    """Remembers which threads counted; waits for `go` first."""

    def __init__(self) -> None:
        super().__init__(EngineProfile(engine="toy", max_model_len=4096))
        self.threads: list[threading.Thread] = []
        self.go = threading.Event()
        self.go.set()

    def tokenize_chat(self, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
        self.threads.append(threading.current_thread())
        assert self.go.wait(10)
        return super().tokenize_chat(messages, tools)


@pytest.fixture
def engine() -> Watched:
    return Watched()


@pytest.fixture
def prompts(engine: Watched) -> Iterator[Prompts]:
    it = Prompts(engine, INLINE_BYTES)
    yield it
    engine.go.set()
    it.close()


def envelope(text: str, role: str = "user") -> RequestEnvelope:
    payload = json.dumps({"model": "m", "messages": [{"role": role, "content": text}]}).encode()
    return RequestEnvelope(
        id="r", org="o", project="p", key="k", deployment="d", model="m", endpoint=Endpoint.CHAT, payload=payload,
        sampling=Sampling(max_tokens=1), price_version="v", admitted_at_ms=0,
    )  # fmt: skip


async def test_long_prompts_are_counted_on_two_threads_and_short_ones_here(
    engine: Watched, prompts: Prompts
) -> None:
    short = await prompts.token_ids(envelope("hello"))
    many = await asyncio.gather(*(prompts.token_ids(envelope("hello " * n)) for n in range(50, 70)))
    assert len(short) < len(many[0]) < len(many[-1]) and len(many) == 20
    assert engine.threads[0] is threading.current_thread()
    others = set(engine.threads[1:])
    assert len(engine.threads) == 21 and threading.current_thread() not in others and len(others) <= 2
    assert prompts.cpu_ns > 0


async def test_refusal_of_a_long_prompt_reaches_who_asked(prompts: Prompts) -> None:
    with pytest.raises(EngineInputError) as refused:
        await prompts.token_ids(envelope("hello " * 50, role="nobody"))
    assert refused.value.param
    assert await prompts.token_ids(envelope("hello " * 50)), "the thread lives on"


async def test_who_was_cancelled_is_not_counted_for(engine: Watched, prompts: Prompts) -> None:
    engine.go.clear()
    asked = [asyncio.ensure_future(prompts.token_ids(envelope("hello " * n))) for n in range(50, 54)]
    while len(engine.threads) < 2:
        await asyncio.sleep(0.001)
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    engine.go.set()
    assert await prompts.token_ids(envelope("hello " * 50))
    assert len(engine.threads) == 3, "two were under way, two were dropped"


async def test_threads_end_with_the_replica(engine: Watched, prompts: Prompts) -> None:
    await asyncio.gather(*(prompts.token_ids(envelope("hello " * n)) for n in range(50, 54)))
    prompts.close()
    for thread in engine.threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
async def test_token_ids_are_the_prompt_as_they_are(prompts: Prompts, prompt: list[Any]) -> None:
    asked = envelope("")
    asked.endpoint = Endpoint.COMPLETIONS
    asked.payload = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert await prompts.token_ids(asked) == [5, 6, 7]
    asked.payload = json.dumps({"model": "m", "prompt": ["a", 5]}).encode()
    with pytest.raises(EngineInputError, match="one list of token ids"):
        await prompts.token_ids(asked)
