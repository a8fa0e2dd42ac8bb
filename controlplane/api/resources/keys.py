"""API keys: what programs call /v1 with."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, KeyId, LimitsValue, Name, ProjectId, Weight, limits_of
from controlplane.tenants import key_scopes, key_services, limit_services, selectors
from controlplane.tenants.key_scopes import KeyScopes, Route
from controlplane.tenants.models import ApiKey
from controlplane.tenants.rights import Permission

router = Router(tags=["keys"])
MAX_OVERLAP_S = 30 * 24 * 3600


_ModelPattern = Annotated[str, Field(min_length=1, max_length=129, examples=["llama-70b", "acme/*"])]
_Range = Annotated[str, Field(min_length=2, max_length=49, examples=["203.0.113.0/24", "2001:db8::/32"])]
_ModelName = Annotated[str, Field(min_length=1, max_length=128)]
_Tag = Annotated[str, Field(min_length=1, max_length=key_scopes.MAX_TAG)]
_Aliases = dict[str, _ModelName]


class ScopesValue(Body):
    """What a key is bound to; null or left out: not in that respect. An empty list allows nothing."""

    routes: Annotated[list[Route], Field(max_length=len(Route))] | None = Field(
        default=None, description="Parts of /v1 it may call; others are refused with 403 key_scope"
    )
    models: Annotated[list[_ModelPattern], Field(max_length=key_scopes.MAX_MODELS)] | None = Field(
        default=None,
        description="Deployments it may call, OWNER/NAME for shared ones, * at the end for any rest; no other exists "
        "for it",
    )
    ip_ranges: Annotated[list[_Range], Field(max_length=key_scopes.MAX_RANGES)] | None = Field(
        default=None,
        description="Addresses it may be used from (CIDR); others are refused with 403 key_scope",
    )

    def as_scopes(self) -> KeyScopes:
        found = self.model_dump()
        return KeyScopes(**{name: None if v is None else tuple(map(str, v)) for name, v in found.items()})


class KeyOut(Schema):
    """An API key, without its secret."""

    id: KeyId
    project_id: ProjectId
    name: str
    last4: str
    weight: int
    limits: LimitsValue
    scopes: ScopesValue
    aliases: dict[str, str] = Field(description="Other names of models, for this key: alias to deployment")
    tags: list[str]
    origin: str = Field(description="Where it was made, if elsewhere: litellm", examples=[""])
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class NewKey(Body):
    """A key to be."""

    project_id: ProjectId
    name: Name
    weight: Weight = 100
    limits: LimitsValue = LimitsValue()
    scopes: ScopesValue = ScopesValue()
    aliases: _Aliases = Field(default={}, max_length=key_scopes.MAX_ALIASES)
    tags: list[_Tag] = Field(default=[], max_length=key_scopes.MAX_TAGS)
    expires_at: datetime | None = None


class KeyChange(Body):
    """What is left out stays as it is."""

    name: Name | None = None
    aliases: Annotated[_Aliases, Field(max_length=key_scopes.MAX_ALIASES)] | None = None
    tags: Annotated[list[_Tag], Field(max_length=key_scopes.MAX_TAGS)] | None = None


class Rotation(Body):
    """How long the old key goes on beside the new one."""

    overlap_s: Annotated[int, Field(ge=0, le=MAX_OVERLAP_S)] = 3600


class CreatedKey(KeyOut):
    """A key with its secret, this once."""

    key: str = Field(description="Shown once and stored nowhere")


class KeyQuery(PageQuery):
    """Which keys."""

    project_id: ProjectId | None = None
    revoked: bool | None = Field(default=None, description="true: only those; false: only those that are not")


def _facts(row: ApiKey) -> dict[str, Any]:
    return {
        "id": row.id,
        "project_id": row.project_id,
        "name": row.name,
        "last4": row.last4,
        "weight": row.weight,
        "limits": limits_of(row),
        "scopes": ScopesValue(**(row.scopes or {})),
        "aliases": row.aliases or {},
        "tags": row.tags or [],
        "origin": row.origin,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
        "last_used_at": row.last_used_at,
    }


def key_out(row: ApiKey) -> KeyOut:
    return KeyOut(**_facts(row))


def _current(request: ApiRequest, key_id: KeyId, **_: object) -> tuple[Model, Any]:
    return selectors.api_key(organization_id=request.caller.organization_id, key_id=key_id), key_out


@operation(router, "GET", "/keys", Permission.KEYS_READ, Page[KeyOut])
def list_keys(request: ApiRequest, query: Query[KeyQuery]) -> Page[KeyOut]:
    """API keys, newest first, revoked ones included."""
    rows = ApiKey.objects.filter(organization_id=request.caller.organization_id)
    rows = matching(rows, project_id=query.project_id)
    if query.revoked is not None:
        rows = rows.filter(revoked_at__isnull=not query.revoked)
    return page(rows, query, key_out)


@operation(router, "POST", "/keys", Permission.KEYS_WRITE, CreatedKey, status=201)
def create_key(request: ApiRequest, body: NewKey) -> CreatedKey:
    """Create an API key."""
    key, plaintext = key_services.create_api_key(
        organization_id=request.caller.organization_id,
        project_id=body.project_id,
        name=body.name,
        expires_at=body.expires_at,
        weight=body.weight,
        limits=body.limits.as_limits(),
        scopes=body.scopes.as_scopes(),
        aliases=body.aliases,
        tags=body.tags,
    )
    return CreatedKey(**_facts(key), key=plaintext)


@operation(router, "GET", "/keys/{key_id}", Permission.KEYS_READ, KeyOut)
def get_key(request: ApiRequest, key_id: KeyId) -> KeyOut:
    """One API key."""
    return key_out(selectors.api_key(organization_id=request.caller.organization_id, key_id=key_id))


@operation(router, "PATCH", "/keys/{key_id}", Permission.KEYS_WRITE, KeyOut, current=_current)
def change_key(request: ApiRequest, key_id: KeyId, body: KeyChange) -> KeyOut:
    """Change a key's name, aliases or tags."""
    key_services.update_api_key(
        organization_id=request.caller.organization_id,
        key_id=key_id,
        name=body.name,
        aliases=body.aliases,
        tags=body.tags,
    )
    return key_out(selectors.api_key(organization_id=request.caller.organization_id, key_id=key_id))


@operation(router, "PUT", "/keys/{key_id}/scopes", Permission.KEYS_WRITE, KeyOut, current=_current)
def set_key_scopes(request: ApiRequest, key_id: KeyId, body: ScopesValue) -> KeyOut:
    """Replace what a key is bound to. Gateways heed it within a second."""
    organization_id = request.caller.organization_id
    key_services.set_api_key_scopes(organization_id=organization_id, key_id=key_id, scopes=body.as_scopes())
    return key_out(selectors.api_key(organization_id=organization_id, key_id=key_id))


@operation(router, "PUT", "/keys/{key_id}/limits", Permission.LIMITS_WRITE, KeyOut, current=_current)
def set_key_limits(request: ApiRequest, key_id: KeyId, body: LimitsValue) -> KeyOut:
    """Replace all limits of a key."""
    organization_id = request.caller.organization_id
    limit_services.set_api_key_limits(organization_id=organization_id, key_id=key_id, limits=body.as_limits())
    return key_out(selectors.api_key(organization_id=organization_id, key_id=key_id))


@operation(router, "POST", "/keys/{key_id}/rotate", Permission.KEYS_WRITE, CreatedKey, status=201)
def rotate_key(request: ApiRequest, key_id: KeyId, body: Rotation) -> CreatedKey:
    """Make a successor that is like it. The old key ends after the overlap."""
    key, plaintext = key_services.rotate_api_key(
        organization_id=request.caller.organization_id, key_id=key_id, overlap_s=body.overlap_s
    )
    return CreatedKey(**_facts(key), key=plaintext)


@operation(router, "DELETE", "/keys/{key_id}", Permission.KEYS_WRITE, None, status=204, current=_current)
def revoke_key(request: ApiRequest, key_id: KeyId) -> None:
    """Revoke a key for good, in every gateway at once."""
    key_services.revoke_api_key(organization_id=request.caller.organization_id, key_id=key_id)
