"""Budgets in Postgres: sums that a trigger keeps, windows, what gateways are told, and who may change what."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from django.db import connection
from django.utils import timezone

from billing.models import Spend
from controlplane.budgets import selectors, services
from controlplane.budgets.models import Budget
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.policy.periods import Period
from controlplane.tenants import key_services
from controlplane.tenants import services as tenants
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey
from tests.booked import book_usage
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World


def make_key(world: World, name: str = "program") -> ApiKey:
    return key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name=name
    )[0]


def make_budget(world: World, **values: object) -> Budget:
    defaults = {"name": "team", "limit_nano": 100_000, "period": Period.DAY}
    return services.create_budget(organization_id=world.organization.id, **(defaults | values))  # type: ignore[arg-type]


def spent(world: World, budget: Budget, now: datetime | None = None) -> int:
    with tenant(world.organization.id):
        found = selectors.budget(organization_id=world.organization.id, budget_id=budget.id)
        return selectors.standing(found, now or timezone.now()).spent_nano


def test_what_is_booked_is_summed_in_the_same_transaction(world: World) -> None:
    key = make_key(world)
    for cost in (10, 20, 30):
        book_usage(world, key_id=key.id, cost_nano=cost, admitted_at=datetime(2026, 3, 1, 10, 7, tzinfo=UTC))
    book_usage(world, key_id=key.id, cost_nano=5, admitted_at=datetime(2026, 3, 1, 10, 15, tzinfo=UTC))
    with tenant(world.organization.id):
        rows = Spend.objects.filter(api_key_id=key.id).order_by("quarter")
        assert [(row.quarter.minute, row.cost_nano, row.n_requests) for row in rows] == [
            (0, 60, 3),
            (15, 5, 1),
        ]
    with tenant(world.other_organization.id):
        assert not Spend.objects.exists()


def test_each_subject_and_model_counts_its_own(world: World) -> None:
    one, two = make_key(world, "one"), make_key(world, "two")
    budgets = {
        "org": make_budget(world), "prj": make_budget(world, project_id=world.project.id),
        "one": make_budget(world, api_key_id=one.id), "chat": make_budget(world, model="chat"),
    }  # fmt: skip
    book_usage(world, key_id=one.id, cost_nano=1, model="chat")
    book_usage(world, key_id=two.id, cost_nano=10, model="other")
    book_usage(world, key_id=two.id, cost_nano=100, project_id=world.other_project.id, model="other")
    book_usage(world, key_id=two.id, cost_nano=1_000, organization_id=world.other_organization.id)
    assert {name: spent(world, budget) for name, budget in budgets.items()} == {
        "org": 111, "prj": 11, "one": 1, "chat": 1,
    }  # fmt: skip


def test_windows_are_those_of_the_organizations_zone(world: World) -> None:
    tenants.update_organization(organization_id=world.organization.id, timezone="Europe/Berlin")
    day, rolling = make_budget(world), make_budget(world, period=Period.ROLLING, rolling_hours=2)
    total = make_budget(world, period=Period.TOTAL)
    midnight = datetime(2026, 10, 24, 22, tzinfo=UTC)  # of a day with 25 hours
    for offset_s, cost in ((-1, 1), (0, 10), (3 * 3600, 100), (25 * 3600, 1_000)):
        at = midnight + timedelta(seconds=offset_s)
        book_usage(world, cost_nano=cost, admitted_at=at)
    late = midnight + timedelta(hours=24, minutes=59)
    assert spent(world, day, late) == 110
    assert spent(world, day, midnight - timedelta(seconds=1)) == 1
    assert spent(world, rolling, midnight + timedelta(hours=1, minutes=59)) == 11
    assert spent(world, rolling, midnight + timedelta(hours=2)) == 10
    assert spent(world, rolling, midnight + timedelta(hours=5, minutes=14)) == 100
    assert spent(world, total, timezone.now()) == 1_111


def test_gateways_are_told_of_hard_budgets_with_the_key(world: World) -> None:
    key, other = make_key(world), make_key(world, "other")
    mine = make_budget(world, api_key_id=key.id, model="chat")
    make_budget(world, api_key_id=key.id, hard=False)
    all_of_us = make_budget(world, period=Period.ROLLING, rolling_hours=5)
    with connection.cursor() as cursor:
        found = {}
        for each in (key, other):
            cursor.execute("SELECT corral_with_budgets(corral_key_lookup_slo(%s, 'c0'), 'c0')", [each.lookup])
            record = cursor.fetchone()[0]
            found[each.id] = json.loads(record)["budgets"] if isinstance(record, str) else record["budgets"]
    assert [b["id"] for b in found[key.id]] == sorted((mine.id.hex, all_of_us.id.hex))
    assert [(b["id"], b["scope"], b["rolling_hours"]) for b in found[other.id]] == [
        (all_of_us.id.hex, "org", 5)
    ]
    assert found[key.id][0] == {
        "id": mine.id.hex, "name": "team", "scope": "key", "limit_nano": 100_000, "model": "chat", "period": "day",
        "rolling_hours": None, "timezone": "UTC",
    }  # fmt: skip


def test_a_change_leaves_a_note_and_an_entry_in_the_audit_log(world: World) -> None:
    key = make_key(world)
    budget = make_budget(world, api_key_id=key.id)
    services.update_budget(organization_id=world.organization.id, budget_id=budget.id, limit_nano=5)
    with acting_as("corral_owner"), connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM corral_change WHERE ref = %s", [f"key:{key.lookup}"])
        assert cursor.fetchone()[0] >= 2
        cursor.execute("SELECT action FROM audit_entry WHERE kind = 'budget' ORDER BY id")
        assert [row[0] for row in cursor.fetchall()] == ["create", "update"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"limit_nano": -1}, "limit_nano"),
        ({"thresholds": [80, 50]}, "thresholds"),
        ({"thresholds": [0]}, "thresholds"),
        ({"period": Period.ROLLING}, "rolling_hours"),
        ({"rolling_hours": 5}, "rolling_hours"),
        ({"period": Period.ROLLING, "rolling_hours": 5_000}, "rolling_hours"),
    ],
)
def test_bad_input_names_its_field(world: World, values: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        make_budget(world, **values)
    assert caught.value.field == field


def test_a_subject_of_another_tenant_is_none(world: World) -> None:
    with pytest.raises(NotFoundError):
        make_budget(world, project_id=world.other_project.id)
    for _ in range(services.MAX_PER_SUBJECT):
        make_budget(world)
    with pytest.raises(ConflictError):
        make_budget(world)
    make_budget(world, project_id=world.project.id)


def test_rest_says_what_was_spent_and_spending_is_no_change(world: World) -> None:
    from controlplane.tenants.models import Role

    api = Api(token_of(world.organization.id, Role.BILLING))
    made = api.post("/budgets", {"name": "team", "limit_nano": 50_000, "period": "month", "thresholds": [90]})
    assert made.status_code == 201, made.body
    tag = made["ETag"]
    book_usage(world, cost_nano=7_000)
    read = api.get(f"/budgets/{made.body['id']}")
    assert (read.body["spent_nano"], read["ETag"]) == (7_000, tag)
    changed = api.call("PATCH", f"/budgets/{made.body['id']}", {"limit_nano": 60_000}, **{"If-Match": tag})
    assert (changed.status_code, changed.body["limit_nano"], changed.body["hard"]) == (200, 60_000, True)
    assert (
        api.call("PATCH", f"/budgets/{made.body['id']}", {"name": "x"}, **{"If-Match": tag}).status_code
        == 412
    )
    assert [b["id"] for b in api.get("/budgets").body["data"]] == [made.body["id"]]
    assert api.get(f"/budgets?project_id=prj_{world.project.id.hex}").body["data"] == []
    assert api.call("DELETE", f"/budgets/{made.body['id']}").status_code == 204
