"""Reads about an organization's directory. Each is scoped by the organization, inside its tenant."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

from django.db.models import Q

from controlplane.errors import NotFoundError
from controlplane.scim.models import ScimGroup, ScimUser


def is_deactivated(*, organization_id: UUID, user_id: UUID, emails: Iterable[str]) -> bool:
    """Whether the directory knows this person, by account or by address, and says that they are to stay out."""
    found = ScimUser.objects.filter(organization_id=organization_id, is_active=False)
    return found.filter(Q(user_id=user_id) | Q(email__in=list(emails))).exists()


def active_users(*, organization_id: UUID) -> frozenset[UUID]:
    """Ids of the accounts whose places the directory has in hand."""
    rows = ScimUser.objects.filter(organization_id=organization_id, is_active=True)
    return frozenset(rows.values_list("user_id", flat=True))


def user(*, organization_id: UUID, scim_user_id: UUID, is_locked: bool = False) -> ScimUser:
    """One entry with its account. Raises NotFoundError, also for another tenant's."""
    rows = ScimUser.objects.select_related("user")
    if is_locked:
        rows = rows.select_for_update(of=("self",))
    found = rows.filter(organization_id=organization_id, id=scim_user_id).first()
    if found is None:
        raise NotFoundError("no such user", field="id")
    return found


def group(*, organization_id: UUID, group_id: UUID, is_locked: bool = False) -> ScimGroup:
    """One group. Raises NotFoundError, also for another tenant's."""
    rows = ScimGroup.objects.select_for_update() if is_locked else ScimGroup.objects.all()
    found = rows.filter(organization_id=organization_id, id=group_id).first()
    if found is None:
        raise NotFoundError("no such group", field="id")
    return found
