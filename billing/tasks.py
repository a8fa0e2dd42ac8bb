"""Celery tasks of billing: booking usage every second, partitions ahead of time once an hour.

Run by the control worker, scheduled by beat (controlplane/celery.py). Each may run twice or late: intake
books a request once however often it is read. Nothing here raises for a server that is away; the next run
tries again.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Final

import redis
import structlog
from celery import shared_task
from django.apps import apps
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connections
from django.db.models import Q
from django.utils import timezone
from redis.backoff import NoBackoff
from redis.exceptions import LockError
from redis.retry import Retry

from billing import metrics
from billing.booking import Books
from billing.intake import Intake, Tally
from billing.usage_streams import UsageStreams
from workers.keys import CellKeys

DATABASE: Final = "operator"
INTAKE_EVERY_S: Final = 1.0
PARTITIONS_EVERY_S: Final = 3600.0
PARTITION_DAYS_AHEAD: Final = 7

# A run ends a little before the next is due. The lock spares double work, no more: whoever holds it and dies stops
# booking for no longer than this.
RUN_BUDGET_S: Final = 0.8
LOCK_LIFE_S: Final = 5.0
# Machines are known from their rows; a walk through the keys finds streams that nobody claims.
FIND_EVERY_S: Final = 60.0
# A machine that is gone may still have entries that were delivered before, or by its disk afterwards.
GONE_MACHINES: Final = timedelta(hours=24)
REDIS_TIMEOUT_S: Final = 2.0

log = structlog.get_logger(__name__)
_local = threading.local()


@shared_task(  # type: ignore[untyped-decorator]
    name="billing.intake", ignore_result=True, expires=5, soft_time_limit=25, time_limit=30
)
def intake() -> None:
    """Book what the machines of this cell delivered since the last run."""
    tally = run_intake()
    if tally.n_booked or tally.n_refused:
        log.info(
            "usage booked",
            n_booked=tally.n_booked,
            n_repeated=tally.n_repeated,
            refused={refusal.value: n for refusal, n in tally.refused.items()},
        )


@shared_task(  # type: ignore[untyped-decorator]
    name="billing.ensure_partitions", ignore_result=True, expires=600
)
def ensure_partitions() -> None:
    """Usage partitions exist for the days ahead; without them rows would gather in the default partition."""
    made = Books(connections[DATABASE]).ensure_partitions(PARTITION_DAYS_AHEAD)
    if made:
        log.info("usage partitions made", n_partitions=made)


def run_intake(budget_s: float = RUN_BUDGET_S) -> Tally:
    """One bounded run, or none while another process is at it. Servers away: an empty tally and a counted
    failure.
    """
    runner = _runner()
    lock = runner.client.lock(runner.keys.intake_lock, timeout=LOCK_LIFE_S, blocking=False)
    try:
        if not lock.acquire():
            return Tally()
        try:
            return runner.intake.run(runner.machines(), budget_s)
        finally:
            with suppress(
                LockError
            ):  # it took longer than the lock lives; whoever came meanwhile did no harm
                lock.release()
    except redis.RedisError as error:
        return _away("redis", error)
    except (DatabaseError, InterfaceError) as error:
        connections[DATABASE].close()  # it may be dead; the next run opens another
        return _away("postgres", error)


def _away(cause: str, error: Exception) -> Tally:
    metrics.FAILURES.labels(cause).inc()
    log.warning("intake interrupted, will be repeated", cause=cause, error=type(error).__name__)
    return Tally()


class _Walk:
    """Machines found by walking all keys, for all threads of this process: it takes Redis 2.5 us a key, in calls of
    2.5 ms that everything else waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: frozenset[str] = frozenset()
        self._due_at = 0.0

    def found(self, streams: UsageStreams) -> frozenset[str]:
        with self._lock:
            if time.monotonic() >= self._due_at:
                self._found = frozenset(streams.find_machines())
                self._due_at = time.monotonic() + FIND_EVERY_S
            return self._found


class _Runner:
    """What one thread keeps between runs: connection and prices."""

    def __init__(self) -> None:
        self.keys = CellKeys(settings.ENV.cell)
        self.client = redis.Redis.from_url(
            settings.ENV.redis_url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self.streams = UsageStreams(self.client, self.keys)
        self.intake = Intake(self.streams, Books(connections[DATABASE]))

    def machines(self) -> list[str]:
        """Ids of machines that may have delivered something, sorted."""
        return sorted(_walk.found(self.streams) | _known_machines(self.keys.cell))


_walk = _Walk()


def _known_machines(cell: str) -> set[str]:
    # By name: billing and autoscaler import nothing of each other.
    machines = apps.get_model("autoscaler", "Machine").objects.using(DATABASE).filter(cell=cell)
    recent = machines.filter(Q(gone_at=None) | Q(gone_at__gt=timezone.now() - GONE_MACHINES))
    return {machine.hex for machine in recent.values_list("id", flat=True)}


def _runner() -> _Runner:
    """This thread's runner; Django's connections are per thread too."""
    runner: _Runner | None = getattr(_local, "runner", None)
    if runner is None:
        runner = _local.runner = _Runner()
    return runner
