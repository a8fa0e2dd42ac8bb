"""ASGI in small pieces: headers of a request, its body within a bound, and whole responses.

Called by the app and the handlers; knows nothing of models or tenants.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from controlplane.gateway import exchange
from controlplane.gateway.errors import ApiError, ClientGone, Headers, bad_request

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_DRAIN_S: Final = 5.0
_DRAIN_BYTES: Final = 64 << 20

JSON = (b"content-type", b"application/json")


class RequestHeaders:
    """The few headers the gateway reads, in one pass. Values are raw bytes; None = absent."""

    __slots__ = (
        "api_key",
        "authorization",
        "content_encoding",
        "content_length",
        "end_customer",
        "idempotency_key",
        "last_event_id",
        "origin",
        "slo_class",
    )  # fmt: skip

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.authorization: bytes | None = None
        self.api_key: bytes | None = None
        self.origin: bytes | None = None
        self.content_length: bytes | None = None
        self.content_encoding: bytes | None = None
        self.last_event_id: bytes | None = None
        self.idempotency_key: bytes | None = None
        self.slo_class: bytes | None = None
        self.end_customer: bytes | None = None
        for name, value in headers:
            if name == b"authorization":
                self.authorization = value
            elif name == b"content-length":
                self.content_length = value
            elif name == b"origin":
                self.origin = value
            elif name == b"x-api-key":
                self.api_key = value
            elif name == b"content-encoding":
                self.content_encoding = value
            elif name == b"last-event-id":
                self.last_event_id = value
            elif name == b"idempotency-key":
                self.idempotency_key = value
            elif name == b"x-corral-slo-class":
                self.slo_class = value
            elif name == b"x-corral-end-customer":
                self.end_customer = value


async def read_body(headers: RequestHeaders, receive: Receive, limit: int) -> bytes:
    """The request's body. ApiError 413 before more than `limit` bytes are kept; ClientGone if it breaks
    off."""
    if headers.content_encoding not in (None, b"identity"):
        raise bad_request(
            "compressed bodies are not supported: leave out Content-Encoding", None, "invalid_encoding"
        )
    declared = headers.content_length
    if declared is not None and declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    message = await receive()
    if message["type"] != "http.request":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if not message.get("more_body"):
        if len(body) > limit:
            raise _too_large(limit)
        return body
    parts = [body]
    n_bytes = len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] != "http.request":
            raise ClientGone
        part = message.get("body", b"")
        n_bytes += len(part)
        if n_bytes > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


async def respond(send: Send, status: int, body: bytes, headers: Headers, *, head_only: bool = False) -> None:
    """A whole response; `headers` without content-length."""
    direct = exchange.of(send)
    if direct is not None and direct.whole(status, headers, body):
        return
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, (b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": b"" if head_only else body})


async def respond_and_drain(send: Send, receive: Receive, status: int, body: bytes, headers: Headers) -> None:
    """Respond to a body that was not read to its end, and then throw the rest away for a while before the
    connection closes: most clients send everything first, and would see a reset connection instead of the
    response.
    """
    length = (b"content-length", b"%d" % len(body))
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, length, (b"connection", b"close")],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": True})
    n_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            while n_bytes < _DRAIN_BYTES:
                message = await receive()
                n_bytes += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
    await send({"type": "http.response.body", "body": b""})


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"the body is larger than {limit} bytes: send less")
