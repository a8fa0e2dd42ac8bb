"""Quotas: no machine is bought that would break one, however many ask at once, and whoever waits is told."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import connections
from django.utils import timezone

from autoscaler import launch, quotas
from autoscaler.cell import Cell
from autoscaler.models import Machine, MachineState
from controlplane.deployments import services as deployments
from controlplane.deployments.models import Deployment
from controlplane.errors import InvalidInputError
from controlplane.quotas import selectors, services
from controlplane.quotas.models import QuotaKind
from controlplane.webhooks.models import Event
from infra.providers.base import Offering
from tests.autoscaler.conftest import Scaling
from tests.autoscaler.fakes import FakeProvider
from workers.keys import CellKeys

SMALL = Offering(
    instance_type="g6.xlarge", zone="z-a", is_spot=False, price_nano_per_h=800_000_000, gpu="l4", n_gpus=1
)
LARGE = replace(SMALL, instance_type="g6.12xlarge", price_nano_per_h=4_600_000_000, n_gpus=4)


def buy(scaling: Scaling, command_id: UUID | None = None) -> Machine | None:
    house = scaling.house
    return launch.launch(command_id or uuid4(), scaling.provider, house.config, house.cell, scaling.seen())


def own(scaling: Scaling, kind: QuotaKind, limit: int) -> None:
    services.set_own(organization_id=scaling.world.organization.id, kind=kind, limit=limit)


def used(scaling: Scaling, kind: QuotaKind) -> int:
    organization = scaling.world.organization
    since = selectors.since(kind, organization.timezone, timezone.now())
    return selectors.use(organization_id=organization.id, cell="", since=since).of(kind)


def test_a_launch_that_breaks_a_quota_is_not_made_and_says_so_to_all(scaling: Scaling) -> None:
    scaling.configure(max_machines=4)
    own(scaling, QuotaKind.MACHINES, 0)
    scaling.queue("one")
    decision = scaling.tick().decision
    assert not any(c.KIND == "launch_machine" for c in decision.commands)
    assert decision.status.code == "quota_reached"
    assert "0 of 0 machines" in decision.status.last_error
    assert scaling.provider.n_launch_calls == 0 and not Machine.objects.exists()
    assert "quota_reached" in scaling.seen().last_error and scaling.seen().phase == "failed"
    stage = scaling.house.cell.redis.hgetall(scaling.house.cell.keys.stage(scaling.deployment.id.hex))
    assert b"quota_reached" in b" ".join(stage.values())
    scaling.tick()
    (event,) = Event.objects.filter(kind="quota.reached")
    assert (event.data["kind"], event.data["limit"], event.data["used"]) == ("machines", 0, 0)
    own(scaling, QuotaKind.MACHINES, 1)
    assert any(
        c.KIND == "launch_machine" or c.KIND == "start_replica" for c in scaling.tick().decision.commands
    )
    assert Machine.objects.get().launched_for == scaling.world.organization.id


@pytest.mark.parametrize("by_house", [True, False])
def test_of_many_launches_at_once_only_as_many_as_the_quota_has_are_made(
    scaling: Scaling, by_house: bool
) -> None:
    scaling.configure(max_machines=10)
    if by_house:
        services.set_ceiling(organization_id=None, kind=QuotaKind.MACHINES, limit=2, cell="c0")
    else:
        own(scaling, QuotaKind.MACHINES, 2)
    barrier, found = threading.Barrier(6), []

    def run() -> None:
        try:
            barrier.wait(10)
            found.append(buy(scaling))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len([m for m in found if m]) == Machine.objects.count() == scaling.provider.n_launch_calls == 2


@pytest.mark.parametrize("by_house", [True, False])
def test_two_cells_that_order_at_once_never_exceed_a_quota(
    scaling: Scaling, redis_url: str, by_house: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cell with its own provider, deployment and keys, on one Postgres. Whoever has checked first waits until the
    other has checked too, or cannot: without the lock both would find the last place free."""
    scaling.configure(max_machines=9)
    organization = scaling.world.organization
    if by_house:
        services.set_ceiling(organization_id=None, kind=QuotaKind.MACHINES, limit=1)
    else:
        own(scaling, QuotaKind.MACHINES, 1)
    first = scaling.house.cell
    second = Cell(redis_url, CellKeys("c1"))
    elsewhere = deployments.create_deployment(
        organization_id=organization.id,
        project_id=scaling.world.project.id,
        name="toy-elsewhere",
        model_version_id=scaling.deployment.model_version_id,
        engine_profile={"engine": "toy"},
    )
    Deployment.objects.filter(id=elsewhere.id).update(cell="c1")
    sides = [
        (first, scaling.provider, scaling.seen()),
        (second, FakeProvider(), Deployment.objects.get(id=elsewhere.id)),
    ]
    check, both, checked = quotas.reached, threading.Condition(), [0]

    def check_and_wait(*args: Any) -> Any:
        found = check(*args)
        with both:
            checked[0] += 1
            both.notify_all()
            both.wait_for(lambda: checked[0] >= 2, 0.5)
        return found

    monkeypatch.setattr(quotas, "reached", check_and_wait)
    begin = threading.Barrier(2)
    most = [0]

    def orders(cell: Cell, provider: FakeProvider, deployment: Deployment) -> None:
        try:
            begin.wait(10)
            for _ in range(3):
                launch.launch(uuid4(), provider, scaling.house.config, cell, deployment)
                most[0] = max(most[0], Machine.objects.exclude(state=MachineState.GONE).count())
        finally:
            connections.close_all()

    threads = [threading.Thread(target=orders, args=side) for side in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    bought = [(side[0].keys.cell, side[1].n_launch_calls) for side in sides]
    assert most[0] == Machine.objects.count() == sum(n for _, n in bought) == 1, bought
    assert {row.cell for row in Machine.objects.all()} == {cell for cell, n in bought if n}


def test_a_place_in_a_quota_is_free_again_when_its_machine_is_gone(scaling: Scaling) -> None:
    scaling.configure(max_machines=4)
    own(scaling, QuotaKind.MACHINES, 1)
    first = buy(scaling)
    assert first is not None and buy(scaling) is None
    launch.mark_gone(first.id, "test")
    assert buy(scaling) is not None


def test_what_fits_the_spend_rate_is_bought_and_what_does_not_is_left_out(scaling: Scaling) -> None:
    scaling.configure(max_machines=9)
    scaling.provider.kinds = [LARGE, SMALL]
    own(scaling, QuotaKind.SPEND_RATE, 1_700_000_000)
    bought = [buy(scaling) for _ in range(3)]
    assert [m is not None for m in bought] == [True, True, False]
    rows = Machine.objects.exclude(state=MachineState.GONE)
    assert {row.offering for row in rows} == {SMALL.name} and {row.n_gpus for row in rows} == {1}
    assert all(LARGE.name not in row.launch_plan for row in rows)
    assert used(scaling, QuotaKind.SPEND_RATE) == 1_600_000_000


def test_gpu_hours_count_in_their_window_also_of_machines_that_are_gone(scaling: Scaling) -> None:
    scaling.configure(max_machines=9)
    scaling.provider.kinds = [SMALL]
    own(scaling, QuotaKind.GPU_HOURS_MONTH, 10)
    first, now = buy(scaling), timezone.now()
    assert first is not None
    start = selectors.since(QuotaKind.GPU_HOURS_MONTH, "UTC", now)
    Machine.objects.filter(id=first.id).update(
        created_at=start - timedelta(hours=50),
        state=MachineState.GONE,
        gone_at=start + timedelta(hours=5),
        n_gpus=2,
    )
    assert used(scaling, QuotaKind.GPU_HOURS_MONTH) == 10
    assert buy(scaling) is None
    own(scaling, QuotaKind.GPU_HOURS_MONTH, 11)
    assert buy(scaling) is not None


def test_the_lower_of_ceiling_and_own_limit_holds(scaling: Scaling) -> None:
    scaling.configure(max_machines=9)
    organization_id = scaling.world.organization.id
    own(scaling, QuotaKind.MACHINES, 5)
    services.set_ceiling(organization_id=organization_id, kind=QuotaKind.MACHINES, limit=1)
    with pytest.raises(InvalidInputError, match="the house allows 1 at most"):
        own(scaling, QuotaKind.MACHINES, 2)
    assert buy(scaling) is not None and buy(scaling) is None
    services.set_ceiling(organization_id=organization_id, kind=QuotaKind.MACHINES, limit=None)
    assert buy(scaling) is not None


def test_another_tenants_machines_do_not_count(scaling: Scaling) -> None:
    scaling.configure(max_machines=4)
    own(scaling, QuotaKind.MACHINES, 1)
    first = buy(scaling)
    assert first is not None
    Machine.objects.filter(id=first.id).update(launched_for=scaling.world.other_organization.id)
    assert buy(scaling) is not None
