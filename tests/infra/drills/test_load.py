"""The clients of a drill against a scripted server: what arrives is kept as it came, whatever the chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from infra.drills.load import Ask, StreamLog, Target, run_streams
from infra.drills.verdict import is_retryable

ID = "0" * 32
Handler = Callable[[bytes, asyncio.StreamWriter], None]


def event(offset: int | str, body: dict[str, object]) -> bytes:
    return f"id: {ID}.{offset}\ndata: {json.dumps(body)}\n\n".encode()


def token(offset: int, text: str) -> bytes:
    return event(offset, {"choices": [{"delta": {"content": text}, "finish_reason": None}], "usage": None})


END = (
    event("2.1", {"choices": [{"delta": {}, "finish_reason": "length"}], "usage": None})
    + event("2.2", {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
    + b"data: [DONE]\n\n"
)
HEAD = b"HTTP/1.1 200 OK\r\nx-request-id: req_" + ID.encode() + b"\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@asynccontextmanager
async def serving(answer: Handler) -> AsyncIterator[int]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        answer(head, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def asked(port: int, *, reconnects: bool = False, limit_s: float = 5.0) -> StreamLog:
    log = StreamLog()
    target = Target("127.0.0.1", port, "key", "toy", reconnects=reconnects)
    await run_streams(target, [Ask("hello", 2)], [log], limit_s=limit_s)
    return log


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_text_ids_and_counts_survive_any_chunking(size: int) -> None:
    body = b": corral stage=waking\n\n" + token(1, " ba\nda") + token(2, " id: x") + END

    def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for at in range(0, len(body), size):
            writer.write(chunk(body[at : at + size]))
        writer.write(b"0\r\n\r\n")

    async with serving(answer) as port:
        found = (await asked(port)).answer()
    assert found.finished
    assert (found.request, found.text, found.n_prompt, found.n_completion) == (ID, " ba\nda id: x", 5, 2)
    assert [e.offset for e in found.events] == [1, 2]


async def test_a_broken_connection_is_an_error_and_no_end() -> None:
    def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(token(1, " bada")))

    async with serving(answer) as port:
        found = (await asked(port)).answer()
    assert not found.finished
    assert found.errors == ("connection: IncompleteReadError",)
    assert found.text == " bada"


async def test_a_client_that_reconnects_names_what_it_saw_last() -> None:
    heads = []

    def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        if len(heads) == 1:
            writer.write(HEAD + chunk(token(1, " bada")))
        else:
            writer.write(HEAD + chunk(token(2, " badi") + END) + b"0\r\n\r\n")

    async with serving(answer) as port:
        found = (await asked(port, reconnects=True)).answer()
    assert found.finished
    assert found.text == " bada badi"
    assert b"last-event-id" not in heads[0]
    assert f"last-event-id: {ID}.1".encode() in heads[1]
    keys = {line for head in heads for line in head.split(b"\r\n") if line.startswith(b"idempotency-key")}
    assert len(keys) == 1


async def test_an_error_event_and_a_refusal_are_told_apart_from_an_end() -> None:
    error = b'data: {"error": {"code": "cell_unavailable", "message": "m", "retry_after_ms": 5}}\n\n'

    def broken(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(token(1, " bada") + error) + b"0\r\n\r\n")

    async with serving(broken) as port:
        found = (await asked(port)).answer()
    assert (found.errors, found.finished) == (("cell_unavailable",), False)

    def refused(head: bytes, writer: asyncio.StreamWriter) -> None:
        body = b'{"error": {"code": "invalid_api_key"}}'
        writer.write(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async with serving(refused) as port:
        found = (await asked(port)).answer()
    assert (found.statuses, found.errors) == ((401,), ("HTTP 401 invalid_api_key",))


@pytest.mark.parametrize(("headers", "says"), [(b"Retry-After: 2\r\n", True), (b"", False)])
async def test_a_503_that_does_not_say_when_to_try_again_is_told_apart(headers: bytes, says: bool) -> None:
    def refuse(head: bytes, writer: asyncio.StreamWriter) -> None:
        body = b'{"error": {"code": "queue_full"}}'
        writer.write(b"HTTP/1.1 503 No\r\n%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body))

    async with serving(refuse) as port:
        assert is_retryable((await asked(port)).answer()) is says


async def test_an_error_event_that_does_not_say_when_to_try_again_is_told_apart() -> None:
    def broken(head: bytes, writer: asyncio.StreamWriter) -> None:
        error = b'data: {"error": {"code": "request_lost"}}\n\n'
        writer.write(HEAD + chunk(token(1, " bada") + error) + b"0\r\n\r\n")

    async with serving(broken) as port:
        assert not is_retryable((await asked(port)).answer())


async def test_only_this_machine_is_ever_loaded() -> None:
    with pytest.raises(ValueError, match="loopback"):
        await run_streams(Target("example.com", 80, "k"), [Ask("x", 1)], [StreamLog()], limit_s=1)
