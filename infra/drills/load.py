"""The clients of a drill: many streamed requests at once, everything they receive kept with its instant.

Called by run.py inside its event loop. Bytes are only stamped while streams run and parsed afterwards, so that the
clients cost little beside what they watch. Talks to loopback addresses only, and ends by its limit.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.drills.verdict import NO_RETRY, Answer, Event

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MAX_HEAD_BYTES = 65_536
_RECONNECT_S = 0.2


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests go and as whom. `reconnects`: a client whose connection breaks, or who is told to come back,
    returns with the same idempotency key and the id of the last event it saw."""

    host: str
    port: int
    api_key: str = field(repr=False)
    model: str = ""
    reconnects: bool = False
    path: str = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its prompt and the tokens it wants."""

    prompt: str
    n_tokens: int
    is_short: bool = False


class StreamLog:
    """What one client has received. `n_seen` is up to date while it runs; `answer()` is for afterwards."""

    def __init__(self) -> None:
        self.n_seen = 0
        self.over = False
        self.last_id = ""
        self.statuses: list[int] = []
        self.errors: list[str] = []
        self.request = ""
        self._chunks: list[tuple[float, bytes]] = []

    def add(self, chunk: bytes) -> None:
        """Bytes of the body, as they arrived."""
        self._chunks.append((time.monotonic(), chunk))
        at = chunk.rfind(b"id: ")
        if at == 0 or chunk[at - 1 : at] == b"\n":
            name = chunk[at + 4 : chunk.find(b"\n", at)].decode("ascii", "replace")
            request, _, rest_of_it = name.partition(".")
            offset = rest_of_it.partition(".")[0]  # what comes after the last token has one more number
            if offset.isdigit():
                self.request, self.last_id = request or self.request, name
                self.n_seen = max(self.n_seen, int(offset))

    def cut(self) -> None:
        """The connection ended: half a line of it is not continued by the next."""
        self._chunks.append((time.monotonic(), b"\n\n"))

    @property
    def is_done(self) -> bool:
        return any(b"data: [DONE]" in chunk for _, chunk in self._chunks[-3:])

    def told_error(self) -> str:
        """Code of an error event at the end, '' without one. It says so when it says no word of another try."""
        tail = b"".join(chunk for _, chunk in self._chunks[-3:])
        at = tail.rfind(b'data: {"error"')
        if at < 0:
            return ""
        try:
            error = json.loads(tail[at + 6 :].split(b"\n", 1)[0])["error"]
            return f"{error.get('code') or 'error'}{'' if 'retry_after_ms' in error else NO_RETRY}"
        except (ValueError, KeyError, AttributeError):
            return "error"

    def answer(self) -> Answer:
        """Everything parsed."""
        events: list[Event] = []
        finish, n_prompt, n_completion, offset, rest = "", -1, -1, 0, b""
        for at_s, chunk in self._chunks:
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if line.startswith(b"id: "):
                    number = line.partition(b".")[2].partition(b".")[0].strip()
                    offset = int(number) if number.isdigit() else offset
                elif line.startswith(b"data: {"):
                    body = _object(line[6:])
                    for choice in body.get("choices") or ():
                        text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                        if text:
                            events.append(Event(at_s, offset, text))
                        finish = choice.get("finish_reason") or finish
                    if usage := body.get("usage"):
                        n_prompt, n_completion = usage["prompt_tokens"], usage["completion_tokens"]
        return Answer(
            request=self.request.removeprefix("req_"),
            events=tuple(events),
            finish=finish,
            n_prompt=n_prompt,
            n_completion=n_completion,
            statuses=tuple(self.statuses),
            errors=tuple(self.errors),
        )


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:  # cut off in the middle
        return {}
    return found if isinstance(found, dict) else {}


async def run_streams(
    target: Target, asks: Sequence[Ask], logs: Sequence[StreamLog], *, limit_s: float
) -> None:
    """All requests at once; returns when every one has ended, or at the limit. Raises ValueError off loopback."""
    if target.host not in _LOOPBACK:
        raise ValueError(f"host: {target.host!r} is not this machine; drills go to loopback only")
    deadline_s = time.monotonic() + limit_s
    async with asyncio.TaskGroup() as group:
        for ask, log in zip(asks, logs, strict=True):
            group.create_task(_one(target, ask, log, deadline_s))


async def _one(target: Target, ask: Ask, log: StreamLog, deadline_s: float) -> None:
    key = f"drill-{id(log):x}-{time.monotonic_ns():x}"
    try:
        while time.monotonic() < deadline_s:
            try:
                async with asyncio.timeout_at(
                    asyncio.get_running_loop().time() + deadline_s - time.monotonic()
                ):
                    again = await _exchange(target, ask, log, key)
            except TimeoutError:
                log.errors.append("client_limit")
                return
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                log.cut()
                again = True
                if not target.reconnects:
                    log.errors.append(f"connection: {type(error).__name__}")
            if log.is_done or not (again and target.reconnects):
                return
            await asyncio.sleep(_RECONNECT_S)
    finally:
        log.over = True


async def _exchange(target: Target, ask: Ask, log: StreamLog, key: str) -> bool:
    """One connection. Whether coming back may give more. Raises OSError or IncompleteReadError when it breaks."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=1 << 20)
    try:
        writer.write(_request(target, ask, log, key))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head[9:12])
        log.statuses.append(status)
        for line in head.split(b"\r\n"):
            if line.startswith(b"x-request-id:"):
                log.request = log.request or line.partition(b":")[2].strip().decode()
        if b"transfer-encoding: chunked" not in head:
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            body = _object(await reader.readexactly(min(length, _MAX_HEAD_BYTES)))
            code = (body.get("error") or {}).get("code") or "error"
            is_told = (
                status not in (429, 503) or b"\r\nretry-after:" in head or b"x-should-retry: false" in head
            )
            log.errors.append(f"HTTP {status} {code}{'' if is_told else NO_RETRY}")
            return status in (409, 429, 502, 503, 504)
        while size := int(await reader.readuntil(b"\r\n"), 16):
            log.add((await reader.readexactly(size + 2))[:-2])
        code = log.told_error()
        if code:
            log.errors.append(code)
            log.cut()
        return bool(code)
    finally:
        writer.close()


def _request(target: Target, ask: Ask, log: StreamLog, key: str) -> bytes:
    body = json.dumps(
        {
            "model": target.model,
            "messages": [{"role": "user", "content": ask.prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": ask.n_tokens,
            "ignore_eos": True,
        }
    ).encode()
    head = [
        f"POST {target.path} HTTP/1.1",
        f"host: {target.host}:{target.port}",
        f"authorization: Bearer {target.api_key}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if target.reconnects:
        head.append(f"idempotency-key: {key}")
        if log.last_id:
            head.append(f"last-event-id: {log.last_id}")
    return "\r\n".join([*head, "", ""]).encode() + body
