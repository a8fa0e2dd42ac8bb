"""A peer that speaks Redis's protocol and misbehaves on command: for faults a healthy server cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import hiredis

Command = list[bytes]
# Returns the raw reply, None to stay silent, or raises ConnectionResetError to hang up.
Behaviour = Callable[[Command], bytes | None]


def answer_ok(command: Command) -> bytes | None:
    return b"+OK\r\n"


class RespServer:
    """Answers the handshake of every connection; `behaviour` answers the rest. Counts what it saw."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = answer_ok
        self.n_connections = 0
        self.answers_later_pings = True
        self.chunks: list[bytes] = []  # as read from the socket, handshake excluded
        self.commands: list[Command] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        has_greeted = False
        parser = hiredis.Reader(notEnoughData=Ellipsis)
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while chunk := await reader.read(1 << 20):
                parser.feed(chunk)
                commands = list(iter(parser.gets, Ellipsis))
                if not all(_is_handshake(command) for command in commands):
                    self.chunks.append(chunk)
                for command in commands:
                    if has_greeted and command[0] == b"PING" and not self.answers_later_pings:
                        continue
                    self._answer(command, writer)
                has_greeted = True
        writer.close()

    def _answer(self, command: Command, writer: asyncio.StreamWriter) -> None:
        reply: bytes | None = b"+OK\r\n"
        if not _is_handshake(command):
            self.commands.append(command)
            reply = self.behaviour(command)
        if reply is not None:
            writer.write(reply)


def _is_handshake(command: Command) -> bool:
    return command[0] in (b"AUTH", b"SELECT", b"PING", b"SCRIPT") or command[:2] == [b"CLIENT", b"SETNAME"]


@contextlib.asynccontextmanager
async def resp_server(
    tls: ssl.SSLContext | None = None, path: Path | None = None
) -> AsyncIterator[tuple[RespServer, str]]:
    """A server and its address: `host:port`, or the path of a unix socket."""
    peer = RespServer()
    server: Any
    if path is not None:
        server = await asyncio.start_unix_server(peer, path=path)
        address = str(path)
    else:
        server = await asyncio.start_server(peer, "127.0.0.1", 0, ssl=tls)
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield peer, address
    finally:
        server.close()
