"""Functions that the toy engine calls: which, with what, and the same on every attempt."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from controlplane.gateway.toolcalls import CallReader, whole
from tests.workers.engine.reading import read
from tests.workers.engine.test_toy import running
from workers.contract import CallRule, FinishReason, HeldFunction
from workers.engine import toy_text
from workers.engine.base import EngineInputError, EngineRequest, SamplingSpec


def asking(text: str, rule: CallRule, **more: Any) -> EngineRequest:
    body = json.dumps({"messages": [{"role": "user", "content": text}], "tools": CALLABLE, **more}).encode()
    ids = toy_text.tokenize_chat([{"role": "user", "content": text}], CALLABLE)
    return EngineRequest("c", ids, SamplingSpec(max_tokens=200, temperature=0.0, calls=rule), body=body)


CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 3},
        "days": {"type": "array", "items": {"enum": [7]}},
    },
    "required": ["city", "days"],
}
CALLABLE = [
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "now"}},
]
MUST = CallRule(
    (HeldFunction("get_weather", json.dumps(CITY)), HeldFunction("now", '{"type":"object"}')), must=True
)


async def test_it_calls_what_the_last_message_names_or_what_it_must() -> None:
    async with running() as engine:

        async def called(text: str, rule: CallRule) -> list[str]:
            answer = await read(engine, asking(text, rule))
            assert answer.finish is FinishReason.STOP
            return re.findall(r'"name": "(\w+)"', answer.text)

        assert await called("hello", CallRule()) == []
        assert await called("use now please", CallRule()) == ["now"]
        assert await called("now, get_weather", CallRule()) == ["get_weather", "now"]
        assert await called("now, get_weather", CallRule(many=False)) == ["get_weather"]
        assert await called("hello", MUST) == ["get_weather"]
        assert await called("now!", CallRule(MUST.functions[:1], must=True)) == ["get_weather"]
        result = {"messages": [{"role": "tool", "content": "now"}]}
        assert "tool_call" not in (await read(engine, asking("now", CallRule(), **result))).text


async def test_its_arguments_fit_differ_by_prompt_and_are_continued_exactly() -> None:
    async with running() as engine:
        request = asking("hello", MUST)
        answer = await read(engine, request)
        ((_, arguments),) = whole([CallReader().read(answer.text, final=True)])[1]
        assert (len(json.loads(arguments)["city"]), json.loads(arguments)["days"]) == (3, [7])
        assert (await read(engine, asking("hello there", MUST))).text != answer.text
        for n in range(1, answer.n_tokens):
            rest = await read(engine, replace(request, prior_token_ids=answer.token_ids[:n]))
            assert answer.token_ids[:n] + rest.token_ids == answer.token_ids
            assert answer.text.endswith(rest.text)
        single = await read(engine, replace(request, single_tokens=True))
        assert (single.token_ids, single.text) == (answer.token_ids, answer.text)
        stopped = replace(request, sampling=replace(request.sampling, stop=("arguments",)))
        assert (await read(engine, stopped)).text == answer.text[: answer.text.index("arguments")]
        short = replace(request, sampling=replace(request.sampling, max_tokens=5))
        assert (await read(engine, short)).finish is FinishReason.LENGTH


async def test_a_schema_it_makes_nothing_of_is_refused_by_name() -> None:
    async with running() as engine:
        schema = '{"type": "object", "required": ["x"], "properties": {"x": {"enum": 5}}}'
        rule = CallRule((HeldFunction("f", schema),), must=True)
        with pytest.raises(EngineInputError) as refused:
            await read(engine, asking("hello", rule))
        assert (refused.value.code, refused.value.param) == ("invalid_schema", "tools")
