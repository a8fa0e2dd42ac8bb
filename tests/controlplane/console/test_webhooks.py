"""The webhook pages: secrets shown once, deliveries with their reason, replay; and the page of shared deployments."""

from __future__ import annotations

import re

import pytest
from django.test import Client
from django.utils import timezone

from controlplane.deployments import sharing
from controlplane.deployments.models import Grant
from controlplane.tenants import services as tenants
from controlplane.tenants.context import tenant
from controlplane.webhooks import services
from controlplane.webhooks.models import Delivery, Endpoint, EndpointState, State
from tests.controlplane.console.conftest import signed_in
from tests.database import acting_as
from tests.world import World, make_deployment

URL = "https://hooks.example.org/corral"
SECRET = re.compile(r"whsec_[A-Za-z0-9+/=]{40,}")


@pytest.fixture
def webhook(world: World) -> Endpoint:
    made, _ = services.create_endpoint(organization_id=world.organization.id, url=URL, events=["key.created"])
    return made


def text_of(client: Client, path: str = "/webhooks") -> str:
    return " ".join(client.get(path).content.decode().split())


def test_the_secret_is_shown_once_and_a_wrong_address_is_named(owner: Client, world: World) -> None:
    form = {"url": URL, "events": ["budget.threshold", "key.created"], "description": "pages us"}
    answer = owner.post("/webhooks/create", form)
    secret = SECRET.search(answer.content.decode())
    assert answer.status_code == 200 and secret
    with tenant(world.organization.id):
        made = Endpoint.objects.get()
        assert services.secrets_of(made) == [secret[0]]
    assert made.events == ["budget.threshold", "key.created"]
    assert not SECRET.search(text_of(owner, f"/webhooks/{made}") + text_of(owner))
    inside = owner.post("/webhooks/create", {"url": "http://127.0.0.1/x"})
    assert inside.status_code == 400 and "not a public address" in inside.content.decode()


def test_a_new_secret_replaces_the_one_before_for_a_day(
    owner: Client, world: World, webhook: Endpoint
) -> None:
    answer = owner.post(f"/webhooks/{webhook}/rotate").content.decode()
    assert SECRET.search(answer) and "for 24 hours" in answer
    with tenant(world.organization.id):
        assert len(services.secrets_of(webhook)) == 2


def test_deliveries_say_what_became_of_them_and_are_sent_again(
    owner: Client, world: World, webhook: Endpoint
) -> None:
    owner.post(f"/webhooks/{webhook}/test")
    assert "on its way" in text_of(owner, f"/webhooks/{webhook}")
    with acting_as("corral_operator"):
        Delivery.objects.update(
            state=State.FAILED,
            n_attempts=12,
            last_status=503,
            last_error="answered 503",
            event=Delivery.objects.get().event_id,
        )
        EndpointState.objects.update(failing_since=timezone.now())
    text = text_of(owner, f"/webhooks/{webhook}")
    assert "given up" in text and "answered 503" in text and ">503<" in text
    assert "failing</span>" in text_of(owner)
    with tenant(world.organization.id):
        delivery = Delivery.objects.get()
    assert owner.post(f"/deliveries/{delivery}/replay").headers["Location"] == f"/webhooks/{webhook}"
    with tenant(world.organization.id):
        again = Delivery.objects.get()
    assert (again.state, again.n_attempts, again.event_id) == (State.PENDING, 0, delivery.event_id)


def test_it_is_changed_disabled_enabled_and_deleted(owner: Client, world: World, webhook: Endpoint) -> None:
    path = f"/webhooks/{webhook}/change"
    assert owner.post(path, {"url": URL + "/2", "description": "x"}).status_code == 302
    with tenant(world.organization.id):
        assert (Endpoint.objects.get().url, Endpoint.objects.get().events) == (URL + "/2", [])
    owner.post(path, {"enabled": "0"})
    assert "disabled</span>" in text_of(owner)
    owner.post(path, {"enabled": "1"})
    assert "enabled</span>" in text_of(owner)
    owner.post(path, {"delete": "1"})
    assert "Nobody is told" in text_of(owner)


def test_shared_deployments_are_listed_on_both_sides_and_taken_back(world: World, owner: Client) -> None:
    deployment = make_deployment(world, "lent")
    annex = tenants.create_project(organization_id=world.organization.id, name="Annex", slug="annex")
    with acting_as("corral_operator"):
        for grantee, project in ((world.other_organization.id, None), (world.organization.id, annex.id)):
            sharing.grant(
                organization_id=world.organization.id,
                deployment_id=deployment.id,
                grantee_id=grantee,
                project_id=project,
            )
    ours = text_of(owner, "/sharing")
    assert "another organization" in ours and "your project Annex" in ours
    assert world.other_organization.name not in ours  # of whom we may not know more than its id
    theirs = signed_in(world.charlie)
    assert "acme/lent" in text_of(theirs, "/sharing") and "Take back" not in text_of(theirs, "/sharing")
    with tenant(world.organization.id):
        given = Grant.objects.get(grantee_id=world.other_organization.id)
    path = f"/sharing/grt_{given.id.hex}/withdraw"
    assert theirs.post(path).status_code == 404
    assert owner.post(path).status_code == 302
    assert "acme/lent" not in text_of(theirs, "/sharing")
