"""LoRA adapters on this machine's disk: fetched when they are announced, before anybody asks; removed when retired.

Run by the agent beside its replicas. A replica fetches what it needs by itself (workers/adapters.py), through the same
store and under the same lock, so this is only ever earlier. It evicts nothing to make room: what may never be asked for
is worth less than whatever is there.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

import msgspec

from workers.config import AgentConfig
from workers.contract import AdapterSpec
from workers.keys import MachineKeys
from workers.modelcache.adapter import ARCHITECTURE
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.redis_client import Client, RedisError

log = logging.getLogger(__name__)

_AT_ONCE: Final = 4  # of one tick, one after the other
_decode = msgspec.json.Decoder(AdapterSpec).decode


class AdapterFiles:
    """Belongs to the agent's loop; the disk is touched in threads."""

    def __init__(self, config: AgentConfig, client: Client, keys: MachineKeys) -> None:
        self.n_fetched = self.n_removed = 0
        self._client, self._key = client, keys.adapters
        self._root, self._budget = config.model_cache, config.model_cache_bytes
        # A cache that machines of one host share is the control plane's, too: what is retired there leaves it later.
        self._is_own = config.model_cache.is_relative_to(config.var_dir)
        self._store: ModelStore | None = None
        self._seen: list[bytes] = []
        self._done = True
        self._failed: set[str] = set()  # digests that did not come: whoever asks for one tries again

    async def tick(self) -> None:
        """What is announced and not here comes, a few at a time; what is here and announced no more goes."""
        try:
            flat: list[bytes] = await self._client.call("HGETALL", self._key)
        except RedisError:
            return
        if flat == self._seen and self._done:  # also where nobody ever spoke of adapters: nothing is removed
            return
        if self._store is None:
            self._store = await asyncio.to_thread(ModelStore, self._root, budget_bytes=self._budget)
        self._seen, specs = flat, _specs(flat)
        self._done = await asyncio.to_thread(self._settle, self._store, specs)

    def _settle(self, store: ModelStore, specs: list[AdapterSpec]) -> bool:
        """Whether nothing is left to do until the next announcement: all is here, and what is retired is gone."""
        wanted = {spec.digest for spec in specs}
        self._failed &= wanted
        missing = [s for s in specs if s.digest not in self._failed and not store.has(s.digest)]
        for spec in missing[:_AT_ONCE]:
            try:
                if not store.has_room(spec.n_bytes):
                    self._failed.add(spec.digest)
                    continue
                store.ensure(spec.digest, spec.source, None, spec.urls or None)
                self.n_fetched += 1
            except (ModelStoreError, ValueError, OSError) as error:
                self._failed.add(spec.digest)
                log.warning(
                    "an adapter was not fetched ahead: %s", getattr(error, "code", type(error).__name__)
                )
        n_in_use = 0
        for held in store.held() if self._is_own else ():
            if held.digest in wanted:
                continue
            with suppress(ModelStoreError):  # a fetch that made room was here first
                if store.manifest(held.digest).architecture != ARCHITECTURE:
                    continue
                is_gone = store.evict(held.digest)
                self.n_removed += is_gone
                n_in_use += not is_gone
        return len(missing) <= _AT_ONCE and not n_in_use


def _specs(flat: list[bytes]) -> list[AdapterSpec]:
    found = []
    for payload in flat[1::2]:
        try:
            found.append(_decode(payload))
        except msgspec.DecodeError:
            continue  # of a newer control: a replica that is asked for it says so
    return found
