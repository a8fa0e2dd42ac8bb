"""What every operation does: tokens, problems, pages, entity tags, keys of idempotency."""

from __future__ import annotations

import json
import re
from io import StringIO

import pytest
from django.db import OperationalError
from django.test import Client

from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, IdempotentWrite, Project, Role
from tests.controlplane.api.caller import Api, token_of
from tests.world import World

PROBLEM = "application/problem+json"


def problem(response) -> tuple[int, str, list[str]]:
    assert response["Content-Type"] == PROBLEM
    body = response.body
    assert body["status"] == response.status_code
    assert body["type"] == f"urn:corral:problem:{body['code']}"
    assert body["title"]
    assert body["detail"]
    assert body["instance"].startswith("/api/v1/")
    return response.status_code, body["code"], [error["field"] for error in body["errors"]]


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer nonsense", "Bearer mt-crl-" + "a" * 12 + "-" + "b" * 43, "Basic dXNlcjpwdw=="],
)
def test_without_a_good_token_nothing_is_told(world: World, authorization: str) -> None:
    response = Api(None).get("/projects", Authorization=authorization)
    assert problem(response) == (401, "unauthorized", [])
    assert response["WWW-Authenticate"].startswith("Bearer")


def test_an_api_key_of_v1_is_no_management_token(world: World) -> None:
    _, key = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    response = Api(key).get("/projects")
    assert problem(response)[0] == 401


def test_a_session_cookie_has_no_power_here(world: World) -> None:
    client = Client()
    client.force_login(world.alice)
    assert client.get("/api/v1/projects").status_code == 401


def test_a_cookie_beside_a_token_changes_nothing(api: Api, world: World) -> None:
    api.client.force_login(world.charlie)
    assert [row["slug"] for row in api.get("/projects").body["data"]] == ["main"]


def test_a_suspended_organization_is_refused(api: Api, world: World) -> None:
    services.suspend_organization(organization_id=world.organization.id, suspended=True)
    assert problem(api.get("/projects")) == (403, "organization_suspended", [])


def test_a_database_that_is_away_is_a_503_never_a_401(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(token: str) -> None:
        raise OperationalError("the server closed the connection")

    monkeypatch.setattr("controlplane.api.middleware.find_caller", away)
    response = api.get("/projects")
    assert problem(response) == (503, "database_unavailable", [])
    assert int(response["Retry-After"]) >= 1


def test_a_database_that_goes_away_meanwhile_is_a_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**_: object) -> None:
        raise OperationalError("the server closed the connection")

    monkeypatch.setattr("controlplane.api.resources.projects.services.create_project", away)
    response = api.post("/projects", {"name": "Two", "slug": "two"})
    assert problem(response) == (503, "database_unavailable", [])


def test_unknown_routes_and_methods_are_problems(api: Api) -> None:
    assert problem(api.get("/nothing"))[:2] == (404, "not_found")
    response = api.call("PUT", "/projects")
    assert problem(response)[:2] == (405, "method_not_allowed")
    assert "GET" in response["Allow"]


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["name", "slug"]),
        ({"name": "", "slug": "two"}, ["name"]),
        ({"name": "Two", "slug": "two", "colour": "red"}, ["colour"]),
        ({"name": "Two", "slug": "two", "limits": {"rpm": -1}}, ["limits.rpm"]),
        ({"name": "Two", "slug": "two", "weight": "heavy"}, ["weight"]),
        ({"name": "Two", "slug": "not a slug"}, ["slug"]),
        ({"name": "Tw\x00o", "slug": "two"}, ["body"]),
    ],
)
def test_bad_input_names_every_field_and_leaves_nothing(
    api: Api, world: World, body: dict, fields: list[str]
) -> None:
    assert problem(api.post("/projects", body)) == (400, "invalid_input", fields)
    with tenant(world.organization.id):
        assert Project.objects.count() == 1


def test_no_json_is_bad_input(api: Api) -> None:
    response = api.client.post(
        "/api/v1/projects",
        b"{",
        content_type="application/json",
        headers={"Authorization": f"Bearer {api.token}"},
    )
    assert response.status_code == 400
    assert response["Content-Type"] == PROBLEM


def test_a_body_that_is_too_large_is_refused(api: Api) -> None:
    response = api.post("/projects", {"name": "x" * (1 << 20), "slug": "two"})
    assert problem(response)[:2] == (413, "body_too_large")


def test_a_malformed_id_is_like_one_that_never_was(api: Api, world: World) -> None:
    missing = f"/projects/prj_{'0' * 32}"
    assert problem(api.get(missing))[:2] == (404, "not_found")
    assert problem(api.get("/projects/nonsense"))[:2] == (404, "not_found")


def test_pages_hold_everything_once(api: Api, world: World) -> None:
    for n in range(5):
        services.create_project(organization_id=world.organization.id, name=f"P{n}", slug=f"p{n}")
    seen, cursor, n_pages = [], "", 0
    while cursor is not None:
        body = api.get(f"/projects?limit=2{'&cursor=' + cursor if cursor else ''}").body
        seen += [row["slug"] for row in body["data"]]
        cursor, n_pages = body["next_cursor"], n_pages + 1
    assert seen == ["p4", "p3", "p2", "p1", "p0", "main"]
    assert n_pages == 3
    assert problem(api.get("/projects?cursor=nonsense")) == (400, "invalid_input", ["cursor"])
    assert problem(api.get("/projects?limit=0")) == (400, "invalid_input", ["limit"])


def test_a_change_after_another_is_refused_by_if_match(api: Api, world: World) -> None:
    made = api.post("/projects", {"name": "Two", "slug": "two"})
    assert made.status_code == 201
    path = f"/projects/{made.body['id']}"
    first = api.get(path)
    assert first["ETag"] == made["ETag"]
    assert api.get(path, **{"If-None-Match": first["ETag"]}).status_code == 304
    changed = api.call("PATCH", path, {"name": "Zwei"}, **{"If-Match": first["ETag"]})
    assert (changed.status_code, changed.body["name"]) == (200, "Zwei")
    assert changed["ETag"] != first["ETag"]
    late = api.call("PATCH", path, {"name": "Deux"}, **{"If-Match": first["ETag"]})
    assert problem(late)[:2] == (412, "changed_meanwhile")
    assert api.get(path).body["name"] == "Zwei"
    assert api.call("PATCH", path, {"name": "Deux"}, **{"If-Match": "*"}).status_code == 200


def test_the_same_key_gives_the_same_answer_and_one_effect(api: Api, world: World) -> None:
    body = {"project_id": f"prj_{world.project.id.hex}", "name": "program"}
    first = api.post("/keys", body, **{"Idempotency-Key": "once"})
    again = api.post("/keys", body, **{"Idempotency-Key": "once"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.body == first.body
    assert again["ETag"] == first["ETag"]
    assert again["Idempotency-Replayed"] == "true"
    assert re.match(r"sk-crl-\w{12}-", again.body["key"])
    with tenant(world.organization.id):
        assert ApiKey.objects.count() == 1
        stored = bytes(IdempotentWrite.objects.get().body)
    assert first.body["key"].encode() not in stored, "the secret is sealed"
    assert first.body["name"].encode() not in stored
    other = api.post("/keys", {**body, "name": "other"}, **{"Idempotency-Key": "once"})
    assert problem(other) == (409, "idempotency_key_reused", ["Idempotency-Key"])
    assert problem(api.post("/keys", body, **{"Idempotency-Key": "a b"}))[0] == 400


def test_a_refused_write_is_not_remembered(api: Api, world: World) -> None:
    wrong = api.post("/projects", {"name": "Two", "slug": "main"}, **{"Idempotency-Key": "k"})
    assert problem(wrong) == (409, "conflict", ["slug"])
    right = api.post("/projects", {"name": "Two", "slug": "two"}, **{"Idempotency-Key": "k"})
    assert right.status_code == 201


def test_two_callers_may_use_the_same_key(api: Api, world: World) -> None:
    other = Api(token_of(world.organization.id, Role.ADMIN))
    for n, caller in enumerate((api, other)):
        made = caller.post("/projects", {"name": "N", "slug": f"n{n}"}, **{"Idempotency-Key": "same"})
        assert made.status_code == 201


def test_what_fails_half_way_leaves_nothing(api: Api, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("controlplane.api.resources.projects.project_out", broken)
    response = api.post("/projects", {"name": "Two", "slug": "two"})
    assert problem(response)[:2] == (500, "internal_error")
    with tenant(world.organization.id):
        assert Project.objects.count() == 1


def test_kept_answers_are_forgotten_after_a_day(api: Api, world: World, as_operator) -> None:
    from datetime import timedelta

    from controlplane.tenants.tasks import forget_answers

    for n in range(2):
        api.post("/projects", {"name": "N", "slug": f"n{n}"}, **{"Idempotency-Key": f"k{n}"})
    with as_operator():
        first = IdempotentWrite.objects.order_by("created_at").first()
        IdempotentWrite.objects.filter(pk=first.pk).update(
            created_at=first.created_at - timedelta(days=1, seconds=1)
        )
        forget_answers()
        assert [row.pk for row in IdempotentWrite.objects.all()] != [first.pk]
        assert IdempotentWrite.objects.count() == 1


def test_the_first_token_comes_from_the_command_line(world: World, as_operator) -> None:
    from django.core.management import CommandError, call_command

    with as_operator():
        out = StringIO()
        call_command("create_token", "ci", "--role", "viewer", "--json", stdout=out)
        with pytest.raises(CommandError, match="--role"):
            call_command("create_token", "ci", "--role", "owner")
        with pytest.raises(CommandError, match="slug"):
            call_command("create_token", "ci", "--organization", "nobody")
    caller = Api(json.loads(out.getvalue())["token"])
    assert caller.get("/projects").status_code == 200
    assert caller.post("/projects", {"name": "Two", "slug": "two"}).status_code == 403


def test_the_table_of_permissions_is_the_page_in_docs() -> None:
    from django.conf import settings

    from controlplane.management.commands.permissions import table

    assert (settings.BASE_DIR / "docs" / "permissions.md").read_text() == table()
