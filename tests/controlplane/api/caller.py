"""A caller of the REST API, with a token of any role."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from django.http import HttpResponse
from django.test import Client

from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.models import Role


@dataclass
class Api:
    """A client with a token. `call` answers the response, JSON decoded as `.body`."""

    token: str | None
    client: Client = field(default_factory=lambda: Client(raise_request_exception=False))

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> HttpResponse:
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        response = self.client.generic(
            method,
            f"/api/v1{path}",
            b"" if body is None else json.dumps(body),
            content_type="application/json",
            headers=headers,
        )
        response.body = json.loads(response.content) if response.content else None
        return response

    def get(self, path: str, **headers: str) -> HttpResponse:
        return self.call("GET", path, **headers)

    def post(self, path: str, body: Any = None, **headers: str) -> HttpResponse:
        return self.call("POST", path, {} if body is None else body, **headers)


def token_of(organization_id: Any, role: Role, **values: Any) -> str:
    account = accounts.create_service_account(
        organization_id=organization_id, name=f"{role.value} {len(values)}", role=role
    )
    return accounts.create_token(
        organization_id=organization_id, account_id=account.id, name="test", **values
    )[1]
