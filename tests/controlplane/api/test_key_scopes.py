"""Scopes, aliases and tags of API keys over REST, as far as what a gateway is told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.controlplane.tenants.test_key_lookup import look_up
from tests.world import World

if TYPE_CHECKING:
    from tests.controlplane.api.caller import Api

SCOPES = {"routes": ["chat", "models"], "models": ["toy-chat", "acme/*"], "ip_ranges": ["203.0.113.0/24"]}


def create(api: Api, world: World, **values: Any) -> Any:
    return api.post("/keys", {"project_id": f"prj_{world.project.id.hex}", "name": "ci", **values})


def told(api: Api, key_id: str) -> Any:
    """What a gateway reads of the key."""
    from controlplane.tenants.models import ApiKey

    return look_up(ApiKey.objects.get(id=key_id.removeprefix("key_")).lookup)["key"]


@pytest.fixture
def in_acme(world: World):
    from controlplane.tenants.context import tenant

    with tenant(world.organization.id):
        yield


def test_a_new_key_is_bound_as_asked(api: Api, world: World, in_acme: None) -> None:
    made = create(api, world, scopes=SCOPES, aliases={"gpt-4": "toy-chat"}, tags=["ci", "eu"]).body
    assert (made["scopes"], made["aliases"], made["tags"], made["origin"]) == (
        SCOPES, {"gpt-4": "toy-chat"}, ["ci", "eu"], "",
    )  # fmt: skip
    found = told(api, made["id"])
    assert (found["scopes"], found["aliases"]) == (SCOPES, {"gpt-4": "toy-chat"})
    successor = api.post(f"/keys/{made['id']}/rotate", {"overlap_s": 60}).body
    assert {k: successor[k] for k in ("scopes", "aliases", "tags")} == {
        k: made[k] for k in ("scopes", "aliases", "tags")
    }


def test_a_key_is_bound_to_nothing_by_default(api: Api, world: World, in_acme: None) -> None:
    made = create(api, world).body
    assert made["scopes"] == {"routes": None, "models": None, "ip_ranges": None}
    assert told(api, made["id"])["scopes"] is None


def test_scopes_are_replaced_whole_and_the_gateways_are_told(
    api: Api, world: World, in_acme: None, django_capture_on_commit_callbacks: Any
) -> None:
    made = create(api, world, scopes=SCOPES).body
    with django_capture_on_commit_callbacks() as told_gateways:
        changed = api.call("PUT", f"/keys/{made['id']}/scopes", {"models": []})
    assert changed.body["scopes"] == {"routes": None, "models": [], "ip_ranges": None}
    assert told(api, made["id"])["scopes"] == {"models": []}
    assert len(told_gateways) == 1
    audit = api.get("/audit?limit=1").body["data"][0]
    assert audit["changes"]["scopes"] == [SCOPES, {"models": []}]


def test_a_change_changes_what_is_named_only(api: Api, world: World) -> None:
    made = create(api, world, scopes=SCOPES, tags=["a"], aliases={"x": "toy-chat"}).body
    assert api.call("PATCH", f"/keys/{made['id']}", {"tags": ["b"]}).body["tags"] == ["b"]
    found = api.call("PATCH", f"/keys/{made['id']}", {"name": "other", "aliases": {}}).body
    assert (found["name"], found["tags"], found["aliases"], found["scopes"]) == ("other", ["b"], {}, SCOPES)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"scopes": {"routes": ["speech"]}}, "scopes.routes.0"),
        ({"scopes": {"models": ["a*b"]}}, "scopes.models.0"),
        ({"scopes": {"ip_ranges": ["10.0.0.1/8"]}}, "scopes.ip_ranges.0"),
        ({"scopes": {"networks": []}}, "scopes.networks"),
        ({"aliases": {"a b": "toy-chat"}}, "aliases"),
        ({"tags": [" "]}, "tags.0"),
    ],
)
def test_what_is_no_scope_is_named_and_no_key_made(
    api: Api, world: World, body: dict[str, Any], field: str
) -> None:
    refused = create(api, world, **body)
    assert refused.status_code == 400
    named = [error["field"] for error in refused.body["errors"]]
    assert any(name.endswith(field) for name in named), named
    assert api.get("/keys").body["data"] == []
