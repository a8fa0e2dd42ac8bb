"""Members: people with a role in the organization."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, MemberId, UserId
from controlplane.tenants import selectors, services
from controlplane.tenants.models import Member, Role
from controlplane.tenants.rights import Permission, require

router = Router(tags=["members"])


class MemberOut(Schema):
    """A person's place in the organization."""

    id: MemberId
    user_id: UserId
    email: str
    name: str
    role: Role
    created_at: datetime


class MemberChange(Body):
    """The new role."""

    role: Role


class MemberQuery(PageQuery):
    """Which members."""

    role: Role | None = None
    email: Annotated[str, Field(max_length=254)] | None = None


def member_out(row: Member) -> MemberOut:
    return MemberOut(
        id=row.id,
        user_id=row.user_id,
        email=row.user.email,
        name=row.user.name,
        role=Role(row.role),
        created_at=row.created_at,
    )


def _current(request: ApiRequest, member_id: MemberId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return selectors.member(organization_id=organization_id, member_id=member_id), member_out


@operation(router, "GET", "/members", Permission.MEMBERS_READ, Page[MemberOut])
def list_members(request: ApiRequest, query: Query[MemberQuery]) -> Page[MemberOut]:
    """Members, newest first."""
    rows = Member.objects.filter(organization_id=request.caller.organization_id).select_related("user")
    rows = matching(rows, role=query.role)
    if query.email is not None:
        rows = rows.filter(user__email=query.email.lower())
    return page(rows, query, member_out)


@operation(router, "GET", "/members/{member_id}", Permission.MEMBERS_READ, MemberOut)
def get_member(request: ApiRequest, member_id: MemberId) -> MemberOut:
    """One member."""
    organization_id = request.caller.organization_id
    return member_out(selectors.member(organization_id=organization_id, member_id=member_id))


@operation(router, "PATCH", "/members/{member_id}", Permission.MEMBERS_WRITE, MemberOut, current=_current)
def change_member(request: ApiRequest, member_id: MemberId, body: MemberChange) -> MemberOut:
    """Give a member another role. Making or unmaking an owner needs owners:write."""
    _guard_owners(request, member_id, body.role)
    organization_id = request.caller.organization_id
    services.change_role(organization_id=organization_id, member_id=member_id, role=body.role)
    return member_out(selectors.member(organization_id=organization_id, member_id=member_id))


@operation(
    router, "DELETE", "/members/{member_id}", Permission.MEMBERS_WRITE, None, status=204, current=_current
)
def remove_member(request: ApiRequest, member_id: MemberId) -> None:
    """Take a member's place away. The last owner stays; removing an owner needs owners:write."""
    _guard_owners(request, member_id, None)
    services.remove_member(organization_id=request.caller.organization_id, member_id=member_id)


def _guard_owners(request: ApiRequest, member_id: MemberId, role: Role | None) -> None:
    caller = request.caller
    member = selectors.member(organization_id=caller.organization_id, member_id=member_id)
    if Role.OWNER in (member.role, role):
        require(caller.role, Permission.OWNERS_WRITE, caller.scopes)
