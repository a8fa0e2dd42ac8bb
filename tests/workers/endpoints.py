"""An OpenAI-compatible endpoint that does what a test says, down to the byte: a real server on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from workers.contract import UpstreamRole, UpstreamSpec

Answerer = Callable[["Call"], Awaitable[None]]
STREAM = "200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked"


class Call:
    """One request, and the pen for its answer."""

    def __init__(
        self,
        path: str,
        headers: dict[str, str],
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.reader = reader
        self.path, self.headers, self.body = path, headers, body
        self.writer = writer
        self.gone = asyncio.Event()

    async def until_gone(self) -> None:
        """Say nothing more until whoever called has closed the connection."""
        try:
            while await self.reader.read(1024):
                pass
        except ConnectionError:
            pass
        self.gone.set()

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, head: str = STREAM) -> None:
        await self.raw(f"HTTP/1.1 {head}\r\n\r\n".encode())

    async def chunk(self, data: bytes) -> None:
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        await self.chunk(f"data: {text}\n\n".encode())

    async def text(self, piece: str, finish: str | None = None) -> None:
        key = {"delta": {"content": piece}} if "chat" in self.path else {"text": piece}
        await self.event({"choices": [{"index": 0, **key, "finish_reason": finish}]})

    async def usage(self, n_prompt: int, n_completion: int, n_cached: int = 0) -> None:
        said: dict[str, Any] = {"prompt_tokens": n_prompt, "completion_tokens": n_completion}
        said["prompt_tokens_details"] = {"cached_tokens": n_cached}
        await self.event({"choices": [], "usage": said})

    async def done(self) -> None:
        await self.event("[DONE]")
        await self.raw(b"0\r\n\r\n")

    async def refuse(self, status: str, body: object = None, headers: str = "") -> None:
        data = json.dumps(body).encode()
        await self.head(f"{status}\r\n{headers}Content-Type: application/json\r\nContent-Length: {len(data)}")
        await self.raw(data)

    async def words(self, *words: str, n_prompt: int = 7, usage: bool = True) -> None:
        """A whole, well-behaved answer."""
        await self.head()
        for word in words:
            await self.text(word)
        await self.text("", "stop")
        if usage:
            await self.usage(n_prompt, len(words))
        await self.done()


class Endpoint:
    """`calls` in the order they came; each is answered by the next of `answers`, the last for all that follow."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answers: list[Answerer] = []
        self.n_connections = 0
        self.port = 0

    def spec(self, **changes: Any) -> UpstreamSpec:
        values: dict[str, Any] = {
            "upstream": "u1",
            "base_url": f"http://127.0.0.1:{self.port}/v1",
            "model": "their-model",
            "role": UpstreamRole.REPLICA,
            "allow": "127.0.0.1",
            "n_retries": 0,
            "connect_s": 2.0,
            "first_token_s": 5.0,
            "between_tokens_s": 5.0,
            "tokenizers": ["toy"],
        }
        return UpstreamSpec(**{**values, **changes})

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.n_connections += 1
        try:
            while line := await reader.readline():
                path = line.split()[1].decode()
                headers: dict[str, str] = {}
                while (header := (await reader.readline()).decode().strip()) != "":
                    name, _, value = header.partition(":")
                    headers[name.lower()] = value.strip()
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"{}")
                call = Call(path, headers, body, reader, writer)
                self.calls.append(call)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                await answer(call)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def endpoint(*answers: Answerer) -> AsyncIterator[Endpoint]:
    made = Endpoint()
    made.answers = list(answers)
    tasks: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await made.serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
