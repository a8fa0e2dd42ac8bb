"""Which words a surface answers in: the one place that chooses between sse.py, messagewriter.py and responsewriter.py.

Called by the generation handler for answers and by the app for errors.
"""

from __future__ import annotations

from typing import Any, Protocol

from controlplane.gateway import messagewriter, responsewriter, sse
from controlplane.gateway.errors import ApiError
from controlplane.gateway.stream import Piece, Stream
from controlplane.gateway.surface import Surface, Translated
from workers.contract import End


class Writer(Protocol):
    """Renders the events of one stream; see sse.ChunkWriter."""

    def pieces(self, pieces: list[Piece]) -> bytes: ...

    def end(self, end: End) -> bytes: ...

    def error(self, error: ApiError) -> bytes: ...

    def comment(self, text: str) -> bytes: ...


def writer_of(stream: Stream, *, include_usage: bool, echo: dict[str, Any] | None) -> Writer:
    """Of a stream's events. `include_usage` is a chat's or completion's, `echo` a response's."""
    if not isinstance(stream.endpoint, Translated):
        return sse.ChunkWriter(stream, include_usage=include_usage)
    if stream.endpoint is Translated.MESSAGES:
        return messagewriter.MessageWriter(stream)
    return responsewriter.ResponseWriter(stream, echo)


def whole(stream: Stream, end: End, echo: dict[str, Any] | None) -> bytes:
    """The body of an answer that is not streamed; takes the stream's text."""
    if not isinstance(stream.endpoint, Translated):
        return sse.answer(stream, end)
    if stream.endpoint is Translated.MESSAGES:
        return messagewriter.count(end) if stream.is_count else messagewriter.message(stream, end)
    return responsewriter.response(stream, end, echo)


def error_body(error: ApiError, endpoint: Surface | None) -> bytes:
    """The body of a refusal; of calls without an endpoint as of a chat."""
    if not isinstance(endpoint, Translated):
        return error.body()
    if endpoint is Translated.RESPONSES:
        return responsewriter.error_body(error)
    return messagewriter.error_body(error)
