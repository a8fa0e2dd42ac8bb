"""What an endpoint answers: events of a stream, whole bodies and errors, as far as they are of use. Pure.

Decodes leniently where endpoints differ, and refuses what is no answer. Never keeps text.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from workers.contract import FinishReason
from workers.engine.base import TokenLogprob

DONE: Final = b"[DONE]"
_MAX_COUNT: Final = 1 << 31


class NotAnAnswerError(ValueError):
    """What came is neither an event of a stream nor an error."""


class Usage(msgspec.Struct, frozen=True):
    """Counts as the endpoint says them."""

    n_prompt: int
    n_cached: int
    n_completion: int


class CallPart(msgspec.Struct, frozen=True):
    """Of one call of a function; `name` comes with its first part."""

    index: int
    name: str
    arguments: str


class Piece(msgspec.Struct, frozen=True):
    """What one event says. `error`: the endpoint's own code for a failure in the middle."""

    text: str = ""
    finish: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    n_logprobs: int = 0
    error: str = ""
    calls: tuple[CallPart, ...] = ()


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


class _Refusal(msgspec.Struct):
    message: str = ""
    param: str | None = None


class _Refused(msgspec.Struct):
    error: _Refusal | str | None = None
    message: str = ""
    detail: Any = None


_event = msgspec.json.Decoder(_Event)
_refused = msgspec.json.Decoder(_Refused)


def piece_of(data: bytes) -> Piece:
    """Of an event, or of a whole body. Raises NotAnAnswerError."""
    try:
        event = _event.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NotAnAnswerError("what came is no event of a completion") from error
    if event.error is not None:
        code = event.error.get("code") or event.error.get("type") if isinstance(event.error, dict) else ""
        return Piece(error=str(code or "error")[:40])
    if event.choices is None and event.usage is None:
        raise NotAnAnswerError("what came is no event of a completion")
    usage = _usage_of(event.usage)
    choice = next((c for c in event.choices or () if c.index == 0), None)
    if choice is None:
        return Piece(usage=usage)
    message = choice.delta or choice.message
    text = (message.content if message is not None else choice.text) or ""
    finish = None
    if choice.finish_reason is not None:
        finish = FinishReason.LENGTH if choice.finish_reason == "length" else FinishReason.STOP
    logprobs = _logprobs_of(choice.logprobs)
    calls = _calls_of(message.tool_calls) if message is not None and message.tool_calls else ()
    return Piece(text, finish, usage, logprobs, len(logprobs or ()), calls=calls)


def _calls_of(said: list[_ToolCall]) -> tuple[CallPart, ...]:
    return tuple(
        CallPart(
            i if each.index is None else each.index, each.function.name or "", each.function.arguments or ""
        )
        for i, each in enumerate(said)
        if each.function is not None
    )


def refusal_of(body: bytes) -> tuple[str, str | None]:
    """(sentence, field) of an error's body, both bounded; empty where it has none."""
    try:
        found = _refused.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", None
    error = found.error
    if isinstance(error, _Refusal):
        return error.message[:300], error.param[:100] if error.param else None
    return (error or found.message or "")[:300], None


def _usage_of(said: _Usage | None) -> Usage | None:
    """None unless both counts are there and possible."""
    if said is None or said.prompt_tokens is None or said.completion_tokens is None:
        return None
    if not (0 <= said.prompt_tokens < _MAX_COUNT and 0 <= said.completion_tokens < _MAX_COUNT):
        return None
    details = said.prompt_tokens_details
    cached = (details.cached_tokens or 0) if details is not None else 0
    return Usage(said.prompt_tokens, min(max(cached, 0), said.prompt_tokens), said.completion_tokens)


def _logprobs_of(said: dict[str, Any] | None) -> tuple[TokenLogprob, ...] | None:
    """Of a chat's `content`, or of a completion's parallel lists. What has another shape is read over."""
    if not said:
        return None
    try:
        if said.get("content"):
            return tuple(
                TokenLogprob(
                    -1,
                    str(each["token"]),
                    float(each["logprob"]),
                    tuple((-1, str(t["token"]), float(t["logprob"])) for t in each.get("top_logprobs") or ()),
                )
                for each in said["content"]
            )
        tops = said.get("top_logprobs") or [None] * len(said["tokens"])
        return tuple(
            TokenLogprob(
                -1,
                str(token),
                float(logprob or 0.0),
                tuple((-1, str(t), float(p)) for t, p in (top or {}).items()),
            )
            for token, logprob, top in zip(said["tokens"], said["token_logprobs"], tops, strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
