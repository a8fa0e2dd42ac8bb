"""What an organization asks of a sign-in: reading and changing it. tenants/signed_in.py
enforces it at every request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import UUID

import structlog

from controlplane.errors import InvalidInputError
from controlplane.identity.models import SignInPolicy
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role

log = structlog.get_logger("corral.identity")

MAX_GROUPS: Final = 200
MAX_GROUP_CHARS: Final = 200


def policy(*, organization_id: UUID) -> SignInPolicy:
    """The organization's, or the defaults, which are not stored."""
    found = SignInPolicy.objects.filter(organization_id=organization_id).first()
    return found or SignInPolicy(organization_id=organization_id)


def set_policy(
    *,
    organization_id: UUID,
    require_mfa: bool | None = None,
    require_sso: bool | None = None,
    just_in_time: bool | None = None,
    default_role: Role | None = None,
    group_roles: Mapping[str, Role] | None = None,
    revoke_keys_of_leavers: bool | None = None,
) -> SignInPolicy:
    """Change what is given. Raises InvalidInputError (too many groups, names too long)."""
    if group_roles is not None and (
        len(group_roles) > MAX_GROUPS or any(not 0 < len(each) <= MAX_GROUP_CHARS for each in group_roles)
    ):
        raise InvalidInputError(
            f"group_roles: at most {MAX_GROUPS} groups with names of 1 to {MAX_GROUP_CHARS} characters",
            field="group_roles",
        )
    given = {
        "require_mfa": require_mfa,
        "require_sso": require_sso,
        "just_in_time": just_in_time,
        "default_role": default_role,
        "group_roles": None
        if group_roles is None
        else {name: str(role) for name, role in group_roles.items()},
        "revoke_keys_of_leavers": revoke_keys_of_leavers,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    with tenant(organization_id):
        row, _ = SignInPolicy.objects.get_or_create(organization_id=organization_id)
        for name, value in changes.items():
            setattr(row, name, value)
        row.save(update_fields=[*changes, "updated_at"])
    log.info("sign_in_policy.changed", organization=organization_id.hex, fields=sorted(changes))
    return row
