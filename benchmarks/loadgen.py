"""A closed-loop HTTP/1.1 load generator in one process: keep-alive connections, plain or streamed answers.

Run as a process of its own (`python -m benchmarks.loadgen < plan.json`), so that its CPU is not counted with the
gateway's. Talks to loopback addresses only, ends by itself: the plan bounds requests and seconds. Prints one JSON
object: counts by status, latencies, tokens where the answers tell their usage, what the first refusals said, and for
streams time to first event and number of SSE events.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop


@dataclass(frozen=True)
class Plan:
    """What to send. `n_requests` over `n_connections`; the whole run ends after `limit_s` at the latest."""

    host: str
    port: int
    path: str
    headers: dict[str, str]
    # Bodies are sent in turn; more than one keeps prompts apart.
    bodies: list[str]
    n_connections: int
    n_requests: int
    stream: bool = False
    limit_s: float = 120.0
    # Requests per connection sent before counting starts, e.g. to fill caches.
    n_warmup: int = 0


@dataclass
class Tally:
    """What came back; times in milliseconds."""

    statuses: dict[str, int] = field(default_factory=dict)
    latency_ms: list[float] = field(default_factory=list)
    first_event_ms: list[float] = field(default_factory=list)
    first_text_ms: list[float] = field(default_factory=list)
    n_events: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    wall_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)  # what the first plain answers that are no 200 said


_N_COMPLETION = re.compile(rb'"completion_tokens":(\d+)')
_TEXT = re.compile(rb'"content":"[^"]')  # the chunk that names the role has none
_TAIL_BYTES = 1024  # the usage event, [DONE] and the last chunk's end fit; of a plain answer all of an error
_MAX_REFUSALS = 5


class _Connection(asyncio.Protocol):
    """One keep-alive connection; `exchange` sends a request and resolves when its answer is complete."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._done: asyncio.Future[int] | None = None
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._length = -1
        self._chunked = False
        self._in_body = False
        self.n_events = 0
        self.n_bytes = 0
        self.first_event_s = self.first_text_s = 0.0
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done and not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))

    def exchange(self, request: bytes) -> asyncio.Future[int]:
        self._reset()
        self._done = asyncio.get_running_loop().create_future()
        assert self.transport is not None
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        self.n_bytes += len(data)
        if not self._in_body:
            self._buffer += data
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = bytes(self._buffer[:head_end]).lower()
            data = bytes(self._buffer[head_end + 4 :])
            self._buffer.clear()
            self._status = int(head[9:12])
            self._chunked = b"transfer-encoding: chunked" in head
            at = head.find(b"content-length:")
            self._length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else -1
            self._in_body = True
        if self._chunked:
            if data:
                self.n_events += data.count(b"data: ")
                if not self.first_event_s and b"data: " in data:
                    self.first_event_s = time.perf_counter()
                if not self.first_text_s and _TEXT.search(self.tail + data):
                    self.first_text_s = time.perf_counter()
                self.tail = (self.tail + data)[-_TAIL_BYTES:]
                if self.tail.endswith(b"\r\n0\r\n\r\n") or self.tail == b"0\r\n\r\n":
                    self._finish()
        else:
            self._length -= len(data)
            self.tail = data[-_TAIL_BYTES:]
            if self._length <= 0:
                self._finish()

    def n_tokens(self) -> int:
        """Completion tokens as a streamed answer's usage tells them; 0 where it does not."""
        told = _N_COMPLETION.findall(self.tail)
        return int(told[-1]) if told else 0

    def _finish(self) -> None:
        if self._done and not self._done.done():
            self._done.set_result(self._status)


def _requests(plan: Plan) -> list[bytes]:
    out = []
    for body in plan.bodies:
        raw = body.encode()
        head = f"POST {plan.path} HTTP/1.1\r\nhost: {plan.host}:{plan.port}\r\ncontent-length: {len(raw)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in plan.headers.items())
        out.append(head.encode() + b"content-type: application/json\r\n\r\n" + raw)
    return out


async def run(plan: Plan) -> Tally:
    """Sends the plan and returns what was seen; raises ValueError for an address that is not loopback."""
    if plan.host not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"host: {plan.host!r} is not this machine; load goes to loopback only")
    loop = asyncio.get_running_loop()
    tally = Tally()
    requests = _requests(plan)
    turn = 0
    deadline_s = time.perf_counter() + plan.limit_s

    async def one(connection: _Connection, counted: bool) -> None:
        nonlocal turn
        request = requests[turn % len(requests)]
        turn += 1
        started_s = time.perf_counter()
        status = await connection.exchange(request)
        if not counted:
            return
        tally.statuses[str(status)] = tally.statuses.get(str(status), 0) + 1
        if status != 200 and len(tally.refusals) < _MAX_REFUSALS:
            tally.refusals.append(f"{status} {connection.tail.decode(errors='replace')}")
        tally.latency_ms.append((time.perf_counter() - started_s) * 1000)
        tally.n_events += connection.n_events
        tally.n_tokens += connection.n_tokens()
        tally.n_bytes += connection.n_bytes
        if connection.first_event_s:
            tally.first_event_ms.append((connection.first_event_s - started_s) * 1000)
        if connection.first_text_s:
            tally.first_text_ms.append((connection.first_text_s - started_s) * 1000)

    left = plan.n_requests

    async def drive(connection: _Connection) -> None:
        nonlocal left
        try:
            while left > 0 and time.perf_counter() < deadline_s:
                left -= 1
                async with asyncio.timeout(max(1.0, deadline_s - time.perf_counter())):
                    await one(connection, True)
        except (ConnectionError, TimeoutError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")

    connections = []
    for _ in range(plan.n_connections):
        _, protocol = await loop.create_connection(_Connection, plan.host, plan.port)
        connections.append(protocol)
    for connection in connections:
        for _ in range(plan.n_warmup):
            await one(connection, False)
    print("ready", flush=True)
    if not sys.stdin.isatty():
        await loop.run_in_executor(None, sys.stdin.readline)
    started_s = time.perf_counter()
    await asyncio.gather(*(drive(c) for c in connections))
    tally.wall_s = time.perf_counter() - started_s
    for connection in connections:
        if connection.transport:
            connection.transport.close()
    return tally


def main() -> None:
    """First line of standard input: the plan. Prints `ready`, waits for a second line, runs, prints the tally."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    raw: dict[str, Any] = json.loads(sys.stdin.readline())
    print(json.dumps(asdict(uvloop.run(run(Plan(**raw))))), flush=True)


if __name__ == "__main__":
    main()
