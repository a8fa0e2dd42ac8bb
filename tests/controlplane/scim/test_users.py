"""A directory makes, changes, deactivates and deletes people."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from controlplane.identity import domains
from controlplane.identity.models import Domain
from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Member, Role, User
from tests.controlplane.scim.caller import USER, Directory, role_of
from tests.world import PASSWORD, World

ANN = "ann@example.org"


def test_a_user_who_is_made_is_a_member(world: World, directory: Directory) -> None:
    response = directory.call(
        "POST",
        "/Users",
        {
            "schemas": [USER, "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User"],
            "userName": "Ann@Example.org",
            "externalId": "00u1",
            "name": {"givenName": "Ann", "familyName": "Lee", "honorificPrefix": "Dr"},
            "emails": [
                {"value": "private@example.net"},
                {"primary": True, "type": "work", "value": "ANN@example.org"},
            ],
            "active": "True",
            "title": "Engineer",
            "groups": [],
            "password": "ignored",
            "urn:ietf:params:scim:schemas:extension:enterprise:2.0:User": {"department": "R&D"},
        },
    )
    assert (response.status_code, response["Content-Type"]) == (201, "application/scim+json")
    body = response.body
    assert body["userName"] == "Ann@Example.org"
    assert body["name"] == {"familyName": "Lee", "givenName": "Ann"}
    assert body["emails"] == [{"value": ANN, "type": "work", "primary": True}]
    assert body["active"] is True
    assert body["meta"]["version"] == response["ETag"]
    assert response["Location"] == body["meta"]["location"]
    assert role_of(world.organization.id, ANN) == Role.VIEWER
    user = User.objects.get(email=ANN)
    assert (user.name, user.has_usable_password()) == ("Ann Lee", False)
    assert directory.get(f"/Users/{body['id']}").body == body


def test_an_account_that_exists_is_linked_and_keeps_its_role(world: World, directory: Directory) -> None:
    directory.add_user("bob@example.org", displayName="Robert")
    assert role_of(world.organization.id, "bob@example.org") == Role.DEVELOPER
    assert User.objects.filter(email="bob@example.org").count() == 1


def test_only_addresses_in_proven_domains(world: World, directory: Directory) -> None:
    for address in ("eve@example.net", "eve@sub.example.org", "nonsense", ""):
        response = directory.call("POST", "/Users", {"userName": address or "eve", "emails": []})
        assert (response.status_code, response.body["scimType"]) == (400, "invalidValue"), address
        assert not User.objects.filter(email=address).exists()
    scim_id = directory.add_user(ANN)
    for body in (
        {"op": "replace", "path": "userName", "value": "eve@example.net"},
        {"op": "replace", "path": 'emails[type eq "work"].value', "value": "eve@example.net"},
    ):
        directory.patch(f"/Users/{scim_id}", body)
    assert User.objects.filter(email=ANN).exists()
    assert not User.objects.filter(email="eve@example.net").exists()


def test_a_domain_that_was_given_up_lets_nobody_back_in(world: World, directory: Directory) -> None:
    scim_id = directory.add_user(ANN)
    directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": False})
    with tenant(world.organization.id):
        row = Domain.objects.get(organization_id=world.organization.id)
    domains.remove(organization_id=world.organization.id, domain_id=row.id)
    response = directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": True})
    assert (response.status_code, "has not proven" in response.body["detail"]) == (400, True)
    assert role_of(world.organization.id, ANN) is None


def test_a_name_or_address_that_is_taken_is_a_conflict(world: World, directory: Directory) -> None:
    directory.add_user(ANN)
    other = directory.add_user("cat@example.org")
    for response in (
        directory.call("POST", "/Users", {"userName": "ANN@example.org"}),
        directory.call("POST", "/Users", {"userName": "ann2", "emails": [{"value": ANN}]}),
        directory.patch(f"/Users/{other}", {"op": "replace", "path": "userName", "value": ANN}),
        directory.patch(
            f"/Users/{other}", {"op": "replace", "path": "emails.value", "value": "bob@example.org"}
        ),
    ):
        assert (response.status_code, response.body["scimType"]) == (409, "uniqueness"), response.body
        assert response.body["schemas"] == ["urn:ietf:params:scim:api:messages:2.0:Error"]


def test_the_address_follows_the_directory(world: World, directory: Directory) -> None:
    scim_id = directory.add_user(ANN)
    before = User.objects.get(email=ANN)
    response = directory.call(
        "PUT",
        f"/Users/{scim_id}",
        {"id": scim_id, "userName": "ann.lee@example.org", "name": {"givenName": "Ann", "familyName": "Li"}},
    )
    assert (response.status_code, response.body["emails"][0]["value"]) == (200, "ann.lee@example.org")
    before.refresh_from_db()
    assert (before.email, before.name) == ("ann.lee@example.org", "Ann Li")
    assert response.body["active"] is True  # what is not said of it stays


def test_an_account_that_can_do_more_than_the_directory_could_give_keeps_its_address(
    world: World, directory: Directory, roles: Any
) -> None:
    """Otherwise whoever has the token gets into it: the new address is where its password is reset to."""
    mallory = {"op": "replace", "path": 'emails[type eq "work"].value', "value": "mallory@example.org"}
    # Bob signs in by password; Ann was made owner by hand; Cat belongs to another organization, too.
    people = {"bob@example.org": world.bob}
    for email in (ANN, "cat@example.org"):
        directory.add_user(email)
        people[email] = User.objects.get(email=email)
    services.add_member(
        organization_id=world.other_organization.id, user=people["cat@example.org"], role=Role.VIEWER
    )
    with tenant(world.organization.id):
        member = Member.objects.get(user=people[ANN])
    services.change_role(organization_id=world.organization.id, member_id=member.id, role=Role.OWNER)
    directory.add_user("bob@example.org")
    for email, user in people.items():
        (found,) = directory.get(f'/Users?filter=userName eq "{email}"').body["Resources"]
        response = directory.patch(f"/Users/{found['id']}", mallory)
        assert (response.status_code, response.body["emails"][0]["value"]) == (200, "mallory@example.org")
        user.refresh_from_db()
        assert user.email == email
    # Where the directory could make owners anyway, nothing is gained by it.
    roles(kings=Role.OWNER)
    (found,) = directory.get(f'/Users?filter=userName eq "{ANN}"').body["Resources"]
    directory.patch(f"/Users/{found['id']}", {"op": "replace", "path": "emails.value", "value": ANN})
    directory.patch(f"/Users/{found['id']}", mallory)
    people[ANN].refresh_from_db()
    assert people[ANN].email == "mallory@example.org"


def test_who_belongs_elsewhere_keeps_the_name(world: World, directory: Directory) -> None:
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.VIEWER)
    directory.add_user("bob@example.org")
    (found,) = directory.get('/Users?filter=userName eq "bob@example.org"').body["Resources"]
    directory.patch(f"/Users/{found['id']}", {"op": "replace", "path": "displayName", "value": "Mallory"})
    world.bob.refresh_from_db()
    assert world.bob.name == "Bob"


@pytest.mark.parametrize("how", ["entra", "okta", "put", "delete"])
def test_who_is_deactivated_loses_place_and_sessions_at_once(
    world: World, directory: Directory, how: str
) -> None:
    scim_id = directory.add_user("bob@example.org")
    console = Client()
    assert console.post("/login", {"email": "bob@example.org", "password": PASSWORD}).status_code == 302
    assert console.get("/keys").status_code == 200
    path = f"/Users/{scim_id}"
    if how == "entra":
        response = directory.patch(path, {"op": "Replace", "path": "active", "value": "False"})
    elif how == "okta":
        response = directory.patch(path, {"op": "replace", "value": {"active": False, "id": scim_id}})
    elif how == "put":
        response = directory.call("PUT", path, {"userName": "bob@example.org", "active": False})
    else:
        response = directory.call("DELETE", path)
    assert response.status_code == (204 if how == "delete" else 200), response.body
    assert role_of(world.organization.id, "bob@example.org") is None
    assert console.get("/keys").status_code == 302  # the session has ended
    assert directory.get(path).status_code == (404 if how == "delete" else 200)


def test_who_is_activated_again_has_a_place_again(world: World, directory: Directory, roles: Any) -> None:
    scim_id = directory.add_user(ANN)
    group = directory.add_group("ops", scim_id)
    directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": False})
    assert role_of(world.organization.id, ANN) is None
    roles(ops=Role.ADMIN)
    response = directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": True})
    assert role_of(world.organization.id, ANN) == Role.ADMIN
    assert [each["value"] for each in response.body["groups"]] == [group]


def test_who_comes_inactive_has_no_place(world: World, directory: Directory) -> None:
    directory.add_user("bob@example.org", active=False)
    assert role_of(world.organization.id, "bob@example.org") is None
    response = directory.call("POST", "/Users", {"userName": "alice@example.org", "active": False})
    assert (response.status_code, response.body["scimType"]) == (400, "mutability")  # the last owner
    assert role_of(world.organization.id, "alice@example.org") == Role.OWNER


def test_who_was_made_by_the_directory_can_choose_a_password(
    directory: Directory, mailoutbox: list[Any]
) -> None:
    directory.add_user(ANN)
    assert Client().post("/account/password/reset", {"email": ANN}).status_code == 302
    assert [mail.to for mail in mailoutbox] == [[ANN]]
    assert "/account/password/reset/key/" in mailoutbox[0].body


def test_the_last_owner_stays(world: World, directory: Directory, roles: Any) -> None:
    scim_id = directory.add_user("alice@example.org")
    for response in (
        directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": False}),
        directory.call("DELETE", f"/Users/{scim_id}"),
    ):
        assert (response.status_code, response.body["scimType"]) == (400, "mutability")
        assert "last owner" in response.body["detail"]
    assert directory.get(f"/Users/{scim_id}").body["active"] is True
    roles(kings=Role.OWNER, staff=Role.VIEWER)
    group = directory.add_group("staff", scim_id)
    assert role_of(world.organization.id, "alice@example.org") == Role.OWNER  # by her groups a viewer
    directory.call("DELETE", f"/Groups/{group}")
    assert role_of(world.organization.id, "alice@example.org") == Role.OWNER


@pytest.mark.parametrize("is_chosen", [True, False])
def test_keys_of_leavers_are_revoked_where_that_was_chosen(
    world: World, directory: Directory, is_chosen: bool
) -> None:
    from controlplane.identity import policies

    policies.set_policy(organization_id=world.organization.id, revoke_keys_of_leavers=is_chosen)
    theirs, others = (
        key_services.create_api_key(
            organization_id=world.organization.id, project_id=world.project.id, name="k", created_by=user
        )[0]
        for user in (world.bob, world.alice)
    )
    scim_id = directory.add_user("bob@example.org")
    directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": False})
    with tenant(world.organization.id):
        revoked = set(ApiKey.objects.exclude(revoked_at=None).values_list("id", flat=True))
    assert revoked == ({theirs.id} if is_chosen else set()), others.id


def test_an_invitation_does_not_outlive_the_place(world: World, directory: Directory) -> None:
    from controlplane.identity import invitations
    from controlplane.identity.models import Invitation

    scim_id = directory.add_user(ANN)
    directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": False})
    row = invitations.invite(organization_id=world.organization.id, email=ANN, role=Role.ADMIN)
    directory.call("DELETE", f"/Users/{scim_id}")
    with tenant(world.organization.id):
        assert Invitation.objects.get(id=row.id).revoked_at is not None


def test_single_sign_on_does_not_let_back_in_whom_the_directory_deactivated(
    world: World, directory: Directory
) -> None:
    from controlplane.errors import NotPermittedError
    from controlplane.identity import providers
    from controlplane.identity.admission import Claims, admit
    from controlplane.identity.models import ProviderKind

    provider = providers.create_provider(
        organization_id=world.organization.id,
        kind=ProviderKind.OIDC,
        name="P",
        issuer="https://id.example.org",
        client_id="c",
    )
    scim_id = directory.add_user(ANN)
    directory.patch(f"/Users/{scim_id}", {"op": "replace", "path": "active", "value": False})
    other = directory.add_user("bob@example.org", emails=[{"value": "bob@example.org"}])
    for value in ({"emails.value": "robert@example.org"}, {"active": False}):
        directory.patch(f"/Users/{other}", {"op": "replace", "value": value})
    # Bob's account keeps its address; he is not let in under the new one either.
    for email in (ANN, "bob@example.org", "robert@example.org"):
        claims = Claims(subject=email, email=email, is_email_refuted=False, name="", groups=None)
        with pytest.raises(NotPermittedError, match="deactivated"):
            admit(provider, claims)
        assert role_of(world.organization.id, email) is None


def test_what_is_written_is_audited_with_the_token(world: World, directory: Directory) -> None:
    from controlplane.audit.models import Entry

    scim_id = directory.add_user(ANN)
    directory.add_group("ops", scim_id)
    with tenant(world.organization.id):
        kinds = dict(Entry.objects.filter(actor__startswith="sct_").values_list("kind", "actor"))
        token = Entry.objects.get(kind="scim_token", action="create")
    assert {"scim_user", "scim_group", "scim_membership", "member"} <= kinds.keys()
    assert not {"digest", "lookup"} & token.changes.keys()


def test_a_change_of_what_has_changed_meanwhile_is_refused(world: World, directory: Directory) -> None:
    scim_id = directory.add_user(ANN)
    first = directory.get(f"/Users/{scim_id}")["ETag"]
    assert directory.get(f"/Users/{scim_id}", **{"If-None-Match": first}).status_code == 304
    rename = {"op": "replace", "path": "displayName", "value": "Ann"}
    assert directory.patch(f"/Users/{scim_id}", rename, **{"If-Match": first}).status_code == 200
    for method in ("PATCH", "PUT", "DELETE"):
        body = {"userName": "x", "Operations": [rename]}
        response = directory.call(method, f"/Users/{scim_id}", body, **{"If-Match": first})
        assert response.status_code == 412, method
    now = directory.get(f"/Users/{scim_id}")["ETag"]
    directory.add_group("ops", scim_id)  # a user's representation names its groups
    assert directory.get(f"/Users/{scim_id}")["ETag"] != now
    # What changes nothing leaves the version as it is.
    before = directory.get(f"/Users/{scim_id}")["ETag"]
    same_address = {"op": "replace", "path": "emails.value", "value": "ANN@Example.org"}
    assert directory.patch(f"/Users/{scim_id}", rename, same_address)["ETag"] == before
