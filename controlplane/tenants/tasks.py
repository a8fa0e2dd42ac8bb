"""Celery tasks of tenants. Run by the control worker, scheduled in controlplane/celery.py; may run twice."""

from datetime import timedelta

import structlog
from celery import shared_task
from django.db import connection

log = structlog.get_logger("corral.tenants")

# Gateways poll every few seconds; one that was away for longer than this starts with an empty cache.
KEEP_CHANGES = timedelta(hours=1)


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
