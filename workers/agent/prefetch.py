"""Fetches model versions that control would like to have here, while nothing else is fetched. Run by the agent.

One at a time and never at another version's expense; what cannot be had is let go, control may ask again. The field of
a version that is here, or was let go, is taken away.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from workers.config import AgentConfig
from workers.contract import PrefetchSpec
from workers.keys import MachineKeys
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.redis_client import Client, RedisError

log = logging.getLogger(__name__)

POLL_S: Final = 2.0
PAUSE_S: Final = 600.0  # after a failure, before the same version is tried again
MAX_FAILED: Final = 64
_decode = msgspec.json.Decoder(PrefetchSpec).decode


class Prefetch:
    """`await run()`; ends with its task, though what is being fetched then goes on until it is there."""

    def __init__(
        self, config: AgentConfig, client: Client, keys: MachineKeys, is_fetching: Callable[[], bool]
    ) -> None:
        """is_fetching: a replica waits for its weights; the link is its."""
        self._client, self._keys, self._is_fetching = client, keys, is_fetching
        self._failed_at_s: dict[str, float] = {}
        self._store = ModelStore(config.model_cache, budget_bytes=config.model_cache_bytes)

    async def run(self) -> None:
        while True:
            try:
                asked = await self._client.call("HGETALL", self._keys.prefetch)
            except RedisError:
                asked = []
            for name, payload in zip(asked[::2], asked[1::2], strict=True):
                if self._is_fetching():
                    break
                await self._one(payload)
                self._client.fire("HDEL", self._keys.prefetch, name)
            await asyncio.sleep(POLL_S)

    async def _one(self, payload: bytes) -> None:
        began_s = time.monotonic()
        try:
            spec = _decode(payload)
            last_s = self._failed_at_s.get(spec.digest, began_s - PAUSE_S)
            if self._store.has(spec.digest) or began_s - last_s < PAUSE_S:
                return
            if len(self._failed_at_s) >= MAX_FAILED:
                self._failed_at_s.clear()
            self._failed_at_s[spec.digest] = began_s
            await asyncio.to_thread(self._fetch, spec)
        except (ModelStoreError, msgspec.MsgspecError, OSError, ValueError) as error:
            log.warning("prefetch: %s", error)
        else:
            del self._failed_at_s[spec.digest]
            log.info("prefetched %s in %.1f s", spec.digest[:12], time.monotonic() - began_s)

    def _fetch(self, spec: PrefetchSpec) -> None:
        self._store.ensure(spec.digest, spec.source, None, spec.urls, spec.siblings, may_evict=False)
