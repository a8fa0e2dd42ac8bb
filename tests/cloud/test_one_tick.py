"""What one tick does on the simulated region, without agents: test_end_to_end.py has the same promises with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from django.utils import timezone

from autoscaler import reconcile, stopping
from autoscaler.models import Machine, MachineState, Offer, PoolDecision, Replica, ReplicaPhase
from autoscaler.tick import tick
from infra.providers.aws.provider import AwsProvider
from tests.autoscaler.conftest import Scaling, eventually, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.conftest import TYPE, aws_config
from tests.cloud.ec2 import ZONES, Ec2, Fault
from tests.cloud.test_from_zero import assert_nothing_left

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])
SPOT = [f"spot/{zone}/{TYPE}" for zone in ZONES]
BIG = "g6.12xlarge"  # four of the GPU that g6.xlarge has one of


@pytest.fixture
def bought(scaling: Scaling, aws: AwsProvider) -> Scaling:  # noqa: F811
    """One request waits, and nothing runs."""
    scaling.configure(provider="aws", max_machines=3)
    scaling.house = replace(scaling.house, provider=aws)
    scaling.queue("first")
    return scaling


def give_back(scaling: Scaling, ec2: Ec2) -> None:  # noqa: F811
    """As the control worker does when nobody wants the model any more; and nothing is left."""
    scaling.change(deleted_at=timezone.now())
    Replica.objects.update(phase=ReplicaPhase.STOPPED, stopped_at=timezone.now())  # no agent says so
    Machine.objects.filter(state=MachineState.PENDING).update(
        state=MachineState.READY, ready_at=timezone.now()
    )
    cold = replace(scaling.house, config=replace(scaling.house.config, machine_keep_warm_s=0.0))
    for _ in range(2):
        reconcile.reconcile(cold, timezone.now() + timedelta(minutes=2))
    assert not Machine.objects.exclude(state=MachineState.GONE).exists()
    assert_nothing_left(ec2)


def test_no_capacity_in_one_zone_buys_the_next_offering_in_the_same_tick(bought: Scaling, ec2: Ec2) -> None:
    ec2.sell(SPOT[:1])
    bought.tick()
    assert bought.machine().offering == SPOT[1]
    assert bought.replica().machine_id == bought.machine().id, "and a replica is ordered on it"
    assert (ec2.count("CreateFleet"), Machine.objects.count()) == (1, 1)
    assert Offer.objects.get(name=SPOT[0]).n_refusals == 1
    give_back(bought, ec2)


@pytest.mark.parametrize("n_lost", [1, 3], ids=["asked-again-at-once", "found-by-reconcile"])
def test_a_lost_reply_of_create_fleet_is_exactly_one_machine(bought: Scaling, ec2: Ec2, n_lost: int) -> None:
    ec2.faults.append(Fault("CreateFleet", times=n_lost, lose_reply=True))
    bought.tick()
    bought.tick()
    later = timezone.now() + timedelta(seconds=20)
    reconcile.reconcile(bought.house, later)
    reconcile.reconcile(bought.house, later)
    assert ec2.alive() == [bought.machine().provider_ref]
    assert len({form["ClientToken"] for action, form in ec2.calls if action == "CreateFleet"}) == 1
    give_back(bought, ec2)


def test_throttling_is_backed_off_from_with_bounded_calls(bought: Scaling, ec2: Ec2) -> None:
    ec2.faults.append(Fault("CreateFleet", times=5, code="RequestLimitExceeded", status=503))
    now = timezone.now()
    tick(bought.deployment.id, bought.house, now)
    assert (ec2.count("CreateFleet"), ec2.alive()) == (3, []), "three calls a round, and no more this tick"
    tick(bought.deployment.id, bought.house, now)
    assert ec2.count("CreateFleet") == 3, "and none in the next second: a machine that failed is waited for"
    for after_s in (2, 4):
        tick(bought.deployment.id, bought.house, timezone.now() + timedelta(seconds=after_s))
    assert ec2.count("CreateFleet") == 6
    assert len(ec2.alive()) == 1
    give_back(bought, ec2)


def test_a_machine_that_is_being_stopped_is_waited_for_and_started_by_the_tick_that_sees_it_stopped(
    bought: Scaling,
    ec2: Ec2,
    eventually: Callable[..., None],  # noqa: F811
) -> None:
    bought.configure(spot=False)
    bought.tick()
    Replica.objects.update(phase=ReplicaPhase.STOPPED, stopped_at=timezone.now())
    Machine.objects.update(state=MachineState.READY, ready_at=timezone.now())
    ec2.stop_s = 0.5
    machine, house = bought.machine(), bought.house
    assert stopping.stop(machine.id, "rests", stopping.Keeper(house.config, house.provider, house.cell))
    bought.tick()
    assert (bought.machine().state, ec2.count("CreateFleet")) == (MachineState.STOPPING, 1)
    assert bought.house.cell.last_stage(bought.deployment.id.hex) == ("starting_machine", "")
    eventually(lambda: [i.state for i in ec2.instances()] == ["stopped"], "EC2 has stopped it")
    bought.house.cell.redis.delete(bought.house.cell.keys.look_lock)  # two seconds on
    bought.tick()
    assert (bought.machine().id, bought.machine().state) == (machine.id, MachineState.RESUMING)
    assert bought.replica().machine_id == machine.id
    assert (ec2.count("CreateFleet"), ec2.count("StartInstances")) == (1, 1)
    Machine.objects.update(state=MachineState.READY)
    give_back(bought, ec2)


@pytest.fixture
def sizes(bought: Scaling, ec2: Ec2, aws: AwsProvider) -> Scaling:
    """Two replicas are wanted that need an L4 each; there are machines with one, with four, and with another GPU."""
    ec2.spot_usd |= {(BIG, zone): 1.0 + n / 100 for n, zone in enumerate(ZONES)}
    ec2.spot_usd |= {("g5.xlarge", zone): 0.1 for zone in ZONES}
    config = aws_config(ec2, CORRAL_AWS_INSTANCE_TYPES=f"{TYPE},{BIG},g5.xlarge")
    bought.configure(accelerator="l4")
    bought.house = replace(
        bought.house, provider=AwsProvider(config, aws._clients, "c0", sleep=lambda _: None)
    )
    bought.change(min_replicas=2, max_replicas=2)
    return bought


def test_the_small_type_is_sold_out_and_one_bigger_machine_comes_and_holds_two_replicas(
    sizes: Scaling, ec2: Ec2
) -> None:
    ec2.sell(SPOT)
    sizes.tick()
    [machine] = Machine.objects.all()
    assert (machine.offering, machine.n_places, machine.n_gpus) == (f"spot/{ZONES[0]}/{BIG}", 4, 4)
    assert list(Replica.objects.values_list("machine_id", flat=True)) == [machine.id] * 2
    asked = next(form for action, form in ec2.calls if action == "CreateFleet")
    types = [v for k, v in asked.items() if k.endswith(".InstanceType")]
    assert types == [TYPE] * 3 + [BIG] * 3, "one fleet, overrides of both sizes, the better price first"
    told = PoolDecision.objects.get().reasons
    # A machine that could hold four costs 1.0, and what losses do, for two; on-demand a small one each costs 0.8.
    assert f"for each of 2 replicas without room: {SPOT[0]} 0.31" in told[-1]
    assert f"spot/{ZONES[0]}/{BIG} 0.51" in told[-1]
    give_back(sizes, ec2)


def test_replicas_are_bought_at_the_least_for_each_and_never_on_a_gpu_they_do_not_run_on(
    sizes: Scaling, ec2: Ec2
) -> None:
    sizes.tick()
    offerings = Machine.objects.order_by("created_at").values_list("offering", "n_places")
    assert [(name.split("/")[2], n) for name, n in offerings] == [(TYPE, 1)] * 2, "0.3 each, not 0.5"
    assert Replica.objects.values("machine_id").distinct().count() == 2, "one each: they have one GPU"
    sizes.change(min_replicas=6, max_replicas=6)
    sizes.tick()
    assert sizes.machine().offering == f"spot/{ZONES[0]}/{BIG}", "0.25 for each of the four that are missing"
    assert Replica.objects.filter(machine=sizes.machine()).count() == 4
    give_back(sizes, ec2)
