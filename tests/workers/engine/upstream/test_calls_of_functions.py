"""Calls of functions that an endpoint tells of become the one form that every answer's text has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.gateway.toolcalls import CallReader, whole
from tests.workers.endpoints import Call, endpoint
from tests.workers.engine.upstream.test_engine import CHAT, ask, collect
from workers.contract import CallRule, FinishReason, UpstreamSecret
from workers.engine.base import EngineFailed
from workers.engine.upstream.answer import CallPart
from workers.engine.upstream.engine import UpstreamEngine
from workers.engine.upstream.spelling import Spelling

TOOLS = [{"type": "function", "function": {"name": "a"}}]
ASKED = {**CHAT, "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}


def part(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    begun = {} if name is None else {"id": f"x{index}", "type": "function"}
    return {"index": index, **begun, "function": {"arguments": arguments} | ({"name": name} if name else {})}


async def delta(call: Call, finish: str | None = None, **said: Any) -> None:
    await call.event({"choices": [{"index": 0, "delta": said, "finish_reason": finish}]})


async def text_of(answer: Any, finish: FinishReason, calls: CallRule | None) -> tuple[str, dict[str, Any]]:
    async with endpoint(answer) as there:
        engine = UpstreamEngine(there.spec(), UpstreamSecret())
        deltas = await collect(engine, ask(ASKED, calls=calls))
        await engine.stop()
        assert deltas[-1].finish is finish
        return "".join(d.text for d in deltas), there.calls[0].body


async def test_what_is_told_in_parts_is_written_down() -> None:
    async def answer(call: Call) -> None:
        await call.head()
        await delta(call, content="Look.")
        await delta(call, tool_calls=[part(0, "", "a")])
        await delta(call, tool_calls=[part(0, '{"x": ')])
        await delta(call, tool_calls=[part(0, "1}")])
        await delta(call, tool_calls=[part(1, "", "b")])
        await delta(call, "tool_calls")
        await call.done()

    text, body = await text_of(answer, FinishReason.STOP, CallRule())
    assert whole([CallReader().read(text, final=True)]) == ("Look.", [("a", '{"x": 1}'), ("b", "{}")])
    assert {name: body[name] for name in ("tools", "tool_choice", "parallel_tool_calls")} == {
        "tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True
    }  # fmt: skip


async def test_a_whole_body_and_an_answer_that_is_cut_off() -> None:
    async def plain(call: Call) -> None:
        message = {"content": None, "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}
        data = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
        await call.raw(
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode()
        )

    text, _ = await text_of(plain, FinishReason.STOP, CallRule())
    assert whole([CallReader().read(text, final=True)]) == ("", [("a", "{}")])

    async def cut_off(call: Call) -> None:
        await call.head()
        await delta(call, "length", tool_calls=[part(0, '{"x": "ye', "a")])
        await call.done()

    text, _ = await text_of(cut_off, FinishReason.LENGTH, CallRule())
    assert whole([CallReader().read(text, final=True)]) == ("", [("a", '{"x": "ye')])


async def test_half_a_call_is_no_answer() -> None:
    async def answer(call: Call) -> None:
        await call.head()
        await delta(call, tool_calls=[part(0, "{}")])

    with pytest.raises(EngineFailed) as failed:
        await text_of(answer, FinishReason.STOP, CallRule())
    assert failed.value.code == "upstream_garbage"


ARGUMENTS = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3).map(json.dumps)


@given(st.lists(st.tuples(st.sampled_from(["a", "get-it", "x.y"]), ARGUMENTS), max_size=4), st.data())
def test_what_is_written_down_is_read_back(calls: list[tuple[str, str]], data: st.DataObject) -> None:
    spelling, text = Spelling(), ""
    for i, (name, arguments) in enumerate(calls):
        at = data.draw(st.integers(0, len(arguments)))
        text += spelling.add("", [CallPart(i, name, arguments[:at])])
        text += spelling.add("", [CallPart(i, "", arguments[at:])])
    assert whole([CallReader().read(text + spelling.close(), final=True)]) == ("", calls)
