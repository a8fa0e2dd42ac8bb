"""The bodies of /v1/chat/completions and /v1/completions as structures: names, types and ranges of every
field.

Decoded by schemas.py, which also checks what a type cannot say. A field that is not here is unknown, and
refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

_Unit = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Count = Annotated[int, Meta(ge=1, le=10_000_000)]
_Int64 = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
_Label = Annotated[str, Meta(max_length=512)]


class ContentPart(msgspec.Struct, gc=False):
    """A part of a message's content; other kinds decode, so that the refusal can name them."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, gc=False):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    arguments: str = ""  # JSON


class ToolCall(msgspec.Struct):
    """A call that an earlier answer made; further members are read over."""

    function: CalledFunction
    id: _Label | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """A turn. Tool members pass through to the model's chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: _Label | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: _Label | None = None
    refusal: str | None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """What an answer must look like. `strict` changes nothing: a schema is always kept."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that both endpoints take."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    seed: _Int64 | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    user: _Label | None = None
    service_tier: str | None = None
    # Common extensions.
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    min_p: _Unit | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] | None = None
    ignore_eos: bool | None = None


class ChatBody(_Common, forbid_unknown_fields=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: _Count | None = None
    # Harmless: they do not change the answer.
    metadata: dict[str, str] | None = None
    safety_identifier: _Label | None = None
    prompt_cache_key: _Label | None = None
    prompt_cache_retention: _Label | None = None
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    # Accepted at their neutral values only: see UNSUPPORTED in schemas.py.
    store: bool | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None


class CompletionBody(_Common, forbid_unknown_fields=True, kw_only=True):
    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    # Accepted at their neutral values only.
    best_of: Annotated[int, Meta(ge=1, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
