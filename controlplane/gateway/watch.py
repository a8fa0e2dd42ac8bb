"""Once a second over every stream: what would otherwise wait for ever is looked at, told of, or ended.

A stream that hears nothing has its journal checked, a client that waits gets a comment, a request past its
deadline is ended, and when Redis stays away running streams end with a retryable error. Bounded per pass.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError, unavailable
from controlplane.gateway.stream import Stream
from workers.redis_client import Client

log = logging.getLogger(__name__)

_PASS_S: Final = 1.0
_MAX_CHECKS: Final = 256  # journals looked at per pass


class Watch:
    """The periodic pass over a process's streams."""

    def __init__(
        self,
        redis: Client,
        ends: Ends,
        *,
        stall_s: float,
        keepalive_s: float,
        redis_grace_s: float,
    ) -> None:
        self.n_stalls = self.n_timeouts = 0
        self._redis = redis
        self._ends = ends
        self._stall_s = stall_s
        self._keepalive_s = keepalive_s
        self._redis_grace_s = redis_grace_s
        self._redis_seen_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="watch")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        interval_s = min(_PASS_S, self._stall_s / 2)
        while True:
            await asyncio.sleep(interval_s)
            try:
                self.look(time.monotonic())
            except Exception:  # a watch that stopped would let clients hang
                log.exception("watch pass failed")

    def look(self, now: float) -> None:
        """One pass."""
        if self._redis.connected:
            self._redis_seen_at = now
            self._ends.retry_orphans()
        redis_gone = now - self._redis_seen_at > self._redis_grace_s
        self._ends.charge_produced()
        n_checks = 0
        for stream in list(self._ends.inbox.streams.values()):
            if stream.abandoned:
                # That its client left, or was told of a failure, is no end of what runs: that is still to be settled.
                is_over = stream.over if stream.keep else stream.end is not None
                if now >= stream.deadline and not is_over and stream.keep:
                    self.n_timeouts += 1
                    self._ends.give_up(stream)
                elif is_over or now >= stream.deadline:
                    self._ends.inbox.streams.pop(stream.number, None)
            elif stream.over or not stream.admitted:
                continue  # its handler is on it
            elif now >= stream.deadline:
                self.n_timeouts += 1
                stream.keep = False
                stream.fail(_timed_out(stream))
            elif redis_gone:
                stream.fail(
                    unavailable(
                        "cell_unavailable", "the service was interrupted: send the request again", 5.0
                    )
                )
            else:
                if now - stream.wrote_at >= self._keepalive_s:
                    stream.nudge()
                if now - stream.heard_at >= self._stall_s and not stream.paused and n_checks < _MAX_CHECKS:
                    n_checks += 1
                    self.n_stalls += 1
                    stream.heard_at = now  # next look in another stall_s
                    self._ends.inbox.catch_up(stream)


def _timed_out(stream: Stream) -> ApiError:
    waited = stream.machine is None and stream.first_at is None
    what = "waited too long for a free replica" if waited else "took too long"
    return ApiError(504, "timeout", f"the request {what}: try again, or ask for fewer tokens")
