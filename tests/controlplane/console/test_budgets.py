"""The budgets page: what was spent as a bar, and what its form and buttons do."""

from __future__ import annotations

import pytest
from django.test import Client

from controlplane.budgets.models import Budget
from controlplane.policy.periods import Period
from controlplane.quotas import services as quotas
from controlplane.quotas.models import QuotaKind
from controlplane.tenants.context import tenant
from tests.controlplane.budgets.test_budgets import make_budget
from tests.database import acting_as
from tests.world import World

FORM = {"name": "team", "limit": "12.50", "period": "rolling:24", "project": "", "kind": "soft"}


def text_of(client: Client) -> str:
    return " ".join(client.get("/budgets").content.decode().split())


def test_bars_say_what_was_spent(owner: Client, world: World, usage_event) -> None:
    make_budget(world, name="tight", limit_nano=20_000, project_id=world.project.id)
    make_budget(world, name="wide", limit_nano=10**9, hard=False, period=Period.ROLLING, rolling_hours=720)
    usage_event()  # 15,000
    text = text_of(owner)
    assert '<rect class="fill" width="75"' in text and "75 %, this day" in text
    assert "only alerts" in text and "last 30 days" in text and "project Main" in text


def test_the_form_makes_a_budget_and_names_what_is_wrong(owner: Client, world: World) -> None:
    assert owner.post("/budgets/create", FORM).status_code == 302
    with tenant(world.organization.id):
        made = Budget.objects.get()
        assert (made.limit_nano, made.period, made.rolling_hours, made.hard) == (
            12_500_000_000,
            "rolling",
            24,
            False,
        )
    wrong = owner.post("/budgets/create", {**FORM, "limit": "much"})
    assert wrong.status_code == 400 and "is no amount" in wrong.content.decode()


def test_a_limit_is_changed_and_a_budget_deleted(owner: Client, world: World) -> None:
    made = make_budget(world)
    assert owner.post(f"/budgets/{made}", {"limit": "$1,000.00"}).status_code == 302
    with tenant(world.organization.id):
        assert Budget.objects.get().limit_nano == 10**12
    assert owner.post(f"/budgets/{made}", {"limit": "-1"}).status_code == 400
    assert owner.post(f"/budgets/{made}", {"delete": "1"}).status_code == 302
    assert "No budgets yet" in text_of(owner)


@pytest.mark.parametrize("limit", [0, 4])
def test_quotas_are_shown_where_there_are_any(owner: Client, world: World, limit: int) -> None:
    assert "Quotas on machines" not in text_of(owner)
    with acting_as("corral_operator"):
        quotas.set_ceiling(organization_id=world.organization.id, kind=QuotaKind.MACHINES, limit=limit)
    text = text_of(owner)
    assert "Quotas on machines" in text and "the house" in text and f'class="num">{limit}</td>' in text
