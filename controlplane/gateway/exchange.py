"""One request and its response on a connection of uvicorn's, without what a general server must do for each.

uvicorn runs `Protocol` in place of its own (__main__.py). The app sees an ordinary ASGI call whose `send` can do more
for those that ask `of(send)`: a whole answer in one write, a piece of a stream without a message, and a call when the
client leaves, for which ASGI would need a task per request. Parsing, pipelining, flow control and the way a server
stops stay uvicorn's. Never blocks, never logs.
"""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections.abc import Callable
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from controlplane.gateway.errors import Headers

_MIN_IDLE_S: Final = 0.05  # the keep-alive timer is not set again for less
_PLAIN_PATH: Final = re.compile(rb"/[A-Za-z0-9/_.-]*\Z")


class Exchange(RequestResponseCycle):
    """What lies behind the app's `send`. Belongs to one event loop."""

    # Called once, when the client leaves before its answer is complete.
    on_gone: Callable[[], object] | None = None

    def whole(self, status: int, headers: Headers, body: bytes) -> bool:
        """Send a whole response; `headers` without content-length. False where that takes ordinary messages: a response
        has begun, has no body, or must wait for a client that reads slowly.
        """
        if self.response_started or self.flow.write_paused or self.scope["method"] == "HEAD":
            return False
        self.response_started = True
        self.waiting_for_100_continue = False
        if self.disconnected:
            return True
        headers = (*self.default_headers, *headers)
        lines = [STATUS_LINE[status]]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        n_lines = len(headers) + 3
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
            n_lines += 1
        lines.append(b"content-length: %d\r\n\r\n" % len(body))
        head = b"".join(lines)
        if head.count(b"\n") != n_lines:
            raise RuntimeError("a header value has a line end in it")
        self.transport.write(head + body)
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True

    async def more(self, body: bytes) -> None:
        """A piece, not empty, of a response that was begun without a length."""
        if self.disconnected:
            return
        if self.flow.write_paused:
            await self.flow.drain()
            if self.disconnected:
                return
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def gone(self) -> None:
        """The connection was lost."""
        if self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        on_gone, self.on_gone = self.on_gone, None
        if on_gone is not None:
            on_gone()


def of(send: Any) -> Exchange | None:
    """The exchange behind an ASGI `send`; None where another server runs the app."""
    exchange = getattr(send, "__self__", None)
    return exchange if isinstance(exchange, Exchange) else None


class Protocol(HttpToolsProtocol):
    """One connection. Its keep-alive timer is set once and looks at the clock, instead of being set per request."""

    _idle_since_s: float | None = None
    _running: Exchange | None = None

    def on_headers_complete(self) -> None:
        """As uvicorn's, for an app that knows neither websockets nor a limit of uvicorn's on concurrency."""
        parser, scope = self.parser, self.scope
        version = parser.get_http_version()
        if version != "1.1":
            scope["http_version"] = version
        scope["method"] = parser.get_method().decode("ascii")
        raw_path, query = self.url, b""
        if _PLAIN_PATH.match(raw_path):
            path = raw_path.decode()
        else:
            url = httptools.parse_url(raw_path)
            raw_path, query = url.path, url.query or b""
            path = urllib.parse.unquote(raw_path.decode("ascii"))
        scope["path"], scope["raw_path"], scope["query_string"] = path, raw_path, query
        before = self.cycle
        exchange = self.cycle = Exchange(
            scope,
            self.transport,
            self.flow,
            self.logger,
            self.access_logger,
            self.access_log,
            self.server_state.default_headers,
            asyncio.Event(),
            self.expect_100_continue,
            version != "1.0" and parser.should_keep_alive(),
            self.on_response_complete,
        )
        exchange.body = b""  # type: ignore[assignment]  # a body of one piece is then that piece, not a copy of it
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._set_timer(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None
        if self._running is not None:
            self._running.gone()

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = None

    def _set_timer(self, after_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(after_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since_s is None:
            return  # it is set again when the response is complete
        left_s = self._idle_since_s + self.timeout_keep_alive - self.loop.time()
        if left_s > _MIN_IDLE_S:
            self._set_timer(left_s)
        else:
            super().timeout_keep_alive_handler()
