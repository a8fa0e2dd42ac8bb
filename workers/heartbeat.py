"""What a replica says about itself: a heartbeat twice a second, what it serves, and every change of phase at once.

Runs on the engine loop of a front. A heartbeat is state (`hb:<rid>`), a phase change is state (`actual`) and
an event. Redis being away costs beats, never tokens.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Final

import msgspec

from workers.beat import BeatFile
from workers.config import FrontConfig
from workers.contract import Heartbeat, ReplicaPhase, ReplicaStatus, ServingReport
from workers.engine.base import Engine, Offering
from workers.engine.steps import gaps_of, quantile_ms
from workers.redis_client import Client
from workers.serve import Server
from workers.spool import Spool

_json = msgspec.json.Encoder()
_STATUS_EVERY: Final = 10
_SERVING_EVERY: Final = 4


class Reporter:
    """Heartbeats and phases of one replica."""

    def __init__(
        self,
        config: FrontConfig,
        engine: Engine,
        client: Client,
        server: Server,
        spool: Spool,
        beat: BeatFile,
    ) -> None:
        self._config = config
        self._keys = config.keys
        self._engine = engine
        self._client = client
        self._server = server
        self._spool = spool
        self._beat = beat
        self._seq = self._n_preemptions = 0
        self.phase = ReplicaPhase.LOADING
        self.reason = self._message = ""
        self.asleep = False
        self.stages_ms: dict[str, int] = dict(config.stages_ms)

    async def run(self) -> None:
        """Beat until cancelled. Every fourth beat says what is served, every tenth repeats the status, should
        Redis have lost it.
        """
        while True:
            due_at_s = time.monotonic() + self._config.tuning.beat_s
            self.beat()
            if self._seq % _SERVING_EVERY == 0:
                self._say_what_is_served()
            if self._seq % _STATUS_EVERY == 0:
                self._client.fire("HSET", self._keys.actual, self._config.replica, self._status())
            await asyncio.sleep(max(0.0, due_at_s - time.monotonic()))

    def beat(self) -> None:
        """One heartbeat, to Redis and to the agent."""
        ready = self.asleep or self.phase is not ReplicaPhase.LOADING
        self._beat.touch(ready=ready, asleep=self.asleep)
        self._seq += 1
        stats, steps = self._engine.stats(), self._engine.take_steps()
        gaps = gaps_of(steps.buckets)
        n_preempted = stats.n_preemptions - self._n_preemptions
        self._n_preemptions = stats.n_preemptions
        spec = self._config.spec
        heartbeat = Heartbeat(
            machine=self._config.machine,
            seq=self._seq,
            at_ms=time.time_ns() // 1_000_000,
            replica=spec.replica,
            deployment=spec.deployment,
            phase=self.phase,
            asleep=self.asleep,
            reason=self.reason,
            slots=self._offered(),
            note=self._engine.note if isinstance(self._engine, Offering) else "",
            n_running=stats.n_running or (self._server.n_running if spec.upstream is not None else 0),
            n_waiting=stats.n_waiting,
            kv_used_ratio=round(stats.kv_used_ratio, 4),
            step_ms=round(stats.step_ms, 3),
            n_tokens_total=self._server.n_tokens_total,
            n_requests_total=self._server.n_requests_total,
            n_errors_total=self._server.n_errors_total,
            handed_back=tuple(self._server.handed_back),
            max_model_len=self._engine.max_model_len,
            kv_tokens=self._engine.kv_tokens,
            adapters=self._server.adapters.resident if self._server.adapters.limit else None,
            spool_full=self._spool.full,
            n_steps=steps.n_steps,
            itl_p50_ms=round(quantile_ms(gaps, 0.5), 3),
            itl_p95_ms=round(quantile_ms(gaps, 0.95), 3),
            itl_counts=steps.buckets,
            engine_queue=round(steps.n_waiting, 2),
            kv_peak_ratio=round(steps.kv_peak_ratio, 4),
            n_preempted=n_preempted,
            n_prefill_tokens=self._server.n_prefill_tokens,
            tokenise_cpu_ms=round(self._server.tokenise_cpu_ms, 3),
        )
        key = self._keys.heartbeat(spec.replica)
        self._client.fire("SET", key, _json.encode(heartbeat), "PX", self._config.tuning.heartbeat_life_ms)

    def _offered(self) -> int:
        """How many requests it should be given at once; an endpoint that fails is given none for a while."""
        slots = self._config.spec.slots
        return self._engine.offered(slots) if isinstance(self._engine, Offering) else slots

    def _say_what_is_served(self) -> None:
        report = ServingReport(seq=self._seq, requests=self._server.running)
        key = self._keys.serving(self._config.replica)
        life_ms = self._config.tuning.heartbeat_life_ms
        self._client.fire("SET", key, _json.encode(report), "PX", life_ms)

    def enter(self, phase: ReplicaPhase, code: str = "", message: str = "", *, asleep: bool = False) -> None:
        """A new phase: written where control finds it, announced on the event channel, and beaten, at
        once.
        """
        self.phase, self.reason, self._message = phase, code, message
        self.asleep = asleep
        status = self._status()
        self._client.fire("HSET", self._keys.actual, self._config.replica, status)
        self._client.fire("PUBLISH", self._keys.event_channel, status)
        self.beat()

    def _status(self) -> bytes:
        spec = self._config.spec
        return _json.encode(
            ReplicaStatus(
                replica=spec.replica,
                phase=self.phase,
                asleep=self.asleep,
                deployment=spec.deployment,
                code=self.reason,
                message=self._message,
                slots=spec.slots,
                max_model_len=self._engine.max_model_len,
                kv_tokens=self._engine.kv_tokens,
                pid=os.getpid(),
                stages_ms=self.stages_ms,
            )
        )
