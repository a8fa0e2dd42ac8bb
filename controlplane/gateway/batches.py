"""Admissions and settlements of one loop pass, each in one script call: requests of one tenant share its counters.

Used by dispatch.py and ends.py. A script call costs Redis some 15 µs before it does anything, and a tenant's counters
are read and written once per call; so what comes together leaves together. Nothing waits for company: a batch leaves
at the end of the loop pass it began in. Never logs arguments.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from typing import Any, Final

import msgspec

from workers import scripts
from workers.keys import RETENTION_MS
from workers.redis_client import Client, ResponseError

log = logging.getLogger(__name__)

# Of one call: bounds how long Redis is kept from others (some 60 µs and 40 µs each).
MAX_ADMISSIONS: Final = 32
MAX_SETTLEMENTS: Final = 64

_encode: Final = msgspec.msgpack.Encoder().encode
_Admission = tuple[str, bytes, int, bytes, asyncio.Future[list[Any]]]


class Admissions:
    """Calls of admit.lua. Belongs to one event loop."""

    def __init__(self, redis: Client) -> None:
        self._redis = redis
        self._waiting: list[_Admission] = []

    def submit(
        self,
        body_key: str,
        body: bytes,
        body_ms: int,
        args: tuple[str | int | float | list[msgspec.Raw], ...],
    ) -> asyncio.Future[list[Any]]:
        """Store the body for `body_ms`, and run the script with `args` (all of its arguments). The future gives its
        answer, or fails as a call of the client does.
        """
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._send)
        answer: asyncio.Future[list[Any]] = loop.create_future()
        self._waiting.append((body_key, body, body_ms, _encode(args), answer))
        return answer

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), MAX_ADMISSIONS):
            together = waiting[start : start + MAX_ADMISSIONS]
            # One write: the script reads the bodies that the commands before it stored, or deletes them.
            for body_key, body, body_ms, _, _ in together:
                self._redis.fire("SET", body_key, body, "PX", body_ms)
            call = self._redis.evalsha(scripts.ADMIT_SEVERAL, (), [args for _, _, _, args, _ in together])
            answers = [answer for _, _, _, _, answer in together]
            call.add_done_callback(functools.partial(_hand_out, answers))


class Settlements:
    """Calls of settle.lua; nobody waits for their answers. Belongs to one event loop."""

    def __init__(self, redis: Client, prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._waiting: list[str | int] = []

    def submit(self, request: str, n_prompt: int, n_completion: int, cost_nano: int, n_cached: int) -> None:
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.send)
        self._waiting += (request, n_prompt, n_completion, cost_nano, n_cached)

    def send(self) -> None:
        """Send what has gathered now."""
        waiting, self._waiting = self._waiting, []
        now_ms = time.time_ns() // 1_000_000
        for start in range(0, len(waiting), 5 * MAX_SETTLEMENTS):
            part = waiting[start : start + 5 * MAX_SETTLEMENTS]
            self._redis.fire(
                "EVALSHA", scripts.SETTLE_SEVERAL.sha, 0, self._prefix, now_ms, RETENTION_MS, *part
            )


def _hand_out(waiters: list[asyncio.Future[list[Any]]], call: asyncio.Future[Any]) -> None:
    """Give each its own answer, or all of them the call's failure."""
    error: BaseException | None = asyncio.CancelledError() if call.cancelled() else call.exception()
    for i, waiter in enumerate(waiters):
        if waiter.done():
            continue  # its handler was cancelled
        if error is not None:
            waiter.set_exception(error)
            continue
        answer = call.result()[i]
        if answer[0] == b"error":
            log.error("an admission failed: %s", answer[1][:200].decode("utf-8", "replace"))
            waiter.set_exception(ResponseError(answer[1].decode("utf-8", "replace")))
        else:
            waiter.set_result(answer)
