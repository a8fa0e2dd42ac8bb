"""Items of a response's `input`, made the turns of a chat: messages, calls of functions and what these answered.

Called by responses.py. Clients send the items of earlier answers back as they came: what an item has beside the words
(ids, states, annotations) is read over, and so is reasoning, which no model here puts out. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from controlplane.gateway.errors import ApiError, bad_request
from controlplane.gateway.tools import check_arguments

_MISSING: Final = "missing_required_parameter"
_UNSUPPORTED: Final = "unsupported_content"
_READ_OVER: Final = "reasoning"


class Part(msgspec.Struct, gc=False):
    """A part of what an item says; of each kind, so that a refusal can name it."""

    type: str = ""
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, gc=False):
    """Of any kind; a message may leave its type out."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    # function_call, function_call_output
    call_id: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    name: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    # Objects are those of other kinds of items.
    arguments: str | dict[str, Any] | None = None
    output: str | list[Part] | dict[str, Any] | None = None


def turns_of(items: list[Item]) -> list[dict[str, Any]]:
    """Messages of a chat. What one side says in a row, and the calls with it, is one turn of the assistant. ApiError
    (400) naming the item at fault."""
    turns: list[dict[str, Any]] = []
    called: set[str] = set()
    for i, item in enumerate(items):
        at = f"input[{i}]"
        kind = item.type or ("message" if item.role else "")
        if kind == "message":
            _say(turns, item, at)
        elif kind == "function_call":
            call = _call(item, at)
            called.add(call["id"])
            _assistant(turns).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            turns.append(_answered(item, at, called))
        elif kind != _READ_OVER:
            raise _unknown(kind, at)
    return turns


def _say(turns: list[dict[str, Any]], item: Item, at: str) -> None:
    if item.role is None:
        raise bad_request(f"{at}.role is required", f"{at}.role", _MISSING)
    text = _text(item.content, f"{at}.content")
    if item.role == "assistant":
        turn = _assistant(turns)
        turn["content"] = "\n".join(filter(None, (turn["content"], text)))
    else:
        turns.append({"role": item.role, "content": text})


def _assistant(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's turn that is being told, or a new one."""
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _call(item: Item, at: str) -> dict[str, Any]:
    for field in ("call_id", "name"):
        if getattr(item, field) is None:
            raise bad_request(f"{at}.{field} is required", f"{at}.{field}", _MISSING)
    if isinstance(item.arguments, dict):
        raise bad_request(f"{at}.arguments must be JSON text", f"{at}.arguments", "invalid_type")
    arguments = item.arguments or ""
    check_arguments(arguments, f"{at}.arguments")
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": arguments}}


def _answered(item: Item, at: str, called: set[str]) -> dict[str, Any]:
    if item.call_id is None:
        raise bad_request(f"{at}.call_id is required", f"{at}.call_id", _MISSING)
    if item.call_id not in called:
        raise bad_request(
            f"{at}.call_id: no function_call with this call_id comes before it; send the items of the answer that made "
            "the call along, since responses are not stored",
            f"{at}.call_id",
        )
    if isinstance(item.output, dict):
        raise bad_request(f"{at}.output must be a string or a list of parts", f"{at}.output", "invalid_type")
    return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output, f"{at}.output")}


def _text(content: str | list[Part] | None, at: str) -> str:
    if content is None:
        raise bad_request(f"{at} is required", at, _MISSING)
    if isinstance(content, str):
        return content
    return "\n".join(_text_of(part, f"{at}[{k}]") for k, part in enumerate(content))


def _text_of(part: Part, at: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("input_text", "output_text", "refusal") or text is None:
        raise bad_request(
            f"{at}: only input_text and output_text with a text are supported here, this part is {part.type[:40]!r}",
            at,
            _UNSUPPORTED,
        )
    return text


def _unknown(kind: str, at: str) -> ApiError:
    if not kind:
        return bad_request(f"{at}.type is required", f"{at}.type", _MISSING)
    if kind == "item_reference":
        remedy = "responses are not stored; send the item itself (clients do with store: false)"
    else:
        remedy = "only message, function_call, function_call_output and reasoning are; leave it out"
    return bad_request(
        f"{at}: items of type {kind[:40]!r} are not supported: {remedy}", f"{at}.type", _UNSUPPORTED
    )
