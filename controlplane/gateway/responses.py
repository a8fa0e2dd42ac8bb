"""Bodies of /v1/responses, OpenAI's Responses API: checked, and made the chat that replicas read.

Called by the generation handler in place of schemas.parse, as messages.py is, and to the same end: what it returns is
an ordinary chat, and only what the client is told is in the words of that API (responsewriter.py). Nothing is stored
here: what would need it is refused by name, and so is what would change the answer and cannot be honoured. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from controlplane.gateway.errors import ApiError, bad_request
from controlplane.gateway.responseitems import Item, turns_of
from controlplane.gateway.schemas import GenerationRequest, decoded, parse
from controlplane.gateway.surface import Translated
from workers.contract import Endpoint

_Label = Annotated[str, Meta(max_length=512)]
# Nothing of what they name comes out of a model here, but for the last, which is refused.
_Includable = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
]
_Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], _Label], Meta(max_length=16)]
# A field of a chat, in the words of what it was made of.
_WORDS: Final = (
    (".function.", "."),
    ("tool_choice.function", "tool_choice"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_tokens", "max_output_tokens"),
)
_UNSUPPORTED: Final = "unsupported_parameter"
_LOGPROBS: Final[_Includable] = "message.output_text.logprobs"
_encode = msgspec.json.Encoder().encode


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct):
    """What else it has tells of reasoning that there is not."""

    effort: str | None = None
    mode: str | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ResponsesBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: Annotated[str, Meta(min_length=1, max_length=200)]
    input: str | list[Item]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: Options | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=10_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: Text | None = None
    service_tier: str | None = None
    user: _Label | None = None
    safety_identifier: _Label | None = None
    # Harmless: they do not change the answer.
    metadata: _Metadata | None = None
    prompt_cache_key: _Label | None = None
    prompt_cache_retention: _Label | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None  # of tools that run at OpenAI
    include: list[_Includable] | None = None
    # Accepted at their neutral values only: see UNSUPPORTED.
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    reasoning: Reasoning | None = None
    prompt: dict[str, Any] | None = None
    context_management: list[Any] | None = None
    moderation: dict[str, Any] | None = None
    image: dict[str, Any] | None = None
    access_programs: dict[str, Any] | None = None


# Field -> (values that ask for nothing, remedy).
UNSUPPORTED: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "store": (
        (None, False),
        "leave it out or send false, responses are not stored; send the conversation in input",
    ),
    "previous_response_id": ((None,), "send the items before in input, responses are not stored"),
    "conversation": ((None,), "send the items before in input, conversations are not stored"),
    "background": ((None, False), "leave it out; with an Idempotency-Key an answer outlives its connection"),
    "truncation": ((None, "disabled"), 'leave it out or send "disabled", and leave items out yourself'),
    "top_logprobs": ((None, 0), "leave it out; /v1/chat/completions tells probabilities"),
    "prompt": ((None,), "send its text in instructions and input"),
    "context_management": ((None, []), "leave it out, and items out of input yourself"),
    "moderation": ((None,), "leave it out"),
    "image": ((None,), "leave it out"),
    "access_programs": ((None,), "leave it out"),
}
# Members of a tool beside those of a function, likewise.
_TOOL_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "defer_loading": (None, False),
    "async": (None, False),
    "allowed_callers": (None, ["direct"]),
}
_FUNCTION: Final = ("name", "description", "parameters", "strict")
_TOOL: Final = {"type", *_FUNCTION, *_TOOL_UNSUPPORTED, "output_schema"}

_decode = msgspec.json.Decoder(ResponsesBody).decode


def parse_responses(body: bytes) -> tuple[GenerationRequest, bytes]:
    """(the checked request, its body as a chat). ApiError (400) naming the field at fault."""
    asked: ResponsesBody = decoded(_decode, body)
    _refuse_unsupported(asked)
    chat = _encode(_chat(asked))
    try:
        request = parse(Endpoint.CHAT, chat)
    except ApiError as error:
        raise in_its_words(error) from None
    request.endpoint = Translated.RESPONSES
    request.echo = _echo(asked)
    return request, chat


def in_its_words(error: ApiError) -> ApiError:
    """A refusal of the chat that was made, by us or by a replica, naming the field that it was made of."""
    for ours, theirs in _WORDS:
        error.message = error.message.replace(ours, theirs)
        if error.param:
            error.param = error.param.replace(ours, theirs)
    if error.param and error.param.partition("[")[0] == "messages":
        error.param = "input"  # which of its items is told before a replica sees them
    return error


def _refuse_unsupported(asked: ResponsesBody) -> None:
    for name, (neutral, remedy) in UNSUPPORTED.items():
        if getattr(asked, name) not in neutral:
            raise _unsupported(name, remedy)
    if asked.reasoning is not None and asked.reasoning.effort not in (None, "none"):
        raise _unsupported("reasoning.effort", "leave it out")
    if asked.reasoning is not None and asked.reasoning.mode not in (None, "standard"):
        raise _unsupported("reasoning.mode", "leave it out")
    if asked.text is not None and asked.text.verbosity not in (None, "medium"):
        raise _unsupported("text.verbosity", "leave it out")
    if (asked.prompt_cache_options or {}).get("prewarm"):
        raise _unsupported("prompt_cache_options.prewarm", "leave it out, prompts are cached anyway")
    if asked.include is not None and _LOGPROBS in asked.include:
        at = f"include[{asked.include.index(_LOGPROBS)}]"
        raise bad_request(
            f"{at}: probabilities are told by /v1/chat/completions only; leave it out",
            at,
            "unsupported_value",
        )


def _unsupported(name: str, remedy: str) -> ApiError:
    return bad_request(f"{name} is not supported by this server: {remedy}", name, _UNSUPPORTED)


def _chat(asked: ResponsesBody) -> dict[str, Any]:
    values = {
        "model": asked.model,
        "messages": _turns(asked),
        "max_tokens": asked.max_output_tokens,
        "stream": asked.stream,
        "stream_options": asked.stream_options,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "tools": _functions(asked.tools or []) or None,
        "tool_choice": _choice(asked.tool_choice),
        "parallel_tool_calls": asked.parallel_tool_calls,
        "response_format": None if asked.text is None else _format(asked.text.format),
        "service_tier": asked.service_tier,
        "user": asked.user,
        "safety_identifier": asked.safety_identifier,
        "prompt_cache_key": asked.prompt_cache_key,
        "metadata": asked.metadata,
    }
    return {name: value for name, value in values.items() if value is not None}


def _turns(asked: ResponsesBody) -> list[dict[str, Any]]:
    if isinstance(asked.input, str):
        turns = [{"role": "user", "content": asked.input}]
    else:
        turns = turns_of(asked.input)
    if not turns:
        raise bad_request("input is empty; send a text or at least one message", "input", "empty_input")
    return [{"role": "system", "content": asked.instructions}, *turns] if asked.instructions else turns


def _functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`tools` of a chat; what is wrong with a function is found there."""
    for i, tool in enumerate(tools):
        kind = tool.get("type")
        if kind != "function":
            raise bad_request(
                f"tools[{i}].type: {str(kind)[:40]!r} is not supported; only functions, which you run, can be called",
                f"tools[{i}].type",
                "unsupported_value",
            )
        for name in tool:
            if name not in _TOOL:
                raise bad_request(
                    f"tools[{i}].{name[:64]} is not known to this server: leave it out",
                    f"tools[{i}].{name[:64]}",
                    "unknown_parameter",
                )
        for name, neutral in _TOOL_UNSUPPORTED.items():
            if tool.get(name) not in neutral:
                raise _unsupported(f"tools[{i}].{name}", "leave it out")
    return [
        {
            "type": "function",
            "function": {name: tool[name] for name in _FUNCTION if tool.get(name) is not None},
        }
        for tool in tools
    ]


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    name = choice.get("name") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(name, str):
        raise bad_request(
            'tool_choice is not understood; send "none", "auto", "required" or {"type": "function", "name": …}, and in '
            "tools only those that may be called",
            "tool_choice",
        )
    return {"type": "function", "function": {"name": name}}


def _format(form: TextFormat | None) -> dict[str, Any] | None:
    if form is None:
        return None
    if form.type == "json_schema":
        schema = {name: getattr(form, name) for name in ("name", "schema", "description", "strict")}
        return {
            "type": form.type,
            "json_schema": {name: value for name, value in schema.items() if value is not None},
        }
    if form.name is not None or form.schema is not None:
        raise bad_request(
            'text.format: name and schema go with type "json_schema"; change the type or leave them out',
            "text.format.type",
        )
    return {"type": form.type}


def _echo(asked: ResponsesBody) -> dict[str, Any]:
    """What the answer repeats of the request, with the values that stand where nothing was said."""
    form = asked.text.format if asked.text is not None else None
    return {
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "prompt_cache_key": asked.prompt_cache_key,
        "safety_identifier": asked.safety_identifier,
        "service_tier": asked.service_tier or "auto",
        "temperature": 1.0 if asked.temperature is None else asked.temperature,
        "text": {"format": form or TextFormat("text"), "verbosity": "medium"},
        "tool_choice": asked.tool_choice or "auto",
        "tools": asked.tools or [],
        "top_p": 1.0 if asked.top_p is None else asked.top_p,
        "user": asked.user,
    }


# Of an answer that is read by its id: what was asked is not kept.
NO_ECHO: Final = _echo(ResponsesBody(model="-", input="-")) | {"temperature": None, "top_p": None}
