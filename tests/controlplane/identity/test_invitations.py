"""Invitations: one mail, one use, one address, and never more rights than the inviter's."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from controlplane.identity import invitations
from controlplane.identity.models import Invitation
from controlplane.tenants import selectors, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role, User
from tests.controlplane.api.caller import Api, token_of
from tests.world import PASSWORD, World

Link = Callable[[], str]
NEW = {"name": "Dora", "password": "a-long-enough-one"}


@pytest.fixture(autouse=True)
def _redis(redis_url: str) -> str:
    """Pages read live figures."""
    return redis_url


@pytest.fixture
def invite(world: World, django_capture_on_commit_callbacks) -> Callable[..., Invitation]:
    def do(email: str = "dora@example.org", role: Role = Role.DEVELOPER) -> Invitation:
        with django_capture_on_commit_callbacks(execute=True):
            return invitations.invite(
                organization_id=world.organization.id, email=email, role=role, invited_by=world.alice
            )

    return do


def role_of(world: World, email: str) -> str | None:
    with tenant(world.organization.id):
        member = Member.objects.filter(organization_id=world.organization.id, user__email=email).first()
    return member and member.role


def signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_the_mail_names_who_invites_to_what_and_its_token_is_stored_nowhere(
    world: World, invite, mailoutbox: list, link: Link
) -> None:
    row = invite()
    [mail] = mailoutbox
    assert mail.to == ["dora@example.org"]
    assert "Alice invites you to join Acme on Corral, as developer" in mail.body
    token = link().rsplit("/", 1)[1]
    assert len(token) == 43
    with tenant(world.organization.id):
        row.refresh_from_db()
        assert row.sent_at is not None
        stored = Invitation.objects.filter(id=row.id).values_list()[0]
    assert token not in repr(stored)


def test_who_has_no_account_opens_one_and_is_in(world: World, invite, link: Link) -> None:
    invite()
    client = Client()
    assert "Open an account and join" in client.get(link()).content.decode()
    response = client.post(link(), NEW)
    assert (response.status_code, response.headers["Location"]) == (302, "/")
    assert "Acme" in client.get("/").content.decode()
    assert role_of(world, "dora@example.org") == "developer"
    assert Client().post(link(), NEW).status_code == 410  # once


def test_a_weak_password_is_said_at_its_field_and_opens_nothing(world: World, invite, link: Link) -> None:
    invite()
    response = Client().post(link(), {"name": "Dora", "password": "password"})
    assert response.status_code == 400
    assert "too short" in response.content.decode()
    assert not User.objects.filter(email="dora@example.org").exists()
    assert Client().get(link()).status_code == 200


def test_who_has_an_account_signs_in_and_joins(world: World, invite, link: Link) -> None:
    invite(email="Charlie@Example.org", role=Role.VIEWER)
    page = Client().get(link()).content.decode()
    assert "Sign in to join" in page and "password" not in page.lower()
    charlie = signed_in(world.charlie)
    assert charlie.post(link()).status_code == 302
    assert role_of(world, "charlie@example.org") == "viewer"
    assert "Acme" in charlie.get("/").content.decode()


def test_an_invitation_is_of_one_address_alone(world: World, invite, link: Link) -> None:
    invite()
    other = signed_in(world.charlie)
    assert "signed in as charlie@example.org" in other.get(link()).content.decode()
    other.post(link(), NEW)
    assert role_of(world, "charlie@example.org") is None
    assert not User.objects.filter(email="dora@example.org").exists()


def test_nobody_opens_an_account_in_the_name_of_one_that_exists(world: World, invite, link: Link) -> None:
    invite(email="charlie@example.org")
    Client().post(link(), {"name": "x", "password": "taken-over-by-me"})
    world.charlie.refresh_from_db()
    assert world.charlie.check_password(PASSWORD)


@pytest.mark.parametrize("end", ["revoke", "expire", "suspend", "resend"])
def test_an_offer_that_ended_gives_nothing(
    world: World, invite, link: Link, end: str, django_capture_on_commit_callbacks
) -> None:
    row = invite()
    organization_id, old = world.organization.id, link()
    if end == "revoke":
        invitations.revoke(organization_id=organization_id, invitation_id=row.id)
    elif end == "suspend":
        services.suspend_organization(organization_id=organization_id, suspended=True)
    else:
        with tenant(organization_id):
            past = timezone.now() - timedelta(minutes=5)
            Invitation.objects.filter(id=row.id).update(sent_at=past)
            if end == "expire":
                Invitation.objects.filter(id=row.id).update(expires_at=past)
        if end == "resend":
            with django_capture_on_commit_callbacks(execute=True):
                invitations.resend(organization_id=organization_id, invitation_id=row.id)
            assert link() != old
            assert Client().get(link()).status_code == 200
    assert Client().post(old, NEW).status_code in (400, 404, 410)
    assert role_of(world, "dora@example.org") is None
    assert not User.objects.filter(email="dora@example.org").exists()


def test_an_address_that_is_in_or_invited_is_a_conflict_and_an_expired_offer_is_not(
    world: World, invite
) -> None:
    api = Api(token_of(world.organization.id, Role.OWNER))
    row = invite()
    for email in ("DORA@example.org", "bob@example.org"):
        refused = api.post("/invitations", {"email": email, "role": "viewer"})
        assert (refused.status_code, refused.body["errors"][0]["field"]) == (409, "email")
    with tenant(world.organization.id):
        Invitation.objects.filter(id=row.id).update(expires_at=timezone.now() - timedelta(seconds=1))
    assert api.post("/invitations", {"email": "dora@example.org", "role": "viewer"}).status_code == 201
    assert api.post("/invitations", {"email": "no address", "role": "viewer"}).status_code == 400


def test_nobody_invites_above_their_own_rights(world: World, invite) -> None:
    admin = Api(token_of(world.organization.id, Role.ADMIN))
    refused = admin.post("/invitations", {"email": "king@example.org", "role": "owner"})
    assert (refused.status_code, refused.body["errors"][0]["field"]) == (403, "role")
    assert admin.post("/invitations", {"email": "king@example.org", "role": "admin"}).status_code == 201
    owners = invite(email="second@example.org", role=Role.OWNER)
    assert admin.post(f"/invitations/{owners}/resend").status_code == 403
    narrow = Api(token_of(world.organization.id, Role.OWNER, scopes=["members:write"]))
    assert narrow.post("/invitations", {"email": "x@example.org", "role": "viewer"}).status_code == 403


def test_the_console_invites_resends_and_revokes(world: World, invite, mailoutbox: list) -> None:
    alice = signed_in(world.alice)
    assert alice.post("/people/invite", {"email": "eve@example.org", "role": "viewer"}).status_code == 302
    assert "eve@example.org" in alice.get("/people").content.decode()
    with tenant(world.organization.id):
        row = Invitation.objects.get()
    assert row.invited_by_id == world.alice.id
    assert alice.post(f"/people/invitations/{row}/resend").status_code == 302
    assert alice.post(f"/people/invitations/{row}/revoke").status_code == 302
    assert "Resend to eve@example.org" not in alice.get("/people").content.decode()
    again = alice.post("/people/invite", {"email": "bob@example.org", "role": "viewer"})
    assert (again.status_code, "a member already" in again.content.decode()) == (409, True)


def test_an_admin_is_not_offered_owner_and_a_developer_nothing(world: World, invite) -> None:
    row = invite(role=Role.OWNER)
    members = {m.user_id: m for m in selectors_of(world)}
    bob = signed_in(world.bob)
    assert bob.post("/people/invite", {"email": "e@example.org", "role": "viewer"}).status_code == 403
    services.change_role(
        organization_id=world.organization.id, member_id=members[world.bob.id].id, role=Role.ADMIN
    )
    assert 'value="owner"' not in bob.get("/people").content.decode()
    assert bob.post("/people/invite", {"email": "e@example.org", "role": "owner"}).status_code == 400
    assert bob.post(f"/people/invitations/{row}/resend").status_code == 403
    assert signed_in(world.charlie).post(f"/people/invitations/{row}/revoke").status_code == 404


def selectors_of(world: World) -> list[Member]:
    with tenant(world.organization.id):
        return selectors.members(organization_id=world.organization.id)


def test_a_mail_server_that_is_away_leaves_an_invitation_to_resend(world: World, invite, settings) -> None:
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", 1
    row = invite()
    with tenant(world.organization.id):
        row.refresh_from_db()
    assert row.sent_at is None
    assert "mail not sent" in signed_in(world.alice).get("/people").content.decode()
