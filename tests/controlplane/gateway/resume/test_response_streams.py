"""Coming back for a response: its events are numbered and repeat what came before, from whichever gateway they come."""

import json
from typing import Any

import pytest

from controlplane.gateway.stream import MIN_BUFFER
from tests.controlplane.gateway.harness import Machine, Running, running
from tests.controlplane.gateway.resume.story import BUDGET, STORY, WORDS, Teller, charged
from tests.controlplane.gateway.test_responses import TOOL
from tests.controlplane.gateway.test_responsewriter import BODY, CALLS, PATH, events_of, tells

TEXT = "I look.\n" + CALLS + "\nDone."
ASKED = {**BODY, "stream": True, "instructions": "Be brief", "metadata": {"k": "v"}}
# Members that are not told by id.
NOT_KEPT = ("instructions", "metadata", "tools", "temperature", "top_p")
N_OPENING = 4  # events before the first token


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")


def numbers_of(events: list[dict[str, Any]]) -> list[int]:
    return [event["sequence_number"] for event in events]


@pytest.mark.parametrize("tools", [[], [TOOL]], ids=["text", "calls"])
async def test_every_event_id_leads_to_the_same_bytes_after_it(
    gw: Running, other: Running, machine: Machine, tools: list[Any]
) -> None:
    tells(machine, TEXT)
    asked = {
        "content": json.dumps({**ASKED, "tools": tools}),
        "headers": {**gw.auth(), "idempotency-key": "k"},
    }
    first = await gw.http.post(PATH, **asked)
    blocks = first.text.split("\n\n")
    assert "event: response.completed" in blocks[-2]
    assert (await other.http.post(PATH, **asked)).text == first.text
    n_ids = 0
    for at, event in enumerate(blocks[:-1]):
        if event.startswith("id: "):
            n_ids += 1
            seen = {**asked["headers"], "last-event-id": event.partition("\n")[0].removeprefix("id: ")}
            again = await other.http.post(PATH, content=asked["content"], headers=seen)
            assert again.text == "\n\n".join(blocks[at + 1 :]), seen
    assert n_ids > 10 and len(machine.jobs) == 1


async def test_by_its_id_the_events_are_the_same_but_for_what_was_asked(
    gw: Running, other: Running, machine: Machine
) -> None:
    tells(machine, TEXT)
    first = await gw.post({**ASKED, "tools": [TOOL]}, path=PATH)
    path = f"/v1/requests/{first.headers['x-request-id']}/events"
    told, by_id = events_of(first.text), events_of((await other.http.get(path, headers=gw.auth())).text)
    assert by_id[0]["response"]["instructions"] is None
    for event, same in zip(by_id, told, strict=True):
        if "response" in event:
            event["response"] |= {name: same["response"][name] for name in NOT_KEPT}
        assert event == same


async def test_more_may_have_been_seen_than_a_stream_holds(
    gw: Running, machine: Machine, redis_url: str
) -> None:
    tells(machine, "x" * 5 * MIN_BUFFER, step=1)
    first = await gw.post(ASKED, path=PATH)
    blocks = first.text.split("\n\n")
    last = blocks[-8].partition("\n")[0].removeprefix("id: ")
    async with running(redis_url, gw.directory, name="gw-other", stream_buffer=MIN_BUFFER) as other:
        rest = await other.http.post(
            PATH, content=json.dumps(ASKED), headers={**gw.auth(), "last-event-id": last}
        )
    assert rest.headers["x-corral-resumed"] == "replayed"
    assert rest.text == "\n\n".join(blocks[-7:])


async def test_a_client_goes_on_while_it_still_runs_and_whoever_had_it_is_told(
    gw: Running, other: Running, teller: Teller
) -> None:
    teller.may_tell = 3
    async with gw.stream(BODY, PATH) as first:
        seen = [await first.next() for _ in range(N_OPENING + 3)]
        async with other.stream(BODY, PATH, **{"last-event-id": first.ids[-1]}) as second:
            assert second.response.headers["x-corral-resumed"] == "attached"
            teller.may_tell = len(WORDS)
            rest = await second.rest()
        superseded = (await first.rest())[-1]
    assert (superseded["type"], superseded["code"]) == ("error", "superseded")
    events = [*seen, *rest]
    assert (numbers_of(events), text_of(events)) == (list(range(len(events))), STORY)
    assert rest[-1]["response"]["output"][0]["content"][0]["text"] == STORY
    assert len(teller.jobs) == 1


async def test_what_a_disconnect_cancelled_goes_on_where_it_was(
    gw: Running, other: Running, teller: Teller
) -> None:
    gw.key = other.key = gw.directory.add_key(key_limits=BUDGET)
    teller.may_tell = 3
    async with gw.stream(BODY, PATH) as first:
        seen = [await first.next() for _ in range(N_OPENING + 3)]
    assert await charged(gw) == 7 + 2 * 3
    teller.may_tell = len(WORDS)
    async with other.stream(BODY, PATH, **{"last-event-id": first.ids[-1]}) as second:
        assert second.response.headers["x-corral-resumed"] == "continued"
        rest = await second.rest()
    events = [*seen, *rest]
    assert (numbers_of(events), text_of(events)) == (list(range(len(events))), STORY)
    done = rest[-1]["response"]
    assert done["output"][0]["content"][0]["text"] == STORY
    assert {event["response"]["id"] for event in events if "response" in event} == {done["id"]}
    assert (done["usage"]["output_tokens"], await charged(gw)) == (len(WORDS), 7 + 2 * len(WORDS))


async def test_another_body_endpoint_or_project_is_no_way_back(gw: Running, machine: Machine) -> None:
    first = await gw.post({**BODY, "stream": True}, path=PATH)
    last = {"last-event-id": first.text.rpartition("id: ")[2].partition("\n")[0]}
    differs = await gw.post({**BODY, "input": "Bye", "stream": True}, path=PATH, **last)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    elsewhere = await gw.post(chat, **last)
    for answer in (differs, elsewhere):
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "body_differs")
    gw.key = gw.directory.add_key(project="9" * 32)
    stranger = await gw.post({**BODY, "stream": True}, path=PATH, **last)
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "request_not_found")
