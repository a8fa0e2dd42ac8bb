"""A client of /scim/v2, and what people have become."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.http import HttpResponse
from django.test import Client

from controlplane.scim import tokens
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role

USER = "urn:ietf:params:scim:schemas:core:2.0:User"
GROUP = "urn:ietf:params:scim:schemas:core:2.0:Group"
PATCH = "urn:ietf:params:scim:api:messages:2.0:PatchOp"
_COUNT = iter(range(10**6))


def token_of(organization_id: UUID) -> str:
    return tokens.create_token(organization_id=organization_id, name=f"directory {next(_COUNT)}")[1]


def role_of(organization_id: UUID, email: str) -> Role | None:
    """Their place, if they have one."""
    with tenant(organization_id):
        member = Member.objects.filter(organization_id=organization_id, user__email=email).first()
    return None if member is None else Role(member.role)


@dataclass
class Directory:
    """Speaks with a token. `call` answers the response, JSON decoded as `.body`."""

    token: str | None
    client: Client = field(default_factory=lambda: Client(raise_request_exception=False))

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> HttpResponse:
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        response = self.client.generic(
            method, f"/scim/v2{path}", content, content_type="application/scim+json", headers=headers
        )
        response.body = json.loads(response.content) if response.content else None
        return response

    def get(self, path: str, **headers: str) -> HttpResponse:
        return self.call("GET", path, **headers)

    def patch(self, path: str, *operations: dict[str, Any], **headers: str) -> HttpResponse:
        return self.call("PATCH", path, {"schemas": [PATCH], "Operations": list(operations)}, **headers)

    def add_user(self, user_name: str, **values: Any) -> str:
        """Its id."""
        response = self.call("POST", "/Users", {"schemas": [USER], "userName": user_name, **values})
        assert response.status_code == 201, response.body
        return response.body["id"]

    def add_group(self, name: str, *members: str, **values: Any) -> str:
        """Its id."""
        body = {
            "schemas": [GROUP],
            "displayName": name,
            "members": [{"value": each} for each in members],
            **values,
        }
        response = self.call("POST", "/Groups", body)
        assert response.status_code == 201, response.body
        return response.body["id"]
