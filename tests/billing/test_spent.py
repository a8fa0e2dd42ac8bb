"""corral_spent: the sum of what was booked for a key, a project or an organization."""

from uuid import UUID

import psycopg
import pytest
import redis
from django.db import DatabaseError, connection

from billing.intake import Intake
from controlplane.ids import new_id
from tests.billing.usage import Tenant, deliver, event, new_hex
from tests.database import acting_as

MACHINE = new_hex()
COST = 60 * 100 + 40 * 25 + 20 * 400


def spent(scope: str, scope_id: UUID | str) -> int:
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_spent(%s, %s)", [scope, scope_id])
        return cursor.fetchone()[0]


def test_each_scope_sums_its_own(intake: Intake, client: redis.Redis) -> None:
    acme = Tenant()
    second_key = Tenant(org=acme.org, project=acme.project)
    second_project = Tenant(org=acme.org)
    for tenant, n in ((acme, 3), (second_key, 2), (second_project, 1), (Tenant(), 5)):
        for _ in range(n):
            deliver(client, MACHINE, event(tenant, MACHINE))
    intake.run([MACHINE], budget_s=5)
    with acting_as("corral_app"):  # as gateways do: no tenant is set
        assert spent("key", acme.key) == 3 * COST
        assert spent("prj", acme.project) == 5 * COST
        assert spent("org", acme.org) == 6 * COST


@pytest.mark.django_db
def test_nothing_spent_is_zero() -> None:
    assert spent("org", new_id()) == 0


@pytest.mark.django_db
def test_an_unknown_scope_is_refused_by_name() -> None:
    with pytest.raises(DatabaseError, match="must be key, prj or org") as caught:
        spent("user", new_id())
    assert isinstance(caught.value.__cause__, psycopg.Error)
