"""Quotas over REST and by command: who sees and sets which."""

from __future__ import annotations

from io import StringIO

import pytest
from django.core.management import CommandError, call_command
from django.db import DatabaseError, transaction

from controlplane.quotas import services
from controlplane.quotas.models import Quota, QuotaKind
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World


def ceiling(world: World, limit: int | None) -> None:
    with acting_as("corral_operator"):
        services.set_ceiling(organization_id=world.organization.id, kind=QuotaKind.MACHINES, limit=limit)


def test_owners_set_lower_limits_than_the_houses(world: World) -> None:
    api = Api(token_of(world.organization.id, Role.OWNER))
    ceiling(world, 8)
    assert api.call("PUT", "/quotas/machines", {"limit": 4}).body == {
        "kind": "machines", "limit": 4, "own": 4, "ceiling": 8, "used": 0,
    }  # fmt: skip
    refused = api.call("PUT", "/quotas/machines", {"limit": 9})
    assert (refused.status_code, refused.body["errors"][0]["field"]) == (400, "limit")
    ceiling(world, 2)
    kinds = {each["kind"]: each for each in api.get("/quotas").body["data"]}
    assert kinds.keys() == set(QuotaKind.values)
    assert (kinds["machines"]["limit"], kinds["spend_rate"]["limit"]) == (2, None)
    assert api.call("DELETE", "/quotas/machines").status_code == 204
    assert api.call("PUT", "/quotas/nonsense", {"limit": 1}).status_code == 404


def test_the_role_of_the_web_process_cannot_touch_ceilings(world: World) -> None:
    ceiling(world, 8)
    with tenant(world.organization.id):
        assert Quota.objects.filter(by_house=True).update(limit=100) == 0
        assert Quota.objects.filter(by_house=True).delete()[0] == 0
        with pytest.raises(DatabaseError), transaction.atomic():
            Quota.objects.create(
                organization_id=world.organization.id, kind="spend_rate", limit=1, by_house=True
            )
        assert Quota.objects.get().limit == 8
    with tenant(world.other_organization.id):
        assert not Quota.objects.exists()


def test_the_operators_command(world: World) -> None:
    out = StringIO()
    with acting_as("corral_operator"):
        call_command("set_quota", "machines", "3", "--organization", "acme", stdout=out)
        call_command("set_quota", "spend_rate", "5000000000", "--cell", "c0", stdout=out)
        call_command("set_quota", "machines", "-", "--organization", "acme", stdout=out)
        assert [(q.kind, q.cell, q.limit) for q in Quota.objects.all()] == [
            ("spend_rate", "c0", 5_000_000_000)
        ]
        with pytest.raises(CommandError, match="no organization"):
            call_command("set_quota", "machines", "3", "--organization", "nobody")
    assert "acme: machines at most 3" in out.getvalue()
