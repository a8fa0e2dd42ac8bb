"""Bodies of /v1/messages and its count_tokens, the API that Anthropic's SDK speaks: checked, and made the chat that
replicas read.

Called by the generation handler in place of schemas.parse. What it returns is an ordinary chat request with an ordinary
chat's body, so that admission, replicas, shadows and endpoints elsewhere need to know nothing of it; only what the
client is told is in its own words (messagewriter.py). As there: what would change the answer and cannot be honoured is
refused by name. Pure.
"""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from controlplane.gateway.errors import ApiError, bad_request
from controlplane.gateway.schemas import GenerationRequest, decoded, parse
from controlplane.gateway.surface import Translated
from workers.contract import Endpoint

_Label = Annotated[str, Meta(max_length=512)]
# Of a message that a chat's field is named after, in the client's words.
_WORDS: Final = (
    (".function.parameters", ".input_schema"),
    (".function.arguments", ".input"),
    (".function.", "."),
    ("tool_choice.function", "tool_choice"),
    ("stop has", "stop_sequences has"),
    ("stop:", "stop_sequences:"),
)
_MISSING: Final = "missing_required_parameter"
_encode = msgspec.json.Encoder().encode


class Block(msgspec.Struct, gc=False):
    """A part of a message; of each kind, so that a refusal can name it. What is not here is read over."""

    type: str
    text: str | None = None
    id: _Label | None = None  # tool_use
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: _Label | None = None  # tool_result
    content: str | list[Block] | None = None


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None  # prefixes are cached anyway
    eager_input_streaming: bool | None = None


class Choice(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(msgspec.Struct, forbid_unknown_fields=True):
    user_id: _Label | None = None


class Thinking(msgspec.Struct):
    type: str


class CountBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the prompt is made of."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    messages: list[Turn]
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    cache_control: dict[str, Any] | None = None


class MessagesBody(CountBody, forbid_unknown_fields=True, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=10_000_000)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


_decode = msgspec.json.Decoder(MessagesBody).decode
_decode_count = msgspec.json.Decoder(CountBody).decode


def parse_messages(body: bytes) -> tuple[GenerationRequest, bytes]:
    """(the checked request, its body as a chat). ApiError (400) naming the field at fault."""
    asked: MessagesBody = decoded(_decode, body)
    how = {
        "max_tokens": asked.max_tokens,
        "stream": asked.stream,
        "stop": asked.stop_sequences or None,
        "temperature": asked.temperature,
        "top_p": asked.top_p,
        "top_k": asked.top_k or None,  # 0 there and none here are the same
        "user": asked.metadata.user_id if asked.metadata else None,
    }
    return _parsed(_prompt(asked) | how)


def parse_count(body: bytes) -> tuple[GenerationRequest, bytes]:
    """The same of a message whose prompt is only counted: no token may follow."""
    asked: CountBody = decoded(_decode_count, body)
    request, chat = _parsed(_prompt(asked))
    request.max_tokens = 0
    return request, chat


def _parsed(values: dict[str, Any]) -> tuple[GenerationRequest, bytes]:
    chat = _encode({name: value for name, value in values.items() if value is not None})
    try:
        request = parse(Endpoint.CHAT, chat)
    except ApiError as error:
        raise _in_its_words(error) from None
    request.endpoint = Translated.MESSAGES
    return request, chat


def _prompt(asked: CountBody) -> dict[str, Any]:
    if asked.thinking is not None and asked.thinking.type != "disabled":
        raise bad_request(
            'thinking is not supported by this server: leave it out or send {"type": "disabled"}',
            "thinking",
            "unsupported_parameter",
        )
    return {
        "model": asked.model,
        "messages": _turns(asked),
        **_tools(asked.tools or [], asked.tool_choice),
    }


def _turns(asked: CountBody) -> list[dict[str, Any]]:
    if not asked.messages:
        raise bad_request("messages is empty; send at least one message", "messages", "empty_messages")
    if asked.messages[-1].role != "user":
        raise bad_request(
            "messages: the last one must be of role user; an answer that was begun cannot be sent along",
            f"messages[{len(asked.messages) - 1}].role",
            "unsupported_value",
        )
    turns: list[dict[str, Any]] = []
    if asked.system:
        turns.append({"role": "system", "content": _text(asked.system, "system")})
    for i, turn in enumerate(asked.messages):
        at = f"messages[{i}].content"
        blocks = [Block("text", turn.content)] if isinstance(turn.content, str) else turn.content
        turns += [_assistant(blocks, at)] if turn.role == "assistant" else _user(blocks, at)
    return [_joined(list(same)) for _, same in groupby(turns, _side)]


def _side(turn: dict[str, Any]) -> object:
    """Turns of one side in a row are one turn; those with calls and results stay what they are."""
    is_plain = turn["role"] in ("user", "assistant") and "tool_calls" not in turn
    return turn["role"] if is_plain else id(turn)


def _joined(turns: list[dict[str, Any]]) -> dict[str, Any]:
    if len(turns) == 1:
        return turns[0]
    return {"role": turns[0]["role"], "content": "\n".join(turn["content"] for turn in turns)}


def _user(blocks: list[Block], at: str) -> list[dict[str, Any]]:
    """What tools answered comes first: it belongs to the calls of the turn before."""
    turns: list[dict[str, Any]] = []
    texts: list[str] = []
    for k, block in enumerate(blocks):
        here = f"{at}[{k}]"
        if block.type == "tool_result":
            if block.tool_use_id is None:
                raise bad_request(f"{here}.tool_use_id is required", f"{here}.tool_use_id", _MISSING)
            content = _text(block.content or "", f"{here}.content")
            turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        else:
            texts.append(_text_of(block, here))
    if texts or not turns:
        turns.append({"role": "user", "content": "\n".join(texts)})
    return turns


def _assistant(blocks: list[Block], at: str) -> dict[str, Any]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for k, block in enumerate(blocks):
        here = f"{at}[{k}]"
        if block.type != "tool_use":
            texts.append(_text_of(block, here))
            continue
        for name in ("id", "name"):
            if not getattr(block, name):
                raise bad_request(f"{here}.{name} is required", f"{here}.{name}", _MISSING)
        function = {"name": block.name, "arguments": _encode(block.input or {}).decode()}
        calls.append({"id": block.id, "type": "function", "function": function})
    said: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    return said | {"tool_calls": calls} if calls else said


def _text(content: str | list[Block], at: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text_of(block, f"{at}[{k}]") for k, block in enumerate(content))


def _text_of(block: Block, at: str) -> str:
    if block.type != "text" or block.text is None:
        raise bad_request(
            f"{at}: only text is supported here, this block is {block.type[:40]!r}", at, "unsupported_content"
        )
    return block.text


def _tools(tools: list[Tool], choice: Choice | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        if tool.type not in (None, "custom"):
            raise bad_request(
                f"tools[{i}].type: {tool.type[:40]!r} runs on Anthropic's servers; only your own tools can be called",
                f"tools[{i}].type",
                "unsupported_value",
            )
    if tools:
        found["tools"] = [
            {
                "type": "function",
                "function": {
                    name: value
                    for name, value in (
                        ("name", tool.name),
                        ("description", tool.description),
                        ("parameters", tool.input_schema),
                        ("strict", tool.strict),
                    )
                    if value is not None
                },
            }
            for tool in tools
        ]
    if choice is None:
        return found
    if choice.type == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}}
    else:
        found["tool_choice"] = {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if choice.disable_parallel_tool_use:
        found["parallel_tool_calls"] = False
    return found


def _in_its_words(error: ApiError) -> ApiError:
    """A refusal of the chat that was made, naming the field that it was made of."""
    for ours, theirs in _WORDS:
        error.message = error.message.replace(ours, theirs)
        if error.param:
            error.param = error.param.replace(ours, theirs)
    if error.param == "stop":
        error.param = "stop_sequences"
    return error
