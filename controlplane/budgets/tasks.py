"""Celery tasks of budgets. Run by the control worker, scheduled in controlplane/celery.py; may run twice."""

import redis
import structlog
from celery import shared_task
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection
from django.utils import timezone
from redis.backoff import NoBackoff
from redis.retry import Retry

from controlplane.budgets import watching

log = structlog.get_logger("corral.budgets")

REDIS_TIMEOUT_S = 2.0


@shared_task(  # type: ignore[untyped-decorator]
    name="budgets.watch", ignore_result=True, expires=5, soft_time_limit=60, time_limit=70
)
def watch() -> None:
    """Alerts for what was crossed; a run that fails is made up for by the next."""
    now = timezone.now()
    everything = int(now.timestamp()) % watching.LOOK_AT_ALL_EVERY_S < 3
    client = redis.Redis.from_url(
        settings.ENV.redis_url,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        with client:
            watching.watch(now, everything=everything, client=client, cell=settings.ENV.cell)
    except (redis.RedisError, DatabaseError, InterfaceError) as error:
        connection.close()
        log.warning("budgets.not_watched", error=type(error).__name__)
