"""The Redis client of the hot path: one connection, every call of a loop pass in one write.

Gateways and replica fronts use it on their event loop; elsewhere redis-py is fine. It costs some 10 µs of CPU
a call under concurrency where redis-py's asyncio client costs over 100 (hot-path measurements, 2026-11).
It never queues for an absent Redis: calls fail at once and the caller decides. It must never be given a
blocking command, and never logs arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from workers.redis_address import Address, parse_url
from workers.redis_connection import (
    Connection,
    RedisError,
    RedisOverloaded,
    RedisUnavailable,
    ResponseError,
    backoff_s,
    open_connection,
    pack,
)
from workers.redis_deadline import DeadlineSweep
from workers.redis_subscriber import Subscriber
from workers.scripts import Script

__all__ = [
    "Client",
    "RedisError",
    "RedisOverloaded",
    "RedisUnavailable",
    "ResponseError",
    "Script",
    "Subscriber",
    "parse_url",
]

Arg = str | bytes | int | float
_SWEEPS_PER_TIMEOUT = 8  # a stall is noticed within timeout × (1 + 1/8)
_IDLE_SWEEPS_BEFORE_PING = 16  # two timeouts without a call
_NOSCRIPT_RETRY_S = (0.02, 0.08, 0.3)  # when only the trusted side may load scripts, give it this long

log = logging.getLogger(__name__)


class Client:
    """Pipelining client of one Redis. Belongs to one event loop; not thread-safe.

    `scripts` are loaded on every connect. A user that may not load them (a machine's) passes
    `may_load_scripts=False` and relies on the trusted side having done so. `greeting(again)`: a command to send before
    any other on every connection; `again` = this client was connected before.
    All calls share one deadline, `call_timeout_s`: since replies come in order, one overdue reply means the
    connection is stuck, so it is dropped and everything in flight fails with `maybe_applied=True`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        scripts: Iterable[Script] = (),
        may_load_scripts: bool = True,
        greeting: Callable[[bool], tuple[str | int, ...]] = lambda again: (),
        connect_timeout_s: float = 2.0,
        call_timeout_s: float = 2.0,
        max_in_flight: int = 65_536,
    ) -> None:
        self.address: Address = parse_url(url)
        self.name = name
        self.n_disconnects = 0
        self.n_fire_errors = 0
        self._scripts = tuple(scripts)
        self._may_load_scripts = may_load_scripts
        self._greeting = greeting
        self._connect_timeout_s = connect_timeout_s
        self._call_timeout_s = call_timeout_s
        self._max_in_flight = max_in_flight
        self._conn: Connection | None = None
        self._ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._n_sent = 0
        self._logged_codes: set[str] = set()

    # -- life

    def start(self) -> None:
        """Begin connecting, and keep reconnecting until `close`. Needs a running loop; returns at once."""
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._keep_connected(), name=f"redis:{self.name}")

    async def connect(self, timeout_s: float | None = None) -> None:
        """`start`, then wait until connected. RedisUnavailable if that takes too long (it goes on trying)."""
        self.start()
        try:
            async with asyncio.timeout(timeout_s or self._connect_timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise RedisUnavailable(f"no connection to Redis at {self.address} yet") from None

    async def close(self, drain_s: float = 1.0) -> None:
        """Wait up to `drain_s` for answers in flight, then disconnect for good."""
        conn, task, self._task = self._conn, self._task, None
        if conn is not None and conn.fifo:
            with contextlib.suppress(TimeoutError, RedisError):
                async with asyncio.timeout(drain_s):
                    await self.call("PING")  # answered after everything sent before it
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    @property
    def connected(self) -> bool:
        return self._conn is not None

    @property
    def n_in_flight(self) -> int:
        return len(self._conn.fifo) if self._conn is not None else 0

    # -- calls

    def call(self, *args: Arg) -> asyncio.Future[Any]:
        """Send one command; the future gives the reply (bytes, int, list, None).

        It fails with ResponseError, RedisUnavailable or RedisOverloaded. TypeError at once if an argument is
        not str, bytes, int or float.
        """
        packed = pack(args)
        waiter: asyncio.Future[Any] = self._require_loop().create_future()
        self._submit(packed, waiter, waiter)
        return waiter

    def fire(self, *args: Arg) -> None:
        """Send one command and forget it. Failures count in `n_fire_errors` and are logged once per code."""
        conn = self._conn
        if conn is None or conn.choked or len(conn.fifo) >= self._max_in_flight:
            self._count_fire_error("UNSENT")
            return
        self._n_sent += 1
        conn.send(pack(args), None)

    def evalsha(self, script: Script, keys: Sequence[Arg], args: Sequence[Arg]) -> asyncio.Future[Any]:
        """Run a script. An unknown script (Redis restarted) is loaded and run once more.

        That retry may run after calls sent later: scripts must not rely on order across calls.
        """
        packed = pack(("EVALSHA", script.sha, len(keys), *keys, *args))
        waiter: asyncio.Future[Any] = self._require_loop().create_future()
        self._submit(packed, waiter, lambda reply: self._script_reply(script, packed, waiter, reply, 0))
        return waiter

    def _require_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("Client.start() has not been called")
        return self._loop

    def _submit(
        self,
        packed: bytes,
        waiter: asyncio.Future[Any],
        on_reply: asyncio.Future[Any] | Callable[[Any], None],
    ) -> None:
        conn = self._conn
        if conn is None:
            waiter.set_exception(RedisUnavailable("not connected to Redis"))
        elif len(conn.fifo) >= self._max_in_flight or conn.choked:
            waiter.set_exception(RedisOverloaded("too many calls to Redis in flight"))
        else:
            self._n_sent += 1
            conn.send(packed, on_reply)

    def _script_reply(
        self, script: Script, packed: bytes, waiter: asyncio.Future[Any], reply: Any, n_retries: int
    ) -> None:
        if waiter.done():
            return
        if not isinstance(reply, RedisError):
            waiter.set_result(reply)
        elif not (isinstance(reply, ResponseError) and reply.code == "NOSCRIPT"):
            waiter.set_exception(reply)
        else:
            self._retry_script(script, packed, waiter, reply, n_retries)

    def _retry_script(
        self, script: Script, packed: bytes, waiter: asyncio.Future[Any], error: ResponseError, n_retries: int
    ) -> None:
        """NOSCRIPT means that nothing ran, so running it again is safe."""

        def again() -> None:
            if not waiter.done():
                self._submit(
                    packed,
                    waiter,
                    lambda reply: self._script_reply(script, packed, waiter, reply, n_retries + 1),
                )

        if self._may_load_scripts and n_retries == 0:
            self.fire("SCRIPT", "LOAD", script.source)
            again()
        elif not self._may_load_scripts and n_retries < len(_NOSCRIPT_RETRY_S):
            self._require_loop().call_later(_NOSCRIPT_RETRY_S[n_retries], again)
        else:
            waiter.set_exception(RedisUnavailable(f"script {script.name} is not loaded: {error}"))

    def _count_fire_error(self, code: str) -> None:
        self.n_fire_errors += 1
        if code not in self._logged_codes and len(self._logged_codes) < 64:
            self._logged_codes.add(code)
            log.warning(
                "redis %s: a fire-and-forget command failed (%s); further ones are counted only",
                self.name,
                code,
            )

    # -- connection keeping

    async def _keep_connected(self) -> None:
        n_failures = 0
        while True:
            try:
                conn = await open_connection(
                    self.address,
                    client_name=self.name,
                    timeout_s=self._connect_timeout_s,
                    scripts=self._scripts if self._may_load_scripts else (),
                    on_orphan_error=lambda error: self._count_fire_error(error.code),
                    greeting=self._greeting(self.n_disconnects > 0),
                )
            except Exception as exc:  # whatever it is, a client that stopped trying would be worse
                if n_failures == 0:
                    log.warning("redis %s: %s; retrying", self.name, exc)
                await asyncio.sleep(backoff_s(n_failures))
                n_failures += 1
                continue
            if n_failures or self.n_disconnects:
                log.info("redis %s: connected again to %s", self.name, self.address)
            n_failures = 0
            self._conn = conn
            self._ready.set()
            conn.on_lost = functools.partial(self._forget, conn)
            try:
                await self._watch(conn)
            finally:
                self._forget(conn)
                conn.abort()
            await asyncio.sleep(backoff_s(0))

    def _forget(self, conn: Connection) -> None:
        """Refuse calls from the moment the connection ends: a waiter that retries at once must not hang."""
        if self._conn is conn:
            self._conn = None
            self._ready.clear()
            self.n_disconnects += 1

    async def _watch(self, conn: Connection) -> None:
        """Returns when the connection ended or its oldest call is overdue."""
        loop = self._require_loop()
        interval_s = self._call_timeout_s / _SWEEPS_PER_TIMEOUT
        sweep = DeadlineSweep(self._call_timeout_s, interval_s)
        n_idle, n_sent_before = 0, self._n_sent
        while not conn.closed.done():
            due_at_s = loop.time() + interval_s
            await asyncio.wait([conn.closed], timeout=interval_s)
            n_sent, n_answered = self._n_sent, self._n_sent - len(conn.fifo)
            if sweep.is_overdue(now_s=loop.time(), due_at_s=due_at_s, n_sent=n_sent, n_answered=n_answered):
                log.warning(
                    "redis %s: no answer within %.1f s; reconnecting", self.name, self._call_timeout_s
                )
                return
            n_idle = n_idle + 1 if n_sent == n_sent_before else 0
            n_sent_before = n_sent
            if n_idle == _IDLE_SWEEPS_BEFORE_PING:  # notice a dead peer before a request does
                n_idle = 0
                self.fire("PING")
