"""Who may call what under /scim/v2: every route with every kind of caller. A new one without a row fails."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import transaction

from controlplane.api.scim.urls import urlpatterns
from controlplane.scim import tokens
from controlplane.tenants import key_services, services
from controlplane.tenants.models import Role
from controlplane.tenants.rights import PERMISSIONS, Permission
from tests.controlplane.scim.caller import Directory, token_of
from tests.world import World

RENAME = {"Operations": [{"op": "replace", "path": "displayName", "value": "x"}]}
# Route -> (method, body, status for the organization's own directory, is about one thing of Acme's).
ROWS: dict[str, list[tuple[str, Any, int, bool]]] = {
    "/ServiceProviderConfig": [("GET", None, 200, False)],
    "/ResourceTypes": [("GET", None, 200, False)],
    "/ResourceTypes/<str:name>": [("GET", None, 200, False)],
    "/Schemas": [("GET", None, 200, False)],
    "/Schemas/<str:name>": [("GET", None, 200, False)],
    "/Users": [("GET", None, 200, False), ("POST", {"userName": "new@example.org"}, 201, False)],
    "/Users/.search": [("POST", {"filter": "active pr"}, 200, False)],
    "/Groups/.search": [("POST", {"filter": "displayName pr"}, 200, False)],
    "/Users/<str:name>": [
        ("GET", None, 200, True),
        ("PUT", {"userName": "ann@example.org"}, 200, True),
        ("PATCH", RENAME, 200, True),
        ("DELETE", None, 204, True),
    ],
    "/Groups": [("GET", None, 200, False), ("POST", {"displayName": "new"}, 201, False)],
    "/Groups/<str:name>": [
        ("GET", None, 200, True),
        ("PUT", {"displayName": "x"}, 200, True),
        ("PATCH", RENAME, 200, True),
        ("DELETE", None, 204, True),
    ],
    "": [("GET", None, 404, False)],
    "/<path:path>": [("GET", None, 404, False), ("POST", {}, 404, False)],
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Acme:
    """A person and a group that Acme's directory made."""

    def __init__(self, directory: Directory) -> None:
        self.user = directory.add_user(
            "ann@example.org", displayName="acme-secret-person", externalId="acme-secret-id"
        )
        self.group = directory.add_group("acme-secret-group", self.user)
        self.secrets = ["acme-secret", "ann@example.org", self.user, self.group]

    def calls(self) -> list[tuple[str, str, Any, int, bool]]:
        return [
            (method, self.path(route), body, status, is_one)
            for route, rows in ROWS.items()
            for method, body, status, is_one in rows
        ]

    def path(self, route: str) -> str:
        kind = route.split("/")[1] if route else ""
        name = {
            "Users": self.user,
            "Groups": self.group,
            "ResourceTypes": "User",
            "Schemas": "urn:ietf:params:scim:schemas:core:2.0:User",
        }.get(kind, "")
        return route.replace("<str:name>", name).replace("<path:path>", "Bulk")

    def leaks(self, response: Any, path: str) -> list[str]:
        text = (response.content.decode() + repr(sorted(response.headers.items()))).replace(path, "")
        return [each for each in self.secrets if each in text]


@pytest.fixture
def acme(directory: Directory) -> Acme:
    return Acme(directory)


def call(caller: Directory, method: str, path: str, body: Any) -> Any:
    """The answer; what the call changed is taken back."""
    with transaction.atomic():
        response = caller.call(method, path, body)
        transaction.set_rollback(True)
    return response


def test_every_route_has_a_row() -> None:
    assert {str(each.pattern) for each in urlpatterns} == ROWS.keys()


def test_the_organizations_own_directory_may_all_of_it_and_no_other_method(
    acme: Acme, directory: Directory
) -> None:
    for method, path, body, status, _ in acme.calls():
        response = call(directory, method, path, body)
        assert response.status_code == status, (method, path, response.body)
        if status < 300 and method != "DELETE":
            assert response["Content-Type"] == "application/scim+json"
    for route, rows in ROWS.items():
        for method in {*METHODS} - {each for each, *_ in rows}:
            response = call(directory, method, acme.path(route), {})
            assert response.status_code == (404 if rows[0][2] == 404 else 405), (method, route)


def test_a_strangers_directory_finds_nothing(world: World, acme: Acme) -> None:
    stranger = Directory(token_of(world.other_organization.id))
    for method, path, body, _, is_one in acme.calls():
        response = call(stranger, method, path, body)
        if is_one:
            assert response.status_code == 404, (method, path)
        assert not acme.leaks(response, path), (method, path)
    for kind, text in (("Users", f'id eq "{acme.user}"'), ("Groups", f'members.value eq "{acme.user}"')):
        assert stranger.get(f"/{kind}?filter={text}").body["totalResults"] == 0
    refused = stranger.call("POST", "/Groups", {"displayName": "g", "members": [{"value": acme.user}]})
    assert (refused.status_code, refused.body["scimType"]) == (400, "invalidValue")


@pytest.mark.parametrize(
    "kind", ["anonymous", "revoked", "expired", "suspended", "management", "inference", "cookie", "garbage"]
)
def test_nobody_else_gets_in(world: World, acme: Acme, directory: Directory, kind: str) -> None:
    """A token of another kind is none here, whatever its rights; nor is this one any use under /api/v1."""
    from django.test import Client

    from tests.controlplane.api.caller import Api
    from tests.controlplane.api.caller import token_of as management_token

    organization_id = world.organization.id
    caller = Directory(directory.token)
    if kind == "anonymous":
        caller.token = None
    elif kind == "garbage":
        caller.token = directory.token[:-1] + ("A" if directory.token[-1] != "A" else "B")
    elif kind == "revoked":
        found = tokens.find_directory(directory.token)
        tokens.revoke_token(organization_id=organization_id, token_id=found.token_id)
    elif kind == "expired":
        from tests.database import acting_as

        with acting_as("corral_operator"):
            from datetime import timedelta

            from django.db.models import F

            from controlplane.scim.models import ScimToken

            second = timedelta(seconds=1)
            ScimToken.objects.update(
                created_at=F("created_at") - 9 * second, expires_at=F("created_at") - second
            )
    elif kind == "suspended":
        services.suspend_organization(organization_id=organization_id, suspended=True)
    elif kind == "management":
        caller.token = management_token(organization_id, Role.OWNER)
    elif kind == "inference":
        caller.token = key_services.create_api_key(
            organization_id=organization_id, project_id=world.project.id, name="k"
        )[1]
    else:
        client = Client(raise_request_exception=False)
        client.force_login(world.alice)
        caller = Directory(None, client)
    for method, path, body, _, _ in acme.calls():
        response = call(caller, method, path, body)
        assert response.status_code == (403 if kind == "suspended" else 401), (method, path)
        assert response.body["schemas"] == ["urn:ietf:params:scim:api:messages:2.0:Error"]
        assert not acme.leaks(response, path), (method, path)
    assert Api(directory.token).get("/members").status_code == 401


def test_who_could_not_give_a_role_makes_no_token_that_can(world: World, roles: Any) -> None:
    from tests.controlplane.api.caller import Api
    from tests.controlplane.api.caller import token_of as management_token

    admin, owner = (Api(management_token(world.organization.id, role)) for role in (Role.ADMIN, Role.OWNER))
    scopes = {*PERMISSIONS[Role.VIEWER], Permission.SIGN_IN_WRITE}
    narrow = Api(management_token(world.organization.id, Role.OWNER, scopes=scopes))
    assert narrow.post("/scim-tokens", {"name": "a"}).status_code == 201
    roles(kings=Role.OWNER)
    assert narrow.post("/scim-tokens", {"name": "b"}).status_code == 403
    assert admin.post("/scim-tokens", {"name": "b"}).status_code == 403, (
        "owners alone change how people sign in"
    )
    made = owner.post("/scim-tokens", {"name": "b"})
    assert (made.status_code, made.body["base_url"]) == (201, "http://127.0.0.1:8401/scim/v2")
    assert Directory(made.body["token"]).get("/Users").status_code == 200
    listed = owner.get("/scim-tokens")
    assert [each["name"] for each in listed.body["data"]] == ["b", "a"]
    assert listed.body["data"][0]["last_used_at"] is not None
    assert made.body["token"] not in listed.content.decode()
    developer = Api(management_token(world.organization.id, Role.DEVELOPER))
    assert (
        developer.get("/scim-tokens").status_code
        == developer.post("/scim-tokens", {"name": "c"}).status_code
        == 403
    )
    assert Permission.SIGN_IN_WRITE.sentence in developer.post("/scim-tokens", {"name": "c"}).body["detail"]


def test_roles_change_with_the_policy_at_once(world: World, directory: Directory) -> None:
    from tests.controlplane.api.caller import Api
    from tests.controlplane.api.caller import token_of as management_token
    from tests.controlplane.scim.caller import role_of

    directory.add_group("ops", directory.add_user("ann@example.org"))
    owner = Api(management_token(world.organization.id, Role.OWNER))
    for role in (Role.ADMIN, Role.BILLING):
        response = owner.call("PATCH", "/sign-in-policy", {"group_roles": {"ops": role}})
        assert response.status_code == 200
        assert role_of(world.organization.id, "ann@example.org") == role


def test_what_is_refused_leaves_nothing_behind_not_even_that_it_was_asked(
    world: World, directory: Directory
) -> None:
    from controlplane.scim.models import ScimToken
    from controlplane.tenants.context import tenant

    def last_use() -> Any:
        with tenant(world.organization.id):
            return ScimToken.objects.get().last_used_at

    assert directory.get("/Users/scu_" + "0" * 32).status_code == 404
    assert last_use() is None
    assert directory.get("/Users").status_code == 200
    assert last_use() is not None


def test_a_wild_directory_is_slowed_down(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    from controlplane.api.ratelimit import CallerLimits
    from controlplane.api.scim import middleware

    monkeypatch.setattr(middleware, "limits", CallerLimits(0.001, 2))
    assert [directory.get("/Users").status_code for _ in range(3)] == [200, 200, 429]
    refused = directory.get("/Users")
    assert int(refused["Retry-After"]) > 1
    assert refused.body["status"] == "429"


def test_a_database_that_is_away_is_no_401(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import OperationalError

    from controlplane.api.scim import middleware

    def away(text: str) -> None:
        raise OperationalError("gone")

    monkeypatch.setattr(middleware, "find_directory", away)
    response = directory.get("/Users")
    assert (response.status_code, response["Retry-After"]) == (503, "2")


def test_a_token_is_kept_under_the_present_pepper_at_its_use(
    world: World, directory: Directory, settings: Any
) -> None:
    from controlplane.scim.models import ScimToken
    from controlplane.tenants.api_keys import pepper_id
    from controlplane.tenants.context import tenant

    former = settings.ENV
    new = "ab" * 32
    settings.ENV = type(former)(
        **{**vars(former), "key_pepper": bytes.fromhex(new), "key_pepper_previous": former.key_pepper}
    )
    assert directory.get("/Users").status_code == 200
    with tenant(world.organization.id):
        assert ScimToken.objects.get().pepper == pepper_id(bytes.fromhex(new))
    settings.ENV = type(former)(**{**vars(former), "key_pepper": bytes.fromhex(new)})
    assert directory.get("/Users").status_code == 200
