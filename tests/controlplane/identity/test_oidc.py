"""Sign-in by OpenID Connect with a real provider: who gets in as what, and every way in which its word is refused."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
import requests
from allauth.socialaccount.models import SocialAccount
from django.test import Client

from controlplane.identity import domains, invitations, policies, providers, sessions
from controlplane.identity.models import IdentityProvider, ProviderKind
from controlplane.tenants import services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role, User
from tests.controlplane.identity.codes import enrol, sign_in
from tests.controlplane.identity.oidc_server import CLIENT_ID, CLIENT_SECRET, OidcServer, serving
from tests.world import World

pytestmark = pytest.mark.usefixtures("redis_url", "allow_loopback", "acme_domain")
BOB = {"sub": "okta-bob", "email": "bob@example.org", "name": "Bob"}
DORA = {"sub": "okta-dora", "email": "Dora@Example.org", "name": "Dora  D."}


@pytest.fixture
def idp(world: World, rsa_key: Any) -> Iterator[OidcServer]:
    with serving(rsa_key) as server:
        yield server


@pytest.fixture
def connected(world: World, idp: OidcServer) -> IdentityProvider:
    return connect(world.organization.id, idp)


def connect(organization_id: Any, idp: OidcServer) -> IdentityProvider:
    return providers.create_provider(
        organization_id=organization_id,
        kind=ProviderKind.OIDC,
        name="Okta",
        issuer=idp.issuer,
        client_id=CLIENT_ID,
        client_secret=CLIENT_SECRET,
    )


def leave(client: Client, provider: IdentityProvider, target: str = "/keys") -> str:
    """To the provider and back as far as its redirect: the address that the browser would go to."""
    there = client.get(f"/sso/{provider}?next={target}").headers["Location"]
    back = requests.get(there, allow_redirects=False, timeout=5)
    assert back.status_code == 302, back.text
    return back.headers["Location"].removeprefix("http://testserver")


def walk(client: Client, provider: IdentityProvider, target: str = "/keys") -> Any:
    return client.get(leave(client, provider, target))


def role_of(world: World, email: str) -> str | None:
    with tenant(world.organization.id):
        found = Member.objects.filter(organization_id=world.organization.id, user__email=email).first()
    return found and found.role


def refused(response: Any, client: Client) -> bool:
    return response.status_code in (401, 403, 502) and client.get("/keys").status_code == 302


def test_somebody_new_comes_in_with_the_default_role(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    idp.person = DORA
    client = Client()
    response = walk(client, connected)
    assert (response.status_code, response.headers["Location"]) == (302, "/keys")
    assert "Acme" in client.get("/keys").content.decode()
    dora = User.objects.get(email="dora@example.org")
    assert (dora.name, dora.has_usable_password(), role_of(world, dora.email)) == ("Dora D.", False, "viewer")
    assert client.get("/account").status_code == 403
    assert SocialAccount.objects.get().extra_data == {}
    # The second time it is the same person, by subject.
    assert walk(Client(), connected).status_code == 302
    assert User.objects.count() == 4


def test_the_first_step_is_found_by_the_domain_of_the_address(connected: IdentityProvider) -> None:
    client = Client()
    response = client.post("/sso", {"email": "anybody@EXAMPLE.org", "next": "/usage"})
    assert response.headers["Location"] == f"/sso/{connected}?next=%2Fusage"
    assert client.post("/sso", {"email": "a@nobody.example"}).status_code == 404
    going = client.get(f"/sso/{connected}").headers["Location"]
    asked = dict(parse_qsl(urlsplit(going).query))
    assert asked["code_challenge_method"] == "S256"
    assert asked["nonce"] and asked["state"]
    assert set(asked["scope"].split()) == {"openid", "profile", "email"}


def test_an_account_that_exists_is_linked_when_the_domain_is_proven(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    idp.person = BOB
    client = Client()
    assert walk(client, connected).status_code == 302
    assert client.get("/keys").status_code == 200
    assert SocialAccount.objects.get().user_id == world.bob.id
    assert role_of(world, "bob@example.org") == "developer"  # as before
    assert sign_in(Client(), "bob@example.org").status_code == 302  # the password still works


@pytest.mark.parametrize(
    "email", ["charlie@other.example", "bob@sub.example.org", "x@example.org.evil.example"]
)
def test_a_provider_vouches_for_its_organizations_domains_alone(
    world: World, idp: OidcServer, connected: IdentityProvider, email: str
) -> None:
    User.objects.filter(id=world.charlie.id).update(email="charlie@other.example")
    idp.person = {"sub": "x", "email": email}
    client = Client()
    response = walk(client, connected)
    assert refused(response, client)
    assert "has not proven the domain" in response.content.decode()
    assert not SocialAccount.objects.exists()


def test_another_organizations_provider_signs_nobody_of_ours_in(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    """Charlie runs Other's provider and says that he is Alice."""
    theirs = connect(world.other_organization.id, idp)
    idp.person = {"sub": "evil", "email": "alice@example.org"}
    client = Client()
    assert refused(walk(client, theirs), client)
    with pytest.raises(Exception, match="holds this domain"):
        row = domains.claim(organization_id=world.other_organization.id, name="example.org")
        domains.mark_verified(organization_id=world.other_organization.id, domain_id=row.id)
    # And what ours vouched for reaches ours alone, though Bob belongs to both.
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.ADMIN)
    idp.person = BOB
    bob = Client()
    walk(bob, connected)
    bob.post("/organization", {"organization": world.other_organization.id.hex})
    page = bob.get("/keys").content.decode()
    assert "Acme" in page and "Other" not in page


LIES: dict[str, dict[str, Any]] = {
    "another audience": {"aud": "somebody-else"},
    "another issuer": {"iss": "https://evil.example"},
    "expired": {"exp": int(time.time()) - 600},
    "from the future": {"iat": int(time.time()) + 3600},
    "another nonce": {"nonce": "stolen"},
    "no nonce": {"nonce": None},
    "no expiry": {"exp": None},
    "no subject": {"sub": None},
    "for another party": {"azp": "somebody-else"},
    "an address that is not verified": {"email_verified": False},
    "no address": {"email": None},
}


@pytest.mark.parametrize("lie", LIES)
def test_an_id_token_that_is_not_as_it_should_be_is_refused(
    idp: OidcServer, connected: IdentityProvider, lie: str
) -> None:
    idp.person, idp.claims = BOB, LIES[lie]
    client = Client()
    assert refused(walk(client, connected), client)
    assert not SocialAccount.objects.exists()


def test_a_signature_by_another_key_is_refused(
    idp: OidcServer, connected: IdentityProvider, other_rsa_key: Any
) -> None:
    idp.person, idp.key = BOB, other_rsa_key
    client = Client()
    assert refused(walk(client, connected), client)


def test_a_token_without_signature_or_signed_with_the_public_key_is_refused(
    idp: OidcServer, connected: IdentityProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    idp.person = BOB
    real = idp._token

    def unsigned(form: dict[str, str], headers: Any) -> tuple[int, Any]:
        status, answer = real(form, headers)
        _, claims, _ = answer["id_token"].split(".")
        header = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": "one"}).encode()).decode()
        return status, {**answer, "id_token": f"{header.rstrip('=')}.{claims}."}

    monkeypatch.setattr(idp, "_token", unsigned)
    client = Client()
    assert refused(walk(client, connected), client)


def test_an_answer_is_good_once_and_only_where_it_was_asked_for(
    idp: OidcServer, connected: IdentityProvider
) -> None:
    idp.person = BOB
    client, thief = Client(), Client()
    back = leave(client, connected)
    assert refused(thief.get(back), thief)  # another browser: no state
    assert client.get(back).status_code == 302
    client.post("/logout")
    assert refused(client.get(back), client)  # again
    unsolicited = Client()
    assert refused(unsolicited.get(f"/sso/{connected}/callback?code=x&state=y"), unsolicited)


def test_who_is_disabled_stays_out(world: World, idp: OidcServer, connected: IdentityProvider) -> None:
    User.objects.filter(id=world.bob.id).update(is_active=False)
    idp.person = BOB
    client = Client()
    response = walk(client, connected)
    assert refused(response, client) and "disabled" in response.content.decode()


def test_without_just_in_time_only_members_and_invited_come_in(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    policies.set_policy(organization_id=world.organization.id, just_in_time=False)
    idp.person = DORA
    client = Client()
    response = walk(client, connected)
    assert refused(response, client) and "invite you" in response.content.decode()
    assert not User.objects.filter(email="dora@example.org").exists()
    invitations.invite(organization_id=world.organization.id, email="dora@example.org", role=Role.BILLING)
    assert walk(client, connected).status_code == 302
    assert role_of(world, "dora@example.org") == "billing"


def test_groups_become_roles_at_each_sign_in(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    policies.set_policy(
        organization_id=world.organization.id,
        group_roles={"platform": Role.ADMIN, "ml": Role.DEVELOPER},
        default_role=Role.VIEWER,
    )
    for groups, role in (
        (["ml", "platform", "other"], "admin"),
        (["ml"], "developer"),
        ("platform", "admin"),
        ([], "viewer"),
    ):
        idp.person = {**DORA, "groups": groups}
        assert walk(Client(), connected).status_code == 302
        assert role_of(world, "dora@example.org") == role, groups
    idp.person = {**DORA}  # it says nothing of groups
    with tenant(world.organization.id):
        Member.objects.filter(user__email="dora@example.org").update(role="billing")
    walk(Client(), connected)
    assert role_of(world, "dora@example.org") == "billing"
    idp.person = {"sub": "alice", "email": "alice@example.org", "groups": ["ml"]}
    walk(Client(), connected)
    assert role_of(world, "alice@example.org") == "owner"  # made by hand, and the last one


def test_a_session_by_the_provider_passes_both_requirements(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    policies.set_policy(organization_id=world.organization.id, require_mfa=True, require_sso=True)
    idp.person = BOB
    client = Client()
    walk(client, connected)
    assert client.get("/keys").status_code == 200


def test_who_has_a_second_factor_here_is_not_asked_for_it_after_the_provider(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    phone = Client()
    sign_in(phone, "bob@example.org")
    enrol(phone)
    idp.person = BOB
    client = Client()
    assert walk(client, connected).headers["Location"] == "/keys"
    assert client.get("/keys").status_code == 200


def test_disabling_the_provider_ends_its_sessions_and_its_doors(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    idp.person = BOB
    client, by_password = Client(), Client()
    back = leave(Client(), connected)
    walk(client, connected)
    sign_in(by_password, "bob@example.org")
    providers.update_provider(
        organization_id=world.organization.id, provider_id=connected.id, is_enabled=False
    )
    assert client.get("/keys").status_code == 302
    assert by_password.get("/keys").status_code == 200
    assert Client().get(f"/sso/{connected}").status_code == 404
    assert Client().get(back).status_code == 404


def test_a_person_whose_domain_was_given_up_is_no_longer_vouched_for(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    idp.person = BOB
    assert walk(Client(), connected).status_code == 302
    with tenant(world.organization.id):
        (row,) = domains.Domain.objects.all()
    domains.remove(organization_id=world.organization.id, domain_id=row.id)
    client = Client()
    assert refused(walk(client, connected), client)


def test_the_secret_is_sealed_and_never_shown(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    from controlplane.audit.models import Entry

    with tenant(world.organization.id):
        stored = IdentityProvider.objects.values_list().get()
        logged = repr(list(Entry.objects.filter(kind="identity_provider").values_list("changes", flat=True)))
    assert CLIENT_SECRET.encode() not in b"".join(
        bytes(v) for v in stored if isinstance(v, (bytes, memoryview))
    )
    assert "secret" not in logged
    assert "client_id" in logged
    assert providers.secret_of(connected) == CLIENT_SECRET


def test_a_provider_that_is_away_or_calls_itself_otherwise_is_said(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    providers.update_provider(
        organization_id=world.organization.id, provider_id=connected.id, issuer=f"{idp.issuer}/"
    )
    assert Client().get(f"/sso/{connected}").status_code == 502
    providers.update_provider(
        organization_id=world.organization.id, provider_id=connected.id, issuer="http://127.0.0.1:1"
    )
    assert Client().get(f"/sso/{connected}").status_code == 502


def test_signing_out_elsewhere_ends_sessions_of_the_provider_too(
    world: World, idp: OidcServer, connected: IdentityProvider
) -> None:
    idp.person = BOB
    client = Client()
    walk(client, connected)
    sessions.end_all(user_id=world.bob.id)
    assert client.get("/keys").status_code == 302


def test_the_way_back_leads_to_our_own_pages_only(idp: OidcServer, connected: IdentityProvider) -> None:
    idp.person = BOB
    assert walk(Client(), connected, "https://evil.example/").headers["Location"] == "/"
    there = Client().get(f"/sso/{connected}?scope=admin&auth_params=prompt%3Dnone").headers["Location"]
    assert "prompt" not in parse_qs(urlsplit(there).query)
