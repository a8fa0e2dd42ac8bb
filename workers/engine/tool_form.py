"""The one form in which calls of functions stand in the journal, whatever the model: `<tool_call>` around a JSON object
with `name` and `arguments`, as Hermes and Qwen models were trained on it.

Used where a prompt is made (vllm.py), where an answer is held to functions (tool_grammar.py, toy_calls.py), where other
forms are rewritten (native_calls.py, for an endpoint's own calls upstream) and by the gateway that reads them back
(toolcalls.py). A model whose template speaks the form, or one of native_form.py, is told of the functions by its
template; any other is told by a system message from here, with calls and results as plain turns. Pure; standard library
only.
"""

from __future__ import annotations

import json
from typing import Any, Final

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
# A call is HEAD % name, the arguments as JSON, TAIL; calls are parted by line ends.
HEAD: Final = OPEN + '\n{"name": "%s", "arguments": '
TAIL: Final = "}\n" + CLOSE
SEPARATORS: Final = (", ", ": ")

_FOREIGN: Final = ("<function=", "<arg_key>")  # other forms within the same tags
_INTRODUCTION: Final = (
    "You may call functions to answer. "
    "Each line between <tools> and </tools> describes one as JSON:\n<tools>\n"
)
_HOW: Final = (
    '\n</tools>\nTo call a function, write exactly this, with a JSON object as its "arguments":\n'
    f'{OPEN}\n{{"name": <name>, "arguments": <arguments>}}\n{CLOSE}\n'
    "Results come back between <tool_response> and </tool_response>. "
    "Where no function helps, answer in words."
)


def speaks(template: str) -> bool:
    """Whether a chat template tells its model of functions, and of this form of calling them."""
    return (
        "tools" in template
        and OPEN in template
        and "arguments" in template
        and not any(other in template for other in _FOREIGN)
    )


def written(name: str, arguments: str) -> str:
    """One call."""
    return HEAD % name + arguments + TAIL


def parsed_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of calls as objects: templates print them as JSON themselves.

    ValueError where they are none; the gateway has refused those already.
    """
    return [
        {**message, "tool_calls": [_parsed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def as_words(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """For a template without a word for functions: what there is in a system message, calls in the text of the
    assistant's turns, results in turns of the user. `content` of every message is a string."""
    out: list[dict[str, Any]] = []
    if tools:
        first = messages[0] if messages and messages[0]["role"] in ("system", "developer") else None
        told = _INTRODUCTION + "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools) + _HOW
        if first is not None:
            out.append({**first, "content": f"{first['content']}\n\n{told}"})
            messages = messages[1:]
        else:
            out.append({"role": "system", "content": told})
    results: list[str] = []  # of the turn of the user that is being made
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            out.append({"role": "user", "content": "\n".join(results)})
            results = []
        if calls := message.get("tool_calls"):
            texts = [message["content"]] if message["content"] else []
            texts += [written(c["function"]["name"], c["function"]["arguments"]) for c in calls]
            out.append({"role": message["role"], "content": "\n".join(texts)})
        else:
            out.append(message)
    if results:
        out.append({"role": "user", "content": "\n".join(results)})
    return out


def _parsed(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}
