"""Limits on end customers on a real Postgres: set by REST, read by gateways with a key; what a customer has spent."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from django.conf import settings
from django.db import IntegrityError, connection, transaction

from controlplane.endcustomers import services
from controlplane.endcustomers.models import EndCustomerLimits
from controlplane.gateway.directory import KeyRecord, LeaseRow
from controlplane.gateway.keycontext import context_of
from controlplane.tenants import key_services
from controlplane.tenants import services as tenants
from controlplane.tenants.context import tenant
from controlplane.tenants.end_customers import pseudonym
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import Role
from tests.booked import book_usage
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World


@pytest.fixture
def api(world: World) -> Api:
    return Api(token_of(world.organization.id, Role.OWNER))


def record(world: World) -> KeyRecord:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="k"
    )
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_with_end_customers(corral_key_lookup_slo(%s, 'c0'))", [key.lookup])
        (found,) = cursor.fetchone()
    return msgspec.convert(json.loads(found) if isinstance(found, str) else found, KeyRecord)


def test_rest_sets_lists_and_clears_and_keeps_no_name(world: World, api: Api) -> None:
    path = f"/projects/prj_{world.project.id.hex}/end-customer-limits"
    all_of_them = api.call("PUT", path, {"rpm": 60, "budget_nano": 5})
    one = api.call("PUT", path, {"end_customer": "jane@example.org", "rpm": 600})
    assert (all_of_them.status_code, one.status_code) == (200, 200), one.body
    jane = pseudonym(settings.ENV.digest_secret, world.organization.id.hex, "jane@example.org")
    listed = api.get(path).body["data"]
    assert [(row["customer"], row["limits"]["rpm"]) for row in listed] == [(jane, 600), ("", 60)]
    assert "jane" not in api.get(path).content.decode() + api.get("/audit").content.decode()
    again = api.call("PUT", path, {"end_customer": "jane@example.org", "rpm": 700})
    assert (again.body["id"], again.body["limits"]["rpm"]) == (one.body["id"], 700)
    for wrong in ({"rpm": -1}, {"end_customer": " ", "rpm": 1}, {"end_customer": "", "rpm": 1}):
        refused = api.call("PUT", path, wrong)
        assert (refused.status_code, refused.body["errors"][0]["field"]) == (400, next(iter(wrong)))
    for wrong in ({"end_customer": "a", "customer": jane}, {"customer": "jane"}, {"customer": ""}):
        refused = api.call("PUT", path, wrong)
        assert (refused.status_code, refused.body["errors"][0]["field"]) == (400, "customer"), wrong
    by_pseudonym = api.call("PUT", path, {"customer": jane, "rpm": 700})
    assert by_pseudonym.body == again.body == api.get(f"/end-customer-limits/{one.body['id']}").body
    planned = api.call("PUT", f"{path}?plan=true", {"end_customer": "jane@example.org", "rpm": 1})
    (change,) = planned.body["changes"]
    assert (change["kind"], change["id"]) == ("end_customer_limits", one.body["id"])
    assert api.call("DELETE", f"/end-customer-limits/{one.body['id']}").status_code == 204
    assert len(api.get(path).body["data"]) == 1


def test_they_are_found_by_project_by_pseudonym_and_by_the_programs_id(world: World, api: Api) -> None:
    annex = tenants.create_project(organization_id=world.organization.id, name="Annex", slug="annex")
    for project in (world.project, annex):
        ids: dict[str, Any] = {"organization_id": world.organization.id, "project_id": project.id}
        services.set_limits(**ids, limits=Limits(rpm=1))
        services.set_limits(**ids, limits=Limits(rpm=2), end_customer="jane")
    jane = pseudonym(settings.ENV.digest_secret, world.organization.id.hex, "jane")

    def found(query: str) -> list[tuple[bool, str]]:
        rows = api.get(f"/end-customer-limits?{query}").body["data"]
        return [(row["project_id"] == f"prj_{annex.id.hex}", row["customer"]) for row in rows]

    assert found("") == [(True, jane), (True, ""), (False, jane), (False, "")]
    assert found("limit=1") == [(True, jane)]
    assert found(f"project_id=prj_{annex.id.hex}") == [(True, jane), (True, "")]
    assert found("end_customer=jane") == found(f"customer={jane}") == [(True, jane), (False, jane)]
    assert found("customer=") == [(True, ""), (False, "")]
    assert found("end_customer=nobody") == []
    refused = api.get("/end-customer-limits?end_customer=%20")
    assert (refused.status_code, refused.body["errors"][0]["field"]) == (400, "end_customer")


def test_a_gateway_reads_them_with_the_key_and_its_cells_part(world: World) -> None:
    ids: dict[str, Any] = {"organization_id": world.organization.id, "project_id": world.project.id}
    assert context_of(record(world)).ends is None
    services.set_limits(**ids, limits=Limits(rpm=60, budget_nano=1_000))
    services.set_limits(**ids, limits=Limits(max_concurrency=4), end_customer="vip")
    found = record(world)
    ends, vip = (
        context_of(found).ends,
        pseudonym(settings.ENV.digest_secret, ids["organization_id"].hex, "vip"),
    )
    assert ends is not None and ends.budgeted
    project = world.project.id.hex
    assert ends.scope("ab" * 12) == (f"{project}.{'ab' * 12}", 60, -1, -1, -1, 1_000, 0)
    assert ends.scope(vip) == (f"{project}.{vip}", -1, -1, -1, 4, -1, 0)
    assert ends.scope("") is None
    half = context_of(msgspec.structs.replace(found, lease=LeaseRow(500_000, 5_000)))
    assert half.ends is not None and half.lease_ms == 5_000
    assert half.ends.scope("ab" * 12) == (f"{project}.{'ab' * 12}", 30, -1, -1, -1, 1_000, 0, 1), (
        "money is leased"
    )
    assert half.ends.scope(vip) == (f"{project}.{vip}", -1, -1, -1, 2, -1, 0)
    little = context_of(msgspec.structs.replace(found, lease=LeaseRow(50_000, 5_000))).ends
    assert little is not None
    assert little.scope(vip) == (f"{project}.{vip}", -1, -1, -1, 1, -1, 0), "or few would be served nowhere"


def test_a_change_is_in_the_feed_that_gateways_poll(world: World) -> None:
    def n_changes() -> int:
        with acting_as("corral_owner"), connection.cursor() as cursor:
            ref = f"prj:{world.project.id.hex}"
            cursor.execute("SELECT count(*) FROM corral_change WHERE ref = %s", [ref])
            return int(cursor.fetchone()[0])

    before = n_changes()
    row = services.set_limits(
        organization_id=world.organization.id, project_id=world.project.id, limits=Limits(rpm=1)
    )
    services.clear_limits(organization_id=world.organization.id, limits_id=row.id)
    assert n_changes() == before + 2


def test_what_a_customer_spent_is_summed_by_project_and_customer(world: World) -> None:
    whose = pseudonym(settings.ENV.digest_secret, world.organization.id.hex, "ann")
    for customer in (whose, whose, "ab" * 12, ""):
        book_usage(world, end_customer=customer)

    def spent(customer: str, cell: str | None = None) -> int:
        with connection.cursor() as cursor:
            cursor.execute("SELECT corral_spent_for(%s, %s, %s)", [world.project.id, customer, cell])
            return int(cursor.fetchone()[0])

    one = spent("ab" * 12)
    assert one > 0 and spent(whose) == 2 * one
    assert spent("") == spent("cd" * 12) == spent(whose, "elsewhere") == 0


def test_rows_of_another_tenant_are_not_seen_nor_made(world: World) -> None:
    services.set_limits(
        organization_id=world.organization.id, project_id=world.project.id, limits=Limits(rpm=1)
    )
    with tenant(world.other_organization.id):
        assert not EndCustomerLimits.objects.exists()
    with pytest.raises(IntegrityError), transaction.atomic(), tenant(world.organization.id):
        EndCustomerLimits.objects.create(
            organization_id=world.organization.id, project_id=world.project.id, customer="jane@example.org"
        )
