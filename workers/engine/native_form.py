"""The forms in which other families write calls of functions, and what their chat templates take: found at the
engine's start by asking the template itself.

Llama 3 writes a JSON object with `name` and `parameters` and nothing before it but perhaps `<|python_tag|>`; Mistral a
list of such after `[TOOL_CALLS]`, with `arguments`, and newer ones `[TOOL_CALLS]name[ARGS]{…}`. Models whose template
speaks one of these are told of functions by it, write their calls as they were trained to, and native_calls.py turns
those into the one form of tool_form.py before anybody else sees them. Pure.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Callable
from typing import Any, Final

from workers.engine.tool_form import parsed_arguments

PYTHON_TAG: Final = "<|python_tag|>"
TOOL_CALLS: Final = "[TOOL_CALLS]"
ARGS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
# Where these are special tokens of a model, they are part of its text all the same.
MARKS: Final = (PYTHON_TAG, TOOL_CALLS, ARGS, CALL_ID)


class Form(enum.Enum):
    """How a model writes a call of `f` with `{"x": 1}`."""

    LLAMA = '{"name": "f", "parameters": {"x": 1}}'
    MISTRAL_LIST = '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]'
    MISTRAL_ARGS = '[TOOL_CALLS]f[ARGS]{"x": 1}'


Render = Callable[..., str]  # (messages, tools=, add_generation_prompt=): the prompt's text

_PROBE: Final = "corral_probe"
_TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": _PROBE,
            "description": "A probe",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]
_USER: Final[dict[str, Any]] = {"role": "user", "content": "Hello"}
_CALL: Final[dict[str, Any]] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": _PROBE, "arguments": '{"x": 1}'},
}
_TURNS: Final[list[dict[str, Any]]] = [
    _USER,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "2"},
]
_WRITTEN: Final = {
    Form.LLAMA: re.compile(
        rf'({re.escape(PYTHON_TAG)})?\s*\{{\s*"name":\s*"{_PROBE}",\s*"parameters":\s*\{{"x":\s*1\}}\s*\}}'
    ),
    Form.MISTRAL_LIST: re.compile(
        rf'\[TOOL_CALLS\]\s*\[\s*\{{\s*"name":\s*"{_PROBE}",\s*"arguments":\s*\{{"x":\s*1\}}'
    ),
    Form.MISTRAL_ARGS: re.compile(
        rf'\[TOOL_CALLS\]\s*{_PROBE}\s*(\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*\{{"x":\s*1\}}'
    ),
}


def form_of(render: Render) -> Form | None:
    """Whose form a template writes a call in, where the model's own answer would begin. None: one that is not known
    here, or the template says nothing of functions."""
    for form, written in _WRITTEN.items():
        answer = _answer(render, form)
        if answer is not None and written.match(answer):
            return form
    return None


def _answer(render: Render, form: Form) -> str | None:
    """What a model would have said to call the probe; None: the template does not tell of functions, or takes no such
    chat."""
    try:
        asked = render([_USER], tools=_TOOLS, add_generation_prompt=True).rstrip()
        called = render(turns_for(form, _TURNS), tools=_TOOLS, add_generation_prompt=False)
    except Exception:  # jinja's own and whatever a template's expressions raise
        return None
    if _PROBE not in asked or not called.startswith(asked):
        return None
    return called[len(asked) :].lstrip()


def turns_for(form: Form, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates of the form take them. ValueError where the arguments of a call are no object."""
    turns = parsed_arguments([_without_empty(message) for message in messages])
    if form is Form.LLAMA:
        return _one_by_one(turns)
    return [_with_short_ids(turn) for turn in turns]


def _without_empty(message: dict[str, Any]) -> dict[str, Any]:
    """SDKs send `tool_calls: null` back, which templates that ask whether it is there take for calls."""
    if message.get("tool_calls") or "tool_calls" not in message:
        return message
    return {name: value for name, value in message.items() if name != "tool_calls"}


def _one_by_one(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Llama's templates take one call a turn: of several each is followed by its result."""
    out: list[dict[str, Any]] = []
    at = 0
    while at < len(turns):
        turn, at = turns[at], at + 1
        calls = turn.get("tool_calls") or []
        if len(calls) < 2:
            out.append(turn)
            continue
        results = []
        while at < len(turns) and turns[at]["role"] == "tool":
            results.append(turns[at])
            at += 1
        for call in calls:
            out.append({**turn, "tool_calls": [call]})
            of_it = [each for each in results if each.get("tool_call_id") == call.get("id")][:1]
            out += of_it
            results = [each for each in results if not any(each is taken for taken in of_it)]
        out += results
    return out


def _with_short_ids(turn: dict[str, Any]) -> dict[str, Any]:
    """Mistral's templates take ids of nine letters and digits, and print calls as they find them."""
    if turn.get("tool_call_id"):
        return {**turn, "tool_call_id": _short(turn["tool_call_id"])}
    if turn.get("tool_calls"):
        calls = [
            {
                "id": _short(call.get("id") or ""),
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": call["function"]["arguments"],
                },
            }
            for call in turn["tool_calls"]
        ]
        return {**turn, "tool_calls": calls}
    return turn


def _short(call_id: str) -> str:
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
