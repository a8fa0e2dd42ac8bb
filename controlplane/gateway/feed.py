"""Follows the change notes in Postgres, so that a cached key is dropped even where the announcement on Redis
was lost.

Started once per gateway. One small query every half second; it is also what notices that Postgres went or
came back.
"""

from __future__ import annotations

import asyncio
import contextlib

from controlplane.gateway.auth import KeyCache
from controlplane.gateway.directory import DirectoryUnavailable, KeyDirectory


class ChangeFeed:
    """Polls `changes` and invalidates the key cache accordingly."""

    def __init__(self, directory: KeyDirectory, keys: KeyCache, *, poll_s: float) -> None:
        self._directory = directory
        self._keys = keys
        self._poll_s = poll_s
        self._watermark: str | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="change-feed")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def poll(self) -> None:
        """One look. DirectoryUnavailable leaves the watermark, so that nothing is missed."""
        seen = await self._directory.changes(self._watermark)
        self._watermark = seen.watermark
        if seen.reset:
            self._keys.doubt_all()
        for ref in seen.changes:
            self._keys.invalidate(ref)

    async def _follow(self) -> None:
        while True:
            with contextlib.suppress(DirectoryUnavailable):
                await self.poll()
            await asyncio.sleep(self._poll_s)
