"""Password, second factor, sessions: what each lets in, and what ends them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from allauth.mfa.models import Authenticator
from allauth.usersessions.models import UserSession
from django.test import Client

from controlplane.identity import policies
from controlplane.tenants import services, signed_in
from controlplane.tenants.models import Role, User
from tests.controlplane.identity.codes import code_of, enrol, sign_in
from tests.world import PASSWORD, World

FACTOR = "/account/2fa/authenticate"
NEW_PASSWORD = "another-long-enough-one"


@pytest.fixture(autouse=True)
def _redis(redis_url: str) -> str:
    return redis_url


@pytest.fixture
def alice(world: World) -> Client:
    client = Client()
    assert sign_in(client, "alice@example.org").status_code == 302
    return client


def is_in(client: Client) -> bool:
    return client.get("/keys").status_code == 200


def test_the_password_alone_does_not_let_in_who_has_a_second_factor(alice: Client) -> None:
    secret, _ = enrol(alice)
    other = Client()
    response = sign_in(other, "alice@example.org", next="/usage")
    assert response.headers["Location"] == FACTOR
    assert not is_in(other)
    assert "Incorrect code" in other.post(FACTOR, {"code": "000000"}).content.decode()
    assert not is_in(other)
    assert other.post(FACTOR, {"code": code_of(secret, periods=1)}).headers["Location"] == "/usage"
    assert is_in(other)


def test_a_code_is_good_once(alice: Client) -> None:
    secret, _ = enrol(alice)
    code = code_of(secret, periods=1)
    clients = [Client(), Client()]
    for client in clients:
        sign_in(client, "alice@example.org")
        client.post(FACTOR, {"code": code})
    assert [is_in(client) for client in clients] == [True, False]


def test_a_recovery_code_is_good_once_and_new_ones_void_it(alice: Client) -> None:
    _, codes = enrol(alice)
    assert len(codes) == 10
    clients = [Client(), Client()]
    for client in clients:
        sign_in(client, "alice@example.org")
        client.post(FACTOR, {"code": codes[0]})
    assert [is_in(client) for client in clients] == [True, False]
    assert codes[1] not in alice.get("/account/2fa/codes").content.decode()  # shown once
    alice.post("/account/2fa/codes/new")
    late = Client()
    sign_in(late, "alice@example.org")
    late.post(FACTOR, {"code": codes[1]})
    assert not is_in(late)


def test_guessing_codes_is_stopped_and_the_right_one_waits_too(alice: Client) -> None:
    secret, _ = enrol(alice)
    other = Client()
    sign_in(other, "alice@example.org")
    for _ in range(5):
        other.post(FACTOR, {"code": "000000"})
    assert "Too many failed" in other.post(FACTOR, {"code": code_of(secret, periods=1)}).content.decode()
    assert not is_in(other)


def test_the_seed_is_sealed_at_rest(alice: Client) -> None:
    secret, _ = enrol(alice)
    stored = repr(list(Authenticator.objects.values_list("data", flat=True)))
    assert secret not in stored
    assert Authenticator.objects.count() == 2


def test_enrolling_ends_sessions_that_had_the_password_alone(alice: Client, world: World) -> None:
    other = Client()
    sign_in(other, "alice@example.org")
    assert is_in(other)
    enrol(alice)
    assert is_in(alice)
    assert not is_in(other)


def test_where_it_is_required_members_enrol_before_anything_else(alice: Client, world: World) -> None:
    bob = Client()
    sign_in(bob, "bob@example.org")
    policies.set_policy(organization_id=world.organization.id, require_mfa=True)
    for path in ("/", "/keys", "/usage.csv", "/playground"):
        assert bob.get(path).headers["Location"].startswith("/account/missing?next="), path
    assert bob.post("/keys/create", {"name": "x"}).status_code == 302
    assert bob.get("/live", headers={"HX-Request": "true"}).headers["HX-Redirect"] == "/account/missing"
    assert bob.get("/account/missing?next=/keys").headers["Location"] == "/account/2fa/activate?next=/keys"
    assert "Acme requires it" in bob.get("/account/2fa/activate").content.decode()
    enrol(bob)
    assert is_in(bob)
    assert "cannot deactivate" in bob.get("/account/2fa/deactivate").content.decode()
    bob.post("/account/2fa/deactivate")
    assert Authenticator.objects.filter(user=world.bob, type="totp").exists()


def test_the_requirement_is_of_one_organization_and_others_stay_open(alice: Client, world: World) -> None:
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.VIEWER)
    policies.set_policy(organization_id=world.organization.id, require_mfa=True)
    bob = Client()
    sign_in(bob, "bob@example.org")
    assert "Other" in bob.get("/keys").content.decode()  # the one that this session is good enough for
    bob.post("/organization", {"organization": world.organization.id.hex})
    assert bob.get("/keys").status_code == 302
    bob.post("/organization", {"organization": world.other_organization.id.hex})
    assert is_in(bob)


def test_taking_the_second_factor_away_makes_the_session_weak_again(alice: Client, world: World) -> None:
    enrol(alice)
    assert signed_in.used_mfa(alice.session)
    assert alice.post("/account/2fa/deactivate").status_code == 302
    assert not signed_in.used_mfa(alice.session)
    policies.set_policy(organization_id=world.organization.id, require_mfa=True)
    assert not is_in(alice)


def test_a_new_password_signs_out_everywhere_else(alice: Client, world: World) -> None:
    other = Client()
    sign_in(other, "alice@example.org")
    form = {"oldpassword": PASSWORD, "password1": NEW_PASSWORD, "password2": NEW_PASSWORD}
    assert alice.post("/account/password", {**form, "oldpassword": "wrong"}).status_code == 200
    assert is_in(other)
    assert alice.post("/account/password", form).headers["Location"] == "/account"
    assert is_in(alice)
    assert not is_in(other)
    assert sign_in(Client(), "alice@example.org").status_code == 401
    assert sign_in(Client(), "alice@example.org", NEW_PASSWORD).status_code == 302


def test_a_forgotten_password_is_set_by_mail_once(
    alice: Client, world: World, mailoutbox: list, link: Callable[[], str]
) -> None:
    visitor = Client()
    assert visitor.post("/account/password/reset", {"email": "Alice@example.org"}).status_code == 302
    assert mailoutbox[-1].to == ["alice@example.org"]
    mailed = link()
    form = visitor.get(mailed).headers["Location"]
    assert form.endswith("-set-password/")  # the key is out of the address
    weak = visitor.post(form, {"password1": "short", "password2": "short"})
    assert "too short" in weak.content.decode()
    done = visitor.post(form, {"password1": NEW_PASSWORD, "password2": NEW_PASSWORD})
    assert done.status_code == 302
    assert not is_in(visitor)  # it signs nobody in: the second factor would be passed by
    assert not is_in(alice)
    assert sign_in(Client(), "alice@example.org", NEW_PASSWORD).status_code == 302
    assert "does not work" in Client().get(mailed).content.decode()
    assert "has been reset" in mailoutbox[-1].body


def test_nobody_learns_who_has_an_account(world: World, mailoutbox: list) -> None:
    answers = [
        Client().post("/account/password/reset", {"email": email}).headers["Location"]
        for email in ("alice@example.org", "nobody@example.org")
    ]
    assert answers[0] == answers[1]
    assert len(mailoutbox) == 1


def test_sessions_are_listed_and_ended_one_or_all(alice: Client, world: World) -> None:
    phone, laptop = (Client(headers={"user-agent": f"Firefox/1 {name}"}) for name in ("Android", "Linux"))
    for client in (phone, laptop):
        sign_in(client, "alice@example.org")
    page = alice.get("/account").content.decode()
    assert "Firefox on Android" in page and "Firefox on Linux" in page
    row = UserSession.objects.get(user_agent__contains="Android")
    stranger = Client()
    sign_in(stranger, "charlie@example.org")
    stranger.post("/account/sessions/end", {"session": row.pk})
    assert is_in(phone)
    alice.post("/account/sessions/end", {"session": row.pk})
    assert (is_in(phone), is_in(laptop)) == (False, True)
    alice.post("/account/sessions/end", {"session": "others"})
    assert (is_in(alice), is_in(laptop)) == (True, False)


def test_a_disabled_person_is_out_at_once_and_stays_out(alice: Client, world: World) -> None:
    User.objects.filter(id=world.alice.id).update(is_active=False)
    assert not is_in(alice)
    assert sign_in(Client(), "alice@example.org").status_code == 401


def vouched(user: User, organization_id) -> Client:
    """As if the identity provider of this organization had signed the user in."""
    client = Client()
    client.force_login(user)
    session = client.session
    session[signed_in.VOUCHED_BY] = organization_id.hex
    session.save()
    return client


def test_a_session_that_a_provider_vouched_for_reaches_that_organization_alone(world: World) -> None:
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.ADMIN)
    client = vouched(world.bob, world.organization.id)
    client.post("/organization", {"organization": world.other_organization.id.hex})
    page = client.get("/keys").content.decode()
    assert "Acme" in page and "Other" not in page
    services.add_member(organization_id=world.other_organization.id, user=world.alice, role=Role.ADMIN)
    lost = vouched(world.charlie, world.organization.id)
    assert lost.get("/").status_code == 403  # a member of Other only


@pytest.mark.parametrize("path", ["/account", "/account/password", "/account/2fa/activate"])
def test_such_a_session_cannot_set_what_opens_other_doors(world: World, path: str) -> None:
    assert vouched(world.bob, world.organization.id).get(path).status_code == 403


def test_where_single_sign_on_is_required_passwords_do_not_do_but_for_owners_with_two(
    alice: Client, world: World
) -> None:
    policies.set_policy(organization_id=world.organization.id, require_sso=True)
    bob = Client()
    sign_in(bob, "bob@example.org")
    enrol(bob)
    assert not is_in(bob)
    assert bob.get("/account/missing").status_code == 403
    assert is_in(vouched(world.bob, world.organization.id))
    assert not is_in(alice)
    enrol(alice)
    assert is_in(alice)
