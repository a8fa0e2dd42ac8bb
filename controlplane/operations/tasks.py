"""Celery tasks of long operations. Run by the control worker, scheduled in controlplane/celery.py; may run twice."""

from datetime import timedelta

import structlog
from celery import shared_task
from django.utils import timezone

from controlplane.operations import advance as advancing
from controlplane.operations.models import Operation

log = structlog.get_logger("corral.operations")

MAX_STEPS = 50  # a run; the next goes on
KEEP = timedelta(days=30)


@shared_task(name="operations.advance")  # type: ignore[untyped-decorator]
def advance() -> None:
    """One step of each operation that is due."""
    advancing.advance_due(MAX_STEPS)


@shared_task(name="operations.forget")  # type: ignore[untyped-decorator]
def forget() -> None:
    """Delete operations that ended a month ago; a bounded number a run."""
    old = Operation.objects.filter(finished_at__lt=timezone.now() - KEEP).order_by("finished_at")
    n_forgotten, _ = Operation.objects.filter(pk__in=list(old.values_list("pk", flat=True)[:10_000])).delete()
    if n_forgotten:
        log.info("operations.forgotten", n_forgotten=n_forgotten)
