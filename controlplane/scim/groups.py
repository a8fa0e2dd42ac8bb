"""Groups of a directory and who is in them. Every change gives the people concerned the role that their groups say.

Called by the SCIM endpoints inside the tenant. Members are ids of ScimUser; groups in groups are not kept: directories
send them flattened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import structlog
from django.utils import timezone as clock

from controlplane import ids
from controlplane.errors import InvalidInputError
from controlplane.saving import insert, update
from controlplane.scim import places, selectors
from controlplane.scim.models import ScimGroup, ScimMembership, ScimUser
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.scim")

MAX_GROUPS: Final = 2_000  # of one organization
MAX_MEMBERS: Final = 20_000  # of one group
_TAKEN: Final = {
    "scimgroup_name_unique": ("displayName", "displayName: there is a group with this name already")
}


@dataclass(frozen=True, slots=True)
class GroupChange:
    """What is to become of a group; None and empty leave things as they are. `members` replaces all of them, then
    `leave` go and `join` come.
    """

    display_name: str | None = None
    external_id: str | None = None
    members: frozenset[UUID] | None = None
    join: frozenset[UUID] = frozenset()
    leave: frozenset[UUID] = frozenset()


def create_group(
    *, organization_id: UUID, display_name: str, external_id: str = "", members: Collection[UUID] = ()
) -> ScimGroup:
    """A new group. Raises InvalidInputError (name, an unknown member, too many) or ConflictError (name)."""
    row = ScimGroup(
        organization_id=organization_id,
        display_name=display_name,
        external_id=external_id,
        updated_at=clock.now(),
    )
    with tenant(organization_id):
        if ScimGroup.objects.filter(organization_id=organization_id).count() >= MAX_GROUPS:
            raise InvalidInputError(
                f"there are {MAX_GROUPS} groups already: delete some", field="displayName"
            )
        insert(row, taken=_TAKEN)
        joined = _join(row, frozenset(members))
        _touch(organization_id, joined)
    log.info("scim_group.created", organization=organization_id.hex, group=row.id.hex)
    return row


def change_group(*, organization_id: UUID, group_id: UUID, change: GroupChange) -> ScimGroup:
    """Raises NotFoundError, InvalidInputError (name, an unknown member, too many), ConflictError (name)."""
    with tenant(organization_id):
        row = selectors.group(organization_id=organization_id, group_id=group_id, is_locked=True)
        fields = {
            name: value
            for name, value in (("display_name", change.display_name), ("external_id", change.external_id))
            if value is not None and value != getattr(row, name)
        }
        concerned: set[UUID] = set()
        if fields:
            for name, value in fields.items():
                setattr(row, name, value)
            concerned |= set(row.memberships.values_list("user_id", flat=True))
        leave, join = change.leave, change.join
        if change.members is not None:
            present = frozenset(row.memberships.values_list("user_id", flat=True))
            wanted = (change.members - leave) | join
            leave, join = present - wanted, wanted - present
        moved = _leave(row, leave - join) | _join(row, join)
        if not fields and not moved:
            return row
        row.updated_at = clock.now()
        update(row, taken=_TAKEN)
        _touch(organization_id, concerned | moved)
    log.info("scim_group.changed", organization=organization_id.hex, group=row.id.hex, n_moved=len(moved))
    return row


def delete_group(*, organization_id: UUID, group_id: UUID) -> None:
    """Its people keep their places, and get the role of the groups that are left. Raises NotFoundError."""
    with tenant(organization_id):
        row = selectors.group(organization_id=organization_id, group_id=group_id, is_locked=True)
        concerned = set(row.memberships.values_list("user_id", flat=True))
        row.delete()
        _touch(organization_id, concerned)
    log.info("scim_group.deleted", organization=organization_id.hex, group=group_id.hex)


def _join(row: ScimGroup, scim_user_ids: frozenset[UUID]) -> set[UUID]:
    """Who was not in it before."""
    if not scim_user_ids:
        return set()
    organization_id = row.organization_id
    # Locked: who is deleted meanwhile must not be left in a group.
    rows = ScimUser.objects.select_for_update(no_key=True).order_by("id")
    rows = rows.filter(organization_id=organization_id, id__in=scim_user_ids)
    known = frozenset(rows.values_list("id", flat=True))
    if unknown := sorted(scim_user_ids - known):
        name = ids.to_text(ids.Prefix.SCIM_USER, unknown[0])
        raise InvalidInputError(f"members: there is no user {name} in this directory", field="members")
    present = frozenset(row.memberships.values_list("user_id", flat=True))
    fresh = known - present
    if len(present) + len(fresh) > MAX_MEMBERS:
        raise InvalidInputError(f"members: a group has at most {MAX_MEMBERS}", field="members")
    ScimMembership.objects.bulk_create(
        ScimMembership(organization_id=organization_id, group=row, user_id=each) for each in sorted(fresh)
    )
    return set(fresh)


def _leave(row: ScimGroup, scim_user_ids: frozenset[UUID]) -> set[UUID]:
    """Who was in it. An id that is not is no error: the end is the same."""
    rows = ScimMembership.objects.filter(
        organization_id=row.organization_id, group=row, user_id__in=scim_user_ids
    )
    gone = set(rows.values_list("user_id", flat=True)) if scim_user_ids else set()
    if gone:
        rows.delete()
    return gone


def _touch(organization_id: UUID, scim_user_ids: Iterable[UUID]) -> None:
    """Their entries name other groups now, so they have another version; and perhaps another role."""
    concerned = sorted(scim_user_ids)
    if not concerned:
        return
    ScimUser.objects.filter(organization_id=organization_id, id__in=concerned).update(updated_at=clock.now())
    places.apply_roles(organization_id=organization_id, scim_user_ids=concerned)
