"""Which role may do what. Surfaces ask before they call a service; services do not know who is asking."""

from enum import StrEnum

from controlplane.errors import NotPermittedError
from controlplane.tenants.models import Role


class Right(StrEnum):
    """Something a member may be allowed to do, in the words of the refusal."""

    VIEW = "view this organization"
    USE_MODELS = "use models and manage API keys"
    DEPLOY = "create and change deployments"
    BILLING = "see and change billing"
    MANAGE_MEMBERS = "manage members and projects"


_ALL = frozenset(Right)
RIGHTS: dict[Role, frozenset[Right]] = {
    Role.OWNER: _ALL,
    Role.ADMIN: _ALL,
    Role.BILLING: frozenset({Right.VIEW, Right.BILLING}),
    Role.DEVELOPER: frozenset({Right.VIEW, Right.USE_MODELS, Right.DEPLOY}),
    Role.VIEWER: frozenset({Right.VIEW}),
}


def may(role: Role, right: Right) -> bool:
    return right in RIGHTS[role]


def require(role: Role, right: Right) -> None:
    """Raise NotPermittedError naming what is missing and who can help."""
    if not may(role, right):
        raise NotPermittedError(f"your role ({role.value}) may not {right.value}: ask an owner or admin")
