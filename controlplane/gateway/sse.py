"""Answers in OpenAI's shapes: server-sent chunks from a prefix built once per request, and the whole JSON
answer.

Called by the generation handler. Rendering one token is a number, a JSON string and a join. Each event
carries `id: <request>.<tokens so far>`, from which a client may resume; what comes without a token after them has one
more number (identity.py). Rules that clients impose: after the
first `id:` a comment is a single line without a blank one (the openai SDK parses what a blank line ends), and
finish reasons are OpenAI's (`budget` is told as `length`, with `"corral": {"finish": "budget"}` beside it).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from controlplane.gateway.errors import ApiError
from controlplane.gateway.identity import TAIL_FINISH, TAIL_USAGE
from controlplane.gateway.logprobs import chat_logprobs, completion_logprobs, tokens_of
from controlplane.gateway.stream import CallsPiece, Piece, Stream
from controlplane.gateway.surface import Surface
from controlplane.gateway.toolcalls import NOTHING, CallPiece, CallReader, whole
from workers.contract import End, Endpoint, FinishReason

DONE: Final = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode

_ID_PREFIX: dict[Surface, str] = {Endpoint.CHAT: "chatcmpl-", Endpoint.COMPLETIONS: "cmpl-"}
_CHUNK_OBJECT: dict[Surface, str] = {
    Endpoint.CHAT: "chat.completion.chunk",
    Endpoint.COMPLETIONS: "text_completion",
}
_ANSWER_OBJECT: dict[Surface, str] = {
    Endpoint.CHAT: "chat.completion",
    Endpoint.COMPLETIONS: "text_completion",
}


def finish_reason(end: End, calls: CallReader | None = None) -> str:
    """OpenAI's word for how it ended."""
    if end.reason is not FinishReason.STOP:
        return "length"
    return "tool_calls" if calls is not None and calls.n_calls else "stop"


def usage(end: End) -> dict[str, Any]:
    return {
        "prompt_tokens": end.n_prompt,
        "completion_tokens": end.n_completion,
        "total_tokens": end.n_prompt + end.n_completion,
        "prompt_tokens_details": {"cached_tokens": end.n_cached},
    }


def answer(stream: Stream, end: End) -> bytes:
    """The body of a request that does not stream; takes the stream's text."""
    pieces = stream.take()
    tokens = [token for piece in pieces for token in tokens_of(piece.logprobs)]
    is_chat = stream.endpoint is Endpoint.CHAT
    logprobs = chat_logprobs(tokens) if is_chat else completion_logprobs(tokens, 0)
    reason = finish_reason(end, stream.calls)
    choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
    if stream.calls is not None:
        choice["message"] = _message_with_calls(stream, pieces)
    elif is_chat:
        text = "".join(piece.text for piece in pieces)
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = "".join(piece.text for piece in pieces)
    body = _head(stream, _ANSWER_OBJECT) | {"choices": [choice], "usage": usage(end)}
    return _encode(body | extension(end))


class ChunkWriter:
    """Renders the events of one stream."""

    __slots__ = (
        "_after", "_before", "_id", "_include_usage", "_is_chat", "_middle", "_n_chars", "_plain_after", "_stream",
        "begun",
    )  # fmt: skip

    def __init__(self, stream: Stream, *, include_usage: bool) -> None:
        self._stream = stream
        self._include_usage = include_usage
        self._is_chat = stream.endpoint is Endpoint.CHAT
        self._id = f"id: {stream.shown}."
        head = _encode(_head(stream, _CHUNK_OBJECT)).decode()[:-1]
        tail = ',"usage":null}\n\n' if include_usage else "}\n\n"
        if self._is_chat:
            self._before = f'\ndata: {head},"choices":[{{"index":0,"delta":{{"content":'
            self._middle = '},"logprobs":'
        else:
            self._before = f'\ndata: {head},"choices":[{{"index":0,"text":'
            self._middle = ',"logprobs":'
        self._after = f',"finish_reason":null}}]{tail}'
        self._plain_after = f"{self._middle}null{self._after}"
        self._n_chars = -1  # of completion text, where token probabilities are asked for; -1 = not yet known
        self.begun = stream.n_seen >= 0

    def pieces(self, pieces: list[Piece]) -> bytes:
        """One event per piece, in one write; in front of the first the chunk that names the role."""
        if self._stream.calls is not None:
            return self._pieces_with_calls(pieces)
        out = [] if self.begun else self._opening()
        id_, before, after = self._id, self._before, self._plain_after
        for piece in pieces:
            text = _encode(piece.text).decode()
            if not text.isascii():
                text = without_line_ends(text)
            if piece.logprobs:
                out.append(
                    f"{id_}{piece.offset}{before}{text}{self._middle}{self._logprobs(piece)}{self._after}"
                )
            else:
                out.append(f"{id_}{piece.offset}{before}{text}{after}")
        return "".join(out).encode()

    def end(self, end: End) -> bytes:
        """Finish chunk, usage when asked for, and [DONE]."""
        reason = finish_reason(end, self._stream.calls)
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        choice["delta" if self._is_chat else "text"] = {} if self._is_chat else ""
        nothing = {"usage": None} if self._include_usage else {}
        out = [] if self.begun else self._opening()
        seen = self._seen_tail()
        if seen < TAIL_FINISH:
            out.append(self._event({"choices": [choice], **nothing, **extension(end)}, TAIL_FINISH))
        if self._include_usage and seen < TAIL_USAGE:
            out.append(self._event({"choices": [], "usage": usage(end)}, TAIL_USAGE))
        return "".join(out).encode() + DONE

    def error(self, error: ApiError) -> bytes:
        """A failure after the headers: an error object as data, which ends the stream."""
        return b"data: " + error.body() + b"\n\n"

    def comment(self, text: str) -> bytes:
        return f": {text}\n".encode() if self.begun else f": {text}\n\n".encode()

    def _seen_tail(self) -> int:
        """Which of the events after the last token the client has."""
        origin = self._stream.origin
        return origin.n_tail if origin is not None and origin.n_seen >= self._stream.have else 0

    def _pieces_with_calls(self, pieces: list[Piece]) -> bytes:
        """The same; a piece of which nothing is known yet has no event."""
        out = [] if self.begun else self._opening()
        nothing = {"usage": None} if self._include_usage else {}
        for piece in pieces:
            assert isinstance(piece, CallsPiece)
            said = piece.said
            if said is NOTHING and not piece.logprobs:
                continue
            delta: dict[str, Any] = {"content": said.content} if said.content else {}
            if said.calls:
                delta["tool_calls"] = [_call_delta(self._stream, part) for part in said.calls]
            logprobs = chat_logprobs(tokens_of(piece.logprobs)) if piece.logprobs else None
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            body = _encode(_head(self._stream, _CHUNK_OBJECT) | {"choices": [choice], **nothing}).decode()
            out.append(f"{self._id}{piece.offset}\ndata: {without_line_ends(body)}\n\n")
        return "".join(out).encode()

    def _logprobs(self, piece: Piece) -> str:
        tokens = tokens_of(piece.logprobs)
        if self._is_chat:
            rendered = chat_logprobs(tokens)
        else:
            if self._n_chars < 0:
                self._n_chars = self._stream.n_chars_seen
            rendered = completion_logprobs(tokens, self._n_chars)
            self._n_chars += sum(len(text) for text, _, _ in tokens)
        return without_line_ends(_encode(rendered).decode())

    def _opening(self) -> list[str]:
        self.begun = True
        if not self._is_chat:
            return []
        # There may be calls only.
        delta = {"role": "assistant", "content": "" if self._stream.calls is None else None}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        nothing = {"usage": None} if self._include_usage else {}
        return [self._event({"choices": [choice], **nothing})]

    def _event(self, rest: dict[str, Any], tail: int = 0) -> str:
        """An event in front of all tokens, or the one with this tail after them."""
        stream = self._stream
        body = _encode(_head(stream, _CHUNK_OBJECT) | rest).decode()
        at = f"{stream.have}.{tail}" if tail else "0"
        return f"{self._id}{at}\ndata: {body}\n\n"


def _message_with_calls(stream: Stream, pieces: list[Piece]) -> dict[str, Any]:
    content, calls = whole([piece.said for piece in pieces if isinstance(piece, CallsPiece)])
    message: dict[str, Any] = {"role": "assistant", "content": content or None, "refusal": None}
    if calls:
        message["tool_calls"] = [
            {
                "id": call_id(stream, i),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for i, (name, arguments) in enumerate(calls)
        ]
    else:
        message["content"] = content
    return message


def _call_delta(stream: Stream, part: CallPiece) -> dict[str, Any]:
    if part.name is None:
        return {"index": part.call, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.call, "id": call_id(stream, part.call), "type": "function", "function": function}


def call_id(stream: Stream, index: int) -> str:
    """Of request and index alone: the same however often the answer is told. OpenAI takes 40 characters."""
    return f"call_{stream.shown}{index}"


def without_line_ends(text: str) -> str:
    """JSON text with the line ends that JSON allows raw, and that many clients split lines at, escaped."""
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")


def _head(stream: Stream, objects: dict[Surface, str]) -> dict[str, Any]:
    return {
        "id": _ID_PREFIX[stream.endpoint] + stream.shown,
        "object": objects[stream.endpoint],
        "created": stream.created_ms // 1000,
        "model": stream.deployment.name,
        "system_fingerprint": f"fp_{stream.deployment.id[-12:]}",
    }


def extension(end: End) -> dict[str, Any]:
    """What OpenAI has no word for, only where there is something to say."""
    notes: dict[str, Any] = {}
    if end.reason is FinishReason.BUDGET:
        notes["finish"] = "budget"
    if end.attempts > 1:
        notes["attempts"] = end.attempts
    return {"corral": notes} if notes else {}
