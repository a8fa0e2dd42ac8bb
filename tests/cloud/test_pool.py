"""Back to spot on a simulated region: cover is bought while spot has none, and given back when it serves again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from django.utils import timezone

from autoscaler import pool, reconcile
from autoscaler.models import Machine, MachineState, Offer
from tests.autoscaler.conftest import eventually, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.conftest import TYPE
from tests.cloud.ec2 import ZONES
from tests.cloud.test_from_zero import Cloud, cloud  # noqa: F401 - fixture

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])
BOOTS_WITHIN_S = 180.0  # a machine and an engine, on a busy computer


@pytest.mark.full  # two machines boot one after the other
@pytest.mark.timeout(600)
def test_on_demand_covers_while_spot_has_none_and_goes_when_it_serves_again(
    cloud: Cloud,  # noqa: F811
    eventually: Callable[..., None],  # noqa: F811
) -> None:
    # A notice that comes in time: no spare is worth its price.
    config = replace(cloud.scaling.house.config, machine_boot_s=120.0, disruption_share=1.0)
    house = cloud.recorder.house = replace(cloud.scaling.house, config=config)
    cloud.ec2.sell([f"spot/{zone}/{TYPE}" for zone in ZONES])
    cloud.scaling.change(min_replicas=1)
    cloud.answered(eventually, cloud.asker.ask("who covers?"))
    [cover] = cloud.machines()
    assert cover.offering.startswith("on-demand/")

    cloud.ec2.capacity.clear()
    Offer.objects.update(refused_until=timezone.now())

    due_s = [0.0]

    def turn() -> None:
        """As beat asks for one, only sooner."""
        if time.monotonic() >= due_s[0]:
            due_s[0] = time.monotonic() + 0.5
            for touched in pool.turn(house):
                cloud.recorder.want_tick(touched.hex)

    eventually(lambda: turn() or len(cloud.machines()) == 2, "a spot machine is bought", 30)
    [_, spot] = cloud.machines()
    assert (spot.offering, spot.replaces) == (f"spot/{ZONES[0]}/{TYPE}", cover.id)
    old = cloud.routed()[0]
    n_routed = []

    def has_moved() -> bool:
        turn()
        n_routed.append(len(cloud.routed()))
        return cloud.routed() != [] and old not in cloud.routed()

    eventually(has_moved, "the replica has moved", BOOTS_WITHIN_S)
    assert min(n_routed) >= 1, "somebody serves all the while"
    eventually(
        lambda: reconcile.reconcile(house) and cover.provider_ref not in cloud.ec2.alive(),
        "cover is given back",
        BOOTS_WITHIN_S,
    )
    assert cloud.ec2.alive() == [spot.provider_ref]
    eventually(lambda: Machine.objects.get(id=cover.id).state == MachineState.GONE, "and its row says so", 30)
    assert len(cloud.ec2.instances()) == 2, "nothing was bought beside"
