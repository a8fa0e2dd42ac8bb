"""A directory that speaks for Acme, whose domain is example.org."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.world import World

if TYPE_CHECKING:
    from tests.controlplane.scim.caller import Directory


@pytest.fixture
def acme_domain(world: World) -> str:
    """`example.org` is Acme's, and proven."""
    from controlplane.identity import domains

    row = domains.claim(organization_id=world.organization.id, name="example.org")
    domains.mark_verified(organization_id=world.organization.id, domain_id=row.id)
    return row.name


@pytest.fixture
def directory(world: World, acme_domain: str) -> Directory:
    from tests.controlplane.scim.caller import Directory, token_of

    return Directory(token_of(world.organization.id))


@pytest.fixture
def roles(world: World) -> Any:
    """Sets which group gives which role in Acme."""
    from controlplane.identity import policies

    def set_roles(**group_roles: Any) -> None:
        policies.set_policy(organization_id=world.organization.id, group_roles=group_roles)

    return set_roles
