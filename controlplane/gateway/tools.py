"""`tools` and `tool_choice` of a chat: checked, and made the rule that its answer keeps. Pure.

Called by schemas.py before anything is reserved. How calls are written is in workers/engine/tool_form.py, how they are
read back in toolcalls.py.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from controlplane.gateway.bodies import ChatBody, Message, Tool
from controlplane.gateway.errors import ApiError, bad_request
from controlplane.gateway.structured import MAX_SCHEMA_BYTES, check_schema
from controlplane.gateway.toolcalls import CallReader
from workers.contract import CallRule, HeldFunction

MAX_TOOLS: Final = 128
MAX_DESCRIPTION: Final = 8_192  # characters
NO_ARGUMENTS: Final = '{"type":"object","properties":{},"additionalProperties":false}'
ANY_ARGUMENTS: Final = '{"type":"object"}'
_CHOICES: Final = '"none", "auto", "required" or {"type": "function", "function": {"name": …}}'
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode

# How a request's record says it (identity.py): nothing, calls, one call at most.
READ: Final = "f"
READ_ONE: Final = "g"


def rule_of(body: ChatBody) -> tuple[CallRule | None, bytes]:
    """(what the answer may or must call, the tools as JSON); None where it may call nothing. ApiError (400) names the
    member at fault."""
    tools, choice = body.tools, body.tool_choice
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise bad_request(
                "tool_choice is only allowed with tools; send them or leave it out", "tool_choice"
            )
        return None, b""
    schemas = _schemas(tools)
    named = _named(choice, schemas)
    if choice == "none":
        return None, b""
    must = choice == "required" or named is not None
    if must and body.ignore_eos:
        raise bad_request("ignore_eos and tool_choice exclude each other; leave one out", "ignore_eos")
    # Held to schemas are calls that must be made, those of strict tools, and any beside an answer that is held to one.
    form = body.response_format
    is_held = (
        must or any(tool.function.strict for tool in tools) or (form is not None and form.type != "text")
    )
    functions: tuple[HeldFunction, ...] = ()
    if is_held:
        strict = {tool.function.name for tool in tools if tool.function.strict}
        functions = tuple(
            HeldFunction(name, schema if must or name in strict else ANY_ARGUMENTS, name in strict)
            for name, schema in schemas.items()
            if named is None or name == named
        )
    many = body.parallel_tool_calls is not False and named is None
    return CallRule(functions, must, many), _encode(tools)


def reader_of(letter: str) -> CallReader | None:
    """Who reads the calls of an answer whose request was noted so."""
    return CallReader(only_one=letter == READ_ONE) if letter else None


def letter_of(rule: CallRule | None) -> str:
    return "" if rule is None else READ if rule.many else READ_ONE


def check_history(message: Message, at: str) -> int:
    """UTF-8 bytes of the calls that an assistant's message tells of. ApiError (400) for arguments that are no object:
    the model's template prints them as one."""
    n_bytes = 0
    for k, call in enumerate(message.tool_calls or ()):
        arguments = call.function.arguments
        check_arguments(arguments, f"{at}.tool_calls[{k}].function.arguments")
        n_bytes += len(call.function.name) + len(arguments.encode("utf-8", "surrogatepass"))
    return n_bytes


def check_arguments(arguments: str, at: str) -> None:
    """Of a call in the history: JSON text of an object, or nothing. ApiError (400) on the field `at`."""
    try:
        if arguments:
            _decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        raise bad_request(
            f"{at} is no JSON object; send the call as the model made it, or leave a call out that was cut off",
            at,
        ) from None


def _schemas(tools: list[Tool]) -> dict[str, str]:
    """JSON text of the arguments' schema by function name, in order."""
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"tools has {len(tools)} members; at most {MAX_TOOLS} are allowed", "tools")
    schemas: dict[str, str] = {}
    n_bytes = 0
    for i, tool in enumerate(tools):
        function, at = tool.function, f"tools[{i}].function"
        if function.name in schemas:
            raise bad_request(f"{at}.name: {function.name!r} names another tool already", f"{at}.name")
        if function.description is not None and len(function.description) > MAX_DESCRIPTION:
            raise bad_request(
                f"{at}.description has {len(function.description)} characters; at most {MAX_DESCRIPTION} are allowed",
                f"{at}.description",
            )
        schemas[function.name] = schema = _schema(function.parameters, f"{at}.parameters")
        n_bytes += len(schema)
        if n_bytes > MAX_SCHEMA_BYTES:
            raise bad_request(
                f"the parameters of tools[0] to tools[{i}] have {n_bytes} bytes; at most {MAX_SCHEMA_BYTES} are "
                "allowed together",
                f"{at}.parameters",
                "schema_too_large",
            )
    return schemas


def _schema(parameters: dict[str, Any] | None, at: str) -> str:
    if not parameters:
        return NO_ARGUMENTS
    if parameters.get("type", "object") != "object":
        raise bad_request(f'{at}.type must be "object": arguments have names', f"{at}.type", "invalid_schema")
    check_schema(parameters, at)
    return _encode({"type": "object", **parameters}).decode()


def _named(choice: str | dict[str, Any] | None, schemas: dict[str, str]) -> str | None:
    """The function that tool_choice names, if it names one."""
    if choice is None or choice in ("none", "auto", "required"):
        return None
    function = choice.get("function") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(function, dict):
        raise _no_choice("tool_choice")
    name = function.get("name")
    if not isinstance(name, str):
        raise _no_choice("tool_choice.function.name")
    if name not in schemas:
        raise bad_request(
            f"tool_choice.function.name: {name[:64]!r} is none of tools; send the name of one of them",
            "tool_choice.function.name",
        )
    return name


def _no_choice(at: str) -> ApiError:
    return bad_request(f"{at} is not understood; tool_choice is {_CHOICES}", at)
