"""Sign-in by SAML with assertions that a real provider signed: who gets in, and every way in which it is refused."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import pytest
from django.test import Client

from controlplane.errors import InvalidInputError
from controlplane.identity import policies, providers
from controlplane.identity.models import IdentityProvider, ProviderKind
from controlplane.tenants import services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role, User
from tests.controlplane.identity.saml_idp import ENTITY_ID, SSO_URL, SamlIdp, certificate
from tests.world import World

pytestmark = pytest.mark.usefixtures("redis_url", "acme_domain")


@pytest.fixture
def idp(rsa_key: Any) -> SamlIdp:
    return SamlIdp(rsa_key)


@pytest.fixture
def connected(world: World, idp: SamlIdp) -> IdentityProvider:
    return providers.create_provider(
        organization_id=world.organization.id,
        kind=ProviderKind.SAML,
        name="Entra",
        issuer=ENTITY_ID,
        sso_url=SSO_URL,
        certificate=idp.certificate,
    )


def browser() -> Client:
    """Unlike the bare test client, it names the host it means."""
    return Client(headers={"host": "testserver"})


def ask(client: Client, provider: IdentityProvider, idp: SamlIdp, target: str = "/keys") -> dict[str, str]:
    there = client.get(f"/sso/{provider}?next={target}").headers["Location"]
    assert there.startswith(f"{SSO_URL}?SAMLRequest=")
    return idp.request_of(there)


def hand_in(client: Client, provider: IdentityProvider, answer: str, **form: str) -> Any:
    """The browser posts the provider's form: across sites, so without our session cookie, and follows."""
    response = client.post(f"/sso/{provider}/acs", {"SAMLResponse": answer, **form})
    while response.status_code == 302 and "/acs" in response.headers["Location"]:
        response = client.get(response.headers["Location"])
    return response


def walk(client: Client, provider: IdentityProvider, idp: SamlIdp) -> Any:
    return hand_in(client, provider, idp.answer(ask(client, provider, idp)))


def refused(response: Any, client: Client) -> bool:
    return response.status_code in (401, 403) and client.get("/keys").status_code == 302


def role_of(world: World, email: str) -> str | None:
    with tenant(world.organization.id):
        found = Member.objects.filter(organization_id=world.organization.id, user__email=email).first()
    return found and found.role


def test_a_member_comes_in(world: World, idp: SamlIdp, connected: IdentityProvider) -> None:
    client = browser()
    response = walk(client, connected, idp)
    assert (response.status_code, response.headers["Location"]) == (302, "/keys")
    page = client.get("/keys").content.decode()
    assert "Acme" in page and "bob@example.org" in page
    assert client.get("/account").status_code == 403


def test_somebody_new_comes_in_by_attributes_with_the_role_of_the_groups(
    world: World, idp: SamlIdp, connected: IdentityProvider
) -> None:
    policies.set_policy(organization_id=world.organization.id, group_roles={"ops": Role.ADMIN})
    claims = "http://schemas.xmlsoap.org/ws/2005/05/identity/claims"
    idp.overrides = {
        "name_id": "opaque-7",
        "name_format": "urn:oasis:names:tc:SAML:2.0:nameid-format:persistent",
    }
    idp.attributes = {
        f"{claims}/emailaddress": ["Dora@example.org"],
        f"{claims}/givenname": ["Dora"],
        f"{claims}/surname": ["Doe"],
        "groups": ["everybody", "ops"],
    }
    client = browser()
    assert walk(client, connected, idp).status_code == 302
    assert User.objects.get(email="dora@example.org").name == "Dora Doe"
    assert role_of(world, "dora@example.org") == "admin"


@pytest.mark.parametrize("what", ["audience", "issuer", "expired", "early", "elsewhere", "other request"])
def test_an_assertion_that_is_not_as_it_should_be_is_refused(
    idp: SamlIdp, connected: IdentityProvider, what: str
) -> None:
    idp.overrides = {
        "audience": {"audience": "https://another.example/metadata"},
        "issuer": {"issuer": "https://another.example/metadata"},
        "expired": {"not_after": "2020-01-01T00:00:00Z"},
        "early": {"not_before": "2099-01-01T00:00:00Z"},
        "elsewhere": {"acs": "https://another.example/acs"},
        "other request": {"in_response_to": "_another"},
    }[what]
    client = browser()
    assert refused(walk(client, connected, idp), client)


def test_wrong_missing_and_broken_signatures_are_refused(
    idp: SamlIdp, connected: IdentityProvider, other_rsa_key: Any
) -> None:
    client = browser()
    idp.is_signed = False
    assert refused(walk(client, connected, idp), client)
    idp.is_signed, idp.tamper = True, (b"bob@example.org", b"alice@example.org")
    assert refused(walk(client, connected, idp), client)
    idp.tamper, idp.signer = None, other_rsa_key
    assert refused(walk(client, connected, idp), client)
    idp.certificate = certificate(other_rsa_key)  # and brings its own certificate along
    assert refused(walk(client, connected, idp), client)


def test_while_its_certificate_is_replaced_both_are_good(
    world: World, idp: SamlIdp, connected: IdentityProvider, other_rsa_key: Any
) -> None:
    """Announced before, accepted on both sides of the change, and the old one no more once it is over."""
    following = certificate(other_rsa_key)
    change = {"organization_id": world.organization.id, "provider_id": connected.id}
    providers.update_provider(**change, next_certificate=following)
    assert walk(browser(), connected, idp).headers["Location"] == "/keys"
    idp.signer = other_rsa_key
    assert walk(browser(), connected, idp).headers["Location"] == "/keys"
    providers.update_provider(**change, certificate=following, next_certificate="")
    assert walk(browser(), connected, idp).headers["Location"] == "/keys"
    client = browser()
    idp.signer = idp.key
    assert refused(walk(client, connected, idp), client)
    with pytest.raises(InvalidInputError, match="next_certificate: not one"):
        providers.update_provider(**change, next_certificate="nonsense")


def test_a_wrapped_signature_is_refused(idp: SamlIdp, connected: IdentityProvider) -> None:
    """The signed assertion stays in the document, and an unsigned one about somebody else comes before it."""
    import base64

    from lxml import etree

    client = browser()
    request = ask(client, connected, idp)
    signed = etree.fromstring(base64.b64decode(idp.answer(request)))
    idp.is_signed, idp.email = False, "alice@example.org"
    forged = etree.fromstring(base64.b64decode(idp.answer(request)))
    tag = "{urn:oasis:names:tc:SAML:2.0:assertion}Assertion"
    signed.insert(list(signed).index(signed.find(tag)), forged.find(tag))
    assert refused(hand_in(client, connected, base64.b64encode(etree.tostring(signed)).decode()), client)


def test_an_answer_is_good_once_and_only_where_it_was_asked_for(
    idp: SamlIdp, connected: IdentityProvider
) -> None:
    client, thief = browser(), browser()
    answer = idp.answer(ask(client, connected, idp))
    assert refused(hand_in(thief, connected, answer), thief)
    assert hand_in(client, connected, answer).status_code == 302
    client.post("/logout")
    assert refused(hand_in(client, connected, answer), client)


def test_unsolicited_answers_are_refused(idp: SamlIdp, connected: IdentityProvider) -> None:
    client = browser()
    request = {**ask(client, connected, idp), "in_response_to": ""}
    assert refused(hand_in(client, connected, idp.answer(request), RelayState="/keys"), client)


def test_a_foreign_domain_and_a_disabled_person_are_refused(
    world: World, idp: SamlIdp, connected: IdentityProvider
) -> None:
    client = browser()
    idp.email = "charlie@other.example"
    response = walk(client, connected, idp)
    assert refused(response, client) and "has not proven" in response.content.decode()
    idp.email = "bob@example.org"
    User.objects.filter(id=world.bob.id).update(is_active=False)
    assert refused(walk(client, connected, idp), client)


def test_one_organizations_answer_opens_no_other(
    world: World, idp: SamlIdp, connected: IdentityProvider
) -> None:
    """Both trust the same provider; its answer names the audience it was made for."""
    theirs = providers.create_provider(
        organization_id=world.other_organization.id,
        kind=ProviderKind.SAML,
        name="The same",
        issuer=ENTITY_ID,
        sso_url=SSO_URL,
        certificate=idp.certificate,
    )
    client = browser()
    answer = idp.answer(ask(client, theirs, idp))
    assert refused(hand_in(client, connected, answer), client)
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.ADMIN)
    assert refused(walk(client, theirs, idp), client)  # they have not proven the domain


def test_our_metadata_says_where_answers_go(idp: SamlIdp, connected: IdentityProvider) -> None:
    response = browser().get(f"/sso/{connected}/metadata")
    assert response.status_code == 200
    text = response.content.decode()
    request = ask(browser(), connected, idp)
    assert f'Location="{request["acs"]}"' in text
    assert urlsplit(request["acs"]).path == f"/sso/{connected}/acs"
    assert f'entityID="{request["audience"]}"' in text


def test_nonsense_is_refused_without_an_error_of_ours(connected: IdentityProvider) -> None:
    for answer in ("", "%%%", "PHhtbC8+", "PCFET0NUWVBFIGE+PGEvPg=="):
        client = browser()
        assert refused(hand_in(client, connected, answer), client), answer
