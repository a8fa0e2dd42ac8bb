"""The agent of a machine: enrols it, keeps its zygote, runs the replicas that control desires, and says
how they are.

One process per machine, started by the provider. It never serves a token: replicas outlive it, and the
next agent adopts them. Zygote and enrolment start together, so that a machine is ready when the slower of
the two is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec

from workers.agent import bell
from workers.agent.adapters import AdapterFiles
from workers.agent.enrol import Credentials, credentials_of
from workers.agent.gpuhealth import GpuWatch
from workers.agent.imds import Metadata, MetadataError
from workers.agent.known import Limits
from workers.agent.notice import Notice, read_notice
from workers.agent.prefetch import Prefetch
from workers.agent.renewal import Renewal
from workers.agent.replicas import Replicas
from workers.agent.shelf import Shelf
from workers.agent.spools import DeadSpools
from workers.agent.zygote_client import Zygote, ZygoteGone
from workers.config import AgentConfig, ServeTuning
from workers.contract import Heartbeat, ReplicaPhase, ReplicaSpec, ReplicaStatus
from workers.keys import MachineKeys
from workers.redis_client import Client, RedisError

log = logging.getLogger(__name__)

# A field of `desired` beside the replica ids. Without it the hash was lost (a new Redis) and says nothing.
GENERATION: Final = b"generation"
_POLL_S: Final = 1.0
_ADAPTERS_S: Final = 2.0
_NOTICE_POLL_S: Final = 0.25
_METADATA_POLL_S: Final = 1.0  # AWS advises 5 s; two minutes are short, and a call costs it nothing
_METADATA_PAUSE_S: Final = 5.0
_ZYGOTE_RETRY_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0)
_ORPHAN_S: Final = 120.0
_ZYGOTE_STOP_S: Final = 3.0
_STOP_GRACE_S: Final = 4.0  # the local provider kills what is left 10 s after its SIGTERM

_PREIMPORT: Final = {"upstream": ("workers.engine.upstream.engine",)}

_json = msgspec.json.Encoder()
_spec_decoder = msgspec.json.Decoder(ReplicaSpec)


class Agent:
    """`await run()` until `stop()` is called."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        limits: Limits | None = None,
        tuning: ServeTuning | None = None,
    ) -> None:
        self._config = config
        self._limits = limits or Limits()
        self._tuning = tuning or ServeTuning()
        self._replicas: Replicas | None = None
        self._enrolled = asyncio.Event()
        self._stopping = asyncio.Event()
        self._changed = asyncio.Event()
        self._zygote: asyncio.Future[Zygote] = asyncio.get_running_loop().create_future()
        self._seq = 0
        self._notice: Notice | None = None

    def stop(self) -> None:
        """Stop all replicas and return from `run`."""
        self._stopping.set()

    async def run(self) -> None:
        """EnrolRefused when this machine cannot become one of ours."""
        self._config.dirs.create()
        zygote = asyncio.create_task(self._keep_zygote(), name="zygote")
        try:
            credentials = await self._unless_stopped(credentials_of(self._config))
            if credentials is not None:
                await self._run_enrolled(credentials, zygote)
        finally:
            if self._stopping.is_set():
                await self._stop_zygote()
            zygote.cancel()
            await asyncio.gather(zygote, return_exceptions=True)

    async def _run_enrolled(self, credentials: Credentials, zygote: asyncio.Task[None]) -> None:
        self._credentials = credentials
        self._keys = MachineKeys(credentials.cell, self._config.machine)
        self._client = Client(credentials.redis_url, name="agent")
        self._renewal = Renewal(self._client, self._keys, credentials.box_key, self._config.dirs.password)
        with contextlib.suppress(RedisError):  # it goes on trying
            await self._client.connect()
        self._gpus = GpuWatch()
        replicas = self._replicas = Replicas(
            self._config, credentials.cell, credentials.redis_url, lambda: self._zygote, self._report,
            box_key=credentials.box_key,
            limits=self._limits, tuning=self._tuning, order=self._order,
        )  # fmt: skip
        spools = DeadSpools(self._config.dirs, self._client, self._keys, self._tuning)
        if self._zygote.done():
            replicas.adopt(self._zygote.result())
        self._enrolled.set()
        loops = [
            asyncio.create_task(work)
            for work in (
                self._beat(replicas),
                self._reconcile(replicas),
                bell.listen(credentials.redis_url, self._keys.bell, self._changed.set),
                self._watch(replicas, spools),
                self._prefetch(),
                self._heed(replicas),
                self._gpus.run(),
                Shelf(self._config, self._client, self._keys).run(),
                Prefetch(self._config, self._client, self._keys, lambda: replicas.is_fetching).run(),
                self._until_stopped(),
            )
        ]
        try:
            done, _ = await asyncio.wait([*loops, zygote], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop that failed is a bug: fail loudly, the provider starts us again
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            if self._stopping.is_set():
                log.info("stopping everything on this machine")
                await replicas.stop_all(_STOP_GRACE_S)
                await spools.tick(replicas.alive)
            spools.close()
            await self._client.close()

    async def _until_stopped(self) -> None:
        await self._stopping.wait()

    async def _unless_stopped(self, work: Coroutine[Any, Any, Credentials]) -> Credentials | None:
        task = asyncio.create_task(work)
        stopped = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not task.done():
            task.cancel()
            return None
        return task.result()

    # -- zygote

    async def _keep_zygote(self) -> None:
        """Start or adopt it, hear of its children's ends, and start another should it end."""
        n_failures = 0
        while not self._stopping.is_set():
            try:
                zygote = await self._start_zygote()
                self._zygote.set_result(zygote)
                if self._replicas is not None:
                    self._replicas.adopt(zygote)
                n_failures = 0
                await self._hear_exits(zygote)
            except (ZygoteGone, OSError, TimeoutError) as error:
                if not self._stopping.is_set():
                    log.error("zygote: %s", str(error)[-500:])
            if self._zygote.done():
                self._zygote = asyncio.get_running_loop().create_future()
                if self._replicas is not None:
                    self._replicas.on_zygote_gone()
            await asyncio.sleep(_ZYGOTE_RETRY_S[min(n_failures, len(_ZYGOTE_RETRY_S) - 1)])
            n_failures += 1

    async def _start_zygote(self) -> Zygote:
        dirs = self._config.dirs
        zygote = await Zygote.start(
            dirs.run / "zygote.sock",
            log=dirs.root / "zygote.log",
            engines=("vllm", "toy") if self._config.engine == "vllm" else ("toy",),
            preimport=("workers.front", *_PREIMPORT.get(self._config.engine, ())),
            orphan_s=_ORPHAN_S,
        )
        log.info("zygote ready", extra={"pid": zygote.pid})
        for engine, reason in zygote.missing.items():
            log.error("engine %s is missing: %s", engine, reason)
        return zygote

    async def _hear_exits(self, zygote: Zygote) -> None:
        try:
            async for ended in zygote.exits():
                await self._enrolled.wait()
                assert self._replicas is not None
                self._replicas.on_exit(ended)
                self._changed.set()
        finally:
            await zygote.close()

    async def _stop_zygote(self) -> None:
        """It would end by itself, but only after a while alone."""
        with contextlib.suppress(TimeoutError, ZygoteGone):
            async with asyncio.timeout(_ZYGOTE_STOP_S):
                zygote = await asyncio.shield(self._zygote)
                await zygote.shutdown(0.5)

    # -- loops

    async def _beat(self, replicas: Replicas) -> None:
        """The agent's own heartbeat: READY once it can start replicas."""
        interval_s = self._credentials.heartbeat_ms / 1000
        while True:
            ready = self._zygote.done()
            self._beat_once(replicas)
            if self._seq % 5 == 0:
                for status in replicas.ended():  # should Redis have lost it
                    self._client.fire("HSET", self._keys.actual, status.replica, _json.encode(status))
            # The first beat that says READY follows the zygote at once.
            if ready:
                await asyncio.sleep(interval_s)
            else:
                await asyncio.wait({self._zygote}, timeout=interval_s)

    def _beat_once(self, replicas: Replicas) -> None:
        self._seq += 1
        phase = ReplicaPhase.READY if self._zygote.done() else ReplicaPhase.STARTING
        notice = self._notice
        heartbeat = Heartbeat(
            machine=self._config.machine,
            seq=self._seq,
            at_ms=time.time_ns() // 1_000_000,
            phase=phase if notice is None else ReplicaPhase.DRAINING,
            n_running=len(replicas.alive),
            ends_in_ms=None if notice is None else notice.ends_in_ms(time.time()),
            password=self._renewal.digest,
            gpus=self._gpus.health,
        )
        life_ms = self._tuning.heartbeat_life_ms
        self._client.fire("SET", self._keys.heartbeat(), _json.encode(heartbeat), "PX", life_ms)

    async def _heed(self, replicas: Replicas) -> None:
        """A notice that this machine will be taken away is beaten at once, with an event that says: look."""
        look_up = self._noticer()
        while True:
            known, self._notice = self._notice, await look_up()
            if self._notice is not None and (known is None or self._notice.ends_at_s < known.ends_at_s - 1):
                log.warning("notice: this machine ends in %d ms", self._notice.ends_in_ms(time.time()))
                self._beat_once(replicas)
                look = ReplicaStatus(replica="", phase=ReplicaPhase.DRAINING)
                self._client.fire("PUBLISH", self._keys.event_channel, _json.encode(look))
            await asyncio.sleep(_METADATA_POLL_S if self._config.tag_prefix else _NOTICE_POLL_S)

    def _noticer(self) -> Callable[[], Awaitable[Notice | None]]:
        """Where word of this machine's end comes from: its metadata service, or a file of the local provider."""
        metadata = Metadata() if self._config.tag_prefix else None

        async def look_up() -> Notice | None:
            if metadata is None:
                return read_notice(self._config.dirs.notice)
            try:
                return await asyncio.to_thread(metadata.notice, time.time())
            except MetadataError as error:
                log.warning("%s", error)
                await asyncio.sleep(_METADATA_PAUSE_S)
                return self._notice

        return look_up

    async def _reconcile(self, replicas: Replicas) -> None:
        """On the bell, on an end, and once a second."""
        while True:
            try:
                desired = await self._read_desired()
                await self._renewal.look()
            except RedisError:
                desired = None
            for replica in replicas.reconcile(desired):
                self._client.fire("HDEL", self._keys.actual, replica)
                # Its leases say all that matters; a queue is there if it put messages back after it was given up.
                queue = self._keys.prefix + self._keys.queue_name(replica)
                self._client.fire("DEL", *self._keys.unacked(replica), queue)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._changed.wait()
            self._changed.clear()

    async def _read_desired(self) -> dict[str, ReplicaSpec] | None:
        """None when Redis does not have it (lost) or it cannot be read."""
        flat = await self._client.call("HGETALL", self._keys.desired)
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        if fields.pop(GENERATION, None) is None:
            return None
        found = {}
        for replica, payload in fields.items():
            try:
                spec = _spec_decoder.decode(payload)
            except msgspec.MsgspecError as error:
                log.error("desired: %s", error, extra={"replica": replica.decode()})
                return None  # written by a newer control: better to do nothing than to stop what runs
            found[spec.replica] = spec
        return found

    async def _watch(self, replicas: Replicas, spools: DeadSpools) -> None:
        """Once a second: fronts without a sign of life, spools without an owner."""
        while True:
            await replicas.check()
            await spools.tick(replicas.alive)
            await asyncio.sleep(_POLL_S)

    async def _prefetch(self) -> None:
        """Adapters that were announced come to the disk before they are asked for; retired ones go."""
        adapters = AdapterFiles(self._config, self._client, self._keys)
        while True:
            await adapters.tick()
            await asyncio.sleep(_ADAPTERS_S)

    def _order(self, replica: str, order: str) -> None:
        self._client.fire("PUBLISH", self._keys.control_channel(replica), order)

    def _report(self, status: ReplicaStatus) -> None:
        payload = _json.encode(status)
        self._client.fire("HSET", self._keys.actual, status.replica, payload)
        self._client.fire("PUBLISH", self._keys.event_channel, payload)
