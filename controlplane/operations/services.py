"""Begins long operations and reads them, each inside one organization. The control worker goes on (advance.py)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from django.db import connection
from django.utils import timezone

from controlplane.errors import CorralError, NotFoundError
from controlplane.operations.models import OPEN, Operation
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.operations")

MAX_OPEN: Final = 100  # of one organization


class TooManyOperationsError(CorralError):
    """So many are open that no more is begun: one that ends makes room."""

    status = 409
    code = "too_many_operations"


def begin(
    *,
    organization_id: UUID,
    kind: str,
    subject: str = "",
    params: Mapping[str, Any] | None = None,
    max_s: float = 3600,
) -> Operation:
    """A new operation, or the open one of the same kind, subject and params. Given up after `max_s`.

    Part of the caller's transaction: undone with it. Raises TooManyOperationsError.
    """
    with tenant(organization_id):
        open_ones = Operation.objects.filter(organization_id=organization_id, state__in=OPEN)
        same = open_ones.filter(kind=kind, subject=subject, params=dict(params or {})).first()
        if same is not None:
            return same
        if open_ones.count() >= MAX_OPEN:
            raise TooManyOperationsError(f"{MAX_OPEN} operations are open: wait until one has ended")
        now = timezone.now()
        made = Operation(
            organization_id=organization_id,
            kind=kind,
            subject=subject,
            params=dict(params or {}),
            actor=_actor(),
            created_at=now,
            next_at=now,
            deadline_at=now + timedelta(seconds=max_s),
        )
        made.save(force_insert=True)
    log.info("operation.begun", organization=organization_id.hex, operation=made.id.hex, kind=kind)
    return made


def operation(*, organization_id: UUID, operation_id: UUID) -> Operation:
    """One operation. Raises NotFoundError, also for another tenant's."""
    found = Operation.objects.filter(organization_id=organization_id, id=operation_id).first()
    if found is None:
        raise NotFoundError("no such operation", field="operation")
    return found


def _actor() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(nullif(current_setting('corral.actor', true), ''), current_user)")
        return str(cursor.fetchone()[0])[:64]
