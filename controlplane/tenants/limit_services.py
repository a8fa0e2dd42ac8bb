"""Writes about what an organization, a project or a key may use: its five limits, and its weight in a full queue.

Surfaces and commands call these after they decided who may (rights.py); services.py and key_services.py check with them
what a new row is given. Gateways are told after commit. Budgets with windows, and what was spent, are kept elsewhere
(controlplane/budgets, billing).
"""

from dataclasses import asdict
from uuid import UUID

from controlplane.errors import InvalidInputError
from controlplane.saving import check_fields
from controlplane.tenants import invalidation, selectors
from controlplane.tenants.context import tenant
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import ApiKey, Organization, Project


def set_organization_limits(*, organization_id: UUID, limits: Limits) -> None:
    """Replace all five limits of the organization."""
    check_limits(limits)
    with tenant(organization_id):
        _set_limits(selectors.organization(organization_id=organization_id), limits)
        invalidation.publish_after_commit(invalidation.organization_ref(organization_id))


def set_project_limits(*, organization_id: UUID, project_id: UUID, limits: Limits) -> None:
    """Replace all five limits of a project. Raises NotFoundError."""
    check_limits(limits)
    with tenant(organization_id):
        _set_limits(selectors.project(organization_id=organization_id, project_id=project_id), limits)
        invalidation.publish_after_commit(invalidation.project_ref(project_id))


def set_api_key_limits(*, organization_id: UUID, key_id: UUID, limits: Limits) -> None:
    """Replace all five limits of a key. Raises NotFoundError."""
    check_limits(limits)
    with tenant(organization_id):
        key = selectors.api_key(organization_id=organization_id, key_id=key_id)
        _set_limits(key, limits)
        invalidation.publish_after_commit(invalidation.key_ref(key.lookup))


def set_weight(
    *, organization_id: UUID, weight: int, project_id: UUID | None = None, key_id: UUID | None = None
) -> None:
    """What an organization, one of its projects or one of its keys gets of a full queue, beside others of the
    same level (100 = ordinary). Raises NotFoundError, InvalidInputError (weight, or both ids).
    """
    check_weight(weight)
    if project_id is not None and key_id is not None:
        raise InvalidInputError("project_id and key_id: name one of them, or none", field="key_id")
    with tenant(organization_id):
        row: Organization | Project | ApiKey
        if key_id is not None:
            row = selectors.api_key(organization_id=organization_id, key_id=key_id)
            ref = invalidation.key_ref(row.lookup)
        elif project_id is not None:
            row = selectors.project(organization_id=organization_id, project_id=project_id)
            ref = invalidation.project_ref(project_id)
        else:
            row = selectors.organization(organization_id=organization_id)
            ref = invalidation.organization_ref(organization_id)
        row.weight = weight
        row.save(update_fields=["weight", *(["updated_at"] if hasattr(row, "updated_at") else [])])
        invalidation.publish_after_commit(ref)


def check_limits(limits: Limits) -> None:
    for field, message in limits.problems():
        raise InvalidInputError(message, field=field)


def check_weight(weight: int) -> None:
    if not 1 <= weight <= 10_000:
        raise InvalidInputError(f"weight={weight}: must be from 1 to 10000", field="weight")


def _set_limits(row: Organization | Project | ApiKey, limits: Limits) -> None:
    values = asdict(limits)
    for name, value in values.items():
        setattr(row, name, value)
    check_fields(row)
    row.save(update_fields=[*values, *(["updated_at"] if hasattr(row, "updated_at") else [])])
