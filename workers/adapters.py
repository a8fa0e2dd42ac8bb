"""LoRA adapters of one replica: fetched and loaded when asked for, kept within the engine's limit, waited for.

Between a claimed request that names an adapter and the engine (generate.py). What an adapter is made of stands under
the machine's `adapters`, where only the trusted side writes; its files come through the model cache, verified. An
adapter in use is never put out of memory, so a request may wait for a place. Which of the others goes is decided by
residency.py. A request without an adapter does not come here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from workers.config import FrontConfig
from workers.contract import AdapterSpec
from workers.engine.base import AdapterRefused, Engine
from workers.modelcache.adapter import FILES
from workers.modelcache.store import ModelStore, ModelStoreError
from workers.modelcache.uses import Claim
from workers.redis_client import Client, RedisError
from workers.residency import Popularity, Resident, least_worth

log = logging.getLogger(__name__)

_ASK_AGAIN_S: Final = 0.2  # while the machine was not told of an adapter yet
_LOAD_S: Final = 0.1  # of an adapter never loaded here; measured on CPU: some 0.02 s, plus the fetch
_MAX_WAITING: Final = 4_096  # for a place; more than a replica has slots
_decode = msgspec.json.Decoder(AdapterSpec).decode


class AdapterUnavailable(RuntimeError):  # noqa: N818 - a state of the world, retryable
    """This replica cannot answer with that adapter now; the message is for the client."""


class Adapters:
    """All adapters of one replica; belongs to the engine's loop. `n_loads`: since the start."""

    def __init__(self, config: FrontConfig, engine: Engine, client: Client) -> None:
        self.n_loads = 0
        self._config, self._engine, self._client = config, engine, client
        self.limit = int(str(config.spec.profile.get("max_loras") or 0))
        self._store: ModelStore | None = None
        self._residents: dict[str, Resident] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._claims: dict[str, Claim] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()  # for a place, first come first served
        self._engine_turn = (
            asyncio.Lock()
        )  # first come first served, so an adapter is out before it comes again
        self._popularity = Popularity()

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of those in memory."""
        return tuple(name for name in self._residents if name not in self._loading)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def n_using(self, adapter: str) -> int:
        """Requests that run with it, or wait for its weights."""
        resident = self._residents.get(adapter)
        return 0 if resident is None else resident.n_using - (adapter in self._loading)

    @asynccontextmanager
    async def use(self, adapter: str, deployment: str) -> AsyncGenerator[None]:
        """Within it the adapter is loaded and stays. Raises AdapterUnavailable and EngineDead."""
        if not self.limit:
            raise AdapterUnavailable("this model is served without adapters: set max_loras in its profile")
        self._popularity.note(adapter)
        try:
            async with asyncio.timeout(self._config.tuning.adapter_patience_s):
                resident = await self._resident(adapter, deployment)
        except TimeoutError:
            raise AdapterUnavailable(
                "the adapter could not be loaded in time: all places for adapters are in use or its files did not "
                "come; try again shortly"
            ) from None
        try:
            yield
        finally:
            self._release(resident)

    async def retire(self, known: Iterable[str]) -> None:
        """Put out what is in memory, unused and not among these: it was retired. Raises EngineDead."""
        wanted = set(known)
        for name, resident in list(self._residents.items()):
            if name in wanted or resident.n_using or self._residents.get(name) is not resident:
                continue
            await self._unload(self._evict(resident))
            self._wake()

    async def known(self) -> list[str]:
        """Ids of the adapters that this machine may be asked for. Raises RedisError."""
        return [raw.decode() for raw in await self._client.call("HKEYS", self._config.keys.adapters)]

    # -- places

    async def _resident(self, adapter: str, deployment: str) -> Resident:
        """The adapter's place, counted as used once more; its weights are there."""
        has_turn = False
        while (resident := self._residents.get(adapter)) is None:
            is_full = len(self._residents) >= self.limit
            victim = least_worth(self._residents.values(), self._popularity) if is_full else None
            if (is_full and victim is None) or (self._waiting and not has_turn):
                await self._place(first=has_turn)
                has_turn = True
                continue
            has_turn = False
            evicted = self._evict(victim) if victim is not None else ""
            # Its loading is a use, too: put out before it was loaded, it would be loaded all the same.
            resident = Resident(adapter, _LOAD_S, time.monotonic(), n_using=1)
            self._residents[adapter] = resident
            task = asyncio.create_task(self._load(resident, deployment, evicted), name=f"adapter:{adapter}")
            task.add_done_callback(_heard)
            self._loading[adapter] = task
        if has_turn:
            self._wake()  # somebody else had it loaded meanwhile: the place is the next one's
        resident.n_using += 1
        resident.last_used_at = time.monotonic()
        loading = self._loading.get(adapter)
        if loading is not None:
            try:
                # Shielded: one client that leaves must not take the adapter from the others that wait for it.
                await asyncio.shield(loading)
            except BaseException:
                self._release(resident)
                raise
        return resident

    async def _place(self, *, first: bool) -> None:
        """Until somebody's use of an adapter ends. `first`: its turn had come before, and was taken by another."""
        if len(self._waiting) >= _MAX_WAITING:
            raise AdapterUnavailable("too many requests wait for their adapters here: try again shortly")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if first:
            self._waiting.appendleft(place)
        else:
            self._waiting.append(place)
        try:
            await place
        except BaseException:
            if place.done() and not place.cancelled():
                self._wake()  # it was ours, and is the next one's now
            else:
                with suppress(ValueError):  # cancelled, and passed over by a wake before we ran
                    self._waiting.remove(place)
            raise

    def _wake(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def _release(self, resident: Resident) -> None:
        resident.n_using -= 1
        resident.last_used_at = time.monotonic()
        if not resident.n_using:
            self._wake()

    def _evict(self, victim: Resident) -> str:
        """It has no place any more; the engine is told before the next one comes."""
        del self._residents[victim.adapter]
        claim = self._claims.pop(victim.adapter, None)
        if claim is not None:
            claim.close()
        return victim.adapter

    # -- loading

    async def _unload(self, adapter: str) -> None:
        async with self._engine_turn:
            await self._engine.unload_adapter(adapter)

    async def _load(self, resident: Resident, deployment: str, evicted: str) -> None:
        adapter, began_s = resident.adapter, time.monotonic()
        try:
            if evicted:
                await self._unload(evicted)
            path, claim = await self._fetch(await self._spec(adapter, deployment))
            self._claims[adapter] = claim
            async with self._engine_turn:
                await self._engine.load_adapter(adapter, path)
        except BaseException as error:
            self._evict(resident)
            if isinstance(error, (AdapterRefused, ModelStoreError, RedisError)):
                log.error("adapter %s: %s", adapter, error, extra={"code": type(error).__name__})
                raise AdapterUnavailable(_told(error)) from None
            raise
        finally:
            del self._loading[adapter]
            self._release(resident)
        self.n_loads += 1
        took_s = time.monotonic() - began_s
        resident.load_s = took_s
        log.info("adapter loaded", extra={"adapter": adapter, "ms": round(took_s * 1000), "evicted": evicted})

    async def _spec(self, adapter: str, deployment: str) -> AdapterSpec:
        """What the machine was told of it. Bounded by the patience of who asks."""
        key = self._config.keys.adapters
        end_s = time.monotonic() + self._config.tuning.adapter_patience_s
        while (raw := await self._client.call("HGET", key, adapter)) is None:
            if time.monotonic() > end_s:
                raise AdapterUnavailable(
                    "the adapter was not brought to the machine in time: try again shortly"
                )
            await asyncio.sleep(_ASK_AGAIN_S)
        try:
            spec = _decode(raw)
        except msgspec.DecodeError:
            raise AdapterUnavailable("this machine does not understand the adapter's description") from None
        if spec.deployment != deployment:
            raise AdapterUnavailable("the adapter belongs to another model")
        return spec

    async def _fetch(self, spec: AdapterSpec) -> tuple[Path, Claim]:
        if self._store is None:
            self._store = ModelStore(
                Path(self._config.model_cache), budget_bytes=self._config.model_cache_bytes
            )
        store = self._store
        path, claim = await asyncio.to_thread(
            store.acquire, spec.digest, spec.source, None, spec.urls or None
        )
        if sorted(entry.name for entry in store.manifest(spec.digest).files) != sorted(FILES):
            claim.close()
            raise AdapterRefused(f"an adapter is made of {' and '.join(FILES)}, and nothing else")
        return path, claim


def _heard(task: asyncio.Task[None]) -> None:
    """Whoever waits is told; should nobody, nobody need be."""
    if not task.cancelled():
        task.exception()


def _told(error: Exception) -> str:
    """To the client: what is wrong, without addresses of ours."""
    if isinstance(error, AdapterRefused):
        return f"the engine cannot load this adapter: {error}"
    if isinstance(error, ModelStoreError):
        return f"the adapter's files could not be brought to the machine ({error.code}): try again shortly"
    return "the adapter could not be looked up: try again shortly"
