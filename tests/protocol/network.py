"""A real Redis behind a network that delays, cuts, resets and forgets.

Every connection of the product has a socket of its own to the real server (so users, ACL rules and scripts are
real), but bytes travel in virtual time: a chunk is executed when it arrives, its answer comes later or never. Pub/sub
is heard by one ear and handed to the subscribers of the cell, at most once. What Redis would do by its own clock
(expiry of the locks) is done by the virtual one.
"""

from __future__ import annotations

import asyncio
import contextvars
import fnmatch
import random
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import hiredis
import redis
from redis.connection import Connection as SyncConnection

from tests.protocol.clock import Process, VirtualLoop, current_process, step_aside

_LOCK = re.compile(rb"[^\s:]+:lock:\w+")
_LIFE = re.compile(rb"\r\n(\d{3,6})\r\n")  # of a lock, in milliseconds, as an argument
_MARK = b"*2\r\n$4\r\nPING\r\n$12\r\nend-of-reply\r\n"
_MARK_REPLY = b"$12\r\nend-of-reply\r\n"
_NO_AUTH = b"-NOAUTH Authentication required.\r\n"  # the mark's, on a connection whose AUTH was refused
_RUNS_SCRIPT = (b"EVALSHA", b"EVAL", b"PUBLISH")


class _Wire:
    """A blocking socket to the real server."""

    def __init__(self, host: str, port: int) -> None:
        self.sock = socket.create_connection((host, port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def execute(self, data: bytes) -> bytes:
        """All replies to the commands in `data`. ConnectionError when the server has closed it (its user is gone)."""
        self.sock.sendall(data + _MARK)
        reply = b""
        while True:
            got = self.sock.recv(1 << 16)
            if not got:
                raise ConnectionResetError("closed by Redis")
            reply += got
            for mark in (_MARK_REPLY, _NO_AUTH):
                if reply.endswith(mark):
                    return reply[: -len(mark)]

    def close(self) -> None:
        self.sock.close()


@dataclass
class Link:
    """Between one host and Redis. While cut, bytes wait in both directions, as TCP makes them."""

    delay_s: tuple[float, float] = (0.0002, 0.002)
    cut: bool = False
    frame_loss: float = 0.0  # share of published messages that never arrive
    held: list[Callable[[], None]] = field(default_factory=list)


class Network:
    """The cell's Redis as its processes reach it."""

    def __init__(self, loop: VirtualLoop, url: str, rng: random.Random) -> None:
        parts = urlsplit(url)
        self.url = url
        self._address = parts.hostname or "", parts.port or 0
        self.loop = loop
        self.rng = rng
        self.up = True
        self.n_starts = 1
        self.links: dict[str, Link] = {}
        self.ends: list[_End] = []
        self.ears: list[Callable[[bytes, bytes], None]] = []
        self.n_executed = 0
        self.after_script: list[Callable[[], None]] = []
        self.reply_takers: list[Callable[[Process, bytes], bool]] = []  # (who asked, what): lose the answer?
        self._locks: dict[str, float] = {}
        self.admin = redis.Redis.from_url(url)
        self._auth = hiredis.pack_command(
            ("AUTH", unquote(parts.username or ""), unquote(parts.password or ""))
        )
        self._ear = _Wire(*self._address)
        self._ear.execute(self._auth)
        self._ear.sock.sendall(hiredis.pack_command(("PSUBSCRIBE", "*")))
        self._heard = hiredis.Reader()
        self._listen(b"psubscribe")
        loop.connect = self.connect

    def link(self, process: Process) -> Link:
        return self.links.setdefault(process.host, Link())

    # -- what the server does

    def execute(self, wire: _Wire, data: bytes) -> bytes:
        """Run commands now; hand out what they published."""
        self.n_executed += 1
        locks = set(_LOCK.findall(data)) if b":lock:" in data else ()
        for lock in locks:
            if self._locks.get(lock, 0.0) <= self.loop.now_s:
                self.admin.delete(lock)
        reply = wire.execute(data)
        for lock in locks if b"PEXPIRE" in data or reply.startswith(b"+OK") else ():  # renewed or taken
            life_ms = int(_LIFE.findall(data)[-1])
            self._locks[lock] = self.loop.now_s + life_ms / 1000
        if any(verb in data for verb in _RUNS_SCRIPT):
            self._ear.sock.sendall(b"*1\r\n$4\r\nPING\r\n")
            for channel, payload in self._listen(b"pong"):
                for hear in self.ears:
                    hear(channel, payload)
                for end in list(self.ends):
                    end.published(channel, payload)
            for hook in self.after_script:
                hook()
        return reply

    def _listen(self, until: bytes) -> list[tuple[bytes, bytes]]:
        found = []
        while True:
            reply = self._heard.gets()
            if reply is False:
                self._heard.feed(self._ear.sock.recv(1 << 16))
            elif reply[0] == until:
                return found
            else:
                found.append((reply[2], reply[3]))

    # -- connections

    async def connect(self, factory: Callable[[], Any]) -> Any:
        """loop.create_connection of the product's clients."""
        process = current_process()
        link = self.link(process)
        await asyncio.sleep(self.rng.uniform(*link.delay_s) * 2)
        while link.cut:
            await asyncio.sleep(0.25)  # SYN into the void; the caller has a timeout
        if not self.up:
            raise ConnectionRefusedError("Redis is down")
        protocol = factory()
        end = _End(self, process, protocol)
        protocol.connection_made(end)
        return end, protocol

    def wire(self) -> _Wire:
        return _Wire(*self._address)

    # -- faults

    def reset(self, host: str) -> None:
        """Connections of a host break; what was on its way may or may not have been executed."""
        for end in list(self.ends):
            if end.process.host == host:
                end.lose()

    def cut(self, host: str) -> None:
        self.links.setdefault(host, Link()).cut = True

    def heal(self, host: str) -> None:
        link = self.links.setdefault(host, Link())
        link.cut = False
        held, link.held = link.held, []
        for go_on in held:
            go_on()

    def crash(self) -> None:
        """The server ends; every connection breaks."""
        self.up = False
        for end in list(self.ends):
            end.lose()

    def start(self, *, emptied: bool = False, snapshot: dict[bytes, tuple[bytes, int]] | None = None) -> None:
        """It is back: with what it had, with nothing, or with what it had a while ago (a replica took over)."""
        self.admin.script_flush()
        self.n_starts += 1
        if emptied or snapshot is not None:
            self.empty(users=emptied)
        for key, (value, ttl_ms) in (snapshot or {}).items():
            self.admin.restore(key, max(ttl_ms, 0), value, replace=True)
        self.up = True

    def empty(self, *, users: bool = True) -> None:
        self.admin.flushall()
        self._locks.clear()
        for user in self.admin.acl_users() if users else ():
            if user not in ("default", "corral"):
                self.admin.acl_deluser(user)

    def snapshot(self) -> dict[bytes, tuple[bytes, int]]:
        return {key: (self.admin.dump(key), self.admin.pttl(key)) for key in self.admin.keys("*")}

    def close(self) -> None:
        for end in list(self.ends):
            end.wire.close()
        self._ear.close()
        self.admin.close()


class _End(asyncio.Transport):
    """The product's end of one connection, and the server's session behind it."""

    def __init__(self, network: Network, process: Process, protocol: Any) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.wire = network.wire()
        self._protocol = protocol
        self._out_at = self._in_at = 0.0
        self._open = True
        self._reader: hiredis.Reader | None = None
        self._channels: set[bytes] = set()
        self._patterns: dict[bytes, re.Pattern[str]] = {}
        network.ends.append(self)
        process.on_death.append(self._gone)

    # -- asyncio.Transport

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: bytes) -> None:
        if self._open:
            self._out_at = self._arrival(self._out_at)
            self._later(self._out_at, self._arrived, bytes(data))

    def abort(self) -> None:
        self.lose()

    def close(self) -> None:
        self.lose()

    def is_closing(self) -> bool:
        return not self._open

    # -- the way

    def _arrival(self, not_before: float) -> float:
        delay_s = self.network.rng.uniform(*self.network.link(self.process).delay_s)
        return max(not_before + 1e-6, self.network.loop.now_s + delay_s)  # one after the other, never at once

    def _later(self, at: float, action: Callable[..., None], *args: Any) -> None:
        """On the way: belongs to no process, so it arrives whoever dies meanwhile."""
        link = self.network.link(self.process)

        def arrive() -> None:
            if link.cut:
                link.held.append(arrive)
            else:
                action(*args)

        self.network.loop.call_at(at, arrive, context=contextvars.Context())

    def _arrived(self, data: bytes) -> None:
        if not self._open or not self.network.up:
            return
        reply = self._subscribes(data)
        if reply is None:
            try:
                reply = self.network.execute(self.wire, data)
            except ConnectionError:
                self.lose()
                return
        if any(takes(self.process, data) for takes in self.network.reply_takers):
            self.lose()  # it was applied, and nobody hears of it
            return
        self._send_back(reply)

    def _send_back(self, reply: bytes) -> None:
        self._in_at = self._arrival(self._in_at)
        self._later(self._in_at, self._deliver, reply)

    def _deliver(self, reply: bytes) -> None:
        if self._open and self.process.alive:
            self.network.loop.call_soon(self._receive, reply, context=self.process.context())

    def _receive(self, reply: bytes) -> None:
        if self._open:
            self._protocol.data_received(reply)

    # -- pub/sub

    def _subscribes(self, data: bytes) -> bytes | None:
        """The answer to subscriptions; None for other commands."""
        if b"SUBSCRIBE\r\n" not in data:
            return None
        reader = hiredis.Reader()
        reader.feed(data)
        out = []
        while (command := reader.gets()) is not False:
            verb, names = command[0].upper(), command[1:]
            assert verb.endswith(b"SUBSCRIBE"), command
            for name in names:
                if verb == b"SUBSCRIBE":
                    self._channels.add(name)
                elif verb == b"PSUBSCRIBE":
                    self._patterns[name] = re.compile(fnmatch.translate(name.decode()))
                else:
                    self._channels.discard(name)
                    self._patterns.pop(name, None)
                out.append(_resp(verb.lower(), name, 1))
        return b"".join(out)

    def published(self, channel: bytes, payload: bytes) -> None:
        link = self.network.link(self.process)
        for pattern, matcher in self._patterns.items():
            if matcher.match(channel.decode()) and not self._lost(link):
                self._send_back(_resp(b"pmessage", pattern, channel, payload))
        if channel in self._channels and not self._lost(link):
            self._send_back(_resp(b"message", channel, payload))

    def _lost(self, link: Link) -> bool:
        return link.frame_loss > 0 and self.network.rng.random() < link.frame_loss

    # -- the end

    def lose(self) -> None:
        """The connection is over; the product hears of it, if it is still there."""
        if self._open:
            self._gone()
            if self.process.alive and not self.network.loop.is_closed():
                self.network.loop.call_soon(
                    self._protocol.connection_lost, None, context=self.process.context()
                )

    def _gone(self) -> None:
        if self._open:
            self._open = False
            self.network.ends.remove(self)
            self.wire.close()


def _resp(*parts: bytes | int) -> bytes:
    out = [b"*%d\r\n" % len(parts)]
    out += [b":%d\r\n" % p if isinstance(p, int) else b"$%d\r\n%b\r\n" % (len(p), p) for p in parts]
    return b"".join(out)


# -- redis-py, as the control worker uses it


class _BlockingSocket:
    """What redis-py takes for a socket: every exchange steps aside for its time on the way."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._process = current_process()
        self._wire = network.wire()
        self._replies = b""
        self._n_starts = network.n_starts
        self._timeout: float | None = None

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        return self._timeout

    def sendall(self, data: bytes) -> None:
        self._replies += step_aside(self._exchange(bytes(data)))

    async def _exchange(self, data: bytes) -> bytes:
        network, link = self._network, self._network.link(self._process)
        await asyncio.sleep(network.rng.uniform(*link.delay_s))
        if link.cut:
            await asyncio.sleep(2.0)
            raise TimeoutError("no answer from Redis")
        if not network.up or network.n_starts != self._n_starts:
            raise ConnectionResetError("Redis has gone")
        reply = network.execute(self._wire, data)
        await asyncio.sleep(network.rng.uniform(*link.delay_s))
        if link.cut:
            await asyncio.sleep(2.0)
            raise TimeoutError("no answer from Redis")
        return reply

    def recv(self, n: int, flags: int = 0) -> bytes:
        if not self._replies:
            raise BlockingIOError
        found, self._replies = self._replies[:n], self._replies[n:]
        return found

    def recv_into(self, buffer: Any, n: int = 0) -> int:
        found = self.recv(n or len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        self._wire.close()


def blocking_client(network: Network, **options: Any) -> redis.Redis:
    """redis-py over the virtual network; use it inside `stepping_aside` only."""

    class Connection(SyncConnection):
        def _connect(self) -> Any:
            if not network.up or network.link(current_process()).cut:
                raise ConnectionRefusedError("Redis is down")
            return _BlockingSocket(network)

        def can_read(self, timeout: float = 0) -> bool:
            return False

    pool = redis.ConnectionPool.from_url(network.url, connection_class=Connection, **options)
    return redis.Redis(connection_pool=pool)


class Ear:
    """What the watcher takes for a PubSub."""

    def __init__(self, network: Network, patterns: tuple[str, ...]) -> None:
        self._network = network
        self._process = current_process()
        self._matchers = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
        self._messages: list[dict[str, Any]] = []
        self._n_starts = network.n_starts
        network.ears.append(self._hear)

    def _hear(self, channel: bytes, payload: bytes) -> None:
        link = self._network.link(self._process)
        if not link.cut and self._network.rng.random() >= link.frame_loss:
            for i, matcher in enumerate(self._matchers):
                if matcher.match(channel.decode()):
                    kind = "pmessage" if i == 0 else "message"
                    self._messages.append({"type": kind, "channel": channel, "data": payload})

    def get_message(self, timeout: float = 0) -> dict[str, Any] | None:
        if not self._network.up or self._n_starts != self._network.n_starts:
            raise redis.ConnectionError("Redis has gone")
        return self._messages.pop(0) if self._messages else None

    def close(self) -> None:
        if self._hear in self._network.ears:
            self._network.ears.remove(self._hear)
