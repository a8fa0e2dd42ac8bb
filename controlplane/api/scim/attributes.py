"""What a filter may ask of users and groups: SCIM's attribute names, as questions to our tables.

Used by views.py for lists and searches; filters.py knows the grammar. Every question stays inside the organization.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID

from django.db.models import Q

from controlplane.api.scim import documents, filters
from controlplane.errors import NotFoundError
from controlplane.scim.models import ScimMembership


def user_attributes(organization_id: UUID) -> dict[str, filters.Asker]:
    """Of users, by their names in small letters."""
    memberships = ScimMembership.objects.filter(organization_id=organization_id)

    def in_group(text: str) -> Q:
        return Q(id__in=memberships.filter(group_id=_or_none(documents.group_id, text)).values("user"))

    groups = filters.among(in_group, Q(id__in=memberships.values("user")))
    return {
        "id": filters.among(lambda text: Q(id=_or_none(documents.user_id, text)), ~Q(pk__in=[])),
        "username": filters.text("user_name"),
        "externalid": filters.text("external_id", is_exact=True),
        "displayname": filters.text("display_name"),
        "name.givenname": filters.text("given_name"),
        "name.familyname": filters.text("family_name"),
        "active": filters.truth("is_active"),
        "emails": filters.text("email"),
        "emails.value": filters.text("email"),
        "emails.type": filters.constant("work"),
        "emails.primary": filters.constant(True),
        "groups": groups,
        "groups.value": groups,
        "meta.created": filters.instant("created_at"),
        "meta.lastmodified": filters.instant("updated_at"),
    }


def group_attributes(organization_id: UUID) -> dict[str, filters.Asker]:
    """Of groups."""
    memberships = ScimMembership.objects.filter(organization_id=organization_id)

    def has_member(text: str) -> Q:
        return Q(id__in=memberships.filter(user_id=_or_none(documents.user_id, text)).values("group"))

    members = filters.among(has_member, Q(id__in=memberships.values("group")))
    return {
        "id": filters.among(lambda text: Q(id=_or_none(documents.group_id, text)), ~Q(pk__in=[])),
        "displayname": filters.text("display_name"),
        "externalid": filters.text("external_id", is_exact=True),
        "members": members,
        "members.value": members,
        "meta.created": filters.instant("created_at"),
        "meta.lastmodified": filters.instant("updated_at"),
    }


def _or_none(read: Callable[[str], UUID], text: str) -> UUID | None:
    """What is no id is nobody's."""
    try:
        return read(text)
    except NotFoundError:
        return None
