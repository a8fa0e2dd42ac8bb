"""Mail that was sent, and the links in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def link(mailoutbox: list) -> Callable[[], str]:
    """The path behind the link of the last mail."""

    def find() -> str:
        found = re.search(r"https?://[^/\s]+(/\S+)", mailoutbox[-1].body)
        assert found, mailoutbox[-1].body
        return found[1]

    return find


@pytest.fixture(scope="session")
def rsa_key() -> Any:
    """Made once: it takes a while."""
    from tests.controlplane.identity.oidc_server import new_key

    return new_key()


@pytest.fixture(scope="session")
def other_rsa_key() -> Any:
    from tests.controlplane.identity.oidc_server import new_key

    return new_key()


@pytest.fixture
def allow_loopback(settings: Any) -> None:
    """As an operator does whose identity provider is in the same network."""
    from controlplane.outbound import allowed_networks

    environment = settings.ENV
    settings.ENV = type(environment)(**{**vars(environment), "outbound_allow": allowed_networks("127.0.0.1")})


@pytest.fixture
def acme_domain(world: Any) -> str:
    """`example.org` is Acme's, and proven."""
    from controlplane.identity import domains

    row = domains.claim(organization_id=world.organization.id, name="example.org")
    domains.mark_verified(organization_id=world.organization.id, domain_id=row.id)
    return row.name
