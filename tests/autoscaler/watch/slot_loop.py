"""The closed loop of slots on a virtual clock: clients, the real queue and scripts in Redis, the real toy engine
behind the real heartbeat, and the real watcher. Nothing sleeps; a second of it costs some milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import redis

from autoscaler.cell import Cell
from autoscaler.models import ReplicaPhase
from autoscaler.watch.table import KnownReplica, Table
from autoscaler.watch.watcher import Watcher
from benchmarks.stats import quantile
from tests.workers import serving
from workers import scripts
from workers.config import FrontConfig
from workers.contract import ReplicaPhase as Phase
from workers.contract import ReplicaSpec
from workers.engine.base import EngineProfile, EngineRequest, SamplingSpec
from workers.engine.toy import ToyEngine
from workers.heartbeat import Reporter
from workers.keys import RETENTION_MS, CellKeys

BEAT_S, WATCH_S = 0.5, 0.25
REPLICA, MACHINE, DEPLOYMENT = "r1", "m1", "d1"


@dataclass
class Loop:
    """`n_clients` ask again as soon as they are answered. `itl_ms` 0: slots stay as they are.

    `gaps`: (milliseconds, streams that waited so long, sequences in the engine's queue) of every step.
    """

    redis_url: str
    profile: EngineProfile
    itl_ms: int
    slots: int
    n_clients: int
    n_tokens: int = 40
    prompt: str = "badi hoga"
    now_s: float = 1000.0
    gaps: list[tuple[float, int, int]] = field(default_factory=list)
    history: list[int] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cell = serving.Cell(self.redis_url)
        self.cell.enrol(REPLICA, MACHINE, self.slots)
        self.engine = ToyEngine(self.profile, now_s=lambda: self.now_s)
        self.watcher = a_watcher(
            self.redis_url, self.profile.max_num_seqs, self.itl_ms, clock=lambda: self.now_s
        )
        self.reporter = _reporter(self.cell.r, self.profile, self.engine)
        self.tasks: set[asyncio.Task[None]] = set()
        self._running = 0

    async def run(self, seconds: float) -> None:
        """Turns of engine, clients, heartbeat and watcher for so long."""
        until_s = self.now_s + seconds
        beat_s = watch_s = self.now_s
        for _ in range(self.n_clients - self._running):
            self._ask()
        while self.now_s < until_s:
            if self.failures:
                raise self.failures[0]
            self._deliver()
            await _settled()
            self.now_s += self.engine._begin_s()
            n_running, began_s = self.engine.stats().n_running, self.engine.stats().last_step_at_s
            self.engine.step()
            waits = self.engine.stats().n_waiting
            self.gaps.append(((self.now_s - began_s) * 1000, n_running, waits))
            await _settled()
            if self.now_s >= beat_s:
                beat_s = self.now_s + BEAT_S
                self.reporter.beat()
                self.history.append(self.given)
            if self.now_s >= watch_s and self.itl_ms:
                watch_s = self.now_s + WATCH_S
                self.watcher.step(0)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.cell.close()

    @property
    def given(self) -> int:
        """Slots as the cell has them."""
        return int(self.cell.r.hget(self.cell.keys.replica(REPLICA), "slots") or 0)

    def seen(self, seconds: float) -> Seen:
        """The last seconds, from the streams' side."""
        return Seen.of(self.gaps, seconds)

    # -- one request

    def _ask(self) -> None:
        self._running += 1
        self.cell.admit(
            f"{self.prompt} {self.cell._n_requests}", max_tokens=self.n_tokens, candidates=(REPLICA,)
        )

    def _deliver(self) -> None:
        """What was bound goes into the engine, as the Celery consumer does."""
        keys = self.cell.keys.machine(MACHINE)
        queue = keys.prefix + keys.queue_name(REPLICA)
        while (message := cast(Any, self.cell.r).rpop(queue)) is not None:
            request = json.loads(message)["headers"]["id"].partition(".")[0]
            task = asyncio.create_task(self._serve(request))
            self.tasks.add(task)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)

    async def _serve(self, request: str) -> None:
        prompt = self.engine.tokenize_chat([{"role": "user", "content": f"{self.prompt} {request}"}])
        sampling = SamplingSpec(max_tokens=self.n_tokens, temperature=0.0, ignore_eos=True)
        asked = EngineRequest(request, prompt, sampling, min_delta_tokens=self.n_tokens)
        async with aclosing(self.engine.generate(asked)) as deltas:
            async for _ in deltas:
                pass
        self._running -= 1
        self.cell.run(
            scripts.SETTLE,
            self.cell.keys.prefix,
            serving.now_ms(),
            request,
            10,
            self.n_tokens,
            0,
            RETENTION_MS,
        )
        self._ask()


@dataclass(frozen=True)
class Seen:
    """tokens_per_s over all streams; engine_queue: sequences waiting inside the engine, mean over the steps."""

    itl_p95_ms: float
    tokens_per_s: float
    engine_queue: float

    @classmethod
    def of(cls, gaps: list[tuple[float, int, int]], seconds: float) -> Seen:
        total_ms, tail = 0.0, []
        for step in reversed(gaps):
            if total_ms >= seconds * 1000:
                break
            total_ms += step[0]
            tail.append(step)
        waits = [ms for ms, n_running, _ in tail for _ in range(n_running)]
        return cls(
            itl_p95_ms=quantile(waits, 0.95),
            tokens_per_s=len(waits) / total_ms * 1000,
            engine_queue=sum(n for _, _, n in tail) / len(tail),
        )


def a_watcher(
    redis_url: str, max_num_seqs: int, itl_ms: int, clock: Callable[[], float] = time.monotonic
) -> Watcher:
    """The product's watcher, knowing one replica; no Postgres behind it."""
    known = KnownReplica(REPLICA, MACHINE, DEPLOYMENT, max_num_seqs, ReplicaPhase.READY, itl_ms)
    recorder = SimpleNamespace(
        table=Table(1, {REPLICA: known}, deployments=(DEPLOYMENT,)),
        note=lambda _: None,
        want_tick=lambda _: None,
        want_table=lambda: None,
    )
    return Watcher(Cell(redis_url, CellKeys("t0")), cast(Any, recorder), stale_after_s=60, clock=clock)


async def _settled() -> None:
    """Tasks that were woken have run."""
    for _ in range(4):
        await asyncio.sleep(0)


class _Nobody:
    """Server and spool of a replica that nobody looks at: every count of theirs is nought."""

    full = False

    handed_back: tuple[str, ...] = ()
    adapters = SimpleNamespace(limit=0, resident=())

    def __getattr__(self, name: str) -> int:
        return 0


def _reporter(client: redis.Redis, profile: EngineProfile, engine: ToyEngine) -> Reporter:
    """The product's heartbeat, written with the test's connection."""
    config = FrontConfig(
        cell="t0",
        machine=MACHINE,
        redis_url="",
        var_dir="",
        spec=ReplicaSpec(
            replica=REPLICA, deployment=DEPLOYMENT, model_digest="", model_source="", profile=profile.to_json(),
            slots=profile.max_num_seqs,
        ),
    )  # fmt: skip
    nobody = _Nobody()
    link = SimpleNamespace(fire=client.execute_command)
    touch = SimpleNamespace(touch=lambda ready, asleep=False: None)
    reporter = Reporter(config, engine, *cast(Any, (link, nobody, nobody, touch)))
    reporter.phase = Phase.READY
    return reporter
