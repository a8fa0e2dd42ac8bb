"""Answers of /v1/messages in Anthropic's shapes: the whole message, and its events.

Called by the generation handler in place of sse.py, with the same promises: events carry `id: <request>.<tokens so
far>`, and from any of them another gateway goes on with the same bytes. Of what belongs to one portion of tokens only
the last event has the id, so that a client cut off in between gets all of it again. Text comes first, then calls, each
a block; text that a model writes after a call is a block at the end. `stop_reason` is `end_turn` also where a stop
sequence ended it: replicas do not tell which.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from controlplane.gateway.errors import ApiError
from controlplane.gateway.identity import TAIL_FINISH
from controlplane.gateway.sse import call_id, finish_reason, without_line_ends
from controlplane.gateway.stream import CallsPiece, Piece, Stream
from controlplane.gateway.toolcalls import CallPiece, whole
from workers.contract import End

_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(dict[str, Any]).decode


def error_body(error: ApiError) -> bytes:
    """An error as Anthropic's clients read it; ours beside it, which names code and field."""
    kind = _ERRORS.get(error.status, "api_error")
    return _encode({"type": "error", "error": error.members() | {"type": kind}})


def message(stream: Stream, end: End) -> bytes:
    """The body of a request that does not stream; takes the stream's text."""
    pieces = stream.take()
    content: list[dict[str, Any]] = []
    if stream.calls is None:
        content.append({"type": "text", "text": "".join(piece.text for piece in pieces)})
    else:
        said = [piece.said for piece in pieces if isinstance(piece, CallsPiece)]
        text, calls = whole(said)
        after = stream.calls.after
        lead = text[: len(text) - len(after)]
        content += [{"type": "text", "text": lead}] if lead or not calls else []
        content += [
            {"type": "tool_use", "id": call_id(stream, i), "name": name, "input": _input(arguments)}
            for i, (name, arguments) in enumerate(calls)
        ]
        content += [{"type": "text", "text": after}] if after else []
    ended = {"stop_reason": _reason(stream, end), "usage": _usage(end)}
    return _encode({**_head(stream), "content": content, **ended})


def count(end: End) -> bytes:
    """The body that says how many tokens a prompt has."""
    return _encode({"input_tokens": end.n_prompt})


class MessageWriter:
    """Renders the events of one stream. As sse.ChunkWriter."""

    __slots__ = ("_id", "_stream", "begun")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._id = f"id: {stream.shown}."
        self.begun = stream.n_seen >= 0

    def pieces(self, pieces: list[Piece]) -> bytes:
        """Events of these pieces, in one write; in front of the first the one that begins the message."""
        out = [] if self.begun else [self._opening()]
        for piece in pieces:
            if isinstance(piece, CallsPiece):
                events = self._said(piece)
            else:
                events = [_text_delta(0, piece.text)] if piece.text else []
            if events:
                out += [*events[:-1], f"{self._id}{piece.offset}\n", events[-1]]
        return "".join(out).encode()

    def end(self, end: End) -> bytes:
        """What closes the last block, how it ended, what it used."""
        stream = self._stream
        out = [] if self.begun else [self._opening()]
        origin = stream.origin
        seen = origin.n_tail if origin is not None and origin.n_seen >= stream.have else 0
        if seen < TAIL_FINISH:
            out += self._closing()
            delta = {"stop_reason": _reason(stream, end), "stop_sequence": None}
            told = {"type": "message_delta", "delta": delta, "usage": _usage(end)}
            out += [f"{self._id}{stream.have}.{TAIL_FINISH}\n", _event(told)]
        return "".join([*out, _event({"type": "message_stop"})]).encode()

    def error(self, error: ApiError) -> bytes:
        """A failure after the headers, which ends the stream."""
        return b"event: error\ndata: " + error_body(error) + b"\n\n"

    def comment(self, text: str) -> bytes:
        return f": {text}\n".encode() if self.begun else f": {text}\n\n".encode()

    def _opening(self) -> str:
        self.begun = True
        usage = {"input_tokens": 0, "output_tokens": 0}  # counted by the replica: told at the end
        started = {**_head(self._stream), "content": [], "stop_reason": None, "usage": usage}
        first = _event({"type": "message_start", "message": started})
        if self._stream.calls is not None:
            return f"{self._id}0\n{first}"
        return f"{first}{self._id}0\n{_text_start(0)}"

    def _said(self, piece: CallsPiece) -> list[str]:
        """A block is closed where the next one begins, so what was seen of those before need not be known."""
        said, reader = piece.said, self._stream.calls
        assert reader is not None
        lead = said.content[: len(said.content) - said.n_after]
        out = [_text_start(0)] if said.begins else []
        if lead:
            out.append(_text_delta(0, lead))
        for part in said.calls:
            at = part.call + reader.has_lead
            if part.name is not None:
                if at:
                    out.append(_stop(at - 1))
                out.append(_tool_start(self._stream, at, part))
            if part.arguments:
                delta = {"type": "input_json_delta", "partial_json": part.arguments}
                out.append(_event({"type": "content_block_delta", "index": at, "delta": delta}))
        return out

    def _closing(self) -> list[str]:
        reader = self._stream.calls
        if reader is None:
            return [_stop(0)]
        n_blocks = reader.n_told + reader.has_lead
        out = [_stop(n_blocks - 1)] if n_blocks else []
        if reader.after:
            out += [_text_start(n_blocks), _text_delta(n_blocks, reader.after), _stop(n_blocks)]
        return out


def _event(body: dict[str, Any]) -> str:
    return f"event: {body['type']}\ndata: {without_line_ends(_encode(body).decode())}\n\n"


def _text_start(index: int) -> str:
    return _event(
        {"type": "content_block_start", "index": index, "content_block": {"type": "text", "text": ""}}
    )


def _text_delta(index: int, text: str) -> str:
    return _event(
        {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": text}}
    )


def _tool_start(stream: Stream, index: int, part: CallPiece) -> str:
    block: dict[str, Any] = {
        "type": "tool_use",
        "id": call_id(stream, part.call),
        "name": part.name,
        "input": {},
    }
    return _event({"type": "content_block_start", "index": index, "content_block": block})


def _stop(index: int) -> str:
    return _event({"type": "content_block_stop", "index": index})


def _input(arguments: str) -> dict[str, Any]:
    """Of a call; nothing of one that was cut off, as `stop_reason` says."""
    try:
        return _decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return {}


def _reason(stream: Stream, end: End) -> str:
    return _REASONS[finish_reason(end, stream.calls)]


def _usage(end: End) -> dict[str, int]:
    """Tokens read from the cache are told apart, as Anthropic does."""
    return {
        "input_tokens": end.n_prompt - end.n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": end.n_cached,
        "output_tokens": end.n_completion,
    }


def _head(stream: Stream) -> dict[str, Any]:
    return {
        "id": f"msg_{stream.shown}",
        "type": "message",
        "role": "assistant",
        "model": stream.deployment.name,
        "stop_sequence": None,
    }
