"""Function calling at the gateway: what is refused, what travels, and answers with calls, whole, streamed and resumed,
read by the published SDK."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from openai import AsyncOpenAI

from controlplane.gateway.directory import LimitsRow
from controlplane.gateway.errors import ApiError
from controlplane.gateway.schemas import parse
from controlplane.gateway.tools import ANY_ARGUMENTS, NO_ARGUMENTS
from tests.controlplane.gateway.harness import CHAT, Job, Machine, Running, running, until
from workers.contract import Endpoint, FinishReason
from workers.engine.tool_form import written

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = PARAMETERS, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


WEATHER, TIME = tool("get_weather", description="The weather in a city"), tool("get_time", None)
TOOLS = [WEATHER, TIME]
ASKED: dict[str, Any] = {**CHAT, "tools": TOOLS}
TEXT = "Let me look.\n" + written("get_weather", '{"city": "Zürich"}') + "\n" + written("get_time", "{}")
SCHEMA = json.dumps(PARAMETERS, separators=(",", ":"))


def parsed(**changes: Any) -> Any:
    return parse(Endpoint.CHAT, json.dumps({**CHAT, **changes}).encode())


@pytest.mark.parametrize(
    ("changes", "functions", "must", "many"),
    [
        ({}, (), False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, (), False, False),
        (
            {"tool_choice": "required"},
            (("get_weather", SCHEMA, False), ("get_time", NO_ARGUMENTS, False)),
            True,
            True,
        ),
        (
            {"tool_choice": "required", "parallel_tool_calls": False, "tools": [TIME]},
            (("get_time", NO_ARGUMENTS, False),),
            True,
            False,
        ),
        ({"tool_choice": named("get_weather")}, (("get_weather", SCHEMA, False),), True, False),
        (
            {"tools": [tool("get_weather", strict=True), TIME]},
            (("get_weather", SCHEMA, True), ("get_time", ANY_ARGUMENTS, False)),
            False,
            True,
        ),
        (
            {"tools": [TIME], "response_format": {"type": "json_object"}},
            (("get_time", ANY_ARGUMENTS, False),),
            False,
            True,
        ),
    ],
)
def test_the_rule_that_travels(changes: dict[str, Any], functions: Any, must: bool, many: bool) -> None:
    rule = parsed(**{"tools": TOOLS} | changes).sampling(5).calls
    assert (rule.functions, rule.must, rule.many) == (functions, must, many)


def test_without_tools_or_with_none_allowed_nothing_travels() -> None:
    for changes in ({}, {"tools": []}, {"tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "none"}):
        request = parsed(**changes)
        assert (request.calls, request.tools) == (None, b"")
        assert b"calls" not in msgspec.json.encode(request.sampling(5))
    assert parsed(tools=TOOLS).n_text_bytes > parsed().n_text_bytes + len(SCHEMA), "they are in the prompt"
    told = {"role": "assistant", "tool_calls": [{"id": "1", **tool_call("f", '{"x": "' + "y" * 500 + '"}')}]}
    assert parsed(messages=[told]).n_text_bytes > 500


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def nested(depth: int) -> dict[str, Any]:
    return {"not": nested(depth - 1)} if depth > 1 else {}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [], "tool_choice": named("f")}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "invalid_value"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
        "tool_choice.function.name",
        "invalid_value",
    ),
    ({"tools": TOOLS, "tool_choice": named("nobody")}, "tool_choice.function.name", "invalid_value"),
    ({"tools": [TIME, TIME]}, "tools[1].function.name", "invalid_value"),
    ({"tools": [tool("no spaces")]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [tool(f"f{i}", None) for i in range(129)]}, "tools", "invalid_value"),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
    ({"tools": [{"type": "custom", "function": {"name": "f"}}]}, "tools[0].type", "invalid_value"),
    ({"tools": [tool("f", {"type": "string"})]}, "tools[0].function.parameters.type", "invalid_schema"),
    (
        {"tools": [tool("f", {"properties": {"a": {"$ref": "https://x/y"}}})]},
        "tools[0].function.parameters",
        "invalid_schema",
    ),
    ({"tools": [tool("f", nested(40))]}, "tools[0].function.parameters", "invalid_schema"),
    (
        {"tools": [tool(n, {"description": "x" * 40_000}) for n in ("f", "g")]},
        "tools[1].function.parameters",
        "schema_too_large",
    ),
    ({"tools": [tool("f", description="x" * 9_000)]}, "tools[0].function.description", "invalid_value"),
    ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos", "invalid_value"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [tool_call("f", '{"x"')]}]},
        "messages[0].tool_calls[0].function.arguments",
        "invalid_value",
    ),
]


@pytest.mark.parametrize(
    ("changes", "param", "code"), REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)]
)
def test_a_refusal_names_the_member_at_fault(changes: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ApiError) as raised:
        parsed(**changes)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, param, code)


async def test_a_refused_request_takes_nothing(gw: Running, machine: Machine) -> None:
    gw.key = gw.directory.add_key(key_limits=LimitsRow(rpm=1))
    assert (await gw.post({**ASKED, "tool_choice": "any"})).status_code == 400
    assert (await gw.post(ASKED)).status_code == 200


# -- answers


async def caller(job: Job) -> None:
    """Writes TEXT four characters a token; the end holds back its last character."""
    for at in range(0, len(TEXT) - 1, 4):
        await job.emit(TEXT[at : min(at + 4, len(TEXT) - 1)])
    await job.finish(TEXT[-1])


@pytest.fixture
async def sdk(gw: Running, machine: Machine) -> AsyncIterator[AsyncOpenAI]:
    machine.behaviour = caller
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=0) as client:
        yield client


def asked_of(sdk: AsyncOpenAI) -> Any:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "tools": TOOLS}


async def test_the_sdk_reads_calls(sdk: AsyncOpenAI, machine: Machine) -> None:
    answer = await sdk.chat.completions.create(**asked_of(sdk))
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me look.")
    calls = choice.message.tool_calls or []
    assert [(c.type, c.function.name, c.function.arguments) for c in calls if c.type == "function"] == [
        ("function", "get_weather", '{"city": "Zürich"}'),
        ("function", "get_time", "{}"),
    ]
    assert len({c.id for c in calls}) == 2
    assert max(len(c.id) for c in calls) <= 40
    # As an agent goes on: what came is sent back as it is.
    results = [{"role": "tool", "tool_call_id": c.id, "content": "4"} for c in calls]
    messages: Any = [{"role": "user", "content": "Hello"}, choice.message, *results]
    again = await sdk.chat.completions.create(**asked_of(sdk) | {"messages": messages})
    assert again.choices[0].message.tool_calls
    sent = json.loads(machine.jobs[1].envelope.payload)["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool"]


async def test_the_sdk_streams_calls(sdk: AsyncOpenAI) -> None:
    async with sdk.chat.completions.stream(**asked_of(sdk)) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.delta") > 4, "arguments come in pieces"
    assert kinds.count("tool_calls.function.arguments.done") == 2
    message = final.choices[0].message
    assert (final.choices[0].finish_reason, message.content) == ("tool_calls", "Let me look.")
    whole = await sdk.chat.completions.create(**asked_of(sdk))
    assert [(c.function.name, c.function.arguments) for c in message.tool_calls or []] == [
        (c.function.name, c.function.arguments)
        for c in whole.choices[0].message.tool_calls or []
        if c.type == "function"
    ]


async def test_chunks_are_openais(gw: Running, machine: Machine) -> None:
    machine.behaviour = caller
    async with gw.stream({**ASKED, "stream_options": {"include_usage": True}}) as events:
        *chunks, usage, done = await events.rest()
    assert (done, usage["choices"]) == ("[DONE]", [])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": None}
    begun = [part for delta in deltas for part in delta.get("tool_calls", ()) if "id" in part]
    assert [(p["index"], p["type"], p["function"]["name"]) for p in begun] == [
        (0, "function", "get_weather"),
        (1, "function", "get_time"),
    ]
    later = [part for delta in deltas for part in delta.get("tool_calls", ()) if "id" not in part]
    assert all(
        set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in later
    )
    assert (deltas[-1], chunks[-1]["choices"][0]["finish_reason"]) == ({}, "tool_calls")
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_content_is_null_beside_calls_alone_and_text_without_calls_is_text(
    gw: Running, machine: Machine
) -> None:
    async def call(job: Job) -> None:
        await job.emit(written("get_time", "{}"), 9)
        await job.finish()

    machine.behaviour = call
    choice = (await gw.post(ASKED)).json()["choices"][0]
    assert choice["message"]["content"] is None

    async def cut_off(job: Job) -> None:
        await job.finish(TEXT[:74], FinishReason.LENGTH, n=9)

    machine.behaviour = cut_off
    choice = (await gw.post(ASKED)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"] == {
        "name": "get_weather",
        "arguments": '{"city": "Zü',
    }

    async def words(job: Job) -> None:
        await job.emit("a <b> <tool")
        await job.finish()

    machine.behaviour = words
    choice = (await gw.post(ASKED)).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "a <b> <tool", "refusal": None}
    async with gw.stream(ASKED) as events:
        chunks = await events.rest()
    assert [c["choices"][0]["delta"].get("content") for c in chunks[1:3]] == ["a <b>", " <tool"]
    # Not asked for, the same text is text.
    machine.behaviour = call
    assert (await gw.post(CHAT)).json()["choices"][0]["message"]["content"] == written("get_time", "{}")


async def test_token_probabilities_come_with_calls(gw: Running, machine: Machine) -> None:
    async def tell(job: Job) -> None:
        for at in range(0, len(TEXT), 20):
            await job.emit(TEXT[at : at + 20], logprobs=[[TEXT[at : at + 20], -0.5, []]])
        await job.finish()

    machine.behaviour = tell
    async with gw.stream({**ASKED, "logprobs": True}) as events:
        chunks = await events.rest()
    told = [c["choices"][0]["logprobs"] for c in chunks[:-1]]
    assert "".join(t["token"] for each in told if each for t in each["content"]) == TEXT


# -- a client that comes back


async def test_every_event_id_leads_to_the_same_bytes_after_it(
    gw: Running, machine: Machine, redis_url: str
) -> None:
    machine.behaviour = caller
    headers = {**gw.auth(), "content-type": "application/json", "idempotency-key": "k"}
    body = json.dumps({**ASKED, "stream": True, "stream_options": {"include_usage": True}})
    first = await gw.http.post("/v1/chat/completions", content=body, headers=headers)
    lines = first.text.split("\n\n")
    async with running(redis_url, gw.directory, name="gw-other") as other:
        replay = await other.http.post("/v1/chat/completions", content=body, headers=headers)
        assert replay.text == first.text
        for at, event in enumerate(lines[:-2]):
            seen = {**headers, "last-event-id": event.partition("\n")[0].removeprefix("id: ")}
            again = await other.http.post("/v1/chat/completions", content=body, headers=seen)
            assert again.text == "\n\n".join(lines[at + 1 :]), seen
        by_id = await other.http.get(
            f"/v1/requests/{first.headers['x-request-id']}/events",
            headers={**gw.auth(), "last-event-id": lines[8].partition("\n")[0].removeprefix("id: ")},
        )
        assert by_id.text == "\n\n".join(lines[9:]), "without the body, the record says that calls are read"
    assert len(machine.jobs) == 1


async def test_a_whole_answer_is_replayed_with_its_ids(gw: Running, machine: Machine) -> None:
    machine.behaviour = caller
    one = {**ASKED, "parallel_tool_calls": False}
    first = await gw.post(one, **{"idempotency-key": "k"})
    again = await gw.post(one, **{"idempotency-key": "k"})
    assert again.headers["x-corral-resumed"] == "replayed"
    assert again.content == first.content
    assert len(first.json()["choices"][0]["message"]["tool_calls"]) == 1


async def test_an_answer_cut_off_inside_its_arguments_goes_on_there(gw: Running, machine: Machine) -> None:
    async def tell(job: Job) -> None:
        while job.offset * 4 < len(TEXT):
            if len(machine.jobs) == 1 and job.offset == 17:
                await job.cancelled.wait()
            if job.cancelled.is_set():
                await job.finish(reason=FinishReason.ABORT)
                return
            await job.emit(TEXT[job.offset * 4 :][:4])
        await job.finish()

    machine.behaviour = tell
    chunks: list[Any] = []
    async with gw.stream(ASKED) as events:
        while '{"c' not in json.dumps(chunks[-1:]).replace("\\", ""):
            chunks.append(await events.next())
    first = machine.jobs[0].id

    async def is_done() -> bool:
        return (await gw.record(first)).get(b"state") == b"done"

    await until(is_done)
    async with gw.stream(ASKED, **{"last-event-id": events.ids[-1]}) as rest:
        assert rest.response.headers["x-corral-resumed"] == "continued"
        chunks += (await rest.rest())[:-1]
    parts = [part for c in chunks for part in c["choices"][0]["delta"].get("tool_calls", ())]
    arguments = {i: "".join(p["function"]["arguments"] for p in parts if p["index"] == i) for i in (0, 1)}
    assert arguments == {0: '{"city": "Zürich"}', 1: "{}"}
    assert [p["id"] for p in parts if "id" in p] == [f"call_{first}0", f"call_{first}1"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
