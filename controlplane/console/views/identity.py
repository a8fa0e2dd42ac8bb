"""How people sign in: mail domains, identity providers, what a sign-in must bring, and the directory's tokens.

One page in the order in which it is set up. Nobody gives what they do not have: roles that exceed one's own are neither
offered nor taken (as in the REST API).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from django import forms
from django.conf import settings
from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from controlplane import ids
from controlplane.console.access import MemberRequest, member_page
from controlplane.console.identity_forms import DomainForm, OidcForm, PolicyForm, SamlForm, ScimTokenForm
from controlplane.errors import (
    ConflictError,
    CorralError,
    InvalidInputError,
    NotFoundError,
    NotPermittedError,
)
from controlplane.identity import domains, policies, providers, vouching
from controlplane.identity.models import Domain, IdentityProvider, ProviderKind
from controlplane.scim import places, tokens
from controlplane.scim.models import ScimUser
from controlplane.tenants.models import Role
from controlplane.tenants.rights import PERMISSIONS, Permission, cover, may

SHOWN_TOKENS: Final = 20


@require_GET
@member_page(Permission.SIGN_IN_READ)
def identity(request: MemberRequest) -> HttpResponse:
    return _page(request)


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def claim_domain(request: MemberRequest) -> HttpResponse:
    form = DomainForm(request.POST)
    if form.is_valid():
        try:
            row = domains.claim(
                organization_id=request.membership.organization_id, name=form.cleaned_data["name"]
            )
        except (InvalidInputError, ConflictError) as error:
            return _refused(request, form, error, "domain_form")
        messages.success(request, f"Publish the TXT record of {row.name}, then let us look for it.")
        return redirect("console:identity")
    return _page(request, 400, domain_form=form)


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def change_domain(request: MemberRequest, domain: str) -> HttpResponse:
    """Looks for its record, or, with `remove`, gives it up."""
    organization_id, domain_id = request.membership.organization_id, _id(ids.Prefix.DOMAIN, domain, "domain")
    row = domains.domain(organization_id=organization_id, domain_id=domain_id)
    if "remove" in request.POST:
        domains.remove(organization_id=organization_id, domain_id=domain_id)
        messages.success(
            request, f"{row.name} is given up: nobody with such an address is vouched for any more."
        )
        return redirect("console:identity")
    try:
        domains.verify(organization_id=organization_id, domain_id=domain_id)
    except (domains.NotProvenError, ConflictError) as error:
        return _page(request, error.status, domain_problem=(row.id, error.message))
    messages.success(request, f"{row.name} is proven.")
    return redirect("console:identity")


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def connect_provider(request: MemberRequest) -> HttpResponse:
    is_saml = request.POST.get("kind") == ProviderKind.SAML
    form: OidcForm | SamlForm = SamlForm(request.POST) if is_saml else OidcForm(request.POST)
    name = "saml_form" if is_saml else "oidc_form"
    if not form.is_valid():
        return _page(request, 400, **{name: form})
    try:
        row = providers.create_provider(
            organization_id=request.membership.organization_id, kind=form.kind, **form.cleaned_data
        )
    except InvalidInputError as error:
        return _refused(request, form, error, name)
    messages.success(request, f"{row.name} is connected. Set its callback URL there, then try the sign-in.")
    return redirect("console:identity")


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def change_provider(request: MemberRequest, provider: str) -> HttpResponse:
    """Enables or disables it, or, with `delete`, disconnects it; with `next_certificate` or `replaced` changes what it
    signs with: both are accepted in between."""
    organization_id = request.membership.organization_id
    provider_id = _id(ids.Prefix.IDENTITY_PROVIDER, provider, "identity provider")
    row = providers.provider(organization_id=organization_id, provider_id=provider_id)
    if "delete" in request.POST:
        providers.delete_provider(organization_id=organization_id, provider_id=provider_id)
        messages.success(request, f"{row.name} is disconnected, and the sessions that came of it have ended.")
        return redirect("console:identity")
    if "next_certificate" in request.POST:
        providers.update_provider(
            organization_id=organization_id,
            provider_id=provider_id,
            next_certificate=request.POST["next_certificate"],
        )
        messages.success(request, f"{row.name} may sign with either certificate from now on.")
        return redirect("console:identity")
    if "replaced" in request.POST:
        if not row.next_certificate:
            raise InvalidInputError(
                "next_certificate: give the new certificate first", field="next_certificate"
            )
        providers.update_provider(
            organization_id=organization_id,
            provider_id=provider_id,
            certificate=row.next_certificate,
            next_certificate="",
        )
        messages.success(request, f"{row.name} signs with its new certificate alone.")
        return redirect("console:identity")
    providers.update_provider(
        organization_id=organization_id, provider_id=provider_id, is_enabled=not row.is_enabled
    )
    done = "disabled, and its sessions have ended" if row.is_enabled else "enabled"
    messages.success(request, f"{row.name} is {done}.")
    return redirect("console:identity")


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def change_policy(request: MemberRequest) -> HttpResponse:
    organization_id = request.membership.organization_id
    before = policies.policy(organization_id=organization_id)
    form = PolicyForm(request.POST, roles=list(Role))
    if not form.is_valid():
        return _page(request, 400, policy_form=form)
    try:
        mapping, default = form.group_mapping(), Role(form.cleaned_data["default_role"])
        added = {role for name, role in mapping.items() if before.group_roles.get(name) != role}
        if default != before.default_role:
            _cover(request, [default], "default_role")
        _cover(request, added, "group_roles")
        policies.set_policy(
            organization_id=organization_id,
            default_role=default,
            group_roles=mapping,
            **{name: form.cleaned_data[name] for name in PolicyForm.CHECKS},
        )
    except (InvalidInputError, NotPermittedError) as error:
        return _refused(request, form, error, "policy_form")
    places.apply_roles(organization_id=organization_id)
    messages.success(request, "The policy is changed. It holds from the next click on.")
    return redirect("console:identity")


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def create_scim_token(request: MemberRequest) -> HttpResponse:
    """Answers with the plaintext in the page: it is stored nowhere, so nothing could be redirected to."""
    organization_id, form = request.membership.organization_id, ScimTokenForm(request.POST)
    if not form.is_valid():
        return _page(request, 400, token_form=form)
    days = form.cleaned_data["expires"]
    try:
        _cover(request, tokens.roles_it_can_give(organization_id=organization_id), "name")
        row, plaintext = tokens.create_token(
            organization_id=organization_id,
            name=form.cleaned_data["name"],
            expires_at=timezone.now() + timedelta(days=int(days)) if days else None,
        )
    except (InvalidInputError, NotPermittedError) as error:
        return _refused(request, form, error, "token_form")
    return _page(request, created=row, plaintext=plaintext)


@require_POST
@member_page(Permission.SIGN_IN_WRITE)
def revoke_scim_token(request: MemberRequest, scim_token: str) -> HttpResponse:
    row = tokens.revoke_token(
        organization_id=request.membership.organization_id,
        token_id=_id(ids.Prefix.SCIM_TOKEN, scim_token, "SCIM token"),
    )
    messages.success(request, f"Token “{row.name}” is revoked. The directory's next call with it is refused.")
    return redirect("console:identity")


def _page(request: MemberRequest, status: int = 200, **context: Any) -> HttpResponse:
    organization_id, now = request.membership.organization_id, timezone.now()
    roles, base = _roles(request), settings.ENV.console_url.rstrip("/")
    people = ScimUser.objects.filter(organization_id=organization_id)
    context = {
        "now": now,
        "domains": [
            (row, *domains.record_of(row))
            for row in Domain.objects.filter(organization_id=organization_id).order_by("name")
        ],
        "providers": [
            (row, base + vouching.callback_path(row), *_addresses(row, base), *_ends(row))
            for row in IdentityProvider.objects.filter(organization_id=organization_id).order_by("name", "id")
        ],
        "scim_tokens": [
            (row, row.is_active(now))
            for row in tokens.tokens(organization_id=organization_id, limit=SHOWN_TOKENS)
        ],
        "n_scim_users": people.count(),
        "n_scim_inactive": people.filter(is_active=False).count(),
        "scim_url": f"{base}/scim/v2",
        "domain_form": DomainForm(),
        "oidc_form": OidcForm(),
        "saml_form": SamlForm(),
        "policy_form": PolicyForm.of(policies.policy(organization_id=organization_id), roles),
        "token_form": ScimTokenForm(),
        "may_change": may(request.membership.role, Permission.SIGN_IN_WRITE),
        **context,
    }
    return render(request, "console/identity.html", context, status=status)


def _addresses(row: IdentityProvider, base: str) -> Sequence[str]:
    """Where people begin with it; and, for SAML, our metadata."""
    login = base + reverse("sso_start", args=[str(row)])
    return login, base + reverse("saml_metadata", args=[str(row)]) if row.kind == ProviderKind.SAML else ""


def _ends(row: IdentityProvider) -> Sequence[datetime | None]:
    """Until when its certificate, and the one to come, are valid."""
    return tuple(map(providers.certificate_ends_at, (row.certificate, row.next_certificate)))


def _refused(request: MemberRequest, form: forms.Form, error: CorralError, name: str) -> HttpResponse:
    message = error.message.removeprefix(f"{error.field}: ")
    form.add_error(error.field if error.field in form.fields else None, message)
    return _page(request, error.status, **{name: form})


def _cover(request: MemberRequest, roles: Iterable[Role], field: str) -> None:
    for role in sorted(roles):
        cover(request.membership.role, None, PERMISSIONS[role], what=f"the role {role.value}", field=field)


def _roles(request: MemberRequest) -> list[Role]:
    own = PERMISSIONS[request.membership.role]
    return [role for role in Role if PERMISSIONS[role] <= own]


def _id(prefix: ids.Prefix, text: str, what: str) -> UUID:
    try:
        return ids.from_text(prefix, text)
    except ids.InvalidIdError as error:
        raise NotFoundError(f"no such {what}") from error
