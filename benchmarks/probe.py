"""One keep-alive HTTP/1.1 connection, for the benchmarks that time single answers. Loopback only."""

from __future__ import annotations

import asyncio
import re
import time

_LENGTH = re.compile(rb"content-length: (\d+)", re.I)
_NAME = re.compile(rb'gateway="([^"]+)"')
_MAX_TRIES = 64
TIMEOUT_S = 30.0


class Probe:
    """Use as `probe = await Probe.open(port)`; requests one after another."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Probe:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(
        self, path: str, key: str | None = None, method: str = "GET", body: bytes = b""
    ) -> tuple[int, bytes]:
        """(status, body)."""
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n"
        if body:
            head += "content-type: application/json\r\n"
        if key is not None:
            head += f"authorization: Bearer {key}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)
        async with asyncio.timeout(TIMEOUT_S):
            head_bytes = await self._reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head_bytes)
            if length is not None:
                answer = await self._reader.readexactly(int(length[1]))
            else:
                answer = await self._chunks() if b"chunked" in head_bytes.lower() else b""
        return int(head_bytes[9:12]), answer

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            parts.append(await self._reader.readexactly(size))
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)
        return b"".join(parts)

    async def timed(self, path: str, key: str) -> tuple[int, float]:
        """(status, microseconds)."""
        started = time.perf_counter_ns()
        status, _ = await self.ask(path, key)
        return status, (time.perf_counter_ns() - started) / 1000

    def close(self) -> None:
        self._writer.close()


async def one_for_each_gateway(port: int, n: int) -> dict[str, Probe]:
    """A connection to each of the processes that share the port, by name: the kernel deals connections out."""
    found: dict[str, Probe] = {}
    for _ in range(_MAX_TRIES):
        probe = await Probe.open(port)
        _, text = await probe.ask("/metrics")
        name = _NAME.search(text)
        if name is None or name[1].decode() in found:
            probe.close()
        else:
            found[name[1].decode()] = probe
        if len(found) == n:
            return found
    raise RuntimeError(f"found {len(found)} of {n} gateways behind port {port}")
