"""Celery tasks of webhooks. Run by the control worker, scheduled in controlplane/celery.py; may run twice."""

from contextlib import suppress
from datetime import timedelta

import redis
import structlog
from celery import shared_task
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection, transaction
from django.db.models import F
from django.utils import timezone
from redis.backoff import NoBackoff
from redis.exceptions import LockError
from redis.retry import Retry

from controlplane.tenants.models import ApiKey
from controlplane.webhooks import sending
from controlplane.webhooks.services import emit, key_data
from workers.keys import CellKeys

log = structlog.get_logger("corral.webhooks")

KEEP = timedelta(days=30)
EXPIRING_WITHIN = timedelta(days=7)
KEYS_A_RUN = 1_000
REDIS_TIMEOUT_S = 2.0
# Longer than a run: whoever holds it and dies stops sending for no longer than this.
LOCK_LIFE_S = 40.0


@shared_task(  # type: ignore[untyped-decorator]
    name="webhooks.send", ignore_result=True, expires=5, soft_time_limit=60, time_limit=70
)
def send() -> None:
    """What is due. One run at a time in a cell, so that slow receivers keep one place of the worker at most."""
    client = redis.Redis.from_url(
        settings.ENV.redis_url,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        with client:
            lock = client.lock(CellKeys(settings.ENV.cell).webhooks_lock, timeout=LOCK_LIFE_S, blocking=False)
            if not lock.acquire():
                return
            try:
                sending.send_due()
            finally:
                with suppress(LockError):
                    lock.release()
    except (redis.RedisError, DatabaseError, InterfaceError) as error:
        connection.close()
        log.warning("webhooks.not_sent", error=type(error).__name__)


@shared_task(name="webhooks.tell_expiring_keys", ignore_result=True)  # type: ignore[untyped-decorator]
def tell_expiring_keys() -> None:
    """Keys that expire within a week are told of once for each date; a bounded number a run."""
    now = timezone.now()
    soon = ApiKey.objects.filter(revoked_at=None, expires_at__gt=now, expires_at__lte=now + EXPIRING_WITHIN)
    # Made for longer than a week: of one that was made to live for an hour nobody need be told.
    lasting = soon.filter(expires_at__gt=F("created_at") + EXPIRING_WITHIN, organization__suspended_at=None)
    for key in lasting.order_by("expires_at", "id")[:KEYS_A_RUN]:
        assert key.expires_at is not None
        with transaction.atomic():
            emit(
                organization_id=key.organization_id,
                kind="key.expiring",
                data={**key_data(key.id, key.name, key.project_id), "expires_at": key.expires_at.isoformat()},
                fence=f"key.expiring:{key.id.hex}:{key.expires_at:%Y%m%d}",
            )


@shared_task(name="webhooks.forget", ignore_result=True)  # type: ignore[untyped-decorator]
def forget() -> None:
    """Delete events that are a month old, with their deliveries; a bounded number a run."""
    n_forgotten = sending.forget(timezone.now() - KEEP)
    if n_forgotten:
        log.info("events.forgotten", n_forgotten=n_forgotten)
