"""Streaming clients that ask again as soon as they are answered, for so many seconds: gaps between tokens as they see
them.

A process of its own (`python -m benchmarks.streams < plan.json`), loopback only. Prints `warm` when the warm-up is
over and, at the end, one JSON object of a few hundred bytes: quantiles of gaps and first tokens, and counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import uvloop

from benchmarks.stats import quantile

MAX_GAPS = 1_000_000


@dataclass(frozen=True)
class StreamPlan:
    """`n_clients` at once, `warm_s` not counted, then `seconds` counted. `bodies` are sent in turn."""

    port: int
    api_key: str
    bodies: list[str]
    n_clients: int
    warm_s: float
    seconds: float


@dataclass
class StreamTally:
    """Milliseconds, of what came in the measured time; `n_refused` by status."""

    gap_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    n_tokens: int = 0
    n_answers: int = 0
    n_refused: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0


async def _client(
    plan: StreamPlan, number: int, tally: StreamTally, counted: list[bool], until_s: float
) -> None:
    turn = number
    while time.perf_counter() < until_s:
        reader, writer = await asyncio.open_connection("127.0.0.1", plan.port)
        try:
            while time.perf_counter() < until_s:
                body = plan.bodies[turn % len(plan.bodies)].encode()
                turn += plan.n_clients
                head = (
                    f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {plan.api_key}"
                    f"\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                if not await _answer(reader, tally, counted):
                    await asyncio.sleep(0.05)
        except (ConnectionError, asyncio.IncompleteReadError):
            continue
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader, tally: StreamTally, counted: list[bool]) -> bool:
    """Reads one answer to its end; whether it was served."""
    asked_s, last_s = time.perf_counter(), 0.0
    head = await reader.readuntil(b"\r\n\r\n")
    status = head[9:12].decode()
    if b"chunked" not in head.lower():
        at = head.lower().index(b"content-length:")
        await reader.readexactly(int(head[at + 15 :].split(b"\r\n", 1)[0]))
        tally.n_refused[status] = tally.n_refused.get(status, 0) + 1
        return False
    tail = b""
    while not tail.endswith(b"0\r\n\r\n"):
        data = await reader.read(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        tail = (tail + data)[-5:]
        n = data.count(b'"content":"') - data.count(b'"content":""')  # the role's chunk is no token
        if not n:
            continue
        now_s = time.perf_counter()
        if counted[0] and len(tally.gap_ms) < MAX_GAPS:
            tally.n_tokens += n
            if last_s:
                tally.gap_ms.append((now_s - last_s) * 1000)
                tally.gap_ms += [0.0] * (n - 1)
            else:
                tally.first_ms.append((now_s - asked_s) * 1000)
        last_s = now_s
    tally.n_answers += counted[0]
    return True


async def run(plan: StreamPlan) -> StreamTally:
    """Sends the plan's load; ends by itself."""
    tally, counted = StreamTally(), [False]
    until_s = time.perf_counter() + plan.warm_s + plan.seconds
    clients = [asyncio.create_task(_client(plan, n, tally, counted, until_s)) for n in range(plan.n_clients)]
    await asyncio.sleep(plan.warm_s)
    print("warm", flush=True)
    counted[0], began_s = True, time.perf_counter()
    await asyncio.sleep(plan.seconds)
    counted[0], tally.wall_s = False, time.perf_counter() - began_s
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return tally


def summary_of(tally: StreamTally) -> dict[str, Any]:
    """Small, so that it passes a pipe in one write whatever mode the loop left it in."""
    return {
        "gap_p50_ms": quantile(tally.gap_ms, 0.5),
        "gap_p95_ms": quantile(tally.gap_ms, 0.95),
        "gap_p99_ms": quantile(tally.gap_ms, 0.99),
        "first_p50_ms": quantile(tally.first_ms, 0.5),
        "first_p99_ms": quantile(tally.first_ms, 0.99),
        "n_tokens": tally.n_tokens,
        "n_answers": tally.n_answers,
        "n_refused": sum(tally.n_refused.values()),
        "wall_s": tally.wall_s,
    }


def main() -> None:
    """The plan on standard input, the tally on standard output."""
    plan = StreamPlan(**json.loads(sys.stdin.readline()))
    print(json.dumps(summary_of(uvloop.run(run(plan)))), flush=True)


if __name__ == "__main__":
    main()
