"""Answers of /v1/responses as the published openai SDK reads them: whole, streamed, with calls, held to a schema, cut
off, paid for. Coming back for them: resume/test_response_streams.py."""

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from controlplane.gateway.directory import EndCustomerRow, LimitsRow
from tests.controlplane.gateway.harness import Job, Machine, Running, running, until
from tests.controlplane.gateway.resume.story import charged
from tests.controlplane.gateway.test_responses import TOOL
from workers.contract import Endpoint, FinishReason, WireError
from workers.engine.tool_form import written

BODY: dict[str, Any] = {"model": "tiny", "input": "Hello"}
PATH = "/v1/responses"
CALLS = written("get_weather", '{"city": "Zürich"}') + "\n" + written("get_weather", '{"city": "Bern"}')


@pytest.fixture
async def sdk(gw: Running, machine: Machine) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=0) as client:
        yield client


def tells(machine: Machine, text: str, reason: FinishReason = FinishReason.STOP, step: int = 4) -> None:
    """The machine's answers are this text, in portions; the last character comes with the end."""

    async def tell(job: Job) -> None:
        for at in range(0, len(text) - 1, step):
            await job.emit(text[at : min(at + step, len(text) - 1)])
        await job.finish(text[-1], reason)

    machine.behaviour = tell


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


# -- whole and streamed


async def test_the_sdk_reads_a_response(sdk: AsyncOpenAI, machine: Machine) -> None:
    async def cached(job: Job) -> None:
        await job.emit("one two", 2)
        await job.finish(n_prompt=7, n_cached=4)

    machine.behaviour = cached
    answer = await sdk.responses.create(
        **BODY, instructions="Be brief", max_output_tokens=50, metadata={"k": "v"}, user="u1"
    )
    assert (answer.object, answer.status, answer.model) == ("response", "completed", "tiny")
    assert (answer.output_text, answer.error, answer.incomplete_details) == ("one two", None, None)
    assert (answer.instructions, answer.metadata, answer.max_output_tokens) == ("Be brief", {"k": "v"}, 50)
    assert (answer.tool_choice, answer.tools, answer.temperature, answer.to_dict()["store"]) == (
        "auto",
        [],
        1.0,
        False,
    )
    used = answer.usage
    assert used and (used.input_tokens, used.output_tokens, used.total_tokens) == (7, 2, 9)
    assert (used.input_tokens_details.cached_tokens, used.output_tokens_details.reasoning_tokens) == (4, 0)
    request = machine.jobs[0].id
    assert answer.id == f"resp_{request}" and answer._request_id == f"req_{request}"
    assert answer.output[0].id == f"msg_{request}0"
    envelope = machine.jobs[0].envelope
    assert (envelope.endpoint, envelope.sampling.max_tokens) == (Endpoint.CHAT, 50)
    assert [turn["role"] for turn in json.loads(envelope.payload)["messages"]] == ["system", "user"]
    assert envelope.end_customer


async def test_the_sdk_streams_a_response(sdk: AsyncOpenAI) -> None:
    async with sdk.responses.stream(**BODY) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert list(dict.fromkeys(event.type for event in events)) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first: Any = events[0]
    assert (first.response.status, first.response.output, first.response.usage) == ("in_progress", [], None)
    whole = await sdk.responses.create(**BODY)
    assert final.output_text == whole.output_text == "one two three"
    assert final.usage and whole.usage and final.usage.output_tokens == whole.usage.output_tokens == 3
    raw = await sdk.responses.create(**BODY, stream=True)
    assert "".join([e.delta async for e in raw if e.type == "response.output_text.delta"]) == "one two three"


async def test_line_ends_of_other_alphabets_stay_in_their_event(gw: Running, machine: Machine) -> None:
    tells(machine, "a\u2028b\x85c\nd")
    answer = await gw.post({**BODY, "stream": True}, path=PATH)
    assert not {"\u2028", "\x85"} & set(answer.text)
    assert "request-id" not in answer.headers, "a header of another API"
    assert events_of(answer.text)[-1]["response"]["output"][0]["content"][0]["text"] == "a\u2028b\x85c\nd"


@pytest.mark.parametrize("reason", [FinishReason.LENGTH, FinishReason.BUDGET])
async def test_an_answer_that_is_cut_off_says_so(
    gw: Running, sdk: AsyncOpenAI, machine: Machine, reason: FinishReason
) -> None:
    tells(machine, "one two", reason)
    answer = await sdk.responses.create(**BODY)
    raw = await sdk.responses.create(**BODY, stream=True)
    events = [event async for event in raw]
    assert events[-1].type == "response.incomplete"
    for told in (answer, events[-1].response):
        assert (told.status, told.output_text, told.output[0].status) == (
            "incomplete",
            "one two",
            "incomplete",
        )
        assert told.incomplete_details and told.incomplete_details.reason == "max_output_tokens"
        corral = told.to_dict().get("corral")
        assert corral == ({"finish": "budget"} if reason is FinishReason.BUDGET else None)


async def test_an_empty_answer_is_an_empty_message(sdk: AsyncOpenAI, machine: Machine) -> None:
    async def silent(job: Job) -> None:
        await job.finish()

    machine.behaviour = silent
    for tools in ([], [TOOL]):
        whole = await sdk.responses.create(**BODY, tools=tools)
        async with sdk.responses.stream(**BODY, tools=tools) as stream:
            final = await stream.get_final_response()
        assert [item.type for item in whole.output] == [item.type for item in final.output] == ["message"]
        assert whole.output_text == final.output_text == ""


# -- calls and schemas


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("I look.\n" + CALLS, ["I look.", {"city": "Zürich"}, {"city": "Bern"}]),
        (CALLS, [{"city": "Zürich"}, {"city": "Bern"}]),
        (CALLS + "\nDone <b>.", [{"city": "Zürich"}, {"city": "Bern"}, "Done <b>."]),
        ("I look.\n" + CALLS + "\nDone.", ["I look.", {"city": "Zürich"}, {"city": "Bern"}, "Done."]),
        ("Nothing to do.", ["Nothing to do."]),
    ],
)
async def test_the_sdk_reads_calls_whole_and_streamed(
    sdk: AsyncOpenAI, machine: Machine, text: str, items: list[Any]
) -> None:
    tells(machine, text)
    whole = await sdk.responses.create(**BODY, tools=[TOOL])
    raw = await sdk.responses.create(**BODY, tools=[TOOL], stream=True)
    events: list[Any] = [event async for event in raw]
    async with sdk.responses.stream(**BODY, tools=[TOOL]) as stream:
        final = await stream.get_final_response()
    for answer in (whole, final):
        found = [
            json.loads(item.arguments) if item.type == "function_call" else item.content[0].text.strip()
            for item in answer.output
        ]
        assert found == items
        assert {item.status for item in answer.output} == {"completed"}
        ids = [item.id for item in answer.output]
        assert len(set(ids)) == len(ids)
    # Items one after the other, each begun once and closed once; what closes one is what the response tells of it.
    shape = [(e.type, e.output_index) for e in events if e.type.startswith("response.output_item")]
    assert shape == [
        (f"response.output_item.{what}", i) for i in range(len(items)) for what in ("added", "done")
    ]
    done = [e.item.to_dict() for e in events if e.type == "response.output_item.done"]
    assert done == [item.to_dict() for item in events[-1].response.output]
    assert [e.sequence_number for e in events] == list(range(len(events)))
    # Whole and streamed differ by the request alone.
    told = json.dumps([item.to_dict() for item in whole.output])
    assert json.loads(told.replace(machine.jobs[0].id, machine.jobs[1].id)) == done


async def test_arguments_that_are_cut_off_are_an_incomplete_item(sdk: AsyncOpenAI, machine: Machine) -> None:
    tells(machine, CALLS[:-20], FinishReason.LENGTH)
    whole = await sdk.responses.create(**BODY, tools=[TOOL])
    raw = await sdk.responses.create(**BODY, tools=[TOOL], stream=True)
    events: list[Any] = [event async for event in raw]
    for answer in (whole, events[-1].response):
        assert [item.status for item in answer.output] == ["completed", "incomplete"]
        assert answer.status == "incomplete"


async def test_the_output_goes_back_as_input(sdk: AsyncOpenAI, machine: Machine) -> None:
    """As the SDK's own examples hold a conversation: the answer's items, then what the functions said."""
    tells(machine, "I look.\n" + CALLS)
    conversation: list[Any] = [{"role": "user", "content": "Where is it warmer?"}]
    first = await sdk.responses.create(model="tiny", input=conversation, tools=[TOOL])
    conversation += first.output
    conversation += [
        {"type": "function_call_output", "call_id": item.call_id, "output": "4 C"}
        for item in first.output
        if item.type == "function_call"
    ]
    tells(machine, "In Zürich.")
    second = await sdk.responses.create(model="tiny", input=conversation, tools=[TOOL])
    conversation += [item.to_dict() for item in second.output]
    third = await sdk.responses.create(model="tiny", input=[*conversation, {"role": "user", "content": "Ok"}])
    assert third.output_text == "In Zürich."
    turns = json.loads(machine.jobs[-1].envelope.payload)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant", "user"]
    assert turns[1]["content"] == "I look." and len(turns[1]["tool_calls"]) == 2
    assert [call["id"] for call in turns[1]["tool_calls"]] == [turn["tool_call_id"] for turn in turns[2:4]]


async def test_the_sdk_parses_an_answer_held_to_a_schema(sdk: AsyncOpenAI, machine: Machine) -> None:
    class City(BaseModel):
        name: str

    class GetWeather(BaseModel):
        city: str

    tells(machine, '{"name":"Bern"}')
    answer = await sdk.responses.parse(**BODY, text_format=City)
    assert answer.output_parsed == City(name="Bern")
    held = machine.jobs[-1].envelope.sampling.json_schema
    assert held and json.loads(held)["properties"]["name"]["type"] == "string"
    async with sdk.responses.stream(**BODY, text_format=City) as stream:
        assert (await stream.get_final_response()).output_parsed == City(name="Bern")
    tells(machine, written("GetWeather", '{"city": "Bern"}'))
    tool = openai.pydantic_function_tool(GetWeather)["function"]
    called = await sdk.responses.parse(
        **BODY, tools=[{"type": "function", **tool}], tool_choice="required", parallel_tool_calls=False
    )
    item: Any = called.output[0]
    assert (item.name, item.parsed_arguments) == ("GetWeather", {"city": "Bern"})
    rule = machine.jobs[-1].envelope.sampling.calls
    assert rule and (rule.must, rule.many) == (True, False)


# -- errors, limits, bills


async def test_a_failure_in_the_stream_is_a_failed_response(sdk: AsyncOpenAI, machine: Machine) -> None:
    async def break_off(job: Job) -> None:
        await job.emit("part")
        await job.finish(reason=FinishReason.ERROR, error=WireError(503, "engine_died", "it died"))

    machine.behaviour = break_off
    events: list[Any] = [event async for event in await sdk.responses.create(**BODY, stream=True)]
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert (failed.status, failed.output_text, failed.output[0].status) == ("failed", "part", "incomplete")
    assert (failed.error.code, failed.error.message) == ("server_error", "it died")
    assert failed.error.to_dict()["corral"] == {"code": "engine_died"}
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_comments_while_nobody_serves_it_are_invisible_to_the_sdk(
    sdk: AsyncOpenAI, gw: Running, machine: Machine
) -> None:
    await machine.withdraw("drain")
    stream = await sdk.responses.create(**BODY, stream=True)
    await machine.enrol()
    assert [event.type async for event in stream][-1] == "response.completed"


async def test_errors_are_the_sdks_own(gw: Running, machine: Machine, sdk: AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="not stored") as bad:
        await sdk.responses.create(**BODY, previous_response_id="resp_1")
    assert (bad.value.param, bad.value.code) == ("previous_response_id", "unsupported_parameter")
    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="sk-crl-nobody").responses.create(**BODY)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await sdk.responses.create(**{**BODY, "model": "other"})
    for nothing_there in (sdk.responses.retrieve("resp_1"), sdk.responses.delete("resp_1")):
        with pytest.raises(openai.NotFoundError):
            await nothing_there


async def test_limits_bills_and_customers_are_those_of_a_chat(
    gw: Running, machine: Machine, redis_url: str
) -> None:
    """The same prompt and limit, sent as a chat and as a response: by keys of their own, and to gateways of their own,
    since what is learned of one's prompt changes the other's hold."""
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "user": "u"}
    asked = {**BODY, "max_output_tokens": 9, "user": "u"}
    limits = LimitsRow(rpm=1, input_tpm=500, output_tpm=500, budget_nano=1_000_000)
    told: list[dict[str, Any]] = []
    async with running(redis_url, gw.directory, name="gw-other") as other:
        for gateway, body, path in (gw, chat, "/v1/chat/completions"), (other, asked, PATH):
            gateway.key = gw.directory.add_key(key_limits=limits)
            gw.directory.limit_ends(gateway.key, EndCustomerRow(LimitsRow(rpm=9)))
            first = await gateway.post(body, path=path)
            spent = await charged(gateway)
            second = await gateway.post(body, path=path)
            envelope = machine.jobs[-1].envelope
            told.append(
                {
                    "status": (first.status_code, second.status_code),
                    "limits": {n: v for n, v in first.headers.items() if n.startswith("x-ratelimit")},
                    "refusal": {n: v for n, v in second.headers.items() if n.startswith("x-corral")},
                    "code": second.json()["error"]["code"],
                    "spent": spent,
                    "customer": envelope.end_customer,
                    "sampling": envelope.sampling,
                }
            )
    for each in told:
        each["limits"] = {name: value for name, value in each["limits"].items() if "reset" not in name}
    assert told[0] == told[1]
    assert (told[0]["status"], told[0]["code"]) == ((200, 429), "rate_limit_exceeded")
    assert told[0]["spent"] == 7 + 2 * 3 and told[0]["customer"] and len(told[0]["limits"]) == 8
    assert [line.endpoint for line in other.log.lines] == ["responses", "responses"]


async def test_a_key_is_a_request_once(gw: Running, machine: Machine, sdk: AsyncOpenAI) -> None:
    headers = {"Idempotency-Key": "once"}
    first = await sdk.responses.create(**BODY, extra_headers=headers)
    again = await sdk.responses.create(**BODY, extra_headers=headers)
    assert again.to_dict() == first.to_dict() and len(machine.jobs) == 1
    with pytest.raises(openai.ConflictError, match="another body"):
        await sdk.responses.create(**{**BODY, "input": "Bye"}, extra_headers=headers)


async def test_a_service_class_is_named_as_in_a_chat(gw: Running, machine: Machine) -> None:
    answer = await gw.post({**BODY, "service_tier": "flex"}, path=PATH)
    refused = await gw.post(BODY, path=PATH, **{"x-corral-slo-class": "none-such"})
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
    same = await gw.post({**chat, "service_tier": "flex"})
    assert answer.status_code == same.status_code
    assert (refused.status_code, "X-Corral-Slo-Class" in refused.text) == (400, True)


async def test_a_client_that_leaves_is_cancelled(gw: Running, machine: Machine) -> None:
    async def endless(job: Job) -> None:
        while await job.emit("x ") == "a" and not job.cancelled.is_set():
            pass

    machine.behaviour = endless
    async with gw.stream(BODY, PATH) as events:
        await events.next()
    await until(lambda: machine.jobs[0].cancelled.is_set())
