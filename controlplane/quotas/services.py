"""Writes about quotas. Launches look at them afresh each time, so nobody has to be told."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

import structlog

from controlplane.errors import InvalidInputError
from controlplane.quotas import selectors
from controlplane.quotas.models import Quota, QuotaKind
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.quotas")

MAX_LIMIT: Final = (1 << 63) - 1


def set_own(*, organization_id: UUID, kind: QuotaKind, limit: int) -> None:
    """A tenant's own limit. Raises InvalidInputError where it exceeds the house's ceiling."""
    _check(limit)
    with tenant(organization_id):
        found = next(each for each in selectors.limits(organization_id=organization_id) if each.kind is kind)
        if found.ceiling is not None and limit > found.ceiling:
            raise InvalidInputError(
                f"limit={limit}: the house allows {found.ceiling} at most; ask its operator for more",
                field="limit",
            )
        Quota.objects.update_or_create(
            organization_id=organization_id,
            cell="",
            kind=kind.value,
            by_house=False,
            defaults={"limit": limit},
        )
    log.info("quota.set", organization=organization_id.hex, kind=kind.value, limit=limit)


def clear_own(*, organization_id: UUID, kind: QuotaKind) -> None:
    """Only the house's ceiling holds then. Nothing to clear is fine."""
    with tenant(organization_id):
        Quota.objects.filter(organization_id=organization_id, kind=kind.value, by_house=False).delete()


def set_ceiling(*, organization_id: UUID | None, kind: QuotaKind, limit: int | None, cell: str = "") -> None:
    """The house's, for an organization, or (None) for a cell, or for all of it; None lifts it. As operator.

    A tenant's own limit may lie above it then: the lower counts.
    """
    where: dict[str, Any] = {
        "organization_id": organization_id,
        "cell": cell,
        "kind": kind.value,
        "by_house": True,
    }
    if limit is None:
        Quota.objects.filter(**where).delete()
    else:
        _check(limit)
        Quota.objects.update_or_create(**where, defaults={"limit": limit})
    log.info(
        "quota.ceiling", organization=organization_id and organization_id.hex, kind=kind.value, limit=limit
    )


def _check(limit: int) -> None:
    if not 0 <= limit <= MAX_LIMIT:
        raise InvalidInputError(f"limit={limit}: must be from 0 to {MAX_LIMIT}", field="limit")
