"""The document: examples that hold, summaries, deprecation; and what every answer carries."""

from __future__ import annotations

import re
import types
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest
from django.urls import include, path
from ninja import Router, Schema

from controlplane.api import middleware
from controlplane.api.app import api as rest
from controlplane.api.app import refused
from controlplane.api.document import Api as Document
from controlplane.api.examples import example
from controlplane.api.operations import Deprecation, operation
from controlplane.api.ratelimit import MAX_CALLERS, CallerLimits
from controlplane.errors import CorralError
from controlplane.ids import new_id
from controlplane.tenants.models import Role
from controlplane.tenants.rights import Permission
from tests.controlplane.api.caller import Api, token_of
from tests.world import World


def document() -> dict[str, Any]:
    import json

    return json.loads(json.dumps(rest.get_openapi_schema(), default=str))


def bodies(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path} {status}", media)
        for path, methods in found["paths"].items()
        for method, each in methods.items()
        for status, body in {"body": each.get("requestBody", {}), **each["responses"]}.items()
        for media in body.get("content", {}).values()
    ]


def test_every_body_has_an_example_that_holds() -> None:
    found = document()
    assert found["openapi"].startswith("3.1")
    checked = bodies(found)
    assert len(checked) > 300
    validators: dict[str, Any] = {}
    for where, media in checked:
        schema = {**media["schema"], "components": found["components"]}
        key = str(media["schema"])
        validator = validators.setdefault(
            key, jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        )
        errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(media["example"])]
        assert not errors, (where, errors, media["example"])


def test_every_operation_says_what_it_does_and_every_parameter_what_it_is() -> None:
    for path_, methods in document()["paths"].items():
        for method, each in methods.items():
            where = f"{method} {path_}"
            assert each["summary"] and not each["summary"].endswith("."), where
            assert each["description"], where
            assert {"400", "401", "403", "404", "429", "503"} <= each["responses"].keys(), where
            for status, response in each["responses"].items():
                assert "X-Request-Id" in response["headers"], (where, status)
            for parameter in each.get("parameters", ()):
                assert parameter["schema"], (where, parameter)


def test_an_example_of_a_plan_reads_like_one() -> None:
    schemas = document()["components"]["schemas"]
    found = example(schemas["Plan"], schemas)
    assert found["changes"][0]["action"] == "update"
    assert found["disrupts"]["summary"]


def test_an_unknown_parameter_is_named(api: Api, world: World) -> None:
    wrong = api.get("/keys?projct_id=x")
    assert (wrong.status_code, wrong.body["errors"][0]["field"]) == (400, "projct_id")
    assert "project_id" in wrong.body["detail"]
    assert api.get("/organization?limit=1").status_code == 400
    assert api.get(f"/keys?project_id=prj_{world.project.id.hex}&limit=1").status_code == 200
    assert api.get("/usage?group_by=day").status_code == 200


def test_every_answer_is_named(api: Api, world: World) -> None:
    answers = [api.get("/projects"), api.get("/nothing"), Api(None).get("/projects")]
    assert [each.status_code for each in answers] == [200, 404, 401]
    names = {each["X-Request-Id"] for each in answers}
    assert len(names) == 3
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", name) for name in names)


class Thing(Schema):
    """What the old operation answers."""

    name: str


old = Router()


@operation(
    old,
    "GET",
    "/old",
    Permission.PROJECTS_READ,
    Thing,
    deprecation=Deprecation(
        since=datetime(2026, 1, 1, tzinfo=UTC),
        sunset=datetime(2027, 1, 1, tzinfo=UTC),
        link="https://example.org/moved",
    ),
)
def get_old(request: Any) -> Thing:
    """What was."""
    return Thing(name="old")


@pytest.fixture
def with_old_route(settings: Any) -> Document:
    made = Document(docs_url=None, urls_namespace="old")
    made.add_router("", old)
    made.exception_handler(CorralError)(refused)
    routes = types.ModuleType("routes_with_old")
    routes.urlpatterns = [path("api/v1/", include([path("", made.urls)]))]
    settings.ROOT_URLCONF = routes
    return made


@pytest.mark.parametrize(("role_may", "status"), [(True, 200), (False, 403)])
def test_a_deprecated_operation_says_so_whatever_it_answers(
    world: World, with_old_route: Document, role_may: bool, status: int
) -> None:
    scopes = None if role_may else [Permission.KEYS_READ]
    answer = Api(token_of(world.organization.id, Role.OWNER, scopes=scopes)).get("/old")
    assert answer.status_code == status
    assert answer["Deprecation"] == "@1767225600"
    assert answer["Sunset"] == "Fri, 01 Jan 2027 00:00:00 GMT"
    assert answer["Link"] == '<https://example.org/moved>; rel="deprecation"; type="text/html"'


def test_the_document_marks_what_is_deprecated(with_old_route: Document) -> None:
    (methods,) = with_old_route.get_openapi_schema(path_prefix="/api/v1/")["paths"].values()
    assert methods["get"]["deprecated"] is True
    assert {"Deprecation", "Sunset", "Link"} <= methods["get"]["responses"]["200"]["headers"].keys()


def test_who_calls_too_often_is_told_when_to_come_back(
    api: Api, stranger: Api, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "limits", CallerLimits(rate_per_s=0.1, burst=3))
    assert [api.get("/organization").status_code for _ in range(4)] == [200, 200, 200, 429]
    refused = api.get("/organization")
    assert (refused.body["code"], refused["Content-Type"]) == (
        "too_many_requests",
        "application/problem+json",
    )
    assert 1 <= int(refused["Retry-After"]) <= 10
    assert stranger.get("/organization").status_code == 200, "each has its own"
    forged = Api(api.token[:-1] + ("a" if api.token[-1] != "a" else "b"))
    assert forged.get("/organization").status_code == 401


def test_buckets_refill_evenly_and_their_number_is_bounded() -> None:
    limits, caller = CallerLimits(rate_per_s=2, burst=2), new_id()
    assert [limits.take(caller, 0.0) for _ in range(3)] == [0, 0, 0.5]
    assert limits.take(caller, 0.4) == pytest.approx(0.1)
    assert limits.take(caller, 0.5) == 0
    assert limits.take(caller, 100.0) == 0
    for _ in range(MAX_CALLERS + 5):
        limits.take(new_id(), 100.0)
    assert len(limits._levels) == MAX_CALLERS


def test_no_filter_falls_over_a_character_that_postgres_cannot_hold(api: Api, world: World) -> None:
    """Every text in every query, as the document lists them; a path that needs an id gets one of nothing."""
    tried = []
    for where, methods in document()["paths"].items():
        for each in methods.get("get", {}).get("parameters", []):
            if (
                each["in"] != "query"
                or "format" in str(each["schema"])
                or "string" not in str(each["schema"])
            ):
                continue
            asked = re.sub(r"\{[^}]*\}", "0" * 32, where.removeprefix("/api/v1"))
            response = api.get(f"{asked}?{each['name']}=a%00b")
            assert response.status_code in (400, 404), (asked, each["name"])
            tried.append((asked, each["name"]))
    assert ("/audit", "kind") in tried
    assert len(tried) > 10
