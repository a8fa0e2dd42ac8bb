"""The page of API keys."""

import re
from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone

from controlplane.tenants import api_keys, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey
from tests.world import World

HTMX = {"HX-Request": "true"}


def create(client: Client, world: World, **values: str):
    return client.post(
        "/keys/create", {"name": "ci", "project": world.project.id.hex, "expires": "", **values}
    )


def stored(world: World) -> list[ApiKey]:
    with tenant(world.organization.id):
        return list(ApiKey.objects.order_by("created_at"))


def plaintexts(text: str) -> list[str]:
    return re.findall(r"sk-crl-[0-9A-Za-z]{12}-[0-9A-Za-z_-]{43}", text)


@pytest.mark.parametrize("headers", [{}, HTMX])
def test_the_plaintext_is_shown_once(owner: Client, world: World, headers: dict[str, str]) -> None:
    response = owner.post("/keys/create", {"name": "ci", "project": world.project.id.hex}, headers=headers)
    [plaintext] = plaintexts(response.content.decode())
    [key] = stored(world)
    assert api_keys.lookup_of(plaintext) == key.lookup
    assert key.created_by_id == world.alice.id
    assert key.expires_at is None
    assert plaintexts(owner.get("/keys").content.decode()) == []


def test_htmx_gets_the_part_and_a_form_post_the_page(owner: Client, world: World) -> None:
    assert (
        "<html"
        not in owner.post(
            "/keys/create", {"name": "a", "project": world.project.id.hex}, headers=HTMX
        ).content.decode()
    )
    assert "<html" in create(owner, world).content.decode()


def test_a_key_may_expire(owner: Client, world: World) -> None:
    create(owner, world, expires="30")
    [key] = stored(world)
    assert key.expires_at is not None
    assert abs(key.expires_at - timezone.now() - timedelta(days=30)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 121),
        ("project", ""),
        ("project", "0" * 32),
        ("project", "zz"),
        ("expires", "31"),
    ],
)
def test_bad_input_is_told_at_its_field_and_makes_no_key(
    owner: Client, world: World, field: str, value: str
) -> None:
    response = create(owner, world, **{field: value})
    assert response.status_code == 400
    assert f'id="id_{field}_error"' in response.content.decode()
    assert stored(world) == []


def test_a_project_of_another_organization_is_no_choice(owner: Client, world: World) -> None:
    assert create(owner, world, project=world.other_project.id.hex).status_code == 400
    assert stored(world) == []


def test_names_are_text_not_markup(owner: Client, world: World) -> None:
    create(owner, world, name="<script>alert(1)</script>")
    assert "<script>alert" not in owner.get("/keys").content.decode()


def test_revoking_asks_first(owner: Client, world: World) -> None:
    create(owner, world)
    [key] = stored(world)
    assert "Revoke “ci”?" in owner.get(f"/keys/{key}/revoke").content.decode()
    assert "<html" not in owner.get(f"/keys/{key}/revoke", headers=HTMX).content.decode()
    assert stored(world)[0].revoked_at is None
    assert owner.post(f"/keys/{key}/revoke").headers["Location"] == "/keys"
    text = owner.get("/keys").content.decode()
    assert "is revoked" in text
    assert stored(world)[0].revoked_at is not None
    assert f"/keys/{key}/revoke" not in text


def test_revoking_again_keeps_the_first_time(owner: Client, world: World) -> None:
    create(owner, world)
    [key] = stored(world)
    owner.post(f"/keys/{key}/revoke")
    first = stored(world)[0].revoked_at
    owner.post(f"/keys/{key}/revoke")
    assert stored(world)[0].revoked_at == first


def test_the_list_says_when_a_key_was_used_and_whether_it_works(owner: Client, world: World) -> None:
    create(owner, world)
    [key] = stored(world)
    assert "never" in owner.get("/keys").content.decode()
    with tenant(world.organization.id):
        ApiKey.objects.filter(id=key.id).update(
            last_used_at=timezone.now() - timedelta(hours=3),
            created_at=timezone.now() - timedelta(days=2),
            expires_at=timezone.now() - timedelta(days=1),
        )
    text = owner.get("/keys").content.decode()
    assert "3 h ago" in text
    assert "expired" in text


def test_without_a_project_there_is_no_form(stranger: Client, world: World) -> None:
    from tests.controlplane.console.conftest import signed_in

    dora = services.create_user(email="dora@example.org", password="correct-horse-battery")
    services.create_organization(name="Bare", slug="bare", owner=dora)
    assert "has none yet" in signed_in(dora).get("/keys").content.decode()
