"""One pipelined connection to Redis: bytes out, replies in, first in first out.

`redis_client.Client` and `redis_subscriber.Subscriber` open these and own what happens when one ends.
A connection never reconnects, never retries, and must never run a blocking command (BLPOP and kin):
everything behind it in the pipeline would wait too.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import hiredis

from workers.redis_address import Address
from workers.scripts import Script

MAX_WRITE_BUFFER_BYTES: Final = 32 << 20  # beyond this the kernel is not taking our bytes: refuse new calls
REFUSED_FOR_NOW: Final = frozenset({"LOADING", "READONLY", "MASTERDOWN", "BUSY"})  # nothing ran: retryable
_NO_REPLY: Final = object()  # hiredis: "not enough data"; None is a legitimate reply


# None: nobody waits. A callable is given the reply or the RedisError.
Waiter = asyncio.Future[Any] | Callable[[Any], None] | None

pack: Callable[[tuple[Any, ...]], bytes] = hiredis.pack_command  # TypeError unless str, bytes, int or float


class RedisError(Exception):
    """Base of everything this client raises."""


class ResponseError(RedisError):
    """Redis answered, and the answer is an error. `code` is its first word (NOSCRIPT, NOPERM, OOM, …)."""

    @property
    def code(self) -> str:
        return str(self).partition(" ")[0]


class RedisUnavailable(RedisError):  # noqa: N818 - a state of the world, retryable; not a mistake
    """No answer: not connected, connection lost, or the deadline passed. Safe to retry later.

    `maybe_applied`: the command left this process, so Redis may have executed it.
    """

    def __init__(self, message: str, *, maybe_applied: bool = False) -> None:
        super().__init__(message)
        self.maybe_applied = maybe_applied


class RedisOverloaded(RedisUnavailable):
    """The pipeline is full (calls or bytes); nothing was sent. Shed load, do not retry at once."""


def backoff_s(n_failures: int, *, first_s: float = 0.05, max_s: float = 0.5) -> float:
    """How long to wait before the next connect: doubles, bounded, with jitter so that clients spread out."""
    ceiling_s: float = min(max_s, first_s * 2.0 ** min(n_failures, 16))
    return ceiling_s * random.uniform(0.5, 1.0)


class Connection(asyncio.Protocol):
    """The FIFO of one socket. Every `send` owes exactly one reply, handed to its `waiter`.

    Errors that nobody waits for go to `on_orphan_error`.
    With `on_push`, the connection is a subscriber: replies belong to nobody and go to `on_push`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_orphan_error: Callable[[ResponseError], None],
        on_push: Callable[[Any], None] | None = None,
    ) -> None:
        self.closed: asyncio.Future[None] = loop.create_future()
        self.fifo: deque[Waiter] = deque()
        self.on_lost: Callable[[], None] | None = None  # called before any waiter hears of the loss
        self.choked = False
        self.n_received = 0  # reads, not replies: a sign of life
        self._loop = loop
        self._reader = hiredis.Reader(replyError=ResponseError, notEnoughData=_NO_REPLY)
        self._out: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._on_orphan_error = on_orphan_error
        self._on_push = on_push

    # -- sending

    def send(self, packed: bytes, waiter: Waiter) -> None:
        """Queue one packed command; all commands of a loop pass leave in one write."""
        self.fifo.append(waiter)
        self.push(packed)

    def push(self, packed: bytes) -> None:
        """Queue bytes whose replies nobody owes (a subscriber's commands)."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(packed)

    def _flush(self) -> None:
        out = self._out
        if out and self._transport is not None:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()

    def abort(self) -> None:
        """Drop the connection now; everything in flight fails from connection_lost."""
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without being a subclass
        self._transport.set_write_buffer_limits(high=MAX_WRITE_BUFFER_BYTES)

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False

    def data_received(self, data: bytes) -> None:
        self.n_received += 1
        self._reader.feed(data)
        gets = self._reader.gets
        try:
            if self._on_push is not None:
                while (reply := gets()) is not _NO_REPLY:
                    self._on_push(reply)
                return
            next_waiter = self.fifo.popleft
            while (reply := gets()) is not _NO_REPLY:
                self._settle(next_waiter(), reply)
        except (hiredis.ProtocolError, IndexError):  # not Redis, or a reply nobody asked for
            self.abort()

    def _settle(self, waiter: Waiter, reply: Any) -> None:
        if isinstance(reply, ResponseError):
            self._settle_error(waiter, reply)
        elif isinstance(waiter, asyncio.Future):
            if not waiter.done():  # else the caller was cancelled meanwhile
                waiter.set_result(reply)
        elif waiter is not None:
            waiter(reply)

    def _settle_error(self, waiter: Waiter, error: ResponseError) -> None:
        code = error.code
        failure: RedisError = error
        if code in REFUSED_FOR_NOW:
            failure = RedisUnavailable(str(error))
        if waiter is None:
            self._on_orphan_error(error)
        elif isinstance(waiter, asyncio.Future):
            if not waiter.done():
                waiter.set_exception(failure)
        else:
            waiter(failure)
        if code == "READONLY":  # a fail-over left us with the old primary: resolve the name again
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.on_lost is not None:
            self.on_lost()
        n_sent = len(self.fifo) - (0 if self._on_push else len(self._out))
        self._out.clear()
        for index, waiter in enumerate(self.fifo):
            lost = RedisUnavailable("connection to Redis lost", maybe_applied=index < n_sent)
            if waiter is None:
                continue
            if isinstance(waiter, asyncio.Future):
                if not waiter.done():
                    waiter.set_exception(lost)
            else:
                waiter(lost)
        self.fifo.clear()
        if not self.closed.done():
            self.closed.set_result(None)


async def open_connection(
    address: Address,
    *,
    client_name: str,
    timeout_s: float,
    scripts: Iterable[Script] = (),
    on_orphan_error: Callable[[ResponseError], None],
    on_push: Callable[[Any], None] | None = None,
    greeting: tuple[str | int, ...] = (),
) -> Connection:
    """Connect, authenticate, select, load scripts; raises RedisUnavailable or ResponseError if it cannot.

    `greeting`: a command to send before any other; what Redis answers to it does not matter.
    """
    loop = asyncio.get_running_loop()
    connection = Connection(loop, on_orphan_error=on_orphan_error)

    def factory() -> Connection:
        return connection

    try:
        async with asyncio.timeout(timeout_s):
            if address.path:
                await loop.create_unix_connection(factory, address.path)
            else:
                await loop.create_connection(factory, address.host, address.port, ssl=address.tls)
            await _handshake(connection, address, client_name, scripts, greeting)
    except (OSError, TimeoutError) as exc:
        connection.abort()
        raise RedisUnavailable(f"cannot reach Redis at {address}: {exc!r}") from exc
    except BaseException:
        connection.abort()
        raise
    connection._on_push = on_push  # from here on replies are pushes
    return connection


async def _handshake(
    connection: Connection,
    address: Address,
    client_name: str,
    scripts: Iterable[Script],
    greeting: tuple[str | int, ...],
) -> None:
    """One round trip. PING proves that Redis serves (not LOADING); a user may lack PING or SETNAME."""
    commands: list[tuple[str | int, ...]] = []
    password = address.password_now()
    if password is not None:
        commands.append(("AUTH", *([address.username] if address.username else []), password))
    if address.db:
        commands.append(("SELECT", address.db))
    commands += [("CLIENT", "SETNAME", client_name), ("PING",)]
    commands += [("SCRIPT", "LOAD", script.source) for script in scripts]
    commands += [greeting] if greeting else []
    loop = asyncio.get_running_loop()
    waiters: list[asyncio.Future[Any]] = []
    for command in commands:
        waiters.append(loop.create_future())
        connection.send(pack(command), waiters[-1])
    replies = await asyncio.gather(*waiters, return_exceptions=True)
    for command, reply in zip(commands, replies, strict=True):
        optional = command[0] in ("CLIENT", "PING")
        if isinstance(reply, ResponseError) and optional and reply.code == "NOPERM":
            continue
        if isinstance(reply, ResponseError) and command is greeting:
            continue
        if isinstance(reply, BaseException):
            raise reply
