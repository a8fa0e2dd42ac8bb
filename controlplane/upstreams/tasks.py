"""Celery tasks of shadows: intake every two seconds, forgetting every ten minutes.

Run by the control worker; each may run twice or late. A server that is away ends a run; the next one goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

import redis
import structlog
from celery import shared_task
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connections

from controlplane.upstreams import intake as work
from workers.keys import CellKeys

DATABASE: Final = "operator"
REDIS_TIMEOUT_S: Final = 2.0
log = structlog.get_logger("corral.upstreams")


@shared_task(  # type: ignore[untyped-decorator]
    name="upstreams.intake", ignore_result=True, expires=5, soft_time_limit=25, time_limit=30
)
def intake() -> None:
    """Keep what copies came to."""
    _once(lambda: work.run(_client(), CellKeys(settings.ENV.cell), using=DATABASE))


@shared_task(name="upstreams.prune", ignore_result=True, expires=60)  # type: ignore[untyped-decorator]
def prune() -> None:
    """Forget what is old or too much."""
    _once(lambda: work.prune(now=datetime.now(tz=UTC), using=DATABASE))


@cache
def _client() -> Any:
    return redis.Redis.from_url(
        settings.ENV.redis_url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
    )


def _once(run: Callable[[], object]) -> None:
    try:
        run()
    except redis.RedisError as error:
        log.warning("shadows.interrupted", error=type(error).__name__)
    except (DatabaseError, InterfaceError) as error:
        connections[DATABASE].close()
        log.warning("shadows.interrupted", error=type(error).__name__)
