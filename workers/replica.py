"""One replica on its engine loop: everything between the Celery pool and the engine, started, reported,
stopped.

front.py builds it on the main thread and runs it on the loop's. It owns the Redis connections, the spool, the
server and the reports. It fails as a whole: a dead or hung engine ends the process, the requests resume
elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any, Final

from workers.accounting import Accounting
from workers.beat import BeatFile
from workers.config import EXIT_FAILED, FrontConfig
from workers.contract import ReplicaPhase
from workers.control import ControlChannel
from workers.engine.base import Engine, EngineDead, Sleeper
from workers.failure import ReplicaFailure, classify, write_outcome
from workers.heartbeat import Reporter
from workers.publisher import Publisher
from workers.redis_client import Client, RedisError
from workers.rest import Rest
from workers.serve import Server
from workers.spool import Spool
from workers.watchdog import Glance

log = logging.getLogger(__name__)

_CONNECT_S: Final = 10.0
_HEALTH_S: Final = 1.0
_LAST_WORDS_S: Final = 0.3
_RETIRED_S: Final = 10.0


class Replica:
    """Construct on any thread; call everything else on the loop."""

    def __init__(self, config: FrontConfig, engine: Engine, born_at_s: float) -> None:
        self.config = config
        self.engine = engine
        self.failed: ReplicaFailure | None = None
        self._born_at_s = born_at_s
        self._serving = asyncio.Event()
        self._consuming = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._rest: Rest | None = None  # of an engine that can sleep

    # -- life

    async def start(self) -> None:
        """Connect, warm the engine up, and report READY once work can arrive. Fails the process otherwise."""
        try:
            await self._start()
        except Exception as error:
            self.fail(classify(error))

    async def _start(self) -> None:
        config, tuning = self.config, self.config.tuning
        self.client = Client(
            config.redis_url,
            name=f"front-{config.replica[:8]}",
            may_load_scripts=False,
        )
        self.spool = Spool(
            config.dirs.spool_file(config.replica),
            max_bytes=tuning.spool_max_bytes,
            republish_after_s=tuning.republish_after_s,
            republish_max_s=tuning.republish_max_s,
        )
        self.beat = BeatFile(config.dirs.beat(config.replica))
        self.publisher = Publisher(self.client, config.keys, tuning, self._on_refused)
        self.server = Server(
            config, self.engine, self.client, self.publisher, self.spool, self._on_engine_dead
        )
        self.reporter = Reporter(config, self.engine, self.client, self.server, self.spool, self.beat)
        self.control = ControlChannel(
            config.redis_url,
            config.keys,
            config.replica,
            self.server.cancel,
            self.server.moved,
            self.server.grant,
            self._on_rest,
        )
        if isinstance(self.engine, Sleeper) and self.engine.sleep_level:
            self._rest = Rest(self.engine, self._say_asleep, self.reporter.stages_ms)
        self.accounting = Accounting(self.spool, self.client, config.keys, config.replica, tuning)

        started_s = time.monotonic()
        self.reporter.stages_ms["load"] = round((started_s - self._born_at_s) * 1000)
        await asyncio.gather(self._connect(), self.control.start(_CONNECT_S), self.engine.start())
        self.reporter.stages_ms["warm"] = round((time.monotonic() - started_s) * 1000)
        await self._consuming.wait()
        self.reporter.stages_ms["total"] = round((time.monotonic() - self._born_at_s) * 1000)
        self._serving.set()
        if self.reporter.phase is ReplicaPhase.LOADING:
            self.reporter.enter(ReplicaPhase.READY)
            log.info("ready", extra={"phase": "ready"})
        self._spawn(self.accounting.tick_forever(), self.accounting.sync_forever(), self._check_health())
        if self._rest is not None:
            self._spawn(self._sleep_and_wake(self._rest))
        if self.server.adapters.limit:
            self._spawn(self._forget_adapters())

    async def _connect(self) -> None:
        await self.client.connect(_CONNECT_S)
        self.reporter.enter(ReplicaPhase.LOADING)
        self._spawn(self.reporter.run())

    def _spawn(self, *work: Coroutine[Any, Any, None]) -> None:
        self._tasks += [asyncio.create_task(each) for each in work]

    def consumer_ready(self) -> None:
        """Celery's consumer is up."""
        self._consuming.set()

    async def serve(self, request_id: str, epoch: int) -> None:
        """The pool's handler."""
        await self._serving.wait()
        if self._rest is None:
            await self.server.serve(request_id, epoch)
        else:
            async with self._rest:
                await self.server.serve(request_id, epoch)

    def drain(self) -> None:
        """SIGTERM has come: say so; the pool stops consuming and waits."""
        if self._serving.is_set() and self.reporter.phase is not ReplicaPhase.DRAINING:
            self.reporter.enter(ReplicaPhase.DRAINING)

    async def stop(self) -> None:
        """After the pool has stopped: nothing runs any more. Leaves STOPPED behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not hasattr(self, "client"):
            return
        await self.control.close()
        await self.engine.stop()
        self.server.close()
        await self.accounting.tick()
        self.spool.sync()
        if self.failed is None:
            self.reporter.enter(ReplicaPhase.STOPPED)
        await self.client.close()
        self.spool.close(delete_if_empty=True)

    # -- failure

    def fail(self, failure: ReplicaFailure) -> None:
        """End the process; what was produced gets a moment to leave. On the loop; the first failure
        counts.
        """
        if self.failed is not None:
            return
        self.failed = failure
        log.error("replica failed: %s", failure.message, extra={"code": failure.code})
        write_outcome(self.config.dirs.outcome(self.config.replica), failure)
        if hasattr(self, "reporter"):
            self.reporter.enter(ReplicaPhase.FAILED, failure.code, failure.message)
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, EXIT_FAILED)

    def _on_refused(self, code: str) -> None:
        self.fail(ReplicaFailure("redis_refused", f"the cell's Redis refuses this machine's work ({code})"))

    def _on_engine_dead(self, error: EngineDead) -> None:
        self.fail(classify(error))

    async def _check_health(self) -> None:
        """An engine can die while idle."""
        while True:
            await asyncio.sleep(_HEALTH_S)
            try:
                await self.engine.check_health()
            except EngineDead as error:
                self._on_engine_dead(error)
                return

    def _on_rest(self, asleep: bool) -> None:
        if self._rest is not None:
            self._rest.order(asleep)

    def _say_asleep(self, asleep: bool) -> None:
        """One that drains goes on to do so."""
        if self.reporter.phase is not ReplicaPhase.DRAINING:
            self.reporter.enter(ReplicaPhase.LOADING if asleep else ReplicaPhase.READY, asleep=asleep)

    async def _sleep_and_wake(self, rest: Rest) -> None:
        try:
            await rest.run()
        except EngineDead as error:
            self._on_engine_dead(error)
        except Exception as error:  # an engine that cannot wake is of no use
            self.fail(classify(error))

    async def _forget_adapters(self) -> None:
        """A retired adapter is its tenant's secret no longer needed here."""
        adapters = self.server.adapters
        while True:
            await asyncio.sleep(_RETIRED_S)
            try:
                if adapters.resident:
                    await adapters.retire(await adapters.known())
            except RedisError:
                continue
            except EngineDead as error:
                self._on_engine_dead(error)
                return

    def glance(self) -> Glance:
        """For the watchdog; called from its thread, reads only."""
        stats = self.engine.stats()
        now_s = time.monotonic()
        if not self._serving.is_set():
            return Glance(now_s, now_s, 0, now_s, 0.0)
        prefill_s = self.server.n_prefill_tokens / max(self.server.prefill_tokens_per_s, 1.0)
        return Glance(
            now_s=now_s,
            loop_beat_at_s=self.beat.at_s,
            n_engine_work=stats.n_running + stats.n_waiting,
            last_step_at_s=stats.last_step_at_s,
            expected_step_s=stats.step_ms / 1000 + prefill_s,
        )
