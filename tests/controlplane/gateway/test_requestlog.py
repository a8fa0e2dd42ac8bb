"""The request log: whole JSON lines, sampled by outcome, bounded when nobody reads."""

import json
import os
import random

import msgspec

from controlplane.gateway import requestlog
from controlplane.gateway.requestlog import RequestLine, RequestLog, timestamp
from tests.controlplane.gateway.harness import until


def line(status: int = 200) -> RequestLine:
    return RequestLine(
        timestamp=timestamp(1_795_190_478_007), event="request", level="info", gateway="gw", request="req_1",
        endpoint="chat", status=status,
    )  # fmt: skip


async def test_lines_are_json_and_all_are_written() -> None:
    reader, writer = os.pipe()
    log = RequestLog(fd=writer)
    for _ in range(3):
        log.write(line())
    await until(lambda: not log._lines)
    log.write(line(503))
    await log.close()
    os.close(writer)
    with os.fdopen(reader) as pipe:
        rows = [json.loads(row) for row in pipe]
    assert [row["status"] for row in rows] == [200, 200, 200, 503]
    assert rows[0]["timestamp"] == "2026-11-20T16:01:18.007Z"
    assert "organization" not in rows[0], "what does not apply is left out"


async def test_reader_that_left_costs_lines_not_requests() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    log = RequestLog(fd=writer)
    log.write(line())
    await log.close()
    assert log.n_dropped == 1
    os.close(writer)


async def test_buffer_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(requestlog, "_MAX_LINES", 2)
    with open(os.devnull, "wb") as sink:  # noqa: PTH123 - a descriptor is wanted
        log = RequestLog(fd=sink.fileno())
        for _ in range(5):
            log.write(line())
        assert log.n_dropped == 3
        await log.close()


def test_failures_are_always_logged_and_the_rest_by_its_share() -> None:
    never = RequestLog(0.0)
    assert never.wants(500)
    assert not never.wants(200)
    half = RequestLog(0.5, rng=random.Random(1))
    assert 400 < sum(half.wants(200) for _ in range(1000)) < 600


def test_line_has_no_field_for_text() -> None:
    assert not {"prompt", "text", "content", "authorization", "body"} & set(msgspec.structs.asdict(line()))
