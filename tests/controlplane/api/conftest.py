"""Callers of the REST API: Acme's owner, and a stranger."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.world import World

if TYPE_CHECKING:
    from tests.controlplane.api.caller import Api


@pytest.fixture
def api(world: World) -> Api:
    """Acme's owner."""
    from controlplane.tenants.models import Role
    from tests.controlplane.api.caller import Api, token_of

    return Api(token_of(world.organization.id, Role.OWNER))


@pytest.fixture
def stranger(world: World) -> Api:
    """The owner of another organization."""
    from controlplane.tenants.models import Role
    from tests.controlplane.api.caller import Api, token_of

    return Api(token_of(world.other_organization.id, Role.OWNER))
