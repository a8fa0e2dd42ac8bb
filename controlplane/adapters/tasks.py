"""Celery tasks of adapters. Run by the control worker as operator, scheduled in controlplane/celery.py. May run twice.

Importing this module registers the handler of uploads with the long operations.
"""

from __future__ import annotations

import structlog
from celery import shared_task
from django.utils import timezone

from controlplane.adapters import files, purging, receiving  # noqa: F401 - registers a handler

log = structlog.get_logger("corral.adapters")


@shared_task(name="adapters.clean_up")  # type: ignore[untyped-decorator]
def clean_up() -> None:
    """Files of adapters retired a while ago go; who never uploaded is refused, so that the name is free."""
    now = timezone.now()
    n_purged, n_given_up = purging.purge_retired(now), purging.give_up_waiting(now)
    if n_purged or n_given_up:
        log.info("adapters.cleaned_up", n_purged=n_purged, n_given_up=n_given_up)
