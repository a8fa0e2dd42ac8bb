"""Requests that nobody will serve, or that must be bound again: after deaths, losses and lost gateways."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from autoscaler.cell.connection import Connection
from workers.contract import Notice, WireError, decode_error
from workers.contract import encode as encode_wire
from workers.keys import RETENTION_MS, MachineKeys
from workers.scripts import SETTLE, WITHDRAW

DEATHS_ALLOWED = 1  # a request that killed two replicas is poison
MAX_FAILED = 256  # requests given up, told a call
MAX_MESSAGES_SEEN = 2048  # of a replica's queue; its slots bound what lies there
MAX_LOST = 512  # a call
# What waits for a gateway that is gone is kept for as long as its client may come back for it.
ABANDONED_AFTER_MS = RETENTION_MS
MAX_ABANDONED = 64  # of a band, a look
N_BANDS, BAND_SPAN = 4, 10**13  # as in lua/lib_flows.lua

ABANDONED = WireError(status=504, code="timeout", message="the request waited too long for a free replica")
POISON = WireError(
    status=500,
    code="request_poison",
    message="this request ended every replica that tried to serve it and is not tried again",
)


class GivingUp(Connection):
    """All of it may be repeated."""

    def finish_failed(self) -> int:
        """Tell the gateways of requests that were given up, settle those at nothing; how many there were.

        Whoever gave them up may have died before. Bounded; safe to repeat: a request leaves the set last.
        """
        failed = cast(list[bytes], self.redis.srandmember(self.keys.failed, MAX_FAILED))
        for request in (raw.decode() for raw in failed):
            fields = self.redis.hmget(self.keys.request(request), "gw", "error")
            gateway, error = cast(list[bytes | None], fields)
            if gateway is not None and error:
                notice = encode_wire(Notice(request=request, error=decode_error(error)))
                self.redis.publish(self.keys.notice_channel(gateway.decode()), notice)
            self._run(SETTLE, request, 0, 0, 0, RETENTION_MS, 0)
            self.redis.srem(self.keys.failed, request)
        return len(failed)

    def abandoned(self, deployment: str, now_ms: int) -> set[str]:
        """Requests that have waited for `ABANDONED_AFTER_MS` for a gateway that nobody hears any more.

        A live gateway ends its own in time. Three round trips at most.
        """
        queue, before_ms = self.keys.queue(deployment), now_ms - ABANDONED_AFTER_MS
        pipeline = self.redis.pipeline(transaction=False)
        for band in range(-1, N_BANDS):  # -1: those that ran before
            least = band * BAND_SPAN
            pipeline.zrangebyscore(queue, least, least + before_ms, start=0, num=MAX_ABANDONED)
        old = [request.decode() for found in pipeline.execute() for request in found]
        for request in old:
            pipeline.hget(self.keys.request(request), "gw")
        gateway_of = {r: gw.decode() for r, gw in zip(old, pipeline.execute(), strict=True) if gw is not None}
        channels = sorted({self.keys.notice_channel(gateway) for gateway in gateway_of.values()})
        if not channels:
            return set()
        n_heard = {channel.decode(): n for channel, n in cast(Any, self.redis).pubsub_numsub(*channels)}
        return {r for r, gateway in gateway_of.items() if not n_heard.get(self.keys.notice_channel(gateway))}

    def give_up(self, requests: Iterable[str], error: WireError) -> None:
        """Nobody will serve them: their gateways are told `error`, and they are settled at nothing."""
        pipeline = self.redis.pipeline(transaction=True)
        for request in requests:
            pipeline.hset(self.keys.request(request), "error", encode_wire(error))
            pipeline.sadd(self.keys.failed, request)
        pipeline.execute()
        self.finish_failed()

    def bind_again(self, replica: str, machine: str, requests: Sequence[str]) -> int:
        """Requests bound to a live replica that never got to it go back to the queue; how many did.

        Those whose message still lies in the replica's queue are left alone. Safe to repeat.
        """
        queue = self._machine(machine).prefix + MachineKeys.queue_name(replica)
        messages = cast(list[bytes], self.redis.lrange(queue, 0, MAX_MESSAGES_SEEN - 1))
        lost = [r for r in requests if not any(r.encode() in message for message in messages)]
        if not lost:
            return 0
        return self._withdraw(replica, "lost", *lost[:MAX_LOST])[0]

    def _withdraw(self, replica: str, mode: str, *requests: str) -> tuple[int, int, int]:
        """(put back into the queue, still bound to the replica, given up)."""
        answer = self._run(WITHDRAW, replica, mode, DEATHS_ALLOWED, encode_wire(POISON), *requests)
        n_requeued, n_left, n_given_up = cast(list[int], answer)
        return n_requeued, n_left, n_given_up
