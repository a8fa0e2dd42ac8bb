"""Answers of /v1/responses in OpenAI's shapes: the whole response, and its events.

Called as sse.py is (writers.py), with the same promises: events carry `id: <request>.<tokens so far>`, and from any of
them another gateway goes on with the same bytes. An item's last events repeat all of its text, and events are numbered:
so a writer is given the answer from its beginning on, also where its client has seen a part (stream.py), and leaves out
what was seen. Of what belongs to one portion of tokens only the last event has the id, so that a client cut off in
between gets all of it again. Text comes first, then calls, each an item; text that a model writes after a call is a
message at the end.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from controlplane.gateway.errors import ApiError
from controlplane.gateway.identity import TAIL_FINISH
from controlplane.gateway.responses import NO_ECHO, in_its_words
from controlplane.gateway.sse import call_id, extension, without_line_ends
from controlplane.gateway.stream import CallsPiece, Piece, Stream
from controlplane.gateway.toolcalls import CallPiece, whole
from workers.contract import End, FinishReason

# Of those that OpenAI has for a failed response; ours stands beside it.
_ERRORS: Final = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
_LEAD, _AFTER = 0, 1  # messages: before the calls, after them
_encode = msgspec.json.Encoder().encode


def error_body(error: ApiError) -> bytes:
    """An error as elsewhere, with the fields named as here."""
    return in_its_words(error).body()


def response(stream: Stream, end: End, echo: dict[str, Any] | None) -> bytes:
    """The body of a request that does not stream; takes the stream's text. `echo`: what it repeats of the request."""
    pieces = stream.take()
    output: list[dict[str, Any]] = []
    if stream.calls is None:
        output.append(_message(stream, _LEAD, "".join(piece.text for piece in pieces)))
    else:
        text, calls = whole([piece.said for piece in pieces if isinstance(piece, CallsPiece)])
        after = stream.calls.after
        lead = text[: len(text) - len(after)]
        output += [_message(stream, _LEAD, lead)] if lead or not calls else []
        output += [_call(stream, i, name, arguments) for i, (name, arguments) in enumerate(calls)]
        output += [_message(stream, _AFTER, after)] if after else []
    output[-1]["status"] = _status(end)
    return _encode(_ended(stream, echo, output, end))


class ResponseWriter:
    """Renders the events of one stream. As sse.ChunkWriter, but told of every piece of the answer, seen or not."""

    __slots__ = (
        "_after", "_before_delta", "_echo", "_id", "_is_open", "_item", "_n_events", "_output", "_parts", "_seen",
        "_stream", "begun",
    )  # fmt: skip

    def __init__(self, stream: Stream, echo: dict[str, Any] | None) -> None:
        origin = stream.origin
        self._stream = stream
        self._echo = echo
        self._id = f"id: {stream.shown}."
        self._seen = (-1, 0) if origin is None else (origin.n_seen, origin.n_tail)
        self.begun = self._seen[0] >= 0
        self._is_open = False  # whether the events before the first token are numbered
        self._n_events = 0
        self._output: list[dict[str, Any]] = []  # items that are complete
        # The one that is being told, and its text or arguments so far.
        self._item: dict[str, Any] | None = None
        self._parts: list[str] = []
        self._before_delta = ""
        self._after: list[str] = []  # text that came after a call

    def pieces(self, pieces: list[Piece]) -> bytes:
        """Events of these pieces, in one write; in front of the first those that begin the response."""
        out = self._opening()
        for piece in pieces:
            if isinstance(piece, CallsPiece):
                events = self._said(piece)
            else:
                events = [self._delta(piece.text)] if piece.text else []
            if events and not self._was_seen(piece.offset):
                out += self._marked(events, piece.offset)
        return "".join(out).encode()

    def end(self, end: End) -> bytes:
        """What closes the last item, and the whole response."""
        stream, out = self._stream, self._opening()
        events = self._closing(_status(end))
        told = _ended(stream, self._echo, self._output, end)
        events.append(self._event(f"response.{told['status']}", response=told))
        if self._seen < (stream.have, TAIL_FINISH):
            out += self._marked(events, f"{stream.have}.{TAIL_FINISH}")
        return "".join(out).encode()

    def error(self, error: ApiError) -> bytes:
        """A failure after the headers, which ends the stream."""
        out, error = self._opening(), in_its_words(error)
        if error.code == "superseded":  # the response itself goes on
            said = {"code": error.code, "message": error.message, "param": error.param}
            return "".join([*out, self._event("error", **said)]).encode()
        failed = _object(self._stream, self._echo, "failed", self._output + self._cut_off())
        failed["error"] = {
            **error.members(),
            "code": _ERRORS.get(error.status, "server_error"),
            "corral": {"code": error.code},
        }
        return "".join([*out, self._event("response.failed", response=failed)]).encode()

    def comment(self, text: str) -> bytes:
        return f": {text}\n".encode() if self.begun else f": {text}\n\n".encode()

    def _opening(self) -> list[str]:
        """Events before the first token; nothing where they were told."""
        if self._is_open:
            return []
        self._is_open = True
        begun = _object(self._stream, self._echo, "in_progress", [])
        events = [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
        ]
        if self._stream.calls is None:
            events += self._begin(_message(self._stream, _LEAD, None))
        was_begun, self.begun = self.begun, True
        return [] if was_begun else self._marked(events, 0)

    def _said(self, piece: CallsPiece) -> list[str]:
        said = piece.said
        n_lead = len(said.content) - said.n_after
        if said.n_after:
            self._after.append(said.content[n_lead:])
        events: list[str] = []
        if n_lead:
            if self._item is None:
                events += self._begin(_message(self._stream, _LEAD, None))
            events.append(self._delta(said.content[:n_lead]))
        for part in said.calls:
            events += self._called(part)
        return events

    def _called(self, part: CallPiece) -> list[str]:
        events: list[str] = []
        if part.name is not None:
            events += self._finish("completed")
            events += self._begin(_call(self._stream, part.call, part.name, ""))
        if part.arguments:
            events.append(self._delta(part.arguments))
        return events

    def _closing(self, status: str) -> list[str]:
        """The ends of the items that are left; the last of all has this status."""
        after = "".join(self._after)
        events: list[str] = []
        if after:
            events += self._finish("completed")
        if after or (self._item is None and not self._output):
            events += self._begin(_message(self._stream, _AFTER if after else _LEAD, None))
        if after:
            events.append(self._delta(after))
        return events + self._finish(status)

    def _cut_off(self) -> list[dict[str, Any]]:
        """The item that is being told, as far as it came."""
        return [] if self._item is None else [self._done("incomplete")]

    # -- one item

    def _begin(self, item: dict[str, Any]) -> list[str]:
        at, item_id = len(self._output), item["id"]
        item["status"] = "in_progress"
        self._item, self._parts = item, []
        events = [self._event("response.output_item.added", output_index=at, item=item)]
        where = f'"item_id":"{item_id}","output_index":{at}'
        if item["type"] == "message":
            kind = "response.output_text.delta"
            where += ',"content_index":0,"logprobs":[]'
            part = {"item_id": item_id, "output_index": at, "content_index": 0, "part": _part("")}
            events.append(self._event("response.content_part.added", **part))
        else:
            kind = "response.function_call_arguments.delta"
        self._before_delta = f'event: {kind}\ndata: {{"type":"{kind}",{where},"delta":'
        return events

    def _delta(self, text: str) -> str:
        """More of the item that is being told."""
        self._parts.append(text)
        self._n_events += 1
        shown = without_line_ends(_encode(text).decode())
        return f'{self._before_delta}{shown},"sequence_number":{self._n_events - 1}}}\n\n'

    def _finish(self, status: str) -> list[str]:
        """Events that end the item that is being told, if there is one."""
        if self._item is None:
            return []
        done, at = self._done(status), len(self._output)
        where: dict[str, Any] = {"item_id": done["id"], "output_index": at}
        if done["type"] == "message":
            where["content_index"] = 0
            part = done["content"][0]
            events = [
                self._event("response.output_text.done", **where, text=part["text"], logprobs=[]),
                self._event("response.content_part.done", **where, part=part),
            ]
        else:
            arguments = done["arguments"]
            events = [self._event("response.function_call_arguments.done", **where, arguments=arguments)]
        events.append(self._event("response.output_item.done", output_index=at, item=done))
        self._output.append(done)
        self._item = None
        return events

    def _done(self, status: str) -> dict[str, Any]:
        """The item that is being told, with all of its text or arguments."""
        assert self._item is not None
        text = "".join(self._parts)
        is_message = self._item["type"] == "message"
        rest = {"content": [_part(text)]} if is_message else {"arguments": text}
        return {**self._item, "status": status, **rest}

    def _event(self, kind: str, **members: Any) -> str:
        body = _encode({"type": kind, **members, "sequence_number": self._n_events}).decode()
        self._n_events += 1
        return f"event: {kind}\ndata: {without_line_ends(body)}\n\n"

    def _marked(self, events: list[str], offset: int | str) -> list[str]:
        return [*events[:-1], f"{self._id}{offset}\n", events[-1]]

    def _was_seen(self, offset: int | str) -> bool:
        """As the offsets of pieces and the tails of event ids say it."""
        if isinstance(offset, int):
            return offset <= self._seen[0]
        n_tokens, _, n_tail = offset.partition(".")
        return (int(n_tokens), int(n_tail)) <= self._seen


def _status(end: End) -> str:
    return "completed" if end.reason is FinishReason.STOP else "incomplete"


def _message(stream: Stream, n: int, text: str | None) -> dict[str, Any]:
    """A message of the answer; without a text one that begins."""
    content = [] if text is None else [_part(text)]
    item_id = f"msg_{stream.shown}{n}"
    return {
        "id": item_id,
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": content,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call(stream: Stream, n: int, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": f"fc_{stream.shown}{n}",
        "type": "function_call",
        "status": "completed",
        "call_id": call_id(stream, n),
        "name": name,
        "arguments": arguments,
    }


def _ended(
    stream: Stream, echo: dict[str, Any] | None, output: list[dict[str, Any]], end: End
) -> dict[str, Any]:
    """The response with its end. Money that ran out is told as tokens that did, and beside it as what it is."""
    told = _object(stream, echo, _status(end), output)
    if end.reason is not FinishReason.STOP:
        told["incomplete_details"] = {"reason": "max_output_tokens"}
    told["usage"] = {
        "input_tokens": end.n_prompt,
        "input_tokens_details": {"cached_tokens": end.n_cached, "cache_write_tokens": 0},
        "output_tokens": end.n_completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": end.n_prompt + end.n_completion,
    }
    return told | extension(end)


def _object(
    stream: Stream, echo: dict[str, Any] | None, status: str, output: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "id": f"resp_{stream.shown}",
        "object": "response",
        "created_at": stream.created_ms // 1000,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": stream.deployment.name,
        "output": output,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "top_logprobs": 0,
        "truncation": "disabled",
        "usage": None,
        **(NO_ECHO if echo is None else echo),
    }
