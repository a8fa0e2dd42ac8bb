"""Usage of replicas that are gone: the agent owns their spools until intake has booked all of it."""

from __future__ import annotations

import logging
from collections.abc import Container
from typing import Final

from workers.accounting import Accounting
from workers.config import MachineDirs, ServeTuning
from workers.keys import MachineKeys
from workers.redis_client import Client
from workers.spool import Spool, SpoolBusy

log = logging.getLogger(__name__)

_MAX_OPEN: Final = 64


class DeadSpools:
    """Call `tick` once a second with the replicas that may still own their file."""

    def __init__(self, dirs: MachineDirs, client: Client, keys: MachineKeys, tuning: ServeTuning) -> None:
        self._dirs = dirs
        self._client = client
        self._keys = keys
        self._tuning = tuning
        self._open: dict[str, tuple[Spool, Accounting]] = {}

    async def tick(self, alive: Container[str]) -> None:
        """Adopt what has no owner, read acknowledgements, announce again, delete what is booked."""
        self._adopt(alive)
        for replica, (spool, accounting) in list(self._open.items()):
            await accounting.tick()
            if not len(spool):
                spool.close(delete_if_empty=True)
                del self._open[replica]
                self._client.fire("DEL", self._keys.ack(replica))

    def close(self) -> None:
        for spool, _ in self._open.values():
            spool.close()
        self._open.clear()

    def _adopt(self, alive: Container[str]) -> None:
        for path in sorted(self._dirs.spool.glob("*.spool")):
            replica = path.stem
            if replica in alive or replica in self._open or len(self._open) >= _MAX_OPEN:
                continue
            try:
                spool = Spool(
                    path,
                    max_bytes=self._tuning.spool_max_bytes,
                    republish_after_s=self._tuning.republish_after_s,
                    republish_max_s=self._tuning.republish_max_s,
                )
            except SpoolBusy:
                continue  # its front is ending just now
            except OSError as error:
                log.error("spool unreadable: %s", error, extra={"replica": replica})
                continue
            if len(spool):
                log.info("usage of a gone replica: %d records", len(spool), extra={"replica": replica})
            self._open[replica] = (
                spool,
                Accounting(spool, self._client, self._keys, replica, self._tuning),
            )
