"""What a directory's word does to people's places: members come, go, and get the role that their groups say.

Called by users.py and groups.py inside the tenant's transaction, and where the sign-in policy's roles change. Writes
go through the services that everybody uses, so that the last owner stays, whoever asks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final
from uuid import UUID

import structlog
from django.utils import timezone as clock

from controlplane.errors import ConflictError, InvalidInputError
from controlplane.identity import invitations, policies, sessions
from controlplane.identity.admission import role_by_groups, set_role
from controlplane.identity.models import Invitation, SignInPolicy
from controlplane.scim.models import ScimMembership, ScimUser
from controlplane.tenants import key_services, selectors, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Member, Role

log = structlog.get_logger("corral.scim")

_BATCH: Final = 500  # people whose roles are looked at together


def let_in(row: ScimUser) -> None:
    """A place for who has none: by their groups' role, an open invitation's, or the default."""
    organization_id = row.organization_id
    policy = policies.policy(organization_id=organization_id)
    by_groups = role_by_groups(policy, _groups_of(organization_id, [row.id])[row.id])
    member = Member.objects.filter(organization_id=organization_id, user_id=row.user_id).first()
    if member is not None:
        if by_groups is not None:
            set_role(member=member, role=by_groups, policy=policy)
        return
    invited = invitations.take_open(organization_id=organization_id, user=row.user)
    role = by_groups or invited or Role(policy.default_role)
    services.add_member(organization_id=organization_id, user=row.user, role=role)


def put_out(row: ScimUser) -> None:
    """End the person's place, their open invitations and sessions, and, where the policy says so, their API keys.

    Raises ConflictError for the last owner: nothing is changed then.
    """
    organization_id = row.organization_id
    member = Member.objects.filter(organization_id=organization_id, user_id=row.user_id).first()
    if member is not None:
        try:
            services.remove_member(organization_id=organization_id, member_id=member.id)
        except InvalidInputError as error:
            raise ConflictError(f"active: {error.message}", field="active") from error
    now = clock.now()
    Invitation.objects.filter(
        organization_id=organization_id,
        email__in={row.email, row.user.email},
        accepted_at=None,
        revoked_at=None,
    ).update(revoked_at=now)
    if selectors.memberships_of(user_id=row.user_id):
        # They still belong elsewhere: a session by password stays, and does not reach this organization any more.
        sessions.end_vouched(organization_id=organization_id, user_id=row.user_id)
    else:
        sessions.end_all(user_id=row.user_id)
    if policies.policy(organization_id=organization_id).revoke_keys_of_leavers:
        _revoke_keys(row)
    log.info("scim_user.left", organization=organization_id.hex, scim_user=row.id.hex)


def apply_roles(*, organization_id: UUID, scim_user_ids: Iterable[UUID] | None = None) -> None:
    """Give members the roles of their groups, where the policy maps any; None: all whom the directory knows."""
    with tenant(organization_id):
        policy = policies.policy(organization_id=organization_id)
        if not policy.group_roles:
            return
        if scim_user_ids is None:
            rows = ScimUser.objects.filter(organization_id=organization_id, is_active=True)
            scim_user_ids = rows.values_list("id", flat=True)
        wanted = sorted(scim_user_ids)
        for at in range(0, len(wanted), _BATCH):
            _apply(organization_id, policy, wanted[at : at + _BATCH])


def _apply(organization_id: UUID, policy: SignInPolicy, scim_user_ids: list[UUID]) -> None:
    rows = ScimUser.objects.filter(organization_id=organization_id, id__in=scim_user_ids, is_active=True)
    users = dict(rows.values_list("user_id", "id"))
    groups = _groups_of(organization_id, users.values())
    members = Member.objects.filter(organization_id=organization_id, user_id__in=users).order_by("id")
    for member in members:
        role = role_by_groups(policy, groups[users[member.user_id]])
        if role is not None:
            set_role(member=member, role=role, policy=policy)


def _groups_of(organization_id: UUID, scim_user_ids: Iterable[UUID]) -> dict[UUID, set[str]]:
    """Names and external ids of each user's groups: the policy may map either, as its sign-in claims carry either."""
    found: dict[UUID, set[str]] = defaultdict(set)
    rows = ScimMembership.objects.filter(organization_id=organization_id, user_id__in=list(scim_user_ids))
    for user_id, name, external_id in rows.values_list(
        "user_id", "group__display_name", "group__external_id"
    ):
        found[user_id] |= {name, external_id} - {""}
    return found


def _revoke_keys(row: ScimUser) -> None:
    keys = ApiKey.objects.filter(
        organization_id=row.organization_id, created_by_id=row.user_id, revoked_at=None
    )
    for key_id in list(keys.values_list("id", flat=True)):
        key_services.revoke_api_key(organization_id=row.organization_id, key_id=key_id)
