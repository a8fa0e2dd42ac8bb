"""Who sees what in the web process: every URL pattern with every kind of visitor. A new one without a row fails.

The REST API has a matrix of its own (../api/test_matrix.py), and so have SCIM (../scim/test_matrix.py) and /v1
(../gateway/test_matrix.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.db import transaction
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from controlplane.budgets import services as budgets
from controlplane.deployments import sharing
from controlplane.endcustomers import services as endcustomers
from controlplane.identity import domains, invitations, providers
from controlplane.identity.models import ProviderKind
from controlplane.policy.periods import Period
from controlplane.scim import tokens as scim_tokens
from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import ApiKey, Role
from controlplane.tenants.rights import PERMISSIONS, Permission
from controlplane.upstreams import services as upstreams
from controlplane.webhooks import services as webhooks
from tests.booked import book_usage
from tests.controlplane.console.conftest import signed_in
from tests.database import acting_as
from tests.world import PASSWORD, World, make_deployment


@dataclass(frozen=True)
class Row:
    """How a pattern is called and by whom. `permission` None: by every member. Parameters are filled in from Acme."""

    method: str = "GET"
    permission: Permission | None = None
    data: dict[str, str] = field(default_factory=dict)
    while_suspended: bool | None = None  # None: as the method says, reading yes, writing no

    @property
    def may_be_suspended(self) -> bool:
        return self.method == "GET" if self.while_suspended is None else self.while_suspended


UPSTREAM_SETTINGS = {
    "role": "replica",
    "base_url": "https://inference.example.org/v1",
    "model": "m",
    "slots": "3",
    "overflow_after_ms": "10",
    "connect_ms": "1000",
    "first_token_ms": "1000",
    "between_tokens_ms": "1000",
    "n_retries": "1",
    "breaker_failures": "2",
    "breaker_pause_ms": "1000",
}
ROWS: dict[str, tuple[Row, ...]] = {
    "": (Row(),),
    "live": (Row(),),
    "organization": (Row("POST", data={"organization": "{organization}"}, while_suspended=True),),
    "deployments": (Row(),),
    "deployments/<str:deployment>": (Row(),),
    "deployments/<str:deployment>/live": (Row(),),
    "keys": (Row(),),
    "keys/create": (
        Row("POST", Permission.KEYS_WRITE, {"name": "new", "project": "{project}", "expires": ""}),
    ),
    "keys/<str:key>": (Row("GET", Permission.KEYS_READ),),
    "keys/<str:key>/scopes": (Row("POST", Permission.KEYS_WRITE, {"models": "some-model"}),),
    "keys/<str:key>/limits": (Row("POST", Permission.LIMITS_WRITE, {"rpm": "5"}),),
    "keys/<str:key>/rotate": (Row("POST", Permission.KEYS_WRITE),),
    "keys/<str:key>/revoke": (Row("GET", Permission.KEYS_WRITE), Row("POST", Permission.KEYS_WRITE)),
    "playground": (Row(),),
    "playground/key": (Row("POST", Permission.MODELS_USE, {"deployment": "{deployment}"}),),
    "people": (Row("GET", Permission.MEMBERS_READ),),
    "people/invite": (
        Row("POST", Permission.MEMBERS_WRITE, {"email": "second-guest@example.com", "role": "viewer"}),
    ),
    "people/invitations/<str:invitation>/resend": (Row("POST", Permission.MEMBERS_WRITE),),
    "people/invitations/<str:invitation>/revoke": (Row("POST", Permission.MEMBERS_WRITE),),
    "sign-in": (Row("GET", Permission.SIGN_IN_READ),),
    "sign-in/domains": (Row("POST", Permission.SIGN_IN_WRITE, {"name": "example.net"}),),
    "sign-in/domains/<str:domain>": (Row("POST", Permission.SIGN_IN_WRITE, {"remove": "1"}),),
    "sign-in/providers": (
        Row(
            "POST",
            Permission.SIGN_IN_WRITE,
            {
                "kind": "oidc",
                "oidc-name": "n",
                "oidc-issuer": "https://id.example.net",
                "oidc-client_id": "c",
                "oidc-groups_claim": "groups",
            },
        ),
    ),
    "sign-in/providers/<str:provider>": (Row("POST", Permission.SIGN_IN_WRITE),),
    "sign-in/policy": (Row("POST", Permission.SIGN_IN_WRITE, {"default_role": "viewer", "group_roles": ""}),),
    "sign-in/scim-tokens": (Row("POST", Permission.SIGN_IN_WRITE, {"scim-name": "new", "scim-expires": ""}),),
    "sign-in/scim-tokens/<str:scim_token>": (Row("POST", Permission.SIGN_IN_WRITE),),
    "slo": (Row("GET", Permission.USAGE_READ),),
    "requests/<str:request_id>": (Row("GET", Permission.USAGE_READ),),
    "budgets": (Row("GET", Permission.USAGE_READ),),
    "budgets/create": (
        Row(
            "POST",
            Permission.LIMITS_WRITE,
            {"name": "n", "limit": "5", "period": "month", "project": "", "kind": "hard"},
        ),
    ),
    "budgets/<str:budget>": (Row("POST", Permission.LIMITS_WRITE, {"limit": "7.50"}),),
    "end-customers": (Row("GET", Permission.LIMITS_WRITE),),
    "end-customers/limit": (
        Row("POST", Permission.LIMITS_WRITE, {"end_customer": "cust-2", "project": "{project}", "rpm": "5"}),
    ),
    "end-customers/<str:limits>": (Row("GET", Permission.LIMITS_WRITE),),
    "end-customers/<str:limits>/change": (
        Row("POST", Permission.LIMITS_WRITE, {"rpm": "6"}),
        Row("POST", Permission.LIMITS_WRITE, {"delete": "1"}),
    ),
    "upstreams": (Row("GET", Permission.UPSTREAMS_READ),),
    "upstreams/attach": (
        Row(
            "POST",
            Permission.UPSTREAMS_WRITE,
            {
                "name": "new",
                "deployment": "{deployment_hex}",
                "role": "overflow",
                "base_url": "https://inference.example.org/v1",
                "model": "m",
                "slots": "4",
            },
        ),
    ),
    "upstreams/consent": (Row("POST", Permission.UPSTREAMS_WRITE, {"agreed": "1"}),),
    "upstreams/<str:upstream>": (Row("GET", Permission.UPSTREAMS_READ),),
    "upstreams/<str:upstream>/change": (
        Row("POST", Permission.UPSTREAMS_WRITE, {"enabled": "0"}),
        Row("POST", Permission.UPSTREAMS_WRITE, {**UPSTREAM_SETTINGS}),
    ),
    "upstreams/<str:upstream>/detach": (Row("POST", Permission.UPSTREAMS_WRITE),),
    "webhooks": (Row("GET", Permission.WEBHOOKS_READ),),
    "webhooks/create": (Row("POST", Permission.WEBHOOKS_WRITE, {"url": "https://hooks.example.net/new"}),),
    "webhooks/<str:webhook>": (Row("GET", Permission.WEBHOOKS_READ),),
    "webhooks/<str:webhook>/change": (
        Row("POST", Permission.WEBHOOKS_WRITE, {"url": "https://hooks.example.net/other"}),
        Row("POST", Permission.WEBHOOKS_WRITE, {"enabled": "0"}),
        Row("POST", Permission.WEBHOOKS_WRITE, {"delete": "1"}),
    ),
    "webhooks/<str:webhook>/rotate": (Row("POST", Permission.WEBHOOKS_WRITE),),
    "webhooks/<str:webhook>/test": (Row("POST", Permission.WEBHOOKS_WRITE),),
    "deliveries/<str:delivery>/replay": (Row("POST", Permission.WEBHOOKS_WRITE),),
    "sharing": (Row("GET", Permission.DEPLOYMENTS_READ),),
    "sharing/<str:grant>/withdraw": (Row("POST", Permission.DEPLOYMENTS_WRITE),),
    "machines": (Row("GET", Permission.DEPLOYMENTS_READ),),
    "audit": (Row("GET", Permission.AUDIT_READ),),
    "usage": (Row(),),
    "usage.csv": (Row(),),
}
# For people nobody knows yet, or without a tenant: nothing of any tenant may be in the answer, whoever asks.
OPEN = {"login", "logout", "internal/enrol", "invitations/<str:token>"}
# Single sign-on (identity/test_oidc.py, test_saml.py), for people nobody knows yet.
OPEN |= {
    "sso",
    "sso/<str:provider>",
    "sso/<str:provider_id>/callback",
    *(f"sso/<str:organization_slug>/{page}" for page in ("acs", "acs/finish", "metadata", "logout")),
}
# A person's own account (identity/test_account.py): nothing of a tenant either.
OPEN |= {
    "account",
    "account/inactive",
    "account/missing",
    "account/sessions/end",
    "account/reauthenticate",
    "account/password",
    "account/password/set",
    "account/password/reset",
    "account/password/reset/sent",
    "account/password/reset/done",
    "^account/password/reset/key/(?P<uidb36>[0-9A-Za-z]+)-(?P<key>.+)/$",
    "account/2fa",
    "account/2fa/authenticate",
    "account/2fa/reauthenticate",
    "account/2fa/activate",
    "account/2fa/deactivate",
    "account/2fa/keys",
    "account/2fa/keys/add",
    "account/2fa/keys/use",
    "account/2fa/keys/<int:pk>/remove",
    "account/2fa/codes",
    "account/2fa/codes/new",
}


def patterns() -> list[str]:
    """Every pattern of the web process, but the REST API's and SCIM's."""

    def walk(resolver: URLResolver, prefix: str) -> Iterator[str]:
        for entry in resolver.url_patterns:
            route = prefix + str(entry.pattern)
            if isinstance(entry, URLPattern):
                yield route
            else:
                yield from walk(entry, route)

    elsewhere = ("api/v1/", "scim/v2")
    return [route for route in walk(get_resolver(), "") if not route.startswith(elsewhere)]


class Acme:
    """Something of everything that a page could show, and what must not be seen of it."""

    def __init__(self, world: World) -> None:
        organization_id = world.organization.id
        self.deployment = make_deployment(world, "acme-secret-model")
        self.key, self.plaintext = key_services.create_api_key(
            organization_id=organization_id, project_id=world.project.id, name="acme-secret-key"
        )
        services.update_organization(organization_id=organization_id, name="Acme Secret Works")
        self.booked = book_usage(
            world, key_id=self.key.id, deployment_id=self.deployment.id, model="acme-secret-model"
        )
        self.invitation = invitations.invite(
            organization_id=organization_id, email="acme-secret-guest@example.com", role=Role.VIEWER
        )
        self.budget = budgets.create_budget(
            organization_id=organization_id, name="acme-secret-budget", limit_nano=10**9, period=Period.DAY
        )
        self.ends = endcustomers.set_limits(
            organization_id=organization_id,
            project_id=world.project.id,
            limits=Limits(rpm=7),
            end_customer="acme-customer",
        )
        self.domain = domains.claim(organization_id=organization_id, name="acme-secret.example")
        self.provider = providers.create_provider(
            organization_id=organization_id,
            kind=ProviderKind.OIDC,
            name="acme-secret-provider",
            issuer="https://acme-secret.example",
            client_id="c",
        )
        self.scim_token, scim_plaintext = scim_tokens.create_token(
            organization_id=organization_id, name="acme-secret-directory"
        )
        self.upstream = upstreams.attach(
            organization_id=organization_id,
            deployment_id=self.deployment.id,
            name="acme-secret-upstream",
            base_url="https://acme-secret-inference.example/v1",
            model="acme-secret-there",
            role="overflow",
            change=upstreams.Change(api_key="sk-acme-secret"),
        )
        self.webhook, webhook_secret = webhooks.create_endpoint(
            organization_id=organization_id, url="https://acme-secret-hook.example/"
        )
        self.delivery = webhooks.try_endpoint(organization_id=organization_id, endpoint_id=self.webhook.id)
        annex = services.create_project(organization_id=organization_id, name="Annex", slug="annex")
        with acting_as("corral_operator"):
            self.grant = sharing.grant(
                organization_id=organization_id,
                deployment_id=self.deployment.id,
                grantee_id=organization_id,
                project_id=annex.id,
            )
        self.values = {
            "upstream": str(self.upstream),
            "webhook": str(self.webhook),
            "delivery": str(self.delivery),
            "grant": f"grt_{self.grant.id.hex}",
            "deployment_hex": self.deployment.id.hex,
            "domain": str(self.domain),
            "provider": str(self.provider),
            "scim_token": str(self.scim_token),
            "budget": str(self.budget),
            "limits": str(self.ends),
            "invitation": str(self.invitation),
            "request_id": str(self.booked),
            "deployment": str(self.deployment),
            "key": str(self.key),
            "organization": organization_id.hex,
            "project": world.project.id.hex,
        }
        self.secrets = [
            "acme-secret",
            "Acme Secret Works",
            self.key.lookup,
            self.plaintext,
            scim_plaintext,
            webhook_secret,
            self.domain.token,
            self.ends.customer,
            "alice@example.org",
            "bob@example.org",
            *(
                each.hex
                for each in (
                    organization_id,
                    world.project.id,
                    self.deployment.id,
                    self.key.id,
                    self.booked.request_id,
                    self.invitation.id,
                    self.budget.id,
                    self.ends.id,
                    self.domain.id,
                    self.provider.id,
                    self.scim_token.id,
                    self.upstream.id,
                    self.webhook.id,
                    self.delivery.id,
                    self.grant.id,
                )
            ),
            str(organization_id),
            str(world.project.id),
        ]

    def calls(self) -> Iterator[tuple[str, Row, str, dict[str, str]]]:
        for pattern, rows in ROWS.items():
            path = "/" + pattern
            for name, value in self.values.items():
                path = path.replace(f"<str:{name}>", value)
            for row in rows:
                yield pattern, row, path, {k: v.format_map(self.values) for k, v in row.data.items()}

    def leaks(self, response: Any, *sent: str) -> list[str]:
        """Secrets in an answer's body and headers, beyond what was sent."""
        text = response.content.decode() + repr(sorted(response.headers.items()))
        for each in sent:
            text = text.replace(each, "")
        return [secret for secret in self.secrets if secret in text]


@pytest.fixture
def acme(world: World) -> Acme:
    return Acme(world)


def call(client: Client, row: Row, path: str, data: dict[str, str]) -> Any:
    """The answer; what the call changed is taken back."""
    with transaction.atomic():
        send = client.post if row.method == "POST" else client.get
        response = send(path, data)
        transaction.set_rollback(True)
    return response


def keys_of(world: World) -> list[Any]:
    with tenant(world.organization.id):
        return list(ApiKey.objects.order_by("id").values_list("id", "revoked_at"))


def test_every_pattern_has_a_row() -> None:
    assert set(patterns()) == ROWS.keys() | OPEN
    assert not ROWS.keys() & OPEN


@pytest.mark.parametrize("role", list(Role))
def test_a_member_may_what_the_role_says(world: World, acme: Acme, role: Role) -> None:
    user = services.create_user(email=f"{role.value}@example.com", password=PASSWORD)
    services.add_member(organization_id=world.organization.id, user=user, role=role)
    for pattern, row, path, data in acme.calls():
        response = call(signed_in(user), row, path, data)
        if row.permission is None or row.permission in PERMISSIONS[role]:
            assert response.status_code in (200, 302), (pattern, response.content)
        else:
            assert response.status_code == 403, pattern
            assert row.permission.sentence in response.content.decode(), pattern
            assert not acme.leaks(response), pattern


def test_a_stranger_finds_nothing(world: World, acme: Acme, stranger: Client) -> None:
    before = keys_of(world)
    for pattern, row, path, data in acme.calls():
        client = signed_in(world.charlie)
        response = call(client, row, path, data)
        if "<" in pattern or pattern == "playground/key":
            assert response.status_code == 404, pattern
        found = acme.leaks(response, path, *data.values())
        assert not found, (pattern, found)
    assert keys_of(world) == before


def test_somebody_who_belongs_nowhere_finds_nothing(world: World, acme: Acme) -> None:
    lonely = services.create_user(email="lonely@example.com", password=PASSWORD)
    for pattern, row, path, data in acme.calls():
        response = call(signed_in(lonely), row, path, data)
        assert response.status_code == 403, pattern
        assert not acme.leaks(response), pattern


@pytest.mark.parametrize("gone", ["anonymous", "inactive"])
def test_who_is_nobody_is_sent_to_sign_in(world: World, acme: Acme, gone: str) -> None:
    before, client = keys_of(world), Client()
    if gone == "inactive":
        client = signed_in(world.alice)
        type(world.alice).objects.filter(id=world.alice.id).update(is_active=False)
    for pattern, row, path, data in acme.calls():
        response = call(client, row, path, data)
        assert response.status_code == 302, (pattern, response.status_code)
        assert response.headers["Location"].startswith("/login?next="), pattern
        assert not acme.leaks(response, path), pattern
    assert keys_of(world) == before


def test_the_owner_of_a_suspended_organization_may_look_and_change_nothing(world: World, acme: Acme) -> None:
    services.suspend_organization(organization_id=world.organization.id, suspended=True)
    before = keys_of(world)
    for pattern, row, path, data in acme.calls():
        response = signed_in(world.alice).generic(
            row.method,
            path,
            "&".join(f"{k}={v}" for k, v in data.items()),
            "application/x-www-form-urlencoded",
        )
        if row.may_be_suspended:
            assert response.status_code in (200, 302), (pattern, response.content)
        else:
            assert response.status_code == 403, pattern
            assert "organization_suspended" in response.content.decode(), pattern
    assert keys_of(world) == before


def test_the_open_pages_tell_of_no_tenant(world: World, acme: Acme) -> None:
    for path in sorted(OPEN):
        for client in (Client(), signed_in(world.charlie)):
            for method in ("GET", "POST"):
                response = call(client, Row(method), f"/{path}", {})
                assert response.status_code < 500, path
                assert not acme.leaks(response), (path, method)


def test_a_teammate_sees_the_same_pages_as_the_owner(world: World, acme: Acme) -> None:
    """The other way round: what the matrix looks for is really there to be seen."""
    seen = "".join(
        signed_in(world.bob).get(path).content.decode()
        for _, row, path, _ in acme.calls()
        if row.method == "GET"
    )
    for name in (
        "acme-secret-model",
        "acme-secret-upstream",
        acme.grant.id.hex,
        "acme-secret-key",
        "acme-secret-guest",
        "Acme Secret Works",
        acme.key.id.hex,
        acme.deployment.id.hex,
    ):
        assert name in seen, name
