"""A replica's side of leases: claim an attempt, and let go of it unharmed.

Called by serve.py on the engine loop. Claims of one loop pass leave in one call. Waits out a Redis that is away; a
lost answer never strands a request.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Any, Final

import msgspec

from workers.config import FrontConfig
from workers.contract import ClaimVerdict
from workers.redis_client import Client, RedisError, RedisUnavailable, ResponseError
from workers.scripts import CLAIM, RELEASE

_RETRY_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8)
_MAX_TOGETHER: Final = 64  # claims of one call: bounds what it costs Redis (some 5 µs each)


_Asked = tuple[str, int, asyncio.Future[list[Any]]]  # request, epoch, who waits for the answer


class Claim(msgspec.Struct, frozen=True):
    """The claim script's answer. `n_done` tokens exist from earlier attempts, `hold` more may be produced;
    `entries` is the journal (empty for a cancelled claim)."""

    verdict: ClaimVerdict
    body: bytes = b""
    gateway: str = ""
    stream: int = 0
    n_done: int = 0
    hold: int = 0
    n_attempt: int = 1
    entries: tuple[bytes, ...] = ()


class Leases:
    """Leases of one replica."""

    def __init__(self, config: FrontConfig, client: Client) -> None:
        self._keys = config.keys
        self._replica = config.replica
        self._max_refusals = config.tuning.max_refusals
        self._client = client
        self._asked: list[_Asked] = []

    async def claim(self, request_id: str, epoch: int) -> Claim:
        """Ask until Redis answers (bounded by the replica's life: a stop cancels it). A claimed attempt comes with
        its body, unless that is gone. ResponseError when Redis keeps refusing the script."""
        maybe_ours, n_failures, n_refusals = False, 0, 0
        while True:
            try:
                claim = _claim_of(await self._ask(request_id, epoch))
                if claim.verdict is ClaimVerdict.HELD and maybe_ours:
                    # The answer to our own claim was lost; nobody else consumes this replica's queue.
                    await self._client.evalsha(RELEASE, (), (self._keys.prefix, request_id, epoch))
                    maybe_ours = False
                    continue
                if claim.verdict is ClaimVerdict.CANCELLED:
                    body = await self._retried("GET", self._keys.body(request_id)) or b""
                    return msgspec.structs.replace(claim, body=body)
                return claim
            except RedisUnavailable as error:
                maybe_ours = maybe_ours or error.maybe_applied
            except ResponseError:
                n_refusals += 1
                if n_refusals >= self._max_refusals:
                    raise
            await asyncio.sleep(_RETRY_S[min(n_failures, len(_RETRY_S) - 1)])
            n_failures += 1

    def _ask(self, request_id: str, epoch: int) -> asyncio.Future[list[Any]]:
        """The script's answer for one attempt; all that are asked for in a loop pass leave in one call."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._send)
        waiter: asyncio.Future[list[Any]] = loop.create_future()
        self._asked.append((request_id, epoch, waiter))
        return waiter

    def _send(self) -> None:
        asked = [each for each in self._asked if not each[2].done()]  # not cancelled before it was sent
        self._asked = []
        for start in range(0, len(asked), _MAX_TOGETHER):
            together = asked[start : start + _MAX_TOGETHER]
            (request_id, epoch, _), *more = together
            now_ms = time.time_ns() // 1_000_000
            args: list[str | int] = [self._keys.prefix, now_ms, request_id, epoch, self._replica]
            for request_id, epoch, _ in more:
                args += (request_id, epoch)
            reply = self._client.evalsha(CLAIM, (), args)
            reply.add_done_callback(partial(self._hand_out, together))

    def _hand_out(self, together: list[_Asked], reply: asyncio.Future[Any]) -> None:
        """Give each of a call's claims its own answer, or all of them the call's failure."""
        error = asyncio.CancelledError() if reply.cancelled() else reply.exception()
        if error is not None:
            for _, _, waiter in together:
                if not waiter.done():
                    waiter.set_exception(error)
            return
        answers = [reply.result()] if len(together) == 1 else reply.result()
        for (request_id, epoch, waiter), answer in zip(together, answers, strict=True):
            if not waiter.done():
                waiter.set_result(answer)
            elif len(answer) > 1:  # claimed for an attempt that was cancelled meanwhile: nobody serves it
                self._client.fire("EVALSHA", RELEASE.sha, 0, self._keys.prefix, request_id, epoch)

    async def release(self, request_id: str, epoch: int) -> bool:
        """Unclaim; True when it was ours. It can then be claimed again, and a withdrawal counts no death."""
        answer = await self._retried("EVALSHA", RELEASE.sha, 0, self._keys.prefix, request_id, epoch)
        return int(answer or 0) == 1

    async def reader(self, request_id: str, epoch: int) -> tuple[str, int] | None:
        """Gateway and stream that an attempt's output goes to; None when the lease is another's, or cannot be read.

        The mark is cleared first, so that a change after the reading sets it again.
        """
        lease = self._keys.lease(request_id)
        if await self._retried("HDEL", lease, "moved") is None:
            return None
        found = await self._retried("HMGET", lease, "epoch", "gw", "stream")
        if found is None or found[0] is None or int(found[0]) != epoch:
            return None
        return found[1].decode(), int(found[2])

    async def _retried(self, *command: str | int) -> Any:
        """An idempotent command, tried until the patience of `_RETRY_S` ends; None then."""
        for wait_s in _RETRY_S:
            try:
                return await self._client.call(*command)
            except RedisError:
                await asyncio.sleep(wait_s)
        return None


def _claim_of(reply: list[Any]) -> Claim:
    verdict = ClaimVerdict(reply[0].decode())
    if len(reply) == 1:
        return Claim(verdict)
    _, body, gateway, stream, n_done, hold, n_attempt = reply[:7]
    return Claim(
        verdict, body, gateway.decode(), int(stream), int(n_done), int(hold), int(n_attempt), tuple(reply[7:])
    )
