"""A client that knows the standard alone finds its way: scim2-tester discovers, makes, asks, patches and deletes.

It makes up mail addresses, so here every address counts as proven.
"""

from __future__ import annotations

import uuid
from typing import Any

import httpx2
import pytest
from django.core.signals import request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections
from scim2_client.engines.httpx2 import SyncSCIMClient
from scim2_tester import Status, check_server

from controlplane.api.ratelimit import CallerLimits
from controlplane.api.scim import middleware
from controlplane.scim import users
from tests.controlplane.scim.caller import Directory

# What we do otherwise, and say in docs/sign-in.md: of addresses one is kept, called "work", and it cannot be taken
# away; whether somebody is active is said, not left open; nothing is searched over users and groups together.
ON_PURPOSE = {
    ("check_add_attribute", "emails"),
    ("check_replace_attribute", "emails"),
    ("check_remove_attribute", "emails"),
    ("check_remove_attribute", "active"),
    ("search_with_attributes", "no such resource"),
}


@pytest.mark.full
def test_a_client_that_knows_the_standard_alone(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proven(organization_id: uuid.UUID, text: str) -> str:
        return text if "@" in text else f"{uuid.uuid4()}@example.org"

    monkeypatch.setattr(users, "_address", proven)
    monkeypatch.setattr(middleware, "limits", CallerLimits(10_000, 10_000))
    served = get_wsgi_application()

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """On the test's own connection: what ends a request must not close it."""
        request_started.disconnect(close_old_connections)
        try:
            return [served(environ, start_response).content]
        finally:
            request_started.connect(close_old_connections)

    with httpx2.Client(
        transport=httpx2.WSGITransport(app=application),
        base_url="http://testserver/scim/v2",
        headers={"Authorization": f"Bearer {directory.token}"},
    ) as http:
        client = SyncSCIMClient(http)
        client.discover()
        results = check_server(client, raise_exceptions=False)
    unexpected = [
        (result.title, result.resource_type, result.reason)
        for result in results
        if result.status not in (Status.SUCCESS, Status.SKIPPED)
        and not any(
            result.title == title and attribute in (result.reason or "") for title, attribute in ON_PURPOSE
        )
    ]
    assert not unexpected
    n_good = sum(result.status == Status.SUCCESS for result in results)
    assert n_good >= 40, n_good
