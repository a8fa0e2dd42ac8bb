"""Each web request works in one tenant, checked against the memberships of that moment."""

import pytest
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.test import Client
from django.urls import path

from controlplane.tenants import selectors, services
from controlplane.tenants.context import current_tenant, tenant
from controlplane.tenants.middleware import TenantRequest, choose_organization
from controlplane.tenants.models import Organization, Project, Role
from tests.world import World


def show(request: TenantRequest) -> HttpResponse:
    """What a view sees: its organization, and every project it can reach."""
    membership = request.membership
    return JsonResponse(
        {
            "organization": membership and membership.organization_slug,
            "role": membership and membership.role,
            "projects": sorted(Project.objects.values_list("organization__slug", flat=True)),
        }
    )


def choose(request: TenantRequest, slug: str) -> HttpResponse:
    chosen = next((m for m in request.memberships if m.organization_slug == slug), None)
    if chosen:
        choose_organization(request, chosen.organization_id)
    return HttpResponse(status=204)


def write_and_fail(request: HttpRequest) -> HttpResponse:
    Project.objects.update(name="half done")
    raise ZeroDivisionError


urlpatterns = [path("show", show), path("choose/<slug:slug>", choose), path("fail", write_and_fail)]
pytestmark = pytest.mark.urls(__name__)


def client(user: object) -> Client:
    signed_in = Client(raise_request_exception=False)
    signed_in.force_login(user)
    return signed_in


def test_owner_teammate_and_stranger_each_see_their_own(world: World) -> None:
    for user, seen in (
        (world.alice, {"organization": "acme", "role": "owner", "projects": ["acme"]}),
        (world.bob, {"organization": "acme", "role": "developer", "projects": ["acme"]}),
        (world.charlie, {"organization": "other", "role": "owner", "projects": ["other"]}),
    ):
        assert client(user).get("/show").json() == seen


def test_nobody_signed_in_sees_nothing(world: World) -> None:
    assert Client().get("/show").json() == {"organization": None, "role": None, "projects": []}


def test_a_user_of_two_organizations_works_for_the_chosen_one(world: World) -> None:
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.VIEWER)
    browser = client(world.bob)
    assert browser.get("/show").json()["organization"] == "acme"
    browser.get("/choose/other")
    assert browser.get("/show").json() == {"organization": "other", "role": "viewer", "projects": ["other"]}


def test_an_organization_put_into_the_session_by_force_is_not_entered(world: World) -> None:
    browser = client(world.charlie)
    session = browser.session
    session["organization_id"] = world.organization.id.hex
    session.save()
    assert browser.get("/show").json()["projects"] == ["other"]


def test_a_removed_member_is_out_at_the_next_request(world: World) -> None:
    browser = client(world.bob)
    assert browser.get("/show").json()["organization"] == "acme"
    with tenant(world.organization.id):
        (bob,) = [
            m for m in selectors.members(organization_id=world.organization.id) if m.user_id == world.bob.id
        ]
    services.remove_member(organization_id=world.organization.id, member_id=bob.id)
    assert browser.get("/show").json() == {"organization": None, "role": None, "projects": []}


def test_what_a_failing_view_wrote_is_undone(world: World) -> None:
    assert client(world.alice).get("/fail").status_code == 500
    assert current_tenant() is None
    with tenant(world.organization.id):
        assert Project.objects.get().name == "Main"


def test_the_tenant_ends_with_the_request(world: World) -> None:
    client(world.alice).get("/show")
    assert current_tenant() is None
    assert not Organization.objects.exists()
