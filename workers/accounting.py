"""Keeps the promise of the spool: usage stays on disk until booked, and is announced again when it may be
lost.

The front runs it for its own spool, the machine's agent for the spools of dead replicas. One `tick` reads the
acknowledgements that intake left, and announces again what has waited too long. It must never announce an end
that Redis may have refused: that request ends elsewhere and would be billed twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from workers.config import ServeTuning
from workers.contract import USAGE_FIELD, WITNESS_FIELD, WITNESS_SPOOL
from workers.keys import MachineKeys
from workers.redis_client import Client, RedisError
from workers.spool import Record, Spool

log = logging.getLogger(__name__)

_ACKS_PER_CALL: Final = 1000
_CALLS_PER_TICK: Final = 10
_SYNC_S: Final = 0.1  # at most so much usage can vanish with the machine, and then Redis still has it


class Accounting:
    """The spool of one replica and its two correspondents: the acknowledgement list and the usage stream."""

    def __init__(
        self, spool: Spool, client: Client, keys: MachineKeys, replica_id: str, tuning: ServeTuning
    ) -> None:
        self._spool = spool
        self._client = client
        self._keys = keys
        self._replica = replica_id
        self._tuning = tuning
        self.n_acked = self.n_announced = 0
        self._n_disconnects = client.n_disconnects

    async def tick(self) -> None:
        """Once per beat. Errors of Redis end the tick; the next one tries again.

        After a disconnect everything is announced again at once (bounded per beat): it may be another Redis, or
        an empty one.
        """
        self._spool.repair()
        if self._client.connected and self._n_disconnects != self._client.n_disconnects:
            self._n_disconnects = self._client.n_disconnects
            self._spool.hasten()
        with contextlib.suppress(RedisError):
            await self._read_acks()
            for record in self._spool.due(self._tuning.republish_per_beat):
                await self._announce(record)

    async def tick_forever(self) -> None:
        """Tick once per beat until cancelled."""
        while True:
            await asyncio.sleep(self._tuning.beat_s)
            await self.tick()

    async def sync_forever(self) -> None:
        """Write out what no flush waits for, and fsync off the loop, a tenth of a second after there is something: an
        idle replica is not woken."""
        news = asyncio.Event()
        self._spool.on_news = news.set
        news.set()  # what came before
        while True:
            await news.wait()
            await asyncio.sleep(_SYNC_S)
            news.clear()
            self._spool.write_out()
            if not self._spool.dirty:
                continue
            try:
                await asyncio.to_thread(self._spool.sync)
            except OSError as error:
                log.error("spool: fsync failed: %s", error, extra={"replica": self._replica})

    async def _read_acks(self) -> None:
        for _ in range(_CALLS_PER_TICK):
            acked = await self._client.call("LPOP", self._keys.ack(self._replica), _ACKS_PER_CALL)
            if not acked:
                return
            self.n_acked += self._spool.forget(request_id.decode() for request_id in acked)
            if len(acked) < _ACKS_PER_CALL:
                return

    async def _announce(self, record: Record) -> None:
        if not record.confirmed and not await self._was_accepted(record):
            return
        bound = self._tuning.usage_stream_max
        fields = (USAGE_FIELD, record.event, WITNESS_FIELD, WITNESS_SPOOL)
        await self._client.call("XADD", self._keys.usage, "MAXLEN", "~", bound, "*", *fields)
        self.n_announced += 1

    async def _was_accepted(self, record: Record) -> bool:
        """An end whose flush was never answered: the lease knows.

        Done under our epoch: it was accepted. Claimed or unclaimed: not yet, the reaper decides. Another
        epoch or no lease: the request was moved away and ends elsewhere (if Redis lost everything at that
        very moment, one request goes unbilled: the harmless side).
        """
        lease = self._keys.lease(record.request_id)
        epoch, state = await self._client.call("HMGET", lease, "epoch", "state")
        if epoch is not None and int(epoch) == record.epoch:
            if state == b"done":
                self._spool.confirm(record.request_id)
                return True
            return False
        self._spool.forget((record.request_id,))
        return False
