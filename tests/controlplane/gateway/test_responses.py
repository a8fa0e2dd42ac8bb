"""/v1/responses: what becomes of a body, and what is refused in its words."""

import json
from typing import Any

import pytest

from controlplane.gateway.errors import ApiError
from controlplane.gateway.responses import in_its_words, parse_responses
from controlplane.gateway.surface import Translated, served_as
from tests.controlplane.gateway.harness import KEYS, Machine, Running
from workers.contract import Endpoint, FinishReason, WireError

BODY: dict[str, Any] = {"model": "tiny", "input": "Hello"}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
FORM = {"type": "json_schema", "name": "city", "schema": {"type": "object"}, "strict": True}


def chat_of(**changes: Any) -> dict[str, Any]:
    request, chat = parse_responses(json.dumps({**BODY, **changes}).encode())
    assert request.endpoint is Translated.RESPONSES and served_as(request.endpoint) is Endpoint.CHAT
    return json.loads(chat)


def test_a_body_becomes_a_chat() -> None:
    assert chat_of() == {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    changed = chat_of(
        instructions="Be brief",
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        stream=True,
        stream_options={"include_obfuscation": False},
        tools=[{**TOOL, "strict": True}],
        tool_choice={"type": "function", "name": "get_weather"},
        parallel_tool_calls=False,
        text={"format": FORM, "verbosity": "medium"},
        user="u1",
        safety_identifier="s1",
        metadata={"k": "v"},
        service_tier="flex",
    )
    assert changed["messages"] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Hello"},
    ]
    function = {
        "name": "get_weather",
        "description": "of a city",
        "parameters": TOOL["parameters"],
        "strict": True,
    }
    assert changed["tools"] == [{"type": "function", "function": function}]
    assert changed["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    assert changed["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": {"type": "object"}, "strict": True},
    }
    plain = {"max_tokens": 50, "temperature": 0.5, "top_p": 0.9, "stream": True, "parallel_tool_calls": False}
    plain |= {"user": "u1", "safety_identifier": "s1", "metadata": {"k": "v"}, "service_tier": "flex"}
    assert {name: changed[name] for name in plain} == plain
    assert chat_of(tools=[TOOL], tool_choice="required")["tool_choice"] == "required"
    assert chat_of(text={"format": {"type": "json_object"}})["response_format"] == {"type": "json_object"}


def test_what_asks_for_nothing_is_no_member_of_the_chat() -> None:
    neutral = {
        "store": False, "previous_response_id": None, "conversation": None, "background": False,
        "truncation": "disabled", "top_logprobs": 0, "reasoning": {"effort": None, "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "max_tool_calls": 3, "prompt_cache_retention": "24h",
        "prompt_cache_options": {"ttl": "12h"}, "instructions": "", "tools": [], "text": {},
    }  # fmt: skip
    assert chat_of(**neutral) == chat_of()


SAID = {
    "type": "message",
    "id": "msg_1",
    "status": "completed",
    "role": "assistant",
    "phase": None,
    "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
}
CALL = {
    "type": "function_call",
    "id": "fc_1",
    "call_id": "call_1",
    "name": "get_weather",
    "arguments": '{"city": "Bern"}',
    "status": "completed",
}
ANSWERED = {"type": "function_call_output", "call_id": "call_1", "output": "4 C"}


def test_items_of_earlier_answers_become_turns() -> None:
    turns = chat_of(
        input=[
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "input_text", "text": "Bern?"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
            SAID,
            CALL,
            {**CALL, "call_id": "call_2", "arguments": ""},
            ANSWERED,
            {
                **ANSWERED,
                "call_id": "call_2",
                "output": [{"type": "input_text", "text": "5"}, {"type": "input_text", "text": "C"}],
            },
            {"role": "assistant", "content": "Cold."},
            {**SAID, "content": [{"type": "refusal", "refusal": "No more."}]},
        ]
    )["messages"]
    assert turns[:2] == [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Bern?"}]
    assert turns[2] == {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'},
            },
            {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": ""}},
        ],
    }
    assert turns[3:] == [
        {"role": "tool", "tool_call_id": "call_1", "content": "4 C"},
        {"role": "tool", "tool_call_id": "call_2", "content": "5\nC"},
        {"role": "assistant", "content": "Cold.\nNo more."},
    ]


HELLO = {"role": "user", "content": "Hello"}
IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    # Of the body.
    ({"store": True}, "store", "unsupported_parameter"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
    ({"conversation": {"id": "conv_1"}}, "conversation", "unsupported_parameter"),
    ({"background": True}, "background", "unsupported_parameter"),
    ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
    ({"top_logprobs": 2}, "top_logprobs", "unsupported_parameter"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
    ({"context_management": [{"type": "compaction"}]}, "context_management", "unsupported_parameter"),
    ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort", "unsupported_parameter"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "unsupported_parameter"),
    ({"include": ["what.is_this"]}, "include[0]", "invalid_value"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "unsupported_parameter"),
    ({"service_tier": "ultrafast"}, "service_tier", "unsupported_parameter"),
    ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm", "unsupported_parameter"),
    (
        {"include": ["reasoning.encrypted_content", "message.output_text.logprobs"]},
        "include[1]",
        "unsupported_value",
    ),
    ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
    ({"temperature": 3}, "temperature", "invalid_value"),
    ({"metadata": {"k": 1}}, "metadata[...]", "invalid_type"),
    ({"messages": []}, "messages", "unknown_parameter"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options.include_usage", "unknown_parameter"),
    # Of its items.
    ({"input": []}, "input", "empty_input"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "invalid_value"),
    ({"input": [{"content": "x"}]}, "input[0].type", "missing_required_parameter"),
    ({"input": [{"type": "message", "content": "x"}]}, "input[0].role", "missing_required_parameter"),
    ({"input": [HELLO, {"role": "user"}]}, "input[1].content", "missing_required_parameter"),
    ({"input": [HELLO, IMAGE]}, "input[1].content[0]", "unsupported_content"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "unsupported_content"),
    (
        {"input": [HELLO, {"type": "web_search_call", "id": "w", "status": "completed"}]},
        "input[1].type",
        "unsupported_content",
    ),
    (
        {"input": [{"type": "computer_call_output", "call_id": "c", "output": {"type": "x"}}]},
        "input[0].type",
        "unsupported_content",
    ),
    (
        {"input": [{"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x"}]}]},
        "input[0].type",
        "unsupported_content",
    ),
    ({"input": [HELLO, ANSWERED]}, "input[1].call_id", "invalid_value"),
    (
        {"input": [HELLO, {"type": "function_call_output", "output": "x"}]},
        "input[1].call_id",
        "missing_required_parameter",
    ),
    ({"input": [CALL, {**ANSWERED, "output": {"a": 1}}]}, "input[1].output", "invalid_type"),
    ({"input": [{**CALL, "name": None}]}, "input[0].name", "missing_required_parameter"),
    ({"input": [HELLO, {**CALL, "arguments": '{"cut'}]}, "input[1].arguments", "invalid_value"),
    ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments", "invalid_type"),
    # Of tools and form.
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
    (
        {"tools": [TOOL, {"type": "mcp", "server_label": "x", "server_url": "http://x"}]},
        "tools[1].type",
        "unsupported_value",
    ),
    ({"tools": [{**TOOL, "what": 1}]}, "tools[0].what", "unknown_parameter"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading", "unsupported_parameter"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
    (
        {"tools": [{**TOOL, "parameters": {"type": "array"}}]},
        "tools[0].parameters.type",
        "invalid_schema",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice.name", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "invalid_value"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "missing_required_parameter"),
    ({"text": {"format": {**FORM, "name": "a b"}}}, "text.format.name", "invalid_value"),
    ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format.type", "invalid_value"),
    (
        {"text": {"format": {**FORM, "schema": {"$ref": "http://elsewhere"}}}},
        "text.format.schema",
        "invalid_schema",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "param", "code"), REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)]
)
def test_a_refusal_names_the_member_in_the_clients_words(
    changes: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(ApiError) as raised:
        chat_of(**changes)
    error = raised.value
    assert (error.status, error.param, error.code) == (400, param, code)
    for word in ("response_format", ".function.", "max_tokens", "json_schema.schema"):
        assert word not in error.message


def test_what_would_need_a_memory_is_refused_with_what_to_do_instead() -> None:
    for changes in (
        {"store": True},
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
        {"input": [ANSWERED]},
    ):
        with pytest.raises(ApiError) as raised:
            chat_of(**changes)
        assert "not stored" in raised.value.message and "send" in raised.value.message


def test_a_refusal_of_a_replica_is_told_in_the_same_words() -> None:
    told = in_its_words(ApiError(400, "c", "tools[0].function.parameters: x", param="tools[0].function"))
    assert told.message == "tools[0].parameters: x"
    assert in_its_words(ApiError(400, "c", "too long", param="messages")).param == "input"
    assert in_its_words(ApiError(400, "c", "too long", param="messages[3].role")).param == "input"
    assert in_its_words(ApiError(429, "c", "slow down")).param is None


async def test_a_refusal_takes_nothing(gw: Running, machine: Machine) -> None:
    before = await gw.redis.keys(KEYS.prefix + "*")
    answer = await gw.post({**BODY, "store": True}, path="/v1/responses")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "store")
    assert await gw.redis.keys(KEYS.prefix + "*") == before and not machine.jobs

    async def refuse(job: Any) -> None:
        error = WireError(400, "context_length_exceeded", "shorten the prompt", "messages")
        await job.finish(reason=FinishReason.ERROR, error=error)

    machine.behaviour = refuse
    for stream in (False, True):
        answer = await gw.post({**BODY, "stream": stream}, path="/v1/responses")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
