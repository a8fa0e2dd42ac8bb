"""Celery tasks of rollouts. Run by the control worker, scheduled in controlplane/celery.py; may run twice."""

from __future__ import annotations

from celery import shared_task

from controlplane.rollouts import (
    canary,  # noqa: F401 - registers its handler
    services,
)


@shared_task(name="rollouts.mend", ignore_result=True, expires=60)  # type: ignore[untyped-decorator]
def mend() -> None:
    """Nothing may hold a canary for ever."""
    services.mend()
