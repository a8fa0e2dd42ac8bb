"""What this machine's model cache holds, told to control, and served to siblings where the machine has an address.

Run by the agent beside its other loops. Without CORRAL_MODEL_SHARE nothing is served and only the digests are told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import msgspec

from workers.agent.imds import Metadata, MetadataError
from workers.config import AgentConfig
from workers.contract import ModelShelf
from workers.keys import MachineKeys
from workers.modelcache.resident import is_resident
from workers.modelcache.share import Share
from workers.modelcache.store import ModelStore
from workers.redis_client import Client

log = logging.getLogger(__name__)

TELL_S: Final = 2.0
LIFE_MS: Final = 15_000  # of what was told: who asks later asks in vain, and fetches elsewhere
MAX_TOLD: Final = 256
RESIDENT_S: Final = 10.0  # between two looks at the page cache: some milliseconds per version
_AGAIN_S: Final = 30.0

_json = msgspec.json.Encoder()


class Shelf:
    """`await run()`; ends with its task."""

    def __init__(self, config: AgentConfig, client: Client, keys: MachineKeys) -> None:
        self._config, self._client, self._keys = config, client, keys
        self._store = ModelStore(config.model_cache, budget_bytes=config.model_cache_bytes)
        self._resident: list[str] = []
        self._look_again_s = 0.0

    async def run(self) -> None:
        """A share that cannot be had is no reason to fail: siblings fetch elsewhere. It is tried again."""
        share: Share | None = None
        loop = asyncio.get_running_loop()
        try_at_s = loop.time()
        try:
            while True:
                if share is None and self._config.model_share is not None and loop.time() >= try_at_s:
                    try_at_s = loop.time() + _AGAIN_S
                    share = await asyncio.to_thread(self._open, *self._config.model_share)
                digests, free, resident = await asyncio.to_thread(self._look)
                shelf = ModelShelf(
                    digests=tuple(digests),
                    url="" if share is None else share.url,
                    key=b"" if share is None else share.key,
                    free_bytes=free,
                    resident=tuple(resident),
                )
                self._client.fire("SET", self._keys.models, _json.encode(shelf), "PX", LIFE_MS)
                await asyncio.sleep(TELL_S)
        finally:
            if share is not None:
                share.close()

    def _look(self) -> tuple[list[str], int, list[str]]:
        digests = self._store.digests()[:MAX_TOLD]
        now_s = time.monotonic()
        if now_s >= self._look_again_s:
            self._look_again_s = now_s + RESIDENT_S
            self._resident = [digest for digest in digests if is_resident(self._store.path(digest))]
        return digests, self._store.free_bytes(), [d for d in self._resident if d in digests]

    def _open(self, host: str, port: int) -> Share | None:
        try:
            share = Share(self._store, Metadata().address() if host == "imds" else host, port)
        except (OSError, MetadataError) as error:
            log.warning("model versions are not shared with siblings: %s", error)
            return None
        share.start()
        log.info("model versions are shared at %s", share.url)
        return share
