"""What a loop pass has for the cell, in one script call: settlements and admissions; requests of one tenant share its
counters, those for one replica its slots.

Used by dispatch.py and ends.py. A script call costs Redis some 20 µs before it does anything, and counters are read and
written once per call; so what comes together leaves together. No client waits for company: a batch leaves at the end of
the loop pass it began in. Only a settlement that nobody can miss waits a moment for the next admission. Never logs
arguments.
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
# A longer body goes by itself and is renamed: Lua would copy it.
MAX_SCRIPT_BODY: Final = 4096
# How long a settlement waits for company, where the cell said that there is room (pass.lua), and only while admissions
# follow each other so closely that it will probably come: waiting in vain costs this process a wake-up, some 25 us,
# going alone costs Redis and the wire some 80. At 200 admissions a second two of three waits end in company.
COMPANY_S: Final = 0.005
FREQUENT_S: Final = 0.008

_encode: Final = msgspec.msgpack.Encoder().encode
_SETTLEMENT_FIELDS: Final = 5
_ROOM: Final = ord("1")


# The answer of admit.lua, and whether its settlement may be a moment late.
Answer = asyncio.Future[tuple[list[Any], bool]]


class Passes:
    """Calls of pass.lua. Belongs to one event loop."""

    def __init__(self, redis: Client, prefix: str) -> None:
        self.n_faults = 0
        self._redis = redis
        self._prefix = prefix
        self._admissions: list[tuple[str, bytes, int, bytes, Answer]] = []
        self._settlements: list[str | int] = []
        self._scheduled = self._waits = False
        self._admitted_at_s = 0.0  # the last pass with an admission, on the loop's clock

    def admit(
        self,
        body_key: str,
        body: bytes,
        body_ms: int,
        args: tuple[str | int | float | list[msgspec.Raw], ...],
    ) -> Answer:
        """Run admit.lua with `args` (all of its arguments) and this body, which lives for `body_ms` if it is long. The
        future gives its answer, or fails as a call of the client does.
        """
        answer: Answer = asyncio.get_running_loop().create_future()
        self._admissions.append((body_key, body, body_ms, _encode(args), answer))
        self._schedule()
        return answer

    def settle(
        self, request: str, n_prompt: int, n_completion: int, cost_nano: int, n_cached: int, *, is_roomy: bool
    ) -> None:
        """Nobody waits for the answer. With `is_roomy` it may leave a moment later."""
        self._settlements += (request, n_prompt, n_completion, cost_nano, n_cached)
        if not is_roomy or len(self._settlements) >= MAX_SETTLEMENTS * _SETTLEMENT_FIELDS:
            self._schedule()
        elif not self._waits and not self._scheduled:
            loop = asyncio.get_running_loop()
            if loop.time() - self._admitted_at_s < FREQUENT_S:
                self._waits = True
                loop.call_later(COMPANY_S, self._company_came_or_not)
            else:
                self._schedule()

    def send(self) -> None:
        """Send what has gathered now."""
        self._scheduled = False
        admissions, self._admissions = self._admissions, []
        settlements, self._settlements = self._settlements, []
        now_ms = time.time_ns() // 1_000_000
        while admissions or settlements:
            some = settlements[: MAX_SETTLEMENTS * _SETTLEMENT_FIELDS]
            together = admissions[:MAX_ADMISSIONS]
            settlements, admissions = settlements[len(some) :], admissions[len(together) :]
            given = _encode((self._prefix, now_ms, RETENTION_MS, *some)) if some else b""
            args: list[bytes | int] = [given, together[0][2] if together else 0]
            for body_key, body, body_ms, packed, _ in together:
                if len(body) > MAX_SCRIPT_BODY:  # one write: the script finds it stored, or deletes it
                    self._redis.fire("SET", body_key, body, "PX", body_ms)
                    body = b""
                args += (packed, body)
            if not together:
                self._redis.fire("EVALSHA", scripts.PASS.sha, 0, *args)
                continue
            call = self._redis.evalsha(scripts.PASS, (), args)
            answers = [answer for *_, answer in together]
            call.add_done_callback(functools.partial(self._hand_out, answers))
            self._admitted_at_s = call.get_loop().time()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.send)

    def _company_came_or_not(self) -> None:
        self._waits = False
        if self._settlements and not self._scheduled:
            self.send()

    def _hand_out(self, waiters: list[Answer], call: asyncio.Future[Any]) -> None:
        """Give each its own answer, or all of them the call's failure. A settlement that failed is intake's to make
        up for."""
        error: BaseException | None = asyncio.CancelledError() if call.cancelled() else call.exception()
        if error is not None:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(error)
            return
        faults, rooms, *answers = call.result()
        if faults:
            self.n_faults += 1
            if self.n_faults == 1:
                log.error("settlements failed: %s; further ones are counted only", _text(faults))
        for waiter, room, answer in zip(waiters, rooms, answers, strict=True):
            if waiter.done():
                continue  # its handler was cancelled
            if answer[0] == b"error":
                log.error("an admission failed: %s", _text(answer[1]))
                waiter.set_exception(ResponseError(_text(answer[1])))
            else:
                waiter.set_result((answer, room == _ROOM))


def _text(raw: bytes) -> str:
    return raw[:200].decode("utf-8", "replace")
