"""The load generator against a small server: counts, and tokens as the answers tell them."""

from __future__ import annotations

import asyncio
import contextlib
import io

import pytest

from benchmarks import loadgen
from benchmarks.loadgen import Plan, Tally


@pytest.mark.parametrize("cut", [1, 7, 100, 10_000])
def test_tokens_are_counted_however_the_answer_is_cut(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    events = "".join(
        f'data: {{"choices":[{{"delta":{{"content":"{n}"}}}}],"usage":null}}\n\n' for n in range(30)
    )
    events += 'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":30}}\n\ndata: [DONE]\n\n'
    tally = asyncio.run(_against(f"{len(events):x}\r\n{events}\r\n0\r\n\r\n".encode(), cut))
    assert (tally.statuses, tally.n_tokens, tally.errors) == ({"200": 3}, 90, [])
    assert len(tally.first_text_ms) == 3
    if cut == 10_000:
        assert tally.n_events == 3 * 32


def test_what_the_first_refusals_said_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    raw = b"HTTP/1.1 503 no\r\ncontent-length: 9\r\n\r\nbusy, why"
    tally = asyncio.run(_sent(raw, 10_000, n_requests=9))
    assert tally.statuses == {"503": 9}
    assert tally.refusals == ["503 busy, why"] * 5


async def _against(body: bytes, cut: int) -> Tally:
    return await _sent(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body, cut, n_requests=3)


async def _sent(raw: bytes, cut: int, n_requests: int) -> Tally:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):  # the client has gone
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                for at in range(0, len(raw), cut):
                    writer.write(raw[at : at + cut])
                    await asyncio.sleep(0)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    plan = Plan("127.0.0.1", port, "/", {}, ["{}"], n_connections=1, n_requests=n_requests, limit_s=10)
    try:
        return await loadgen.run(plan)
    finally:
        server.close()
