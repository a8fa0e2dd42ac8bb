"""Every list that may grow long is filtered: what a filter names is found by it, and nothing else is."""

from __future__ import annotations

import pytest

from controlplane.api.app import api as rest
from controlplane.tenants.models import Role
from tests.controlplane.api.caller import Api, token_of
from tests.controlplane.api.test_matrix import Acme
from tests.world import World

# Path, a filter that finds something of Acme's, and one that finds nothing.
FILTERS = [
    ("/members", "email=BOB@example.org", "email=nobody@example.org"),
    ("/invitations", "email=guest@example.org", "email=other@example.org"),
    ("/invitations", "status=open", "status=expired"),
    ("/invitations", "status=open", "status=accepted"),
    ("/invitations", "status=open", "status=revoked"),
    ("/service-accounts", "name=robot%20zero", "name=robot"),
    ("/service-accounts", "role=viewer", "role=billing"),
    ("/service-accounts/{account_id}/tokens", "revoked=false", "revoked=true"),
    ("/grants-held", "name=acme%2Fserved", "name=other"),
    ("/grants-held", "name=acme%2Fserved", "project_id=prj_" + "0" * 32),
    ("/webhooks", "url=https://acme.example/hook", "url=https://acme.example/"),
    ("/webhooks", "enabled=true", "enabled=false"),
    ("/webhooks/{webhook_id}/deliveries", "state=pending", "state=delivered"),
    ("/webhooks/{webhook_id}/deliveries", "kind=webhook.test", "kind=key.created"),
    ("/upstreams", "name=acme-overflow", "name=acme"),
    ("/upstreams", "role=overflow", "role=shadow"),
    ("/upstreams", "enabled=true", "enabled=false"),
    ("/upstreams", "deployment_id={deployment_id}", "deployment_id=dep_" + "0" * 32),
    ("/end-customer-limits", "end_customer=acme-customer", "end_customer=other"),
]
# Lists that hold a handful by their nature (bounded, or one for each thing that an administrator sets up).
SHORT = {
    "/identity-providers",
    "/domains",
    "/scim-tokens",
    "/organization/exports",
    "/deployments/{deployment_id}/profiles",
    "/projects/{project_id}/end-customer-limits",
}


def test_what_a_filter_names_is_found_and_nothing_else(world: World) -> None:
    acme, api = Acme(world), Api(token_of(world.organization.id, Role.OWNER))
    for path, finds, misses in FILTERS:
        where = path.format_map(acme.ids)
        found, missed = api.get(f"{where}?{finds.format_map(acme.ids)}"), api.get(f"{where}?{misses}")
        assert (found.status_code, missed.status_code) == (200, 200), (path, found.body, missed.body)
        assert found.body["data"] and not missed.body["data"], (path, finds, misses)


@pytest.mark.parametrize(
    "query", ["open=true", "open=false", "slo_class=batch", "project_id=prj_" + "0" * 32]
)
def test_alerts_are_filtered(world: World, query: str) -> None:
    from django.utils import timezone

    from controlplane.slo.models import SloAlert
    from tests.database import acting_as

    api = Api(token_of(world.organization.id, Role.OWNER))
    now = timezone.now()
    with acting_as("corral_operator"):
        SloAlert.objects.create(
            organization=world.organization,
            project=world.project,
            slo_class="flex",
            severity="page",
            burn_rate=2.0,
            window_s=3600,
            started_at=now,
        )
    assert len(api.get("/slo/alerts?slo_class=flex").body["data"]) == 1
    assert bool(api.get(f"/slo/alerts?{query}").body["data"]) == (query == "open=true")


def test_no_list_is_without_filters_but_the_short_ones() -> None:
    """A new list without a filter fails here."""
    bare = set()
    document = rest.get_openapi_schema()
    for path, methods in document["paths"].items():
        short = path.removeprefix("/api/v1")
        known = {each["name"] for each in methods.get("get", {}).get("parameters", [])}
        if "cursor" in known and not {name for name in known if f"{{{name}}}" not in path} - {
            "cursor",
            "limit",
            "If-None-Match",
        }:
            bare.add(short)
    assert bare <= SHORT, bare - SHORT
