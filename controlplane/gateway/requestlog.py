"""One JSON line per finished request, with ids, counts and times; never text, never a key.

Called by the generation handler. A line costs some microseconds: it is encoded from a struct, kept in a
bounded buffer and written a few times a second, so that a slow pipe never holds up a stream; what does not
fit is counted.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

import msgspec

_FLUSH_S: Final = 0.25
_MAX_LINES: Final = 20_000


class RequestLine(msgspec.Struct, omit_defaults=True, gc=False):
    """A finished request. Ids carry their prefixes; times are milliseconds."""

    timestamp: str
    event: str
    level: str
    gateway: str
    request: str
    endpoint: str
    status: int
    code: str = ""
    organization: str = ""
    project: str = ""
    key: str = ""
    deployment: str = ""
    replica: str = ""
    model: str = ""
    stream: bool = False
    resumes: str = ""  # the request whose client came back with this call
    finish: str = ""
    n_prompt: int = 0
    n_cached: int = 0
    n_completion: int = 0
    attempts: int = 0
    ttft_ms: int | None = None
    duration_ms: int = 0


class RequestLog:
    """Buffered writer on a file descriptor (standard error)."""

    def __init__(self, sample: float = 1.0, fd: int | None = None, rng: random.Random | None = None) -> None:
        self.n_dropped = 0
        self._sample = sample
        self._fd = sys.stderr.fileno() if fd is None else fd
        self._rng = rng or random.Random()
        self._lines: list[bytes] = []
        self._encode = msgspec.json.Encoder().encode
        self._task: asyncio.Task[None] | None = None

    def wants(self, status: int) -> bool:
        """Whether a request with this outcome gets a line: failures of ours always do."""
        return self._sample >= 1 or status >= 500 or self._rng.random() < self._sample

    def write(self, line: RequestLine) -> None:
        if len(self._lines) >= _MAX_LINES:
            self.n_dropped += 1
            return
        self._lines.append(self._encode(line))
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._flush_soon())

    async def close(self) -> None:
        """Write what is left."""
        if self._task is not None:
            await self._task
        await asyncio.to_thread(self._write_out)

    async def _flush_soon(self) -> None:
        await asyncio.sleep(_FLUSH_S)
        try:
            await asyncio.to_thread(self._write_out)  # may block for as long as the reader of the pipe likes
        finally:
            self._task = None

    def _write_out(self) -> None:
        lines, self._lines = self._lines, []
        if not lines:
            return
        data = memoryview(b"\n".join([*lines, b""]))
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # the reader has gone: lines are lost, requests are not
            self.n_dropped += len(lines)


def timestamp(at_ms: int) -> str:
    """ISO 8601 in UTC, as the other processes write it."""
    second, ms = divmod(at_ms, 1000)
    return f"{_second_text(second)}.{ms:03d}Z"


@lru_cache(maxsize=4)
def _second_text(second: int) -> str:
    return datetime.fromtimestamp(second, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S")
