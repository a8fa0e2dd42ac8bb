"""The connection below the app: whole answers in one write, clients that leave, idle connections. No sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from controlplane.gateway import exchange
from controlplane.gateway.http import respond

App = Callable[[Any, Any, Any], Awaitable[None]]
GET = b"GET /a/b?c=%20d HTTP/1.1\r\nhost: x\r\n\r\n"


class Wire(asyncio.Transport):
    """What the connection writes, and whether it closed."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def connect(app: App, keep_alive_s: int = 60) -> tuple[exchange.Protocol, Wire]:
    config = uvicorn.Config(
        app, http=exchange.Protocol, lifespan="off", ws="none", log_config=None, access_log=False,
        proxy_headers=False, timeout_keep_alive=keep_alive_s,
    )  # fmt: skip
    config.load()
    protocol, wire = exchange.Protocol(config, ServerState(), {}), Wire()
    protocol.connection_made(wire)
    return protocol, wire


async def turns(n: int = 10) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_whole_answer_is_one_write_and_the_connection_stays() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 200, b"{}", ((b"x-path", scope["path"].encode()),))
        direct = exchange.of(send)
        assert direct is not None
        begun.append(not direct.whole(200, (), b"again"))

    begun: list[bool] = []
    protocol, wire = connect(app)
    for _ in range(2):
        protocol.data_received(GET)
        await turns()
    assert wire.written == [b"HTTP/1.1 200 OK\r\nx-path: /a/b\r\ncontent-length: 2\r\n\r\n{}"] * 2
    assert not wire.closed
    protocol.data_received(b"GET /%41 HTTP/1.0\r\n\r\n")
    await turns()
    assert b"x-path: /A\r\nconnection: close\r\n" in wire.written[-1] and wire.closed
    assert begun == [True] * 3


async def test_head_and_what_was_begun_take_ordinary_messages() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 404, b"none", (), head_only=scope["method"] == "HEAD")
        direct = exchange.of(send)
        assert direct is not None and not direct.whole(200, (), b"again")

    protocol, wire = connect(app)
    protocol.data_received(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
    await turns()
    said = b"".join(wire.written)
    assert said.startswith(b"HTTP/1.1 404") and said.endswith(b"content-length: 4\r\n\r\n")
    assert not wire.closed


async def test_header_with_a_line_end_is_never_written() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond(send, 200, b"{}", ((b"x-name", b"a\r\nset-cookie: b"),))

    protocol, wire = connect(app)
    protocol.data_received(GET)
    await turns()
    assert wire.written == [] and wire.closed


async def test_body_arrives_whole_however_it_was_cut() -> None:
    bodies = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["more_body"]:
            body += message["body"]
        bodies.append(body + message["body"])
        await respond(send, 200, b"", ())

    protocol, _ = connect(app)
    request = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabcdefghi"
    for cuts in ((len(request),), (10, 30, len(request)), (len(request) - 5, len(request) - 2, len(request))):
        at = 0
        for cut in cuts:
            protocol.data_received(request[at:cut])
            at = cut
            await turns()
    assert bodies == [b"abcdefghi"] * 3


@pytest.mark.parametrize("pipelined", [False, True])
async def test_client_that_leaves_is_told_to_the_request_that_runs(pipelined: bool) -> None:
    gone: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        direct = exchange.of(send)
        assert direct is not None
        direct.on_gone = lambda: gone.append(scope["path"])
        await asyncio.Event().wait()

    protocol, _ = connect(app)
    protocol.data_received(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n" + (GET if pipelined else b""))
    await turns()
    assert gone == []
    protocol.connection_lost(None)
    assert gone == ["/first"]


async def test_nobody_is_told_after_the_answer() -> None:
    gone: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        direct = exchange.of(send)
        assert direct is not None
        direct.on_gone = lambda: gone.append(scope["path"])
        await respond(send, 200, b"", ())

    protocol, _ = connect(app)
    protocol.data_received(GET)
    await turns()
    protocol.connection_lost(None)
    assert gone == []


async def test_idle_connection_is_closed_when_its_time_has_come_and_not_before() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            await asyncio.Event().wait()
        await respond(send, 200, b"", ())

    protocol, wire = connect(app)
    protocol.data_received(GET)
    await turns()
    assert protocol.timeout_keep_alive_task is not None
    protocol.timeout_keep_alive_handler()  # too early: set again
    assert protocol.timeout_keep_alive_task is not None and not wire.closed
    protocol.data_received(b"GET /wait HTTP/1.1\r\nhost: x\r\n\r\n")
    protocol.timeout_keep_alive_handler()  # a request runs
    assert not wire.closed
    other, idle = connect(app, keep_alive_s=0)
    other.data_received(GET)
    await turns()
    other.timeout_keep_alive_handler()
    assert idle.closed
    for each in (protocol, other):
        each.connection_lost(None)
        assert each.timeout_keep_alive_task is None
