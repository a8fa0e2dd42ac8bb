"""A tenant's budget bounds its replicas, on the live loop as in the simulator's ration."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from autoscaler import explaining, market, means
from autoscaler.models import Decision, Machine, Replica
from controlplane.budgets.models import Budget
from infra.providers.base import Offering
from tests.autoscaler.conftest import Scaling

COVER = Offering(instance_type="g6.xlarge", zone="z-a", is_spot=False, price_nano_per_h=800_000_000)


@pytest.fixture
def rich(scaling: Scaling) -> Scaling:
    """Four replicas fit on a machine of 0.8 USD an hour, so each costs 0.2."""
    scaling.provider.kinds = [COVER]
    market.refresh(scaling.provider, "c0")
    scaling.configure(max_machines=3)
    scaling.change(max_replicas=8)
    return scaling


def _budget(scaling: Scaling, usd: float, **fields: object) -> Budget:
    return Budget.objects.create(
        organization_id=scaling.world.organization.id,
        name="all",
        limit_nano=round(usd * 1e9),
        period="day",
        **fields,
    )


def test_replicas_cost_no_more_an_hour_than_what_is_left(rich: Scaling) -> None:
    rich.queue(*(f"r{i}" for i in range(16)))  # six replicas of four slots
    _budget(rich, 0.45)
    rich.tick()
    assert Replica.objects.count() == 2
    row = Decision.objects.latest("at", "id")
    assert "budget: 2 of 6 replicas, " in " ".join(row.reasons)
    assert "has 0.45 USD left for 1 h" in " ".join(row.reasons)
    assert explaining.replay(row).same, "the bound is part of what is stored"


def test_without_a_budget_of_the_whole_nothing_is_bounded(rich: Scaling) -> None:
    rich.queue(*(f"r{i}" for i in range(16)))
    _budget(rich, 0.0, hard=False)
    _budget(rich, 0.0, project_id=rich.world.project.id)
    _budget(rich, 0.0, model="other")
    rich.tick()
    assert Replica.objects.count() == 6


def test_the_last_money_pays_for_one_and_no_money_for_none(rich: Scaling) -> None:
    rich.queue(*(f"r{i}" for i in range(16)))
    budget = _budget(rich, 0.01)
    rich.tick()
    assert Replica.objects.count() == 1
    assert "one serves as long as there is money" in " ".join(Decision.objects.latest("at", "id").reasons)
    Budget.objects.filter(id=budget.id).update(limit_nano=0)
    rich.tick()
    assert Decision.objects.latest("at", "id").commands[0]["kind"] == "stop_replica"


def test_what_other_deployments_of_the_tenant_run_counts(rich: Scaling) -> None:
    _budget(rich, 0.45)
    other = Replica(
        organization_id=rich.world.organization.id,
        deployment_id=rich.deployment.id,
        machine=Machine.objects.create(
            provider="fake", command_id=rich.deployment.id, enroll_proof_digest=b"p" * 32, cell="c0"
        ),
        generation=1,
        slots=4,
    )
    other.save()
    now = timezone.now() + timedelta(seconds=1)
    house = rich.house
    own = rich.seen()
    assert means.granted(own, 3, house.config, "c0", now) == means.Means(
        2, f"budget: 2 of 3 replicas, {own.organization} has 0.45 USD left for 1 h"
    )
    stranger = replace_id(own)
    found = means.granted(stranger, 3, house.config, "c0", now)
    assert found is not None
    assert found.n == 1, "one of its two is the other deployment's"


def replace_id(deployment: object) -> object:
    """The same owner's, another deployment; never saved."""
    import copy

    from controlplane import ids

    other = copy.copy(deployment)
    other.id = ids.new_id()  # type: ignore[attr-defined]
    return other
