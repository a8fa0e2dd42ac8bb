"""A TCP proxy that delivers every byte so many milliseconds later, in both directions, in order.

`bench delay` puts it between the machines and Redis; a test holds the pipelining of flushes against it. Loopback only.
Runs on a thread of its own. What waits in it is bounded by what the two sides send within the delay.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import uvloop

Address = tuple[str, int]


class _Side(asyncio.Protocol):
    """One end of a connection; what it receives the other end writes later."""

    def __init__(self, proxy: DelayProxy) -> None:
        self.other: _Side | None = None
        self.transport: asyncio.Transport | None = None
        self._proxy = proxy
        self._late: deque[tuple[float, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.pump()

    def data_received(self, data: bytes) -> None:
        self._proxy.n_bytes += len(data)
        if self.other is not None:
            self.other.send_later(data)

    def connection_lost(self, exc: Exception | None) -> None:
        other, self.other = self.other, None
        if other is not None:
            other.other = None
            other.send_later(b"")

    def send_later(self, data: bytes) -> None:
        """Empty data closes the connection, in its turn."""
        self._late.append((asyncio.get_running_loop().time() + self._proxy.delay_ms / 1000, data))
        if self._timer is None:
            self.pump()

    def pump(self) -> None:
        """Write what is due."""
        self._timer = None
        if self.transport is None:
            return  # still connecting
        loop = asyncio.get_running_loop()
        while self._late:
            due_s, data = self._late[0]
            if due_s > loop.time():
                self._timer = loop.call_at(due_s, self.pump)
                return
            self._late.popleft()
            if data:
                self.transport.write(data)
            else:
                self.transport.close()


class DelayProxy:
    """`with DelayProxy(lambda: ("127.0.0.1", 6379), 40) as proxy:` listens on `proxy.port`.

    `upstream` is asked per connection, so the server may start after the proxy.
    """

    def __init__(self, upstream: Callable[[], Address], delay_ms: float) -> None:
        self._upstream = upstream
        self.delay_ms = delay_ms  # may be changed at any time
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="delay-proxy", daemon=True)
        self._server: Any = None
        self.port = 0
        self.n_bytes = 0  # that have come, in both directions

    def __enter__(self) -> DelayProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(5)
        return self

    def __exit__(self, *error: object) -> None:
        if self._server is not None:
            self._loop.call_soon_threadsafe(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    async def _listen(self) -> None:
        self._server = await self._loop.create_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    def _accept(self) -> _Side:
        near, far = _Side(self), _Side(self)
        near.other, far.other = far, near
        connecting = self._loop.create_task(self._connect(near, far))
        _connecting.add(connecting)
        connecting.add_done_callback(_connecting.discard)
        return near

    async def _connect(self, near: _Side, far: _Side) -> None:
        try:
            await self._loop.create_connection(lambda: far, *self._upstream())
        except OSError:
            near.send_later(b"")


_connecting: set[asyncio.Task[None]] = set()  # the loop holds tasks weakly
