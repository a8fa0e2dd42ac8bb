"""Single sign-on: identity providers, the mail domains they may vouch for, and what a sign-in must bring."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from django.conf import settings
from django.db.models import Model
from django.urls import reverse
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import Body, DomainId, IdentityProviderId
from controlplane.identity import domains, policies, providers, vouching
from controlplane.identity.models import Domain, IdentityProvider, ProviderKind, SignInPolicy
from controlplane.scim import places
from controlplane.tenants.models import Role
from controlplane.tenants.rights import PERMISSIONS, Permission, cover

router = Router(tags=["sign-in"])

_Url = Annotated[str, Field(max_length=500)]


class IdentityProviderOut(Schema):
    """Who vouches for the organization's people. The client secret is never shown."""

    id: IdentityProviderId
    kind: ProviderKind
    name: str
    is_enabled: bool
    issuer: str = Field(description="OIDC: the issuer URL; SAML: the provider's entity id")
    client_id: str
    sso_url: str
    certificate: str
    next_certificate: str = Field(description="SAML: accepted beside it; empty but while it is replaced")
    groups_claim: str
    callback_url: str = Field(description="Set this at the provider: OIDC redirect URI, SAML ACS URL")
    metadata_url: str | None = Field(description="SAML: our metadata, and our entity id; null for OIDC")
    login_url: str = Field(description="Where people begin to sign in with it")
    created_at: datetime


class NewIdentityProvider(Body):
    """An identity provider to be. OIDC: issuer, client_id, client_secret. SAML: issuer, sso_url, certificate."""

    kind: ProviderKind
    name: Annotated[str, Field(min_length=1, max_length=40, pattern=r"\S", examples=["Okta"])]
    issuer: Annotated[str, Field(min_length=1, max_length=500, examples=["https://example.okta.com"])]
    client_id: Annotated[str, Field(max_length=191)] = ""
    client_secret: Annotated[str, Field(max_length=500)] = ""
    sso_url: _Url = ""
    certificate: Annotated[
        str, Field(max_length=20_000, description="PEM or base64 of one X.509 certificate")
    ] = ""
    next_certificate: Annotated[
        str, Field(max_length=20_000, description="What it will sign with: accepted beside the other")
    ] = ""
    groups_claim: Annotated[str, Field(min_length=1, max_length=200)] = "groups"


class IdentityProviderChange(Body):
    """What is left out stays as it is. Disabling ends the sessions that came of it."""

    name: Annotated[str, Field(min_length=1, max_length=40, pattern=r"\S")] | None = None
    is_enabled: bool | None = None
    issuer: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    client_id: Annotated[str, Field(min_length=1, max_length=191)] | None = None
    client_secret: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    sso_url: _Url | None = None
    certificate: Annotated[str, Field(max_length=20_000)] | None = None
    next_certificate: (
        Annotated[
            str,
            Field(
                max_length=20_000,
                description="Both are accepted, from before the provider changes over until this is empty again",
            ),
        ]
        | None
    ) = None
    groups_claim: Annotated[str, Field(min_length=1, max_length=200)] | None = None


class DomainOut(Schema):
    """A mail domain, and the DNS record that proves it."""

    id: DomainId
    name: str
    record_name: str = Field(examples=["_corral.example.org"])
    record_text: str = Field(examples=["corral-verification=0123456789abcdef0123456789abcdef"])
    verified_at: datetime | None
    created_at: datetime


class NewDomain(Body):
    """A domain to be proven."""

    name: Annotated[str, Field(min_length=4, max_length=253, examples=["example.org"])]


class SignInPolicyOut(Schema):
    """What a sign-in must bring, and what people become who come by the identity provider or SCIM."""

    require_mfa: bool = Field(
        description="A second factor after a password; members enrol before anything else"
    )
    require_sso: bool = Field(
        description="The identity provider alone; owners also with password and second factor"
    )
    just_in_time: bool = Field(description="Who is vouched for and no member yet becomes one")
    default_role: Role
    group_roles: dict[str, Role] = Field(description="Group at the provider to role; the highest counts")
    revoke_keys_of_leavers: bool = Field(
        description="API keys of whom SCIM deactivates or deletes are revoked at once"
    )


class SignInPolicyChange(Body):
    """What is left out stays as it is."""

    require_mfa: bool | None = None
    require_sso: bool | None = None
    just_in_time: bool | None = None
    default_role: Role | None = None
    group_roles: Annotated[dict[str, Role], Field(max_length=policies.MAX_GROUPS)] | None = None
    revoke_keys_of_leavers: bool | None = None


def provider_out(row: IdentityProvider) -> IdentityProviderOut:
    base, is_saml = settings.ENV.console_url.rstrip("/"), row.kind == ProviderKind.SAML
    return IdentityProviderOut(
        id=row.id,
        kind=ProviderKind(row.kind),
        name=row.name,
        is_enabled=row.is_enabled,
        issuer=row.issuer,
        client_id=row.client_id,
        sso_url=row.sso_url,
        certificate=row.certificate,
        next_certificate=row.next_certificate,
        groups_claim=row.groups_claim,
        callback_url=base + vouching.callback_path(row),
        metadata_url=base + reverse("saml_metadata", args=[str(row)]) if is_saml else None,
        login_url=base + reverse("sso_start", args=[str(row)]),
        created_at=row.created_at,
    )


def domain_out(row: Domain) -> DomainOut:
    name, text = domains.record_of(row)
    return DomainOut(
        id=row.id,
        name=row.name,
        record_name=name,
        record_text=text,
        verified_at=row.verified_at,
        created_at=row.created_at,
    )


def policy_out(row: SignInPolicy) -> SignInPolicyOut:
    return SignInPolicyOut(
        require_mfa=row.require_mfa,
        require_sso=row.require_sso,
        just_in_time=row.just_in_time,
        default_role=Role(row.default_role),
        group_roles={name: Role(role) for name, role in row.group_roles.items()},
        revoke_keys_of_leavers=row.revoke_keys_of_leavers,
    )


def _current(request: ApiRequest, provider_id: IdentityProviderId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return providers.provider(organization_id=organization_id, provider_id=provider_id), provider_out


@operation(router, "GET", "/identity-providers", Permission.SIGN_IN_READ, Page[IdentityProviderOut])
def list_identity_providers(request: ApiRequest, query: Query[PageQuery]) -> Page[IdentityProviderOut]:
    """Identity providers, newest first."""
    rows = IdentityProvider.objects.filter(organization_id=request.caller.organization_id)
    return page(rows, query, provider_out)


@operation(router, "POST", "/identity-providers", Permission.SIGN_IN_WRITE, IdentityProviderOut, status=201)
def create_identity_provider(request: ApiRequest, body: NewIdentityProvider) -> IdentityProviderOut:
    """Connect an identity provider. It may vouch for addresses in the organization's proven domains."""
    row = providers.create_provider(organization_id=request.caller.organization_id, **body.model_dump())
    return provider_out(row)


@operation(router, "GET", "/identity-providers/{provider_id}", Permission.SIGN_IN_READ, IdentityProviderOut)
def get_identity_provider(request: ApiRequest, provider_id: IdentityProviderId) -> IdentityProviderOut:
    """One identity provider."""
    organization_id = request.caller.organization_id
    return provider_out(providers.provider(organization_id=organization_id, provider_id=provider_id))


@operation(
    router,
    "PATCH",
    "/identity-providers/{provider_id}",
    Permission.SIGN_IN_WRITE,
    IdentityProviderOut,
    current=_current,
)
def change_identity_provider(
    request: ApiRequest, provider_id: IdentityProviderId, body: IdentityProviderChange
) -> IdentityProviderOut:
    """Change or disable an identity provider."""
    row = providers.update_provider(
        organization_id=request.caller.organization_id,
        provider_id=provider_id,
        **body.model_dump(exclude_unset=True),
    )
    return provider_out(row)


@operation(
    router,
    "DELETE",
    "/identity-providers/{provider_id}",
    Permission.SIGN_IN_WRITE,
    None,
    status=204,
    current=_current,
)
def delete_identity_provider(request: ApiRequest, provider_id: IdentityProviderId) -> None:
    """Disconnect an identity provider and end the sessions that came of it. Its people stay members."""
    providers.delete_provider(organization_id=request.caller.organization_id, provider_id=provider_id)


@operation(router, "GET", "/domains", Permission.SIGN_IN_READ, Page[DomainOut])
def list_domains(request: ApiRequest, query: Query[PageQuery]) -> Page[DomainOut]:
    """Mail domains, newest first."""
    return page(Domain.objects.filter(organization_id=request.caller.organization_id), query, domain_out)


@operation(router, "POST", "/domains", Permission.SIGN_IN_WRITE, DomainOut, status=201)
def create_domain(request: ApiRequest, body: NewDomain) -> DomainOut:
    """Claim a mail domain. It counts once its TXT record is found."""
    return domain_out(domains.claim(organization_id=request.caller.organization_id, name=body.name))


@operation(router, "POST", "/domains/{domain_id}/verify", Permission.SIGN_IN_WRITE, DomainOut)
def verify_domain(request: ApiRequest, domain_id: DomainId) -> DomainOut:
    """Look for the TXT record now. 409 while it is not there, or if another organization holds the domain."""
    return domain_out(domains.verify(organization_id=request.caller.organization_id, domain_id=domain_id))


@operation(router, "DELETE", "/domains/{domain_id}", Permission.SIGN_IN_WRITE, None, status=204)
def delete_domain(request: ApiRequest, domain_id: DomainId) -> None:
    """Give a domain up. Nobody with an address in it can be vouched for any more."""
    domains.remove(organization_id=request.caller.organization_id, domain_id=domain_id)


@operation(router, "GET", "/sign-in-policy", Permission.SIGN_IN_READ, SignInPolicyOut)
def get_sign_in_policy(request: ApiRequest) -> SignInPolicyOut:
    """What a sign-in must bring."""
    return policy_out(policies.policy(organization_id=request.caller.organization_id))


@operation(router, "PATCH", "/sign-in-policy", Permission.SIGN_IN_WRITE, SignInPolicyOut)
def change_sign_in_policy(request: ApiRequest, body: SignInPolicyChange) -> SignInPolicyOut:
    """Change what a sign-in must bring. Roles given to groups may not exceed the caller's rights; whom SCIM knows gets
    the role of their groups at once, everybody else when they sign in next."""
    given = {*(body.group_roles or {}).values(), *([body.default_role] if body.default_role else [])}
    for role in given:
        cover(
            request.caller.role,
            request.caller.scopes,
            PERMISSIONS[role],
            what=f"the role {role.value}",
            field="default_role" if role == body.default_role else "group_roles",
        )
    organization_id = request.caller.organization_id
    row = policies.set_policy(organization_id=organization_id, **body.model_dump(exclude_unset=True))
    if body.group_roles is not None or body.default_role is not None:
        places.apply_roles(organization_id=organization_id)
    return policy_out(row)
