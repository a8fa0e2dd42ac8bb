"""API keys: what programs call /v1 with."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import Body, KeyId, LimitsValue, Name, ProjectId, Weight, limits_of
from controlplane.tenants import selectors, services
from controlplane.tenants.models import ApiKey
from controlplane.tenants.rights import Permission

router = Router(tags=["keys"])
MAX_OVERLAP_S = 30 * 24 * 3600


class KeyOut(Schema):
    """An API key, without its secret."""

    id: KeyId
    project_id: ProjectId
    name: str
    last4: str
    weight: int
    limits: LimitsValue
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
    expires_at: datetime | None = None


class Rotation(Body):
    """How long the old key goes on beside the new one."""

    overlap_s: Annotated[int, Field(ge=0, le=MAX_OVERLAP_S)] = 3600


class CreatedKey(KeyOut):
    """A key with its secret, this once."""

    key: str = Field(description="Shown once and stored nowhere")


class KeyQuery(PageQuery):
    """Which keys."""

    project_id: ProjectId | None = None


def _facts(row: ApiKey) -> dict[str, Any]:
    return {
        "id": row.id,
        "project_id": row.project_id,
        "name": row.name,
        "last4": row.last4,
        "weight": row.weight,
        "limits": limits_of(row),
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
    if query.project_id is not None:
        rows = rows.filter(project_id=query.project_id)
    return page(rows, query, key_out)


@operation(router, "POST", "/keys", Permission.KEYS_WRITE, CreatedKey, status=201)
def create_key(request: ApiRequest, body: NewKey) -> CreatedKey:
    """Create an API key."""
    key, plaintext = services.create_api_key(
        organization_id=request.caller.organization_id,
        project_id=body.project_id,
        name=body.name,
        expires_at=body.expires_at,
        weight=body.weight,
        limits=body.limits.as_limits(),
    )
    return CreatedKey(**_facts(key), key=plaintext)


@operation(router, "GET", "/keys/{key_id}", Permission.KEYS_READ, KeyOut)
def get_key(request: ApiRequest, key_id: KeyId) -> KeyOut:
    """One API key."""
    return key_out(selectors.api_key(organization_id=request.caller.organization_id, key_id=key_id))


@operation(router, "PUT", "/keys/{key_id}/limits", Permission.LIMITS_WRITE, KeyOut, current=_current)
def set_key_limits(request: ApiRequest, key_id: KeyId, body: LimitsValue) -> KeyOut:
    """Replace all limits of a key."""
    organization_id = request.caller.organization_id
    services.set_api_key_limits(organization_id=organization_id, key_id=key_id, limits=body.as_limits())
    return key_out(selectors.api_key(organization_id=organization_id, key_id=key_id))


@operation(router, "POST", "/keys/{key_id}/rotate", Permission.KEYS_WRITE, CreatedKey, status=201)
def rotate_key(request: ApiRequest, key_id: KeyId, body: Rotation) -> CreatedKey:
    """Make a successor with the same project, limits and weight. The old key ends after the overlap."""
    key, plaintext = services.rotate_api_key(
        organization_id=request.caller.organization_id, key_id=key_id, overlap_s=body.overlap_s
    )
    return CreatedKey(**_facts(key), key=plaintext)


@operation(router, "DELETE", "/keys/{key_id}", Permission.KEYS_WRITE, None, status=204, current=_current)
def revoke_key(request: ApiRequest, key_id: KeyId) -> None:
    """Revoke a key for good, in every gateway at once."""
    services.revoke_api_key(organization_id=request.caller.organization_id, key_id=key_id)
