"""Streaming requests sent at given instants, whatever became of those before: what each client saw, token by token.

A process of its own (`python -m benchmarks.replay < plan.json`), loopback only; ends by itself `limit_s` after the last
request. Writes one JSON object per request to the plan's file and prints how many were answered. An instant is in
seconds after the first line it prints, `ready`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

_PROMPT_TOKENS = re.compile(rb'"prompt_tokens":(\d+)')
_OUTPUT_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_EVENT_ID = re.compile(rb"(?:^|\n)id: [^.\n]*\.(\d+)[.\r\n]")  # tokens shown so far, this event's among them
_TAIL = 2048  # bytes kept to find the usage in


@dataclass(frozen=True)
class ReplayPlan:
    """`requests`: instants and bodies, in order. `path`: file for the records."""

    port: int
    api_key: str
    path: str
    requests: list[tuple[float, str]]
    limit_s: float = 30.0


@dataclass
class Seen:
    """One request as its client saw it. `tokens_s`: when each token came, as event ids count them: an event holds
    several where steps are quicker than their way. Empty when it was refused or cut off."""

    sent_s: float
    status: str = ""
    n_prompt: int = 0
    tokens_s: list[float] = field(default_factory=list)
    is_whole: bool = False


async def _one(plan: ReplayPlan, at_s: float, body: str, began_s: float) -> Seen:
    text = body.encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {plan.api_key}"
        f"\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n"
    )
    # The connection is there when the request is due: it is the answer that is timed.
    await asyncio.sleep(max(began_s + at_s - 0.2 - time.perf_counter(), 0))
    reader, writer = await asyncio.open_connection("127.0.0.1", plan.port)
    await asyncio.sleep(max(began_s + at_s - time.perf_counter(), 0))
    seen = Seen(time.perf_counter() - began_s)
    try:
        writer.write(head.encode() + text)
        await _answer(reader, seen, began_s)
    finally:
        writer.close()
    return seen


async def _answer(reader: asyncio.StreamReader, seen: Seen, began_s: float) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    seen.status = head[9:12].decode()
    if b"chunked" not in head.lower():
        return
    tail = b""
    while not tail.endswith(b"0\r\n\r\n"):
        data = await reader.read(65536)
        if not data:
            return
        now_s = time.perf_counter() - began_s
        tail = (tail + data)[-_TAIL:]
        ids = _EVENT_ID.findall(data)
        if ids:
            seen.tokens_s += [now_s] * (int(ids[-1]) - len(seen.tokens_s))
    found = _PROMPT_TOKENS.search(tail)
    made = _OUTPUT_TOKENS.search(tail)
    seen.n_prompt = int(found[1]) if found else 0
    if made and seen.tokens_s:  # an id that came in two reads was not counted
        seen.tokens_s = (seen.tokens_s + [seen.tokens_s[-1]] * int(made[1]))[: int(made[1])]
    seen.is_whole = bool(seen.tokens_s and found and made)


async def run(plan: ReplayPlan) -> list[Seen]:
    """Sends the plan; what did not end in time is told as it stood."""
    began_s = time.perf_counter()
    print("ready", flush=True)
    tasks = [asyncio.create_task(_one(plan, at_s, body, began_s)) for at_s, body in plan.requests]
    last_s = max((at_s for at_s, _ in plan.requests), default=0.0)
    await asyncio.wait(tasks, timeout=last_s + plan.limit_s)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    return [
        end if isinstance(end, Seen) else Seen(at_s, f"{type(end).__name__}"[:60])
        for end, (at_s, _) in zip(ended, plan.requests, strict=True)
    ]


def main() -> None:
    """The plan on standard input; records into its file."""
    found = json.loads(sys.stdin.readline())
    found["requests"] = [(at_s, body) for at_s, body in found["requests"]]
    plan = ReplayPlan(**found)
    seen = uvloop.run(run(plan))
    Path(plan.path).write_text("".join(json.dumps(asdict(one)) + "\n" for one in seen))
    print(sum(one.is_whole for one in seen), flush=True)


if __name__ == "__main__":
    main()
