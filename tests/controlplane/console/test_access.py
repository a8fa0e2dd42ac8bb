"""Every page as anonymous, owner, teammate and stranger."""

import pytest
from django.test import Client

from controlplane.deployments.models import Deployment
from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey
from tests.controlplane.console.conftest import signed_in
from tests.world import PASSWORD, World

PAGES = ["/", "/live", "/deployments", "/keys", "/playground", "/people", "/budgets", "/usage", "/usage.csv"]


@pytest.fixture
def key(world: World) -> ApiKey:
    found, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="ci", created_by=world.alice
    )
    return found


@pytest.fixture
def detail_pages(deployment: Deployment, key: ApiKey) -> list[str]:
    return [f"/deployments/{deployment}", f"/deployments/{deployment}/live", f"/keys/{key}/revoke"]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.django_db
def test_anonymous_visitors_sign_in_first_and_come_back(anonymous: Client, page: str) -> None:
    response = anonymous.get(page)
    assert (response.status_code, response.headers["Location"]) == (302, f"/login?next={page}")


@pytest.mark.django_db
def test_a_fragment_for_nobody_sends_the_whole_page_to_sign_in(anonymous: Client) -> None:
    response = anonymous.get("/live", headers={"HX-Request": "true"})
    assert (response.status_code, response.headers["HX-Redirect"]) == (204, "/login")


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("visitor", ["owner", "developer", "viewer"])
def test_members_see_every_page(
    visitor: str, page: str, deployment: Deployment, request: pytest.FixtureRequest
) -> None:
    response = request.getfixturevalue(visitor).get(page)
    assert response.status_code == 200
    assert "no-store" in response.headers["Cache-Control"]


@pytest.mark.parametrize("page", ["/", "/deployments", "/keys", "/playground", "/usage"])
def test_a_stranger_sees_nothing_of_ours(
    stranger: Client, deployment: Deployment, key: ApiKey, page: str
) -> None:
    text = stranger.get(page).content.decode()
    assert "toy-chat" not in text
    assert key.lookup[:4] not in text


def test_what_belongs_to_another_organization_does_not_exist(
    stranger: Client, owner: Client, detail_pages: list[str]
) -> None:
    for page in detail_pages:
        assert owner.get(page).status_code == 200
        assert stranger.get(page).status_code == 404


@pytest.mark.parametrize("text", ["dep_0", "x", "dep_" + "g" * 32, "key_" + "0" * 32, "%00"])
def test_a_malformed_id_is_not_found(owner: Client, text: str) -> None:
    assert owner.get(f"/deployments/{text}").status_code == 404
    assert owner.get(f"/keys/{text}/revoke").status_code == 404


def test_a_viewer_cannot_create_or_revoke(
    viewer: Client, world: World, deployment: Deployment, key: ApiKey
) -> None:
    created = viewer.post("/keys/create", {"name": "mine", "project": world.project.id.hex})
    assert created.status_code == 403
    assert "your role (viewer) may not" in created.content.decode()
    assert viewer.post(f"/keys/{key}/revoke").status_code == 403
    assert viewer.post("/playground/key", {"deployment": str(deployment)}).status_code == 403
    with tenant(world.organization.id):
        [left] = ApiKey.objects.all()
    assert (left.id, left.revoked_at) == (key.id, None)


def test_a_viewer_is_offered_no_forms(viewer: Client, deployment: Deployment, key: ApiKey) -> None:
    assert "/keys/create" not in viewer.get("/keys").content.decode()
    assert "/revoke" not in viewer.get("/keys").content.decode()
    assert 'id="composer"' not in viewer.get("/playground").content.decode()


def test_a_stranger_cannot_revoke(stranger: Client, key: ApiKey, world: World) -> None:
    assert stranger.post(f"/keys/{key}/revoke").status_code == 404
    with tenant(world.organization.id):
        assert ApiKey.objects.get().revoked_at is None


def test_a_user_without_an_organization_is_told_so(world: World) -> None:
    lonely = services.create_user(email="lonely@example.org", password=PASSWORD)
    response = signed_in(lonely).get("/")
    assert response.status_code == 403
    assert "no organization yet" in response.content.decode()


def test_one_chooses_between_organizations_one_belongs_to(world: World, deployment: Deployment) -> None:
    services.add_member(organization_id=world.other_organization.id, user=world.alice, role="viewer")
    alice = signed_in(world.alice)
    assert "toy-chat" in alice.get("/deployments").content.decode()
    alice.post("/organization", {"organization": world.other_organization.id.hex})
    assert "toy-chat" not in alice.get("/deployments").content.decode()


def test_one_cannot_choose_an_organization_one_does_not_belong_to(stranger: Client, world: World) -> None:
    stranger.post("/organization", {"organization": world.organization.id.hex})
    assert "Acme" not in stranger.get("/").content.decode()


@pytest.mark.parametrize("path", ["/keys/create", "/playground/key", "/organization", "/logout"])
def test_what_changes_something_takes_posts_only(owner: Client, path: str) -> None:
    assert owner.get(path).status_code == 405


def test_forms_are_protected_against_other_sites(world: World, key: ApiKey) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(world.alice)
    response = client.post(f"/keys/{key}/revoke")
    assert response.status_code == 403
    assert "out of date" in response.content.decode()
