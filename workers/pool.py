"""Celery pool whose jobs are coroutines: thousands in flight on one asyncio loop, no thread or process each.

Celery's consumer calls it on the hub thread; the coroutine is the front's (see runtime.py). A job's end calls
Celery's own callback, which acknowledges through the hub. It must never run a task body, block the hub
outside `on_stop`, or log a task's arguments.

`celery inspect active` shows for each job id, name `corral.serve`, args `[request id, epoch]`, time_start,
worker_pid, acknowledged and delivery_info; `inspect stats` shows under `pool` what `_get_info` returns.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from celery.concurrency.base import BasePool
from celery.worker import state as worker_state

from workers import runtime as runtime_registry
from workers.contract import SERVE_TASK

log = logging.getLogger(__name__)


class Job:
    """One delivered message being served. Celery keeps a weak reference and may call `terminate`."""

    __slots__ = (
        "__weakref__",
        "_pool",
        "arguments",
        "cancel_reason",
        "on_done",
        "started_at",
        "task",
        "task_id",
    )

    def __init__(
        self, pool: LoopPool, task_id: str, arguments: tuple[str, int], on_done: Callable[..., None]
    ) -> None:
        self._pool = pool
        self.task_id = task_id
        self.arguments = arguments
        self.on_done = [on_done]  # more than one if the message was redelivered while running
        self.started_at = monotonic()
        self.task: asyncio.Task[None] | None = None
        self.cancel_reason = ""

    def terminate(self, signal: Any = None) -> None:
        """Cancel the coroutine. Called by Celery on revoke(terminate=True) and on cold shutdown."""
        self._pool.cancel(self, "revoked" if self.task_id in worker_state.revoked else "stopping")


class LoopPool(BasePool):
    """`worker_pool = "workers.pool:LoopPool"`; `worker_concurrency` bounds the jobs in flight."""

    signal_safe = True
    task_join_will_block = False
    body_can_be_buffer = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.n_started = self.n_done = self.n_failed = self.n_cancelled = self.n_joined = self.n_refused = 0
        self._jobs: dict[tuple[str, int], Job] = {}
        self._inbox: deque[Job] = deque()
        self.settle_ended: Callable[[], None] = lambda: None  # on the hub: acknowledge what has ended, now
        self._stopping = False
        self._drained = threading.Event()
        self._logged_failures: set[str] = set()

    # -- hub thread

    def on_start(self) -> None:
        self._runtime = runtime_registry.current()
        if not self._runtime.loop.is_running():
            raise RuntimeError("the runtime's loop is not running: start its thread before the worker")

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        accept_callback: Callable[[int, float], None],
        callback: Callable[..., None],
        **options: Any,
    ) -> Job | None:
        """Take a job. `args`: task name, task id, request (with the decoded arguments), body, …"""
        accept_callback(os.getpid(), monotonic())
        arguments = _arguments(args[0], args[2])
        if arguments is None:
            self.n_refused += 1
            log.error("refused a %s message whose arguments are not (request id, epoch)", args[0])
            callback((False, None, 0.0))
            return None
        return self.submit(args[1], arguments, callback)

    def submit(self, task_id: str, arguments: tuple[str, int], on_done: Callable[..., None]) -> Job:
        """Start a job, or join the one that runs. `on_done` is called on the loop, unless a revoke or stop ends it."""
        running = self._jobs.get(arguments)
        if running is not None:
            # Put back and delivered again when the connection to Redis was lost: the job still runs.
            self.n_joined += 1
            running.on_done.append(on_done)
            if self._jobs.get(arguments) is running:
                return running
            # It ended in between and may not have seen us. A job of its own finds the claim taken or done and ends
            # at once; being told twice does no harm, a request acknowledges once.
        job = self._jobs[arguments] = Job(self, task_id, arguments, on_done)
        self.n_started += 1
        self._inbox.append(job)
        if len(self._inbox) == 1:  # otherwise the loop is already on its way
            self._runtime.loop.call_soon_threadsafe(self._start_jobs)
        return job

    def job(self, arguments: tuple[str, int]) -> Job | None:
        """The job in flight for (request id, epoch), if any."""
        return self._jobs.get(arguments)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call on the loop's thread, from there; at once when the pool is stopping."""
        self._runtime.loop.call_later(0.0 if self._stopping else delay_s, callback)

    def cancel(self, job: Job, reason: str) -> None:
        """Ask a job to end; it may be waiting, running or over."""
        job.cancel_reason = job.cancel_reason or reason
        self._runtime.loop.call_soon_threadsafe(self._cancel_task, job)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Nothing to signal: the job is a coroutine of this process. Celery calls `Job.terminate` next."""

    def on_stop(self) -> None:
        """Warm stop: let jobs finish, then cancel the rest, then return. Consuming has ended already.

        A cold shutdown asked for meanwhile cuts the grace short: Celery's handler terminates every job.
        """
        self._stopping = True
        grace_s = self._runtime.stop_grace_s
        log.info("stopping with %d jobs in flight, which have %.1f s to finish", len(self._jobs), grace_s)
        self._wait_drained(grace_s)
        self._cancel_all()
        self.settle_ended()

    def on_terminate(self) -> None:
        """Cold stop: as a warm one without the first wait."""
        self._stopping = True
        self._cancel_all()
        self.settle_ended()

    def _cancel_all(self) -> None:
        for job in list(self._jobs.values()):
            self.cancel(job, "stopping")
        self._wait_drained(self._runtime.cancel_grace_s)
        if self._jobs:
            grace_s = self._runtime.cancel_grace_s
            log.error("%d jobs did not end within %.1f s of being cancelled", len(self._jobs), grace_s)

    def _wait_drained(self, timeout_s: float) -> None:
        if self._jobs:  # the last one to end sets the event, as `_stopping` is set by now
            self._drained.wait(timeout_s)

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        info.update(
            in_flight=len(self._jobs),
            started=self.n_started,
            done=self.n_done,
            failed=self.n_failed,
            cancelled=self.n_cancelled,
            joined=self.n_joined,
            refused=self.n_refused,
        )
        return info

    # -- loop thread

    def _start_jobs(self) -> None:
        loop, handler = self._runtime.loop, self._runtime.handler
        while self._inbox:
            # Popped last: `on_apply` wakes the loop only for a job that finds the inbox empty.
            job = self._inbox[0]
            task = job.task = loop.create_task(handler(*job.arguments))
            task.add_done_callback(functools.partial(self._finish, job))
            self._inbox.popleft()

    def _cancel_task(self, job: Job) -> None:
        """Comes after the `_start_jobs` of this job, and before its first step if they follow each other."""
        if job.task is not None:
            job.task.cancel(job.cancel_reason)

    def _finish(self, job: Job, task: asyncio.Task[None]) -> None:
        self._jobs.pop(job.arguments, None)
        if task.cancelled() and job.cancel_reason:
            self.n_cancelled += 1  # not acknowledged here: revoke did, a stop puts the message back
        else:
            self._count_end(task)
            runtime_s = monotonic() - job.started_at
            for on_done in job.on_done:
                try:
                    on_done((False, None, runtime_s))
                except Exception:
                    log.exception("acknowledging a finished job failed")
        if self._stopping and not self._jobs:
            self._drained.set()

    def _count_end(self, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self.n_done += 1
            return
        self.n_failed += 1
        kind = type(error).__name__
        if kind not in self._logged_failures and len(self._logged_failures) < 64:
            self._logged_failures.add(kind)  # the type alone: a message or traceback may quote a prompt
            log.error("a job ended with %s, acknowledged; its lease decides what happens next", kind)


def _arguments(task_name: str, request: dict[str, Any]) -> tuple[str, int] | None:
    match request.get("args"):
        case [str() as request_id, int() as epoch] if task_name == SERVE_TASK:
            return request_id, epoch
    return None
