"""Groups of a directory, who is in them, and the roles that they give."""

from __future__ import annotations

from typing import Any

from django.db import transaction

from controlplane.tenants.models import Role
from tests.controlplane.scim.caller import Directory, role_of
from tests.world import World

ANN, CAT = "ann@example.org", "cat@example.org"


def members_of(directory: Directory, group: str) -> set[str]:
    return {each["value"] for each in directory.get(f"/Groups/{group}").body.get("members", [])}


def test_the_highest_role_of_ones_groups_counts(world: World, directory: Directory, roles: Any) -> None:
    organization_id = world.organization.id
    roles(ops=Role.ADMIN, dev=Role.DEVELOPER)
    ann = directory.add_user(ANN)
    assert role_of(organization_id, ANN) == Role.VIEWER
    dev = directory.add_group("dev", ann)
    ops = directory.add_group("ops", ann)
    assert role_of(organization_id, ANN) == Role.ADMIN
    directory.patch(f"/Groups/{ops}", {"op": "remove", "path": f'members[value eq "{ann}"]'})
    assert role_of(organization_id, ANN) == Role.DEVELOPER
    directory.patch(f"/Groups/{dev}", {"op": "replace", "path": "displayName", "value": "ops"})
    assert role_of(organization_id, ANN) == Role.DEVELOPER  # there is an ops already: refused
    directory.call("DELETE", f"/Groups/{ops}")
    directory.patch(f"/Groups/{dev}", {"op": "replace", "path": "displayName", "value": "ops"})
    assert role_of(organization_id, ANN) == Role.ADMIN
    directory.call("DELETE", f"/Groups/{dev}")
    assert role_of(organization_id, ANN) == Role.VIEWER


def test_a_role_may_be_given_by_the_directorys_own_id_of_a_group(
    world: World, directory: Directory, roles: Any
) -> None:
    """As Entra's sign-in claims name groups."""
    roles(**{"6f9619ff": Role.BILLING})
    directory.add_group("Finance", directory.add_user(ANN), externalId="6f9619ff")
    assert role_of(world.organization.id, ANN) == Role.BILLING


def test_owners_who_were_made_by_hand_stay_where_no_group_makes_owners(
    world: World, directory: Directory, roles: Any
) -> None:
    from controlplane.tenants import services

    services.add_member(organization_id=world.organization.id, user=world.charlie, role=Role.OWNER)
    roles(dev=Role.DEVELOPER)
    directory.add_group("dev", directory.add_user("charlie@example.org"))
    assert role_of(world.organization.id, "charlie@example.org") == Role.OWNER


def _entra_add(*who: str) -> dict[str, Any]:
    return {"op": "Add", "path": "members", "value": [{"$ref": None, "value": each} for each in who]}


CHANGES: list[tuple[Any, str]] = [
    (lambda a, b: [_entra_add(b)], "ab"),
    (lambda a, b: [_entra_add(a, b), _entra_add(a)], "ab"),
    (lambda a, b: [{"op": "add", "value": {"members": [{"value": b}]}}], "ab"),
    (lambda a, b: [{"op": "Remove", "path": "members", "value": [{"value": a}]}], ""),
    (lambda a, b: [{"op": "remove", "path": f'members[value eq "{a}" or value eq "{b}"]'}], ""),
    (lambda a, b: [{"op": "remove", "path": f'members[value eq "{b}"]'}], "a"),
    (lambda a, b: [{"op": "remove", "path": "members"}], ""),
    (lambda a, b: [{"op": "remove", "path": "members"}, _entra_add(b)], "b"),
    (lambda a, b: [{"op": "replace", "path": "members", "value": [{"value": b}]}], "b"),
    (lambda a, b: [{"op": "replace", "path": "members", "value": []}], ""),
    (lambda a, b: [_entra_add(b), {"op": "remove", "path": f'members[value eq "{b}"]'}], "a"),
    (lambda a, b: [{"op": "remove", "path": f'members[value eq "{a}"]'}, _entra_add(a)], "a"),
    (lambda a, b: [{"op": "replace", "value": {"id": "x", "displayName": "renamed"}}], "a"),
]


def test_members_as_directories_change_them(directory: Directory) -> None:
    a, b = directory.add_user(ANN), directory.add_user(CAT)
    group = directory.add_group("ops", a)
    for n, (operations, left) in enumerate(CHANGES):
        with transaction.atomic():
            response = directory.patch(f"/Groups/{group}", *operations(a, b))
            assert response.status_code == 200, (n, response.body)
            assert members_of(directory, group) == {{"a": a, "b": b}[each] for each in left}, n
            transaction.set_rollback(True)


def test_a_put_replaces_the_members(directory: Directory) -> None:
    a, b = directory.add_user(ANN), directory.add_user(CAT)
    group = directory.add_group("ops", a, externalId="x")
    directory.call("PUT", f"/Groups/{group}", {"displayName": "ops", "members": [{"value": b}]})
    body = directory.get(f"/Groups/{group}").body
    assert ([each["value"] for each in body["members"]], "externalId" in body) == ([b], False)
    directory.call("PUT", f"/Groups/{group}", {"displayName": "renamed"})  # says nothing of members
    assert members_of(directory, group) == {b}
    directory.call("PUT", f"/Groups/{group}", {"displayName": "renamed", "members": []})
    assert members_of(directory, group) == set()


def test_who_is_deleted_is_in_no_group_any_more(directory: Directory) -> None:
    a = directory.add_user(ANN)
    group = directory.add_group("ops", a)
    before = directory.get(f"/Groups/{group}")["ETag"]
    directory.call("DELETE", f"/Users/{a}")
    assert members_of(directory, group) == set()
    assert directory.get(f"/Groups/{group}")["ETag"] != before


def test_what_is_refused_leaves_nothing_behind(world: World, directory: Directory) -> None:
    a = directory.add_user(ANN)
    group = directory.add_group("ops", a)
    unknown = "scu_" + "0" * 32
    for operations, scim_type in (
        ([_entra_add(unknown)], "invalidValue"),
        ([_entra_add("nonsense")], "invalidValue"),
        ([{"op": "add", "path": "members", "value": [{"value": a, "type": "Group"}]}], "invalidValue"),
        ([{"op": "replace", "path": "displayNam", "value": "x"}], "invalidPath"),
        ([{"op": "replace", "path": "members[", "value": "x"}], "invalidPath"),
        ([{"op": "remove", "path": 'members[display eq "x"]'}], "invalidFilter"),
        ([{"op": "remove"}], "noTarget"),
        ([{"op": "move", "path": "members"}], "invalidSyntax"),
        ([], "invalidSyntax"),
        ([{"op": "replace", "path": "id", "value": "x"}], "mutability"),
        ([{"op": "replace", "path": "displayName", "value": ""}], "invalidValue"),
        ([{"op": "replace", "path": "displayName", "value": "x" * 300}], "invalidValue"),
    ):
        first = {"op": "replace", "path": "externalId", "value": "changed"}
        response = directory.patch(f"/Groups/{group}", *([first, *operations] if operations else []))
        assert (response.status_code, response.body["scimType"]) == (400, scim_type), (
            operations,
            response.body,
        )
    body = directory.get(f"/Groups/{group}").body
    assert ("externalId" in body, body["displayName"]) == (False, "ops")
    again = directory.call("POST", "/Groups", {"displayName": "OPS"})
    assert (again.status_code, again.body["scimType"]) == (409, "uniqueness")
    assert directory.call("POST", "/Groups", {"displayName": " "}).status_code == 400
