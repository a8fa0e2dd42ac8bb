"""What waits in a stream for its client: bounded in entries, in fewer where each names probabilities."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.gateway.stream import MIN_BUFFER, Stream
from workers.contract import Endpoint


def a_stream(buffer: int) -> Stream:
    nothing: Any = None
    stream = Stream(
        1, "r", Endpoint.CHAT, nothing, nothing, nothing, streaming=True, raw_estimate=0, expected=0,
        now=0.0, now_ms=0, timeout_s=1.0, buffer=buffer,
    )  # fmt: skip
    stream.live_machine = "m1"
    return stream


def n_until_paused(buffer: int, n_alternatives: int | None) -> int:
    stream = a_stream(buffer)
    logprobs: list[object] | None = None
    if n_alternatives is not None:
        logprobs = [["x", -0.1, [["y", -1.0]] * n_alternatives]]
    for n in range(1, buffer + 1):
        stream.accept(1, "x", None, 0.0, logprobs)
        if stream.paused:
            assert stream.live_machine is None
            return n
    raise AssertionError("never paused")


@pytest.mark.parametrize(
    ("buffer", "n_alternatives", "n"),
    [(1024, None, 1024), (1024, 0, 512), (1024, 20, 46), (64, 20, MIN_BUFFER), (8, 0, MIN_BUFFER)],
)
def test_a_client_that_does_not_read_is_kept_a_bounded_amount(
    buffer: int, n_alternatives: int | None, n: int
) -> None:
    assert n_until_paused(buffer, n_alternatives) == n
