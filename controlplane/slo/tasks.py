"""Celery tasks of service levels: alerts every half minute, old windows forgotten every ten.

Run by the control worker; each may run twice or late. A database that is away ends a run; the next one looks again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import structlog
from celery import shared_task
from django.db import DatabaseError, InterfaceError, connections

from controlplane.slo import alerting
from controlplane.webhooks.services import emit

DATABASE: Final = "default"  # the control worker's is the operator's
log = structlog.get_logger("corral.slo")


@shared_task(  # type: ignore[untyped-decorator]
    name="slo.alert", ignore_result=True, expires=30, soft_time_limit=25, time_limit=30
)
def alert() -> None:
    """Raise and end alerts about error budgets."""
    _once(lambda now: alerting.look(now=now, tell=tell, using=DATABASE))


@shared_task(name="slo.prune", ignore_result=True, expires=600)  # type: ignore[untyped-decorator]
def prune() -> None:
    """Forget windows that are no longer kept."""
    _once(lambda now: alerting.prune(now=now, using=DATABASE))


def tell(organization_id: UUID, kind: str, data: dict[str, Any]) -> None:
    """A webhook, and mail to those who answer for the tenant; inside the transaction of the alert."""
    emit(organization_id=organization_id, kind=kind, data=data)


def _once(work: Any) -> None:
    try:
        work(datetime.now(tz=UTC))
    except (DatabaseError, InterfaceError) as error:
        connections[DATABASE].close()
        log.warning("slo.interrupted", error=type(error).__name__)
