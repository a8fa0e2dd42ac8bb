"""Which role may do what. Surfaces ask before they call a service; services do not know who is asking.

A permission is `thing:verb`, the same word in the REST API's scopes, in refusals and in docs/permissions.md (written by
`manage.py permissions`). Reading and writing are apart, money and people too.
"""

from __future__ import annotations

from collections.abc import Set
from enum import StrEnum
from typing import Final

from controlplane.errors import NotPermittedError
from controlplane.tenants.models import Role


class Permission(StrEnum):
    """What can be allowed."""

    ORGANIZATION_READ = "organization:read"
    ORGANIZATION_WRITE = "organization:write"
    PROJECTS_READ = "projects:read"
    PROJECTS_WRITE = "projects:write"
    MEMBERS_READ = "members:read"
    MEMBERS_WRITE = "members:write"
    OWNERS_WRITE = "owners:write"
    SIGN_IN_READ = "sign_in:read"
    SIGN_IN_WRITE = "sign_in:write"
    SERVICE_ACCOUNTS_READ = "service_accounts:read"
    SERVICE_ACCOUNTS_WRITE = "service_accounts:write"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    LIMITS_WRITE = "limits:write"
    DEPLOYMENTS_READ = "deployments:read"
    DEPLOYMENTS_WRITE = "deployments:write"
    MODELS_USE = "models:use"
    USAGE_READ = "usage:read"
    BILLING_READ = "billing:read"
    BILLING_WRITE = "billing:write"
    AUDIT_READ = "audit:read"
    DATA_READ = "data:read"
    DATA_WRITE = "data:write"
    WEBHOOKS_READ = "webhooks:read"
    WEBHOOKS_WRITE = "webhooks:write"
    QUOTAS_READ = "quotas:read"
    QUOTAS_WRITE = "quotas:write"
    UPSTREAMS_READ = "upstreams:read"
    UPSTREAMS_WRITE = "upstreams:write"

    @property
    def sentence(self) -> str:
        """In the words of a refusal: "you may not …"."""
        return _SENTENCES[self]


_SENTENCES: Final[dict[Permission, str]] = {
    Permission.ORGANIZATION_READ: "see this organization",
    Permission.ORGANIZATION_WRITE: "change this organization",
    Permission.PROJECTS_READ: "see projects",
    Permission.PROJECTS_WRITE: "create and change projects",
    Permission.MEMBERS_READ: "see members",
    Permission.MEMBERS_WRITE: "add, change and remove members",
    Permission.OWNERS_WRITE: "make or remove owners",
    Permission.SIGN_IN_READ: "see how people sign in",
    Permission.SIGN_IN_WRITE: "change how people sign in",
    Permission.SERVICE_ACCOUNTS_READ: "see service accounts and their tokens",
    Permission.SERVICE_ACCOUNTS_WRITE: "create and change service accounts and their tokens",
    Permission.KEYS_READ: "see API keys",
    Permission.KEYS_WRITE: "create and revoke API keys",
    Permission.LIMITS_WRITE: "change limits and budgets",
    Permission.DEPLOYMENTS_READ: "see deployments",
    Permission.DEPLOYMENTS_WRITE: "create and change deployments",
    Permission.MODELS_USE: "use models",
    Permission.USAGE_READ: "see usage",
    Permission.BILLING_READ: "see billing",
    Permission.BILLING_WRITE: "change billing",
    Permission.AUDIT_READ: "see the audit log",
    Permission.DATA_READ: "read exports of everything, and the state of an erasure",
    Permission.DATA_WRITE: "export everything, and erase the organization",
    Permission.WEBHOOKS_READ: "see webhooks and their deliveries",
    Permission.WEBHOOKS_WRITE: "create and change webhooks",
    Permission.QUOTAS_READ: "see quotas",
    Permission.QUOTAS_WRITE: "change quotas",
    Permission.UPSTREAMS_READ: "see upstreams and what they cost",
    Permission.UPSTREAMS_WRITE: "attach and change upstreams, and let prompts leave",
}

_READ: Final = frozenset(
    {
        Permission.ORGANIZATION_READ,
        Permission.PROJECTS_READ,
        Permission.MEMBERS_READ,
        Permission.KEYS_READ,
        Permission.DEPLOYMENTS_READ,
        Permission.USAGE_READ,
        Permission.QUOTAS_READ,
    }
)
PERMISSIONS: Final[dict[Role, frozenset[Permission]]] = {
    Role.OWNER: frozenset(Permission),
    # Whoever connects an identity provider can have it vouch for anybody, an owner included.
    Role.ADMIN: frozenset(Permission)
    - {Permission.OWNERS_WRITE, Permission.SIGN_IN_WRITE, Permission.DATA_READ, Permission.DATA_WRITE},
    Role.BILLING: _READ
    | {Permission.BILLING_READ, Permission.BILLING_WRITE, Permission.LIMITS_WRITE, Permission.UPSTREAMS_READ},
    Role.DEVELOPER: _READ
    | {Permission.KEYS_WRITE, Permission.DEPLOYMENTS_WRITE, Permission.MODELS_USE, Permission.UPSTREAMS_READ},
    Role.VIEWER: _READ,
}


def may(role: Role, permission: Permission) -> bool:
    return permission in PERMISSIONS[role]


def require(role: Role, permission: Permission, scopes: Set[Permission] | None = None) -> None:
    """Raise NotPermittedError naming what is missing and who can help. `scopes`: of a token, None for no bound."""
    if not may(role, permission):
        who = "an owner or admin" if may(Role.ADMIN, permission) else "an owner"
        raise NotPermittedError(f"your role ({role.value}) may not {permission.sentence}: ask {who}")
    if scopes is not None and permission not in scopes:
        raise NotPermittedError(
            f"this token may not {permission.sentence}: make one with the scope {permission.value}"
        )


def cover(
    role: Role,
    scopes: Set[Permission] | None,
    given: Set[Permission],
    *,
    what: str,
    field: str,
) -> None:
    """Nobody gives what they do not have. Raises NotPermittedError naming what `what` could and the giver could not."""
    own = PERMISSIONS[role] if scopes is None else PERMISSIONS[role] & scopes
    if missing := sorted(given - own):
        raise NotPermittedError(
            f"{what} could {', '.join(missing)}, and you could not: give less, or ask an owner", field=field
        )
