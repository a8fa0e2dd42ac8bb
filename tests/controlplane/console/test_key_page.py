"""The page of one key: what it shows to whom, binding, limiting, rotating."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from controlplane.tenants import key_services
from controlplane.tenants.context import tenant
from controlplane.tenants.key_scopes import KeyScopes
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import ApiKey
from tests.world import World


@pytest.fixture
def key(world: World) -> ApiKey:
    return key_services.create_api_key(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name="backend",
        scopes=KeyScopes(routes=("chat",), models=("acme/*",), ip_ranges=("203.0.113.0/24",)),
        limits=Limits(rpm=60, budget_nano=1_500_000_000),
        tags=("eu",),
    )[0]


def stored(key: ApiKey, world: World) -> ApiKey:
    with tenant(world.organization.id):
        return ApiKey.objects.get(id=key.id)


def bind(client: Client, key: ApiKey, **values: Any) -> Any:
    return client.post(f"/keys/{key}/scopes", values)


def test_the_page_shows_what_the_key_is_bound_to(owner: Client, key: ApiKey) -> None:
    page = owner.get(f"/keys/{key}").content.decode()
    for shown in ("backend", "acme/*", "203.0.113.0/24", 'value="60"', 'value="1.5"', "eu", key.masked):
        assert shown in page, shown
    assert re.search(r'value="chat"[^>]*checked', page)
    assert "bound" in owner.get("/keys").content.decode()


def test_a_scope_is_replaced_by_what_the_form_says(owner: Client, key: ApiKey, world: World) -> None:
    response = bind(owner, key, routes=["models", "chat"], models="a\nb/*\n", ip_ranges="10.0.0.0/8, ::1")
    assert response.status_code == 302
    assert stored(key, world).scopes == {
        "routes": ["models", "chat"], "models": ["a", "b/*"], "ip_ranges": ["10.0.0.0/8", "::1/128"],
    }  # fmt: skip
    assert bind(owner, key).status_code == 302
    assert stored(key, world).scopes is None, "nothing given binds nothing"


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("id_ip_ranges", {"ip_ranges": "10.0.0.1/8"}),
        ("id_models", {"models": "a*b"}),
        ("routes", {"routes": ["speech"]}),
    ],
)
def test_a_mistake_is_told_at_its_field_and_changes_nothing(
    owner: Client, key: ApiKey, world: World, field: str, values: dict[str, Any]
) -> None:
    response = bind(owner, key, **values)
    assert response.status_code == 400
    page = response.content.decode()
    assert f'id="{field}_error"' in page or field == "routes"
    assert 'class="problem"' in page
    assert stored(key, world).scopes == key.scopes


def test_saving_does_not_open_a_key_that_was_shut(owner: Client, key: ApiKey, world: World) -> None:
    key_services.set_api_key_scopes(
        organization_id=world.organization.id, key_id=key.id, scopes=KeyScopes(models=())
    )
    assert "0 models" in owner.get(f"/keys/{key}").content.decode()
    assert bind(owner, key, ip_ranges="10.0.0.0/8").status_code == 302
    assert stored(key, world).scopes == {"models": [], "ip_ranges": ["10.0.0.0/8"]}
    bind(owner, key, models="toy-chat")
    assert stored(key, world).scopes == {"models": ["toy-chat"]}


def test_limits_are_replaced_and_a_budget_is_exact(owner: Client, key: ApiKey, world: World) -> None:
    assert owner.post(f"/keys/{key}/limits", {"rpm": "7", "budget": "0.000000001"}).status_code == 302
    assert stored(key, world).limits == Limits(rpm=7, budget_nano=1)
    assert owner.post(f"/keys/{key}/limits", {"rpm": "-1"}).status_code == 400
    assert owner.post(f"/keys/{key}/limits", {"budget": "1e30"}).status_code == 400
    assert stored(key, world).limits == Limits(rpm=7, budget_nano=1)


def test_rotating_shows_a_successor_that_is_like_it(owner: Client, key: ApiKey, world: World) -> None:
    page = owner.post(f"/keys/{key}/rotate").content.decode()
    assert len(re.findall(r"sk-crl-[0-9A-Za-z]{12}-[0-9A-Za-z_-]{43}", page)) == 1
    with tenant(world.organization.id):
        successor = ApiKey.objects.exclude(id=key.id).get()
    assert (successor.scopes, successor.limits, successor.tags) == (key.scopes, key.limits, key.tags)
    assert stored(key, world).expires_at is not None


def test_who_may_not_change_it_sees_it_only(
    viewer: Client, stranger: Client, key: ApiKey, world: World
) -> None:
    page = viewer.get(f"/keys/{key}").content.decode()
    assert "acme/*" in page and "<form class=" not in page
    for action, values in (("scopes", {}), ("limits", {}), ("rotate", {})):
        assert viewer.post(f"/keys/{key}/{action}", values).status_code == 403
        assert stranger.post(f"/keys/{key}/{action}", values).status_code == 404
    assert stranger.get(f"/keys/{key}").status_code == 404
    assert stored(key, world).scopes == key.scopes
