"""Celery tasks of tenants. Run by the control worker, scheduled in controlplane/celery.py; may run twice."""

from datetime import timedelta

import redis
import structlog
from celery import shared_task
from django.conf import settings
from django.db import DatabaseError, InterfaceError, connection, connections
from django.utils import timezone
from redis.backoff import NoBackoff
from redis.retry import Retry

from controlplane.endcustomers.leases import give_back
from controlplane.tenants.leases import DATABASE, Leases
from controlplane.tenants.models import IdempotentWrite

LEASES_EVERY_S = 10.0
REDIS_TIMEOUT_S = 2.0

log = structlog.get_logger("corral.tenants")

# Gateways poll every few seconds; one that was away for longer than this starts with an empty cache.
KEEP_CHANGES = timedelta(hours=1)
KEEP_ANSWERS = timedelta(days=1)


@shared_task(name="tenants.prune_changes")  # type: ignore[untyped-decorator]
def prune_changes() -> None:
    """Delete change notes that every gateway has read, or has been away too long to read."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT corral_prune_changes(make_interval(secs => %s))", [KEEP_CHANGES.total_seconds()]
        )
        (n_pruned,) = cursor.fetchone()
    if n_pruned:
        log.info("changes.pruned", n_pruned=n_pruned)


@shared_task(name="tenants.forget_answers")  # type: ignore[untyped-decorator]
def forget_answers() -> None:
    """Delete answers that were kept for repeated writes and are a day old; a bounded number a run."""
    before = timezone.now() - KEEP_ANSWERS
    old = IdempotentWrite.objects.filter(created_at__lt=before).order_by("created_at")
    n_forgotten, _ = IdempotentWrite.objects.filter(
        pk__in=list(old.values_list("pk", flat=True)[:10_000])
    ).delete()
    if n_forgotten:
        log.info("answers.forgotten", n_forgotten=n_forgotten)


@shared_task(  # type: ignore[untyped-decorator]
    name="tenants.lease_shares", ignore_result=True, expires=LEASES_EVERY_S
)
def lease_shares() -> None:
    """Renew this cell's part of every tenant's limits; give back what it does not use of end customers' money. A run
    that fails is made up for by the next: a lease outlives several."""
    client = redis.Redis.from_url(
        settings.ENV.redis_url,
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        with client:
            alone = timedelta(seconds=settings.ENV.gateway_key_stale_s)
            renewed = Leases(settings.ENV.cell, client, alone=alone).renew(timezone.now())
            give_back(settings.ENV.cell, client, timezone.now())
    except (redis.RedisError, DatabaseError, InterfaceError) as error:
        connections[DATABASE].close()
        log.warning("leases.not_renewed", error=type(error).__name__)
        return
    if renewed.n_changed:
        log.info("leases.changed", n_tenants=renewed.n_tenants, n_changed=renewed.n_changed)
