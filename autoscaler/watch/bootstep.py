"""Starts the watcher with the control worker and stops it with it.

Added to the Celery application in controlplane/celery.py. Starts after the pool, so that forked pool processes
inherit none of its threads; never starts in them.
"""

from __future__ import annotations

from typing import Any

import structlog
from celery import bootsteps

log = structlog.get_logger("corral.autoscaler")


class WatcherStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Two daemon threads in the worker's main process, if it consumes the control queue."""

    requires = frozenset({"celery.worker.components:Pool"})

    def __init__(self, worker: Any, **_: Any) -> None:
        self._threads: Any = None

    def start(self, worker: Any) -> None:
        from autoscaler.house import build_house
        from autoscaler.watch.recorder import Recorder
        from autoscaler.watch.watcher import Watcher

        if "control" not in worker.app.amqp.queues.consume_from:
            log.info("watcher.not_started", reason="this worker does not consume the control queue")
            return
        house = build_house()
        recorder = Recorder(house)
        watcher = Watcher(house.cell, recorder, stale_after_s=house.config.heartbeat_stale_s)
        recorder.start()
        watcher.start()
        self._threads = (watcher, recorder)

    def stop(self, worker: Any) -> None:
        for thread in self._threads or ():
            thread.stop()
        self._threads = None

    terminate = stop
