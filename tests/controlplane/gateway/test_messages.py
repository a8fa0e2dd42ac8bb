"""/v1/messages: what becomes of a body, what is refused, and answers as the published anthropic SDK reads them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from controlplane.gateway.directory import LimitsRow
from controlplane.gateway.errors import ApiError
from controlplane.gateway.messages import parse_messages
from controlplane.gateway.surface import Translated, served_as
from tests.controlplane.gateway.harness import Job, Machine, Running, running
from workers.contract import Endpoint, FinishReason
from workers.engine.tool_form import written

BODY: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Hello"}],
}
TOOL = {
    "name": "get_weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALLS = written("get_weather", '{"city": "Zürich"}') + "\n" + written("get_weather", '{"city": "Bern"}')


def chat_of(**changes: Any) -> dict[str, Any]:
    request, chat = parse_messages(json.dumps({**BODY, **changes}).encode())
    assert request.endpoint is Translated.MESSAGES and served_as(request.endpoint) is Endpoint.CHAT
    return json.loads(chat)


def test_a_body_becomes_a_chat() -> None:
    assert chat_of() == {
        "model": "tiny",
        "max_tokens": 50,
        "messages": [{"role": "user", "content": "Hello"}],
    }
    changed = chat_of(
        system=[
            {"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "brief"},
        ],
        stop_sequences=["END"],
        metadata={"user_id": "u1"},
        temperature=0.5,
        top_k=0,
        thinking={"type": "disabled"},
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
    )
    assert changed["messages"][0] == {"role": "system", "content": "Be\nbrief"}
    assert (changed["stop"], changed["user"], changed["temperature"]) == (["END"], "u1", 0.5)
    assert "top_k" not in changed and "thinking" not in changed
    function = {"name": "get_weather", "description": "of a city", "parameters": TOOL["input_schema"]}
    assert changed["tools"] == [{"type": "function", "function": function}]
    assert changed["tool_choice"] == {"type": "function", "function": {"name": "get_weather"}}
    assert changed["parallel_tool_calls"] is False
    assert chat_of(tools=[TOOL], tool_choice={"type": "any"})["tool_choice"] == "required"


def test_calls_and_what_tools_answered_become_turns() -> None:
    used = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {"city": "Bern"}}
    answered = {"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "4 C"}]}
    turns = chat_of(
        messages=[
            {"role": "user", "content": "And"},
            {"role": "user", "content": [{"type": "text", "text": "Bern?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}, used]},
            {"role": "user", "content": [{"type": "text", "text": "go on"}, answered]},
        ]
    )["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "user"]
    assert turns[0]["content"] == "And\nBern?", "two turns of one side are one"
    assert turns[1]["tool_calls"][0] == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Bern"}'},
    }
    assert turns[2] == {"role": "tool", "tool_call_id": "call_1", "content": "4 C"}


IMAGE = {"type": "image", "source": {"type": "base64", "data": "", "media_type": "image/png"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"messages": []}, "messages", "empty_messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]", "unsupported_content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
        "messages[0].content[0].tool_use_id",
        "missing_required_parameter",
    ),
    (
        {"messages": [*BODY["messages"], {"role": "assistant", "content": "Well"}]},
        "messages[1].role",
        "unsupported_value",
    ),
    ({"system": [IMAGE]}, "system[0]", "unsupported_content"),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking", "unsupported_parameter"),
    ({"temperature": 1.5}, "temperature", "invalid_value"),
    ({"stop_sequences": [""]}, "stop_sequences", "invalid_value"),
    ({"n": 2}, "n", "unknown_parameter"),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools[0].type",
        "unsupported_value",
    ),
    (
        {"tools": [{**TOOL, "input_schema": {"type": "array"}}]},
        "tools[0].input_schema.type",
        "invalid_schema",
    ),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice.name", "invalid_value"),
    ({"tool_choice": {"type": "any"}}, "tool_choice", "invalid_value"),
]


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
    assert "function" not in error.message


# -- answers


@pytest.fixture
async def sdk(gw: Running, machine: Machine) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(api_key=gw.key, base_url=gw.url, max_retries=0) as client:
        yield client


async def test_the_sdk_reads_a_message(sdk: AsyncAnthropic, machine: Machine) -> None:
    async def cached(job: Job) -> None:
        await job.emit("one two", 2)
        await job.finish(n_prompt=7, n_cached=4)

    machine.behaviour = cached
    answer = await sdk.messages.create(**BODY, system="Be brief", metadata={"user_id": "u1"})
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == (
        "message",
        "assistant",
        "tiny",
        "end_turn",
    )
    assert [(block.type, block.text) for block in answer.content if block.type == "text"] == [
        ("text", "one two")
    ]
    used = answer.usage
    assert (used.input_tokens, used.cache_read_input_tokens, used.output_tokens) == (3, 4, 2)
    assert answer._request_id and answer._request_id.startswith("req_")
    envelope = machine.jobs[0].envelope
    assert (envelope.endpoint, envelope.sampling.max_tokens) == (Endpoint.CHAT, 50)
    assert json.loads(envelope.payload)["messages"][0]["role"] == "system"
    assert envelope.end_customer


async def test_the_sdk_streams_a_message(sdk: AsyncAnthropic, machine: Machine) -> None:
    async with sdk.messages.stream(**BODY) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert [kind for kind in dict.fromkeys(kinds) if kind != "text"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    whole = await sdk.messages.create(**BODY)
    assert final.content[0].to_dict()["text"] == whole.content[0].to_dict()["text"] == "one two three"
    assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == ("end_turn", 7, 3)

    async def long(job: Job) -> None:
        await job.finish("a", FinishReason.LENGTH, n=1)

    machine.behaviour = long
    assert (await sdk.messages.create(**BODY)).stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("I look.\n" + CALLS, ["I look.", {"city": "Zürich"}, {"city": "Bern"}]),
        (CALLS, [{"city": "Zürich"}, {"city": "Bern"}]),
        (CALLS + "\nDone <b>.", [{"city": "Zürich"}, {"city": "Bern"}, "Done <b>."]),
        ("Nothing to do.", ["Nothing to do."]),
    ],
)
async def test_the_sdk_reads_calls_whole_and_streamed(
    sdk: AsyncAnthropic, machine: Machine, text: str, blocks: list[Any]
) -> None:
    async def caller(job: Job) -> None:
        for at in range(0, len(text), 4):
            await job.emit(text[at : at + 4])
        await job.finish()

    machine.behaviour = caller
    whole = await sdk.messages.create(**BODY, tools=[TOOL])
    async with sdk.messages.stream(**BODY, tools=[TOOL]) as stream:
        events = [event async for event in stream if event.type.startswith(("content_block", "message"))]
        final = await stream.get_final_message()
    for answer in (whole, final):
        found = [b.input if b.type == "tool_use" else b.to_dict()["text"].strip() for b in answer.content]
        assert found == blocks
        assert answer.stop_reason == ("tool_use" if any(isinstance(b, dict) for b in blocks) else "end_turn")
    # Blocks one after the other, each begun once and closed once.
    shape = [
        (e.type, getattr(e, "index", -1))
        for e in events
        if e.type in ("content_block_start", "content_block_stop")
    ]
    assert shape == [(f"content_block_{what}", i) for i in range(len(blocks)) for what in ("start", "stop")]
    calls = [b for b in whole.content if b.type == "tool_use"]
    again = [b for b in final.content if b.type == "tool_use"]
    assert [(b.name, b.input) for b in calls] == [(b.name, b.input) for b in again]
    assert len({b.id for b in (*calls, *again)}) == 2 * len(calls)


async def test_every_event_id_leads_to_the_same_bytes_after_it(
    gw: Running, machine: Machine, redis_url: str
) -> None:
    text = "I look.\n" + CALLS + "\nDone."

    async def caller(job: Job) -> None:
        for at in range(0, len(text) - 1, 4):
            await job.emit(text[at : min(at + 4, len(text) - 1)])
        await job.finish(text[-1])

    machine.behaviour = caller
    headers = {"x-api-key": gw.key, "content-type": "application/json", "idempotency-key": "k"}
    for body, n_jobs in ({**BODY, "stream": True, "tools": [TOOL]}, 1), ({**BODY, "stream": True}, 2):
        headers["idempotency-key"] += "k"
        asked = {"content": json.dumps(body), "headers": headers}
        first = await gw.http.post("/v1/messages", **asked)
        lines = first.text.split("\n\n")
        assert lines[-2].startswith("event: message_stop")
        async with running(redis_url, gw.directory, name="gw-other") as other:
            assert (await other.http.post("/v1/messages", **asked)).text == first.text
            n_ids = 0
            for at, event in enumerate(lines[:-1]):
                if not event.startswith("id: "):
                    continue
                n_ids += 1
                seen = {**headers, "last-event-id": event.partition("\n")[0].removeprefix("id: ")}
                again = await other.http.post("/v1/messages", content=asked["content"], headers=seen)
                assert again.text == "\n\n".join(lines[at + 1 :]), seen
            assert n_ids > 10
            by_id = await other.http.get(
                f"/v1/requests/{first.headers['x-request-id']}/events", headers={"x-api-key": gw.key}
            )
            assert by_id.text == first.text
        assert len(machine.jobs) == n_jobs


async def test_errors_are_the_sdks_own_and_take_nothing(
    gw: Running, machine: Machine, sdk: AsyncAnthropic
) -> None:
    with pytest.raises(anthropic.BadRequestError) as bad:
        await sdk.messages.create(**BODY, thinking={"type": "enabled", "budget_tokens": 1024})
    error: Any = bad.value.body
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert (error["error"]["param"], error["error"]["code"]) == ("thinking", "unsupported_parameter")
    with pytest.raises(anthropic.AuthenticationError):
        await sdk.with_options(api_key="sk-crl-nobody").messages.create(**BODY)
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        await sdk.messages.create(**{**BODY, "model": "other"})
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=1))
    once = sdk.with_options(api_key=gw.key)
    await once.messages.create(**BODY)
    with pytest.raises(anthropic.RateLimitError) as limited:
        await once.messages.create(**BODY)
    assert int(limited.value.response.headers["retry-after"]) >= 1
    assert limited.value.response.headers["request-id"].startswith("req_")
