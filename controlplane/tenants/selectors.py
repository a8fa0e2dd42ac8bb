"""Reads about tenants. Each is scoped: by an organization, or by a user whose memberships are asked for.

The explicit filter is the first lock, row-level security the second; neither is trusted alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from django.db import connection

from controlplane.errors import NotFoundError
from controlplane.tenants.models import ApiKey, Member, Organization, Project, Role


@dataclass(frozen=True, slots=True)
class Membership:
    """A user's place in one organization, as it was when the request began."""

    organization_id: UUID
    member_id: UUID
    role: Role
    organization_name: str
    organization_slug: str
    timezone: str
    suspended_at: datetime | None
    require_mfa: bool = False
    require_sso: bool = False


def memberships_of(*, user_id: UUID) -> tuple[Membership, ...]:
    """The organizations this user belongs to, by name. Needs no tenant."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT organization_id, member_id, role, name, slug, timezone, suspended_at, "
            "coalesce(require_mfa, false), coalesce(require_sso, false) "
            "FROM corral_user_memberships(%s) "
            "LEFT JOIN corral_user_sign_in_policies(%s) USING (organization_id) ORDER BY name, organization_id",
            [user_id, user_id],
        )
        rows: Iterable[tuple[UUID, UUID, str, str, str, str, datetime | None, bool, bool]] = cursor.fetchall()
    return tuple(Membership(row[0], row[1], Role(row[2]), *row[3:]) for row in rows)


def organization(*, organization_id: UUID) -> Organization:
    """The organization itself. Raises NotFoundError."""
    found = Organization.objects.filter(id=organization_id).first()
    if found is None:
        raise NotFoundError("no such organization", field="organization")
    return found


def projects(*, organization_id: UUID) -> list[Project]:
    """All projects, by name."""
    return list(Project.objects.filter(organization_id=organization_id).order_by("name", "id"))


def project(*, organization_id: UUID, project_id: UUID) -> Project:
    """One project. Raises NotFoundError, also for another tenant's."""
    found = Project.objects.filter(organization_id=organization_id, id=project_id).first()
    if found is None:
        raise NotFoundError("no such project", field="project")
    return found


def api_keys(*, organization_id: UUID, project_id: UUID | None = None, limit: int = 200) -> list[ApiKey]:
    """Keys of the organization (or of one project), newest first, revoked ones included; at most `limit`."""
    keys = ApiKey.objects.filter(organization_id=organization_id).select_related("project", "created_by")
    if project_id is not None:
        keys = keys.filter(project_id=project_id)
    return list(keys.order_by("-created_at", "-id")[:limit])


def api_key(*, organization_id: UUID, key_id: UUID) -> ApiKey:
    """One key. Raises NotFoundError, also for another tenant's."""
    found = (
        ApiKey.objects.filter(organization_id=organization_id, id=key_id).select_related("project").first()
    )
    if found is None:
        raise NotFoundError("no such API key", field="api_key")
    return found


def members(*, organization_id: UUID) -> list[Member]:
    """Members with their users, by e-mail."""
    return list(
        Member.objects.filter(organization_id=organization_id)
        .select_related("user")
        .order_by("user__email", "id")
    )


def member(*, organization_id: UUID, member_id: UUID) -> Member:
    """One member with its user. Raises NotFoundError, also for another tenant's."""
    found = (
        Member.objects.filter(organization_id=organization_id, id=member_id).select_related("user").first()
    )
    if found is None:
        raise NotFoundError("no such member", field="member")
    return found
