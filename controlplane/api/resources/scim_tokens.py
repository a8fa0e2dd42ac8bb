"""SCIM tokens: what an organization's directory calls /scim/v2 with."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import Body, Name, ScimTokenId
from controlplane.scim import tokens
from controlplane.scim.models import ScimToken
from controlplane.tenants.rights import PERMISSIONS, Permission, cover

router = Router(tags=["sign-in"])


class ScimTokenOut(Schema):
    """A SCIM token, without its secret."""

    id: ScimTokenId
    name: str
    last4: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None = Field(
        description="To the minute; null: no directory has called with it yet"
    )


class NewScimToken(Body):
    """A SCIM token to be."""

    name: Name
    expires_at: datetime | None = None


class CreatedScimToken(ScimTokenOut):
    """A SCIM token with its secret, this once."""

    token: str = Field(description="Shown once and stored nowhere")
    base_url: str = Field(
        description="Set this at the directory", examples=["https://corral.example/scim/v2"]
    )


def _out(row: ScimToken) -> ScimTokenOut:
    return ScimTokenOut(
        id=row.id,
        name=row.name,
        last4=row.last4,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


@operation(router, "GET", "/scim-tokens", Permission.SIGN_IN_READ, Page[ScimTokenOut])
def list_scim_tokens(request: ApiRequest, query: Query[PageQuery]) -> Page[ScimTokenOut]:
    """SCIM tokens, newest first, revoked ones included."""
    return page(ScimToken.objects.filter(organization_id=request.caller.organization_id), query, _out)


@operation(router, "POST", "/scim-tokens", Permission.SIGN_IN_WRITE, CreatedScimToken, status=201)
def create_scim_token(request: ApiRequest, body: NewScimToken) -> CreatedScimToken:
    """Create a SCIM token. By it people get the roles that the sign-in policy gives to groups, so these may not exceed
    the caller's rights."""
    caller = request.caller
    for role in sorted(tokens.roles_it_can_give(organization_id=caller.organization_id)):
        cover(caller.role, caller.scopes, PERMISSIONS[role], what=f"the role {role.value}", field="name")
    row, plaintext = tokens.create_token(
        organization_id=caller.organization_id, name=body.name, expires_at=body.expires_at
    )
    base_url = f"{settings.ENV.console_url.rstrip('/')}/scim/v2"
    return CreatedScimToken(**_out(row).model_dump(), token=plaintext, base_url=base_url)


@operation(router, "DELETE", "/scim-tokens/{scim_token_id}", Permission.SIGN_IN_WRITE, None, status=204)
def revoke_scim_token(request: ApiRequest, scim_token_id: ScimTokenId) -> None:
    """Revoke a SCIM token for good. The directory's next call with it is refused."""
    tokens.revoke_token(organization_id=request.caller.organization_id, token_id=scim_token_id)
