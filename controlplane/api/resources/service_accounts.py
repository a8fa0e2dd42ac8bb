"""Service accounts and their management tokens. Nobody gives what they do not have."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, Name, ServiceAccountId, TokenId
from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.models import ManagementToken, Role, ServiceAccount
from controlplane.tenants.rights import PERMISSIONS, Permission, cover

router = Router(tags=["service accounts"])


class ServiceAccountOut(Schema):
    """A program's place in the organization."""

    id: ServiceAccountId
    name: str
    role: Role
    created_at: datetime


class NewServiceAccount(Body):
    """A service account to be."""

    name: Name
    role: Role


class ServiceAccountQuery(PageQuery):
    """Which service accounts."""

    name: Annotated[str, Field(max_length=120)] | None = None
    role: Role | None = None


class TokenQuery(PageQuery):
    """Which tokens."""

    revoked: bool | None = Field(default=None, description="true: only those; false: only others")


class TokenOut(Schema):
    """A management token, without its secret."""

    id: TokenId
    service_account_id: ServiceAccountId
    name: str
    scopes: list[str] | None = Field(description="Permissions it is bound to; null: all of the role's")
    last4: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


class NewToken(Body):
    """A token to be."""

    name: Name
    scopes: Annotated[list[Permission], Field(min_length=1)] | None = None
    expires_at: datetime | None = None


class CreatedToken(TokenOut):
    """A token with its secret, this once."""

    token: str = Field(description="Shown once and stored nowhere")


def account_out(row: ServiceAccount) -> ServiceAccountOut:
    return ServiceAccountOut(id=row.id, name=row.name, role=Role(row.role), created_at=row.created_at)


def _facts(row: ManagementToken) -> dict[str, Any]:
    return {
        "id": row.id,
        "service_account_id": row.service_account_id,
        "name": row.name,
        "scopes": row.scopes,
        "last4": row.last4,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }


def _current(request: ApiRequest, account_id: ServiceAccountId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return accounts.service_account(organization_id=organization_id, account_id=account_id), account_out


@operation(router, "GET", "/service-accounts", Permission.SERVICE_ACCOUNTS_READ, Page[ServiceAccountOut])
def list_service_accounts(request: ApiRequest, query: Query[ServiceAccountQuery]) -> Page[ServiceAccountOut]:
    """Service accounts, newest first."""
    rows = ServiceAccount.objects.filter(organization_id=request.caller.organization_id, deleted_at=None)
    rows = matching(rows, name=query.name, role=query.role)
    return page(rows, query, account_out)


@operation(
    router,
    "POST",
    "/service-accounts",
    Permission.SERVICE_ACCOUNTS_WRITE,
    ServiceAccountOut,
    status=201,
)
def create_service_account(request: ApiRequest, body: NewServiceAccount) -> ServiceAccountOut:
    """Create a service account. Its role may not exceed the caller's."""
    _covers(request, PERMISSIONS[body.role], f"the role {body.role.value}", "role")
    return account_out(
        accounts.create_service_account(
            organization_id=request.caller.organization_id, name=body.name, role=body.role
        )
    )


@operation(
    router,
    "GET",
    "/service-accounts/{account_id}",
    Permission.SERVICE_ACCOUNTS_READ,
    ServiceAccountOut,
)
def get_service_account(request: ApiRequest, account_id: ServiceAccountId) -> ServiceAccountOut:
    """One service account."""
    organization_id = request.caller.organization_id
    return account_out(accounts.service_account(organization_id=organization_id, account_id=account_id))


@operation(
    router,
    "DELETE",
    "/service-accounts/{account_id}",
    Permission.SERVICE_ACCOUNTS_WRITE,
    None,
    status=204,
    current=_current,
)
def delete_service_account(request: ApiRequest, account_id: ServiceAccountId) -> None:
    """End a service account and every token of it."""
    accounts.delete_service_account(organization_id=request.caller.organization_id, account_id=account_id)


@operation(
    router,
    "GET",
    "/service-accounts/{account_id}/tokens",
    Permission.SERVICE_ACCOUNTS_READ,
    Page[TokenOut],
)
def list_tokens(
    request: ApiRequest, account_id: ServiceAccountId, query: Query[TokenQuery]
) -> Page[TokenOut]:
    """Tokens of a service account, newest first, revoked ones included."""
    organization_id = request.caller.organization_id
    account = accounts.service_account(organization_id=organization_id, account_id=account_id)
    rows = ManagementToken.objects.filter(organization_id=organization_id, service_account=account)
    if query.revoked is not None:
        rows = rows.filter(revoked_at__isnull=not query.revoked)
    return page(rows, query, lambda row: TokenOut(**_facts(row)))


@operation(
    router,
    "POST",
    "/service-accounts/{account_id}/tokens",
    Permission.SERVICE_ACCOUNTS_WRITE,
    CreatedToken,
    status=201,
)
def create_token(request: ApiRequest, account_id: ServiceAccountId, body: NewToken) -> CreatedToken:
    """Create a token. It may not do more than the caller."""
    organization_id = request.caller.organization_id
    account = accounts.service_account(organization_id=organization_id, account_id=account_id)
    given = PERMISSIONS[Role(account.role)] if body.scopes is None else frozenset(body.scopes)
    _covers(request, given, "this token", "scopes")
    token, plaintext = accounts.create_token(
        organization_id=organization_id,
        account_id=account_id,
        name=body.name,
        scopes=body.scopes,
        expires_at=body.expires_at,
    )
    return CreatedToken(**_facts(token), token=plaintext)


@operation(router, "DELETE", "/tokens/{token_id}", Permission.SERVICE_ACCOUNTS_WRITE, None, status=204)
def revoke_token(request: ApiRequest, token_id: TokenId) -> None:
    """Revoke a token for good. The next call with it is refused."""
    accounts.revoke_token(organization_id=request.caller.organization_id, token_id=token_id)


def _covers(request: ApiRequest, given: frozenset[Permission], what: str, field: str) -> None:
    cover(request.caller.role, request.caller.scopes, given, what=what, field=field)
