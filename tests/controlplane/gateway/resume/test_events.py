"""The events of a request by its id, and the published SDK that comes back."""

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.controlplane.gateway.harness import (
    CHAT,
    Events,
    Running,
    text_of,
    until,
)
from tests.controlplane.gateway.resume.story import STORY, Teller, is_done, read

# -- GET /v1/requests/<id>/events


async def test_events_of_a_request_are_read_by_its_id(gw: Running, other: Running, teller: Teller) -> None:
    teller.may_tell = 3
    async with gw.stream({**CHAT, "stream_options": {"include_usage": True}}) as first:
        whole = [await first.next() for _ in range(4)]
        path = f"/v1/requests/{first.response.headers['x-request-id']}/events"
        async with other.http.stream("GET", path, headers=other.auth()) as response:
            teller.may_tell = 8
            events = await Events(response).rest()
        assert events[:4] == whole
        assert text_of(events) == STORY
        assert events[-2]["usage"]["completion_tokens"] == 8
        assert (await first.rest())[-1]["error"]["code"] == "superseded"
    again = await gw.http.get(path, headers={**gw.auth(), "last-event-id": f"{teller.jobs[0].id}.8"})
    assert (again.headers["content-type"], again.text.count("data: ")) == (
        "text/event-stream; charset=utf-8",
        3,
    )
    for wrong, status in (("req_1", 400), ("req_" + "f" * 32, 404)):
        assert (await gw.http.get(f"/v1/requests/{wrong}/events", headers=gw.auth())).status_code == status
    foreign = await gw.http.get(path, headers={**gw.auth(), "last-event-id": f"{'f' * 32}.1"})
    assert foreign.status_code == 400
    assert (await gw.http.post(path, headers=gw.auth())).headers["allow"] == "GET"
    assert (await gw.http.get(path)).status_code == 401


async def test_what_was_cut_off_needs_its_body_to_go_on(gw: Running, teller: Teller) -> None:
    teller.may_tell = 3
    async with gw.stream(CHAT) as first:
        await read(first, 3)
    await until(is_done(gw, teller.jobs[0].id))
    answer = await gw.http.get(f"/v1/requests/req_{teller.jobs[0].id}/events", headers=gw.auth())
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "body_needed")


# -- the published SDK


async def test_sdk_goes_on_with_its_last_event_id(gw: Running, other: Running, teller: Teller) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    teller.may_tell = 3
    async with AsyncOpenAI(api_key=gw.key, base_url=gw.url + "/v1", max_retries=0) as sdk:
        create = sdk.chat.completions.create
        stream = await create(
            model="tiny", messages=messages, stream=True, extra_headers={"Idempotency-Key": "k"}
        )
        seen = ""
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
            if seen == "w0 w1 w2 ":
                break
        await stream.close()
    teller.may_tell = 8
    request = teller.jobs[0].id
    async with AsyncOpenAI(api_key=gw.key, base_url=other.url + "/v1", max_retries=0) as sdk:
        stream = await sdk.chat.completions.create(
            model="tiny", messages=messages, stream=True, extra_headers={"Last-Event-ID": f"{request}.3"}
        )
        async for chunk in stream:
            seen += chunk.choices[0].delta.content or ""
        with pytest.raises(openai.ConflictError, match="another body"):
            await sdk.chat.completions.create(
                model="tiny", messages=messages, extra_headers={"Idempotency-Key": "k"}
            )
    assert seen == STORY
    assert len(teller.jobs) == 1
