"""HTTP/1.1 to one endpoint: connections to judged addresses only, kept for the next request, answers read as they come.

Called by the upstream engine, which sets every time limit. Redirects are not followed, nothing is decompressed, headers
are bounded. Never logs what is sent or received.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import httptools

from workers.addresses import Network, Target, aresolve

_MAX_HEAD_BYTES: Final = 64 << 10
_READ_BYTES: Final = 64 << 10
_IDLE_S: Final = 15.0  # servers close theirs after 5 to 75 s
_MAX_IDLE: Final = 32


class HttpError(Exception):
    """The exchange broke off, or what came is no HTTP. `fresh`: on a connection that had not been used before."""

    def __init__(self, message: str, *, fresh: bool = True) -> None:
        super().__init__(message)
        self.fresh = fresh


class _Parsed:
    """Callbacks of the parser."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.body: list[bytes] = []
        self.has_head = self.complete = self.keeps_open = False
        self.parser: httptools.HttpResponseParser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.has_head = True

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.complete = True
        self.keeps_open = bool(self.parser.should_keep_alive())  # the parser forgets it afterwards


class Connection:
    """One exchange at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._parsed = _Parsed()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.used = False
        self.idle_since_s = 0.0

    async def send(self, method: str, path: str, headers: dict[str, str], body: bytes) -> None:
        """Send a request and read the head of its answer. Raises HttpError."""
        self._parsed = _Parsed()
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items())
        try:
            self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body)
            await self._writer.drain()
            n_head = 0
            while not self._parsed.has_head:
                n_head += await self._read()
                if n_head > _MAX_HEAD_BYTES and not self._parsed.has_head:
                    raise HttpError("the head of the answer is too long")
        except (OSError, UnicodeError) as error:
            raise HttpError(f"{type(error).__name__} while talking to it", fresh=not self.used) from error
        self.status, self.headers = self._parsed.parser.get_status_code(), self._parsed.headers

    async def body(self) -> AsyncGenerator[bytes, None]:
        """Pieces of the body. Ends with it, or with the connection where the server gave no length: what came must
        then say itself that it is whole. Raises HttpError where a length was given and not kept."""
        parsed = self._parsed
        while True:
            for piece in parsed.body:
                yield piece
            parsed.body.clear()
            if parsed.complete:
                return
            try:
                await self._read()
            except (OSError, HttpError) as error:
                if isinstance(error, HttpError) and str(error) == _EOF and self._ends_with_connection():
                    return
                raise HttpError("the answer broke off") from error

    @property
    def reusable(self) -> bool:
        """Its exchange is over, and the server keeps it open."""
        return self._parsed.complete and not self._parsed.body and self._parsed.keeps_open

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._writer.transport.abort()

    async def _read(self) -> int:
        data = await self._reader.read(_READ_BYTES)
        if not data:
            raise HttpError(_EOF, fresh=not self.used)
        try:
            self._parsed.parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise HttpError("what came is no HTTP") from error
        return len(data)

    def _ends_with_connection(self) -> bool:
        return "content-length" not in self.headers and "transfer-encoding" not in self.headers


_EOF: Final = "the connection was closed"


class Connections:
    """To one endpoint. `allowed`: networks that may be called although they are not public."""

    def __init__(self, to: Target, allowed: Sequence[Network]) -> None:
        self._to = to
        self._allowed = allowed
        self._tls = ssl.create_default_context() if to.scheme == "https" else None
        self._idle: list[Connection] = []

    async def take(self, now_s: float) -> Connection:
        """One that is open, or a new one. Raises RefusedAddressError, CallFailedError and OSError."""
        while self._idle:
            kept = self._idle.pop()
            if now_s - kept.idle_since_s < _IDLE_S:
                return kept
            kept.close()
        return await self.fresh()

    async def fresh(self) -> Connection:
        """A new one, to an address that was judged a moment before. Raises as `take`."""
        to = self._to
        last: OSError | None = None
        for address in await aresolve(to.host, to.port, self._allowed):
            try:
                reader, writer = await asyncio.open_connection(
                    address, to.port, ssl=self._tls, server_hostname=to.host if self._tls else None
                )
                return Connection(reader, writer)
            except OSError as error:
                last = error
        raise last or OSError("no address")

    def give_back(self, connection: Connection, now_s: float) -> None:
        """After an exchange that was read to its end."""
        if connection.reusable and len(self._idle) < _MAX_IDLE:
            connection.used, connection.idle_since_s = True, now_s
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


def host_header(to: Target) -> str:
    host = f"[{to.host}]" if ":" in to.host else to.host
    return host if to.port == (443 if to.scheme == "https" else 80) else f"{host}:{to.port}"
