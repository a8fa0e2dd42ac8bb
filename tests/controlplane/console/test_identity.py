"""The page on which an organization sets up how its people sign in."""

from __future__ import annotations

import re
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from django.test import Client

from controlplane.identity import policies, providers
from controlplane.identity.models import Domain, IdentityProvider, ProviderKind
from controlplane.scim import tokens
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role
from tests.controlplane.console.conftest import signed_in
from tests.controlplane.identity.saml_idp import certificate
from tests.world import World

OIDC = {
    "kind": "oidc",
    "oidc-name": "Okta",
    "oidc-issuer": "https://example.okta.com",
    "oidc-client_id": "corral",
    "oidc-client_secret": "hush-hush",
    "oidc-groups_claim": "groups",
}


def rows(world: World, model: Any) -> list[Any]:
    with tenant(world.organization.id):
        return list(model.objects.order_by("id"))


def test_a_domain_is_claimed_looked_for_and_given_up(
    world: World, owner: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlplane.identity import domains

    assert owner.post("/sign-in/domains", {"name": "no domain"}).status_code == 400
    assert owner.post("/sign-in/domains", {"name": "acme.example"}).status_code == 302
    (row,) = rows(world, Domain)
    page = owner.get("/sign-in").content.decode()
    assert f"_corral.acme.example<br>corral-verification={row.token}" in page
    monkeypatch.setattr(domains, "_texts", lambda name: set())
    looked = owner.post(f"/sign-in/domains/{row}")
    assert (looked.status_code, "there is no TXT record" in looked.content.decode()) == (409, True)
    monkeypatch.setattr(domains, "_texts", lambda name: {f"corral-verification={row.token}"})
    assert owner.post(f"/sign-in/domains/{row}").status_code == 302
    assert rows(world, Domain)[0].verified_at is not None
    owner.post(f"/sign-in/domains/{row}", {"remove": "1"})
    assert rows(world, Domain) == []


def test_a_provider_is_connected_disabled_and_disconnected(world: World, owner: Client) -> None:
    wrong = owner.post("/sign-in/providers", {**OIDC, "oidc-issuer": "ftp://x"})
    assert (wrong.status_code, '<details class="more" open>' in wrong.content.decode()) == (400, True)
    assert owner.post("/sign-in/providers", OIDC).status_code == 302
    (row,) = rows(world, IdentityProvider)
    assert providers.secret_of(row) == "hush-hush"
    page = owner.get("/sign-in").content.decode()
    assert f"/sso/{row}/callback" in page and "hush-hush" not in page
    owner.post(f"/sign-in/providers/{row}")
    assert not rows(world, IdentityProvider)[0].is_enabled
    owner.post(f"/sign-in/providers/{row}", {"delete": "1"})
    assert rows(world, IdentityProvider) == []
    assert owner.post("/sign-in/providers", {"kind": "saml", "saml-name": "x"}).status_code == 400


def test_a_saml_certificate_is_replaced_with_both_good_in_between(world: World, owner: Client) -> None:
    first, second = (certificate(rsa.generate_private_key(65537, 2048)) for _ in range(2))
    provider = providers.create_provider(
        organization_id=world.organization.id,
        kind=ProviderKind.SAML,
        name="Entra",
        issuer="https://idp.example.org/metadata",
        sso_url="https://idp.example.org/sso",
        certificate=first,
    )
    path, before = f"/sign-in/providers/{provider}", provider.certificate
    assert owner.post(path, {"next_certificate": "nonsense"}).status_code == 400
    assert owner.post(path, {"replaced": "1"}).status_code == 400
    assert owner.post(path, {"next_certificate": second}).status_code == 302
    assert "is accepted too" in owner.get("/sign-in").content.decode()
    assert owner.post(path, {"replaced": "1"}).status_code == 302
    (row,) = rows(world, IdentityProvider)
    assert row.certificate not in ("", before) and row.next_certificate == ""


def test_the_policy_is_shown_and_changed_as_it_is(world: World, owner: Client) -> None:
    organization_id = world.organization.id
    values = {"default_role": "developer", "group_roles": "ops = admin\n/a=b = viewer\n", "require_mfa": "on"}
    assert owner.post("/sign-in/policy", values).status_code == 302
    with tenant(organization_id):
        row = policies.policy(organization_id=organization_id)
    assert row.group_roles == {"ops": "admin", "/a=b": "viewer"}
    assert (row.require_mfa, row.just_in_time, row.default_role) == (True, False, "developer")
    policies.set_policy(organization_id=organization_id, require_mfa=False)
    page = owner.get("/sign-in").content.decode()
    assert re.search(r"ops = admin</textarea>", page)
    for wrong in ("ops", "ops = king", "= admin"):
        refused = owner.post("/sign-in/policy", {"default_role": "viewer", "group_roles": wrong})
        assert (refused.status_code, "is not GROUP = ROLE" in refused.content.decode()) == (400, True)
    with tenant(organization_id):
        assert policies.policy(organization_id=organization_id).group_roles == row.group_roles


def test_owners_alone_change_how_people_sign_in(world: World) -> None:
    """Whoever connects a provider can have it vouch for an owner."""
    from controlplane.tenants import services
    from tests.world import PASSWORD

    user = services.create_user(email="admin@example.org", password=PASSWORD)
    services.add_member(organization_id=world.organization.id, user=user, role=Role.ADMIN)
    admin, path = signed_in(user), "/sign-in/policy"
    values = {"default_role": "viewer", "group_roles": "kings = owner"}
    assert admin.get("/sign-in").status_code == 200
    assert admin.post(path, values).status_code == 403
    assert admin.post(path, {"default_role": "viewer", "group_roles": ""}).status_code == 403
    provider = {"kind": "oidc", "oidc-name": "x", "oidc-issuer": "https://idp.test"}
    assert admin.post("/sign-in/providers", provider).status_code == 403
    assert admin.post("/sign-in/domains", {"name": "example.net"}).status_code == 403
    assert admin.post("/sign-in/scim-tokens", {"scim-name": "t"}).status_code == 403


def test_a_scim_token_is_shown_once_and_revoked(world: World, owner: Client) -> None:
    page = owner.post("/sign-in/scim-tokens", {"scim-name": "Entra", "scim-expires": "90"}).content.decode()
    found = re.search(r'id="secret">(sc-crl-[\w-]+)<', page)
    assert found
    directory = tokens.find_directory(found[1])
    assert directory is not None and directory.organization_id == world.organization.id
    listed = owner.get("/sign-in").content.decode()
    assert found[1] not in listed and f"sc-crl-…{found[1][-4:]}" in listed
    (row,) = rows(world, tokens.ScimToken)
    owner.post(f"/sign-in/scim-tokens/{row}")
    assert tokens.find_directory(found[1]) is None


def test_whose_place_the_directory_has_in_hand_is_marked(world: World, owner: Client) -> None:
    from controlplane.identity import domains
    from controlplane.scim import users

    organization_id = world.organization.id
    row = domains.claim(organization_id=organization_id, name="example.org")
    domains.mark_verified(organization_id=organization_id, domain_id=row.id)
    assert ">directory<" not in owner.get("/people").content.decode()
    users.create_user(organization_id=organization_id, facts=users.Facts("bob", "bob@example.org"))
    page = owner.get("/people").content.decode()
    assert re.search(r"Bob <span[^>]*>directory</span>", page)
    assert page.count(">directory<") == 1


def test_who_may_not_see_it_is_not_shown_the_way(owner: Client, developer: Client) -> None:
    assert "/sign-in" in owner.get("/people").content.decode()
    assert 'href="/sign-in"' not in developer.get("/people").content.decode()
    assert developer.get("/sign-in").status_code == 403
