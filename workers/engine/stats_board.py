"""vLLM's stat logger turned into a board: the last figures the engine core sent, for heartbeats and watchdog.

Given to AsyncLLM by vllm.py, which calls `record` on the loop once per engine step. Reading never asks the
core. Imports no vLLM: its stats objects are read by attribute, its logger interface is met by shape.
"""

from __future__ import annotations

import time
from typing import Any

from workers.engine.base import EngineStats
from workers.engine.steps import StepWindow


class StatsBoard:
    """The last figures the core sent with its outputs. Written and read on the loop, once per engine step."""

    def __init__(self) -> None:
        self._n_inflight = 0
        self.n_running = self.n_waiting = self.n_steps = self.n_preemptions = 0
        self.n_prefix_queries = self.n_prefix_hits = 0
        self.kv_used_ratio = self.step_ms = 0.0
        self.last_step_at_s = time.monotonic()
        self.steps = StepWindow()

    def logger(self, config: object, engine_index: int = 0) -> StatsBoard:
        """vLLM's factory of stat loggers; this object is the logger."""
        return self

    @property
    def n_inflight(self) -> int:
        return self._n_inflight

    @n_inflight.setter
    def n_inflight(self, n: int) -> None:
        if self._n_inflight == 0:
            self.last_step_at_s = time.monotonic()  # an idle engine owes no step
            self.n_running = 0  # the core's last word was about requests that are gone
        self._n_inflight = n

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        if iteration_stats is not None:
            self.n_preemptions += iteration_stats.num_preempted_reqs
        if scheduler_stats is None:
            return
        now_s = time.monotonic()
        self.n_steps += 1
        step_ms = (now_s - self.last_step_at_s) * 1000
        self.step_ms += 0.2 * (step_ms - self.step_ms)
        self.steps.add(
            step_ms,
            scheduler_stats.num_running_reqs,
            scheduler_stats.num_waiting_reqs,
            scheduler_stats.kv_cache_usage,
        )
        self.last_step_at_s = now_s
        self.n_running = scheduler_stats.num_running_reqs
        self.n_waiting = scheduler_stats.num_waiting_reqs
        self.kv_used_ratio = scheduler_stats.kv_cache_usage
        self.n_prefix_queries += scheduler_stats.prefix_cache_stats.queries
        self.n_prefix_hits += scheduler_stats.prefix_cache_stats.hits

    def read(self) -> EngineStats:
        n_running = min(self.n_running, self._n_inflight)  # the core's last word may predate an abort
        return EngineStats(
            n_running=n_running,
            n_waiting=self._n_inflight - n_running,
            kv_used_ratio=self.kv_used_ratio if self._n_inflight else 0.0,
            n_steps=self.n_steps,
            last_step_at_s=self.last_step_at_s,
            step_ms=self.step_ms,
            n_preemptions=self.n_preemptions,
            n_prefix_queries=self.n_prefix_queries,
            n_prefix_hits=self.n_prefix_hits,
        )

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        pass
