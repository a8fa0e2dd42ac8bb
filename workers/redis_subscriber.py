"""Pub/sub on its own connection: subscriptions that survive reconnects, and say when messages may be missing.

Gateways listen for frames with it, agents and control for events. Pub/sub delivers at most once; after a
reconnect `on_gap` runs, and the owner reads what it missed from the journal. Callbacks run on the loop and
must not block.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from workers.redis_address import parse_url
from workers.redis_connection import (
    Connection,
    RedisUnavailable,
    ResponseError,
    backoff_s,
    open_connection,
    pack,
)

log = logging.getLogger(__name__)


class Subscriber:
    """Calls `on_message(channel, payload)` for every message of the channels and patterns subscribed to.

    `on_gap()` runs after each reconnect, once all subscriptions stand again: anything published meanwhile is
    lost.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        on_message: Callable[[bytes, bytes], None],
        on_gap: Callable[[], None] | None = None,
        connect_timeout_s: float = 2.0,
        ping_interval_s: float = 5.0,
    ) -> None:
        self.address = parse_url(url)
        self.name = name
        self.n_gaps = 0
        self.n_callback_errors = 0
        self._on_message = on_message
        self._on_gap = on_gap
        self._connect_timeout_s = connect_timeout_s
        self._ping_interval_s = ping_interval_s
        self._wanted: dict[tuple[bool, bytes], None] = {}  # (is_pattern, name), in order
        self._standing: set[tuple[bool, bytes]] = set()
        self._changed = asyncio.Event()
        self._conn: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._refused: ResponseError | None = None

    def start(self) -> None:
        """Begin connecting, and keep reconnecting until `close`. Needs a running loop; returns at once."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(
                self._keep_connected(), name=f"sub:{self.name}"
            )

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def subscribe(self, *channels: str, timeout_s: float = 2.0) -> None:
        """Subscribe and wait for the confirmation. RedisUnavailable if it is late (the wish stands)."""
        await self._want(False, channels, timeout_s)

    async def psubscribe(self, *patterns: str, timeout_s: float = 2.0) -> None:
        """As `subscribe`, for glob patterns."""
        await self._want(True, patterns, timeout_s)

    def unsubscribe(self, *channels: str) -> None:
        self._unwant(False, channels)

    def punsubscribe(self, *patterns: str) -> None:
        self._unwant(True, patterns)

    @property
    def connected(self) -> bool:
        """Connected, with every subscription confirmed."""
        return self._conn is not None and self._standing >= self._wanted.keys()

    async def _want(self, is_pattern: bool, names: tuple[str, ...], timeout_s: float) -> None:
        wanted = [(is_pattern, name.encode()) for name in names]
        fresh = [key for key in wanted if key not in self._wanted]
        self._wanted.update(dict.fromkeys(wanted))
        self._refused = None
        if self._conn is not None and fresh:
            self._send_subscribe(self._conn, fresh)
        try:
            async with asyncio.timeout(timeout_s):
                while not self._standing.issuperset(wanted):
                    if self._refused is not None:
                        for key in fresh:
                            self._wanted.pop(key, None)
                        raise self._refused
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise RedisUnavailable("subscription not confirmed yet") from None

    def _unwant(self, is_pattern: bool, names: tuple[str, ...]) -> None:
        for name in names:
            self._wanted.pop((is_pattern, name.encode()), None)
        if self._conn is not None and names:
            verb = "PUNSUBSCRIBE" if is_pattern else "UNSUBSCRIBE"
            self._conn.push(pack((verb, *names)))

    @staticmethod
    def _send_subscribe(conn: Connection, keys: list[tuple[bool, bytes]]) -> None:
        for is_pattern, verb in ((False, "SUBSCRIBE"), (True, "PSUBSCRIBE")):
            names = [name for pattern, name in keys if pattern is is_pattern]
            if names:
                conn.push(pack((verb, *names)))

    # -- receiving

    def _on_push(self, reply: Any) -> None:
        if isinstance(reply, ResponseError):
            log.error("redis %s: subscription refused (%s)", self.name, reply.code)
            self._refused = reply
            self._changed.set()
            return
        if not isinstance(reply, list):
            return
        kind = reply[0]
        if kind == b"message":
            self._deliver(reply[1], reply[2])
        elif kind == b"pmessage":
            self._deliver(reply[2], reply[3])
        elif kind in (b"subscribe", b"psubscribe"):
            self._standing.add((kind == b"psubscribe", reply[1]))
            self._changed.set()
        elif kind in (b"unsubscribe", b"punsubscribe"):
            self._standing.discard((kind == b"punsubscribe", reply[1]))

    def _deliver(self, channel: bytes, payload: bytes) -> None:
        try:
            self._on_message(channel, payload)
        except Exception as exc:
            self.n_callback_errors += 1
            if self.n_callback_errors == 1:  # the type only: a message may carry a tenant's text
                log.error(
                    "redis %s: message callback failed with %s; counting from here",
                    self.name,
                    type(exc).__name__,
                )

    def _tell_gap(self) -> None:
        if self._on_gap is not None:
            try:
                self._on_gap()
            except Exception:
                log.exception("redis %s: on_gap failed", self.name)

    # -- connection keeping

    async def _keep_connected(self) -> None:
        n_failures = 0
        was_connected = False
        while True:
            conn = None
            try:
                conn = await open_connection(
                    self.address,
                    client_name=self.name,
                    timeout_s=self._connect_timeout_s,
                    on_orphan_error=lambda _error: None,
                    on_push=self._on_push,
                )
                conn.closed.add_done_callback(lambda _: self._changed.set())
                self._conn = conn
                self._refused = None
                self._standing.clear()
                self._send_subscribe(conn, list(self._wanted))
                await self._await_standing(conn)
                n_failures = 0
                if was_connected:
                    self.n_gaps += 1
                    log.info("redis %s: subscribed again; messages may have been missed", self.name)
                    self._tell_gap()
                was_connected = True
                await self._watch(conn)
            except Exception as exc:  # whatever it is, a subscriber that stopped trying would be worse
                if n_failures == 0:
                    log.warning("redis %s: %s; retrying", self.name, exc)
                n_failures += 1
            finally:
                self._conn = None
                self._standing.clear()
                if conn is not None:
                    conn.abort()
            await asyncio.sleep(backoff_s(n_failures))

    async def _await_standing(self, conn: Connection) -> None:
        async with asyncio.timeout(self._connect_timeout_s):
            while not self._standing >= self._wanted.keys():
                if self._refused is not None:
                    raise self._refused
                if conn.closed.done():
                    raise RedisUnavailable("connection to Redis lost")
                self._changed.clear()
                await self._changed.wait()

    async def _watch(self, conn: Connection) -> None:
        """Ping when quiet; return when the connection ended or stayed silent through a whole interval."""
        n_seen, pinged = conn.n_received, False
        while not conn.closed.done():
            await asyncio.wait([conn.closed], timeout=self._ping_interval_s)
            if conn.n_received != n_seen:
                n_seen, pinged = conn.n_received, False
            elif pinged:
                return
            else:
                conn.push(pack(("PING",)))
                pinged = True
