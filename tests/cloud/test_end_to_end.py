"""Issue 6, end to end on the simulated region, one promise each: from a request with nothing running to its answer by a
real agent, and at the end everything is given back by the control worker's own doing. test_one_tick.py has each promise
without agents.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest

from autoscaler import pool, reconcile, specs, tick
from autoscaler.models import (
    Machine,
    MachineState,
    Offer,
    PoolDecision,
    PoolDecisionKind,
    Replica,
    StartTiming,
)
from autoscaler.tick import House
from autoscaler.types import ScalerSpec
from controlplane.deployments import versions
from controlplane.deployments.models import ModelSource
from infra.objectstore import Place, publish
from infra.providers.aws.provider import AwsProvider
from tests.autoscaler.conftest import eventually, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.conftest import TYPE, aws_config
from tests.cloud.ec2 import ZONES, Fault
from tests.cloud.test_from_zero import Cloud, cloud  # noqa: F401 - fixture
from tests.workers.modelcache.test_store import a_version

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(600),
    pytest.mark.django_db(transaction=True, databases=["default", "operator"]),
]
Eventually = Callable[..., None]
N_WEIGHTS = 4 << 20


def test_from_zero_a_request_buys_a_spot_machine_that_boots_loads_weights_from_s3_and_answers(
    cloud: Cloud,  # noqa: F811
    s3: dict[str, str],
    tmp_path: Path,
    eventually: Eventually,  # noqa: F811
) -> None:
    weights = os.urandom(N_WEIGHTS)
    digest, _ = stored(cloud, weights, tmp_path / "origin")
    assert (cloud.ec2.alive(), cloud.machines()) == ([], [])

    request = cloud.asker.ask("what is left when all is gone?")
    text = cloud.answered(eventually, request)
    assert text
    [machine] = cloud.machines()
    assert (machine.offering, machine.state) == (f"spot/{ZONES[0]}/{TYPE}", MachineState.READY)
    [instance] = cloud.ec2.instances()
    assert (instance.id, instance.lifecycle) == (machine.provider_ref, "spot")
    assert machine.ready_at is not None
    assert machine.launched_at is not None
    assert machine.ready_at > machine.launched_at, "it booted"
    [guest] = cloud.hypervisor.guests.values()
    assert (guest.var / "models" / digest / "model.safetensors").read_bytes() == weights
    assert cloud.answered(eventually, cloud.asker.ask("what is left when all is gone?")) == text
    assert cloud.ec2.count("CreateFleet") == 1
    cloud.all_given_back(eventually)


def test_a_reserve_is_stopped_by_the_ladder_and_a_request_starts_it_again_with_its_weights_on_its_disk(
    cloud: Cloud,  # noqa: F811
    s3: dict[str, str],
    tmp_path: Path,
    eventually: Eventually,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _hasty(monkeypatch)
    weights = os.urandom(N_WEIGHTS)
    digest, place = stored(cloud, weights, tmp_path / "origin")
    cloud.ec2.stop_s = 0.5
    house = _frugal(cloud)

    request = cloud.asker.ask("are you there?")
    text = cloud.answered(eventually, request)
    cloud.asker.settle(request)
    [machine] = cloud.machines()
    assert machine.offering.startswith("on-demand/")
    ref = machine.provider_ref
    agent = cloud.hypervisor.guests[ref].process.pid
    _emptied(place)

    def rests() -> bool:
        """As beat asks for it, only sooner."""
        cloud.recorder.want_tick(cloud.scaling.deployment.id.hex)
        pool.turn(house)
        reconcile.reconcile(house)
        return Machine.objects.get(id=machine.id).state == MachineState.STOPPED

    eventually(rests, "the ladder has it stopped", 60)
    assert [i.state for i in cloud.ec2.instances()] == ["stopped"]
    assert cloud.hypervisor.guests == {}, "nothing runs there"
    assert not house.cell.has_user(machine.id.hex)
    told = [reason for row in PoolDecision.objects.all() for reason in row.reasons]
    assert f"{machine.id.hex}: rests: stopped machine" in told

    assert cloud.answered(eventually, cloud.asker.ask("are you there?")) == text
    assert [(m.id, m.state) for m in cloud.machines()] == [(machine.id, MachineState.READY)]
    assert [(i.id, i.state) for i in cloud.ec2.instances()] == [(ref, "running")], "nothing bought beside it"
    assert (cloud.ec2.count("CreateFleet"), cloud.ec2.count("StartInstances")) == (1, 1)
    guest = cloud.hypervisor.guests[ref]
    assert guest.process.pid != agent
    assert (guest.var / "models" / digest / "model.safetensors").read_bytes() == weights, "not in the bucket"
    assert cloud.hypervisor.booted == [ref, ref]
    cloud.all_given_back(eventually)


def test_a_request_while_a_machine_is_being_stopped_is_served_by_it_and_nothing_is_bought(
    cloud: Cloud,  # noqa: F811
    eventually: Eventually,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _hasty(monkeypatch)
    house = _frugal(cloud)
    first = cloud.asker.ask("are you there?")
    text = cloud.answered(eventually, first)
    cloud.asker.settle(first)
    [machine] = cloud.machines()
    cloud.ec2.stop_s = 4.0

    def is_being_stopped() -> bool:
        cloud.recorder.want_tick(cloud.scaling.deployment.id.hex)
        pool.turn(house)
        return Machine.objects.get(id=machine.id).state == MachineState.STOPPING

    eventually(is_being_stopped, "the ladder has it stopped", 60)
    eventually(lambda: [i.state for i in cloud.ec2.instances()] == ["stopping"], "EC2 is at it", 5)
    StartTiming.objects.filter(stage="launching_machine").update(average_ms=180_000)  # as at EC2, not as here
    request = cloud.asker.ask("are you there?")
    stages = set()

    def is_started() -> bool:
        """Beat's tick alone: nobody reconciles."""
        cloud.recorder.want_tick(cloud.scaling.deployment.id.hex)
        stages.add(house.cell.last_stage(cloud.scaling.deployment.id.hex)[0])
        return Machine.objects.get(id=machine.id).state in (MachineState.RESUMING, MachineState.READY)

    eventually(is_started, "it is started as soon as it has stopped", 30)
    assert "starting_machine" in stages, "which is what the client was told meanwhile"
    assert cloud.answered(eventually, request) == text
    assert [(m.id, m.state) for m in cloud.machines()] == [(machine.id, MachineState.READY)]
    asked = [form for action, form in cloud.ec2.calls if action in ("CreateFleet", "StartInstances")]
    assert len(asked) == 2, "one bought, one started, and no start that EC2 refused"
    cloud.all_given_back(eventually)


def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing left to wait for but the idle timeout."""

    def hasty(*args: Any) -> ScalerSpec:
        return replace(
            specs.scaler_spec(*args), stable_window_s=1.0, panic_window_s=1.0, scale_down_delay_s=0.5
        )

    monkeypatch.setattr(tick, "scaler_spec", hasty)


def _frugal(cloud: Cloud) -> House:  # noqa: F811
    """On-demand only, and no second of waiting is worth more than some of a warm machine."""
    house = cloud.scaling.house
    config = replace(house.config, spot=False, late_after_s=0.0, late_usd=0.0, late_usd_per_s=3e-4)
    cloud.rehouse(replace(house, config=config))
    cloud.scaling.change(idle_timeout_s=1)
    return cloud.scaling.house


def stored(cloud: Cloud, weights: bytes, source: Path) -> tuple[str, Place]:  # noqa: F811
    """(digest, where) of a version that the deployment is to serve from now on, and that lies in a bucket only."""
    place = Place("models", f"e2e-{os.urandom(4).hex()}")
    manifest = a_version(source, {"config.json": b"{}", "model.safetensors": weights})
    publish(source, manifest, place, lambda name, size: None)
    version = versions.register(
        organization_id=cloud.scaling.world.organization.id,
        digest=manifest.digest,
        name="stored",
        source_kind=ModelSource.DIRECTORY,
        source_uri=place.uri,
        size_bytes=len(weights),
        max_model_len=4096,
        manifest={"files": [{"name": entry.name} for entry in manifest.files]},
    )
    cloud.scaling.change(model_version_id=version.id)
    (source / "model.safetensors").unlink()
    return manifest.digest, place


def _emptied(place: Place) -> None:
    """Whoever fetches from it now gets nothing."""
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket=place.bucket, Prefix=place.prefix)["Contents"]
    assert listed
    for each in listed:
        client.delete_object(Bucket=place.bucket, Key=each["Key"])


def test_no_capacity_in_one_zone_buys_the_next_offering_in_the_same_tick(
    cloud: Cloud,  # noqa: F811
    eventually: Eventually,  # noqa: F811
) -> None:
    cloud.ec2.sell([f"spot/{zone}/{TYPE}" for zone in ZONES[:2]])
    cloud.answered(eventually, cloud.asker.ask("who else sells?"))
    [machine] = cloud.machines()
    assert machine.offering == f"spot/{ZONES[2]}/{TYPE}"
    assert cloud.ec2.count("CreateFleet") == 1, "one call asked all three zones"
    assert Machine.objects.count() == 1, "no row of a machine that was not to be had"
    refused = Offer.objects.filter(n_refusals=1, refused_until__gt=machine.created_at)
    assert set(refused.values_list("name", flat=True)) == {f"spot/{zone}/{TYPE}" for zone in ZONES[:2]}
    cloud.all_given_back(eventually)


@pytest.mark.parametrize("n_lost", [1, 3], ids=["asked-again-at-once", "found-by-reconcile"])
def test_a_lost_reply_of_create_fleet_is_exactly_one_machine(
    cloud: Cloud,  # noqa: F811
    eventually: Eventually,  # noqa: F811
    n_lost: int,
) -> None:
    cloud.ec2.faults.append(Fault("CreateFleet", times=n_lost, lose_reply=True))
    asked = cloud.asker.ask("did you hear me?")
    # As beat has it done every 15 s.
    eventually(
        lambda: reconcile.reconcile(cloud.scaling.house) and cloud.routed(), "a replica is routed to", 180
    )
    cloud.answered(eventually, asked)
    assert len(cloud.ec2.instances()) == 1
    tokens = {form["ClientToken"] for action, form in cloud.ec2.calls if action == "CreateFleet"}
    assert len(tokens) == 1, "every repetition was the same request to AWS"
    assert cloud.ec2.count("CreateFleet") == min(n_lost + 1, 3)
    cloud.all_given_back(eventually)
    assert Replica.objects.count() == 1


def test_throttling_is_backed_off_from_and_the_request_served_with_bounded_calls(
    cloud: Cloud,  # noqa: F811
    eventually: Eventually,  # noqa: F811
) -> None:
    """A whole round of three calls is refused, and the first of the next: the row of the first is gone, a later tick
    buys, and the waiting request has lost nothing but time."""
    cloud.ec2.faults.append(Fault("CreateFleet", times=4, code="RequestLimitExceeded", status=503))
    cloud.answered(eventually, cloud.asker.ask("too fast?"))
    assert cloud.ec2.count("CreateFleet") == 5
    assert len(cloud.ec2.instances()) == 1
    gone = Machine.objects.filter(state=MachineState.GONE)
    assert [("RequestLimitExceeded" in m.reason, m.provider_ref) for m in gone] == [(True, "")]
    cloud.all_given_back(eventually)


def test_a_bigger_machine_comes_where_the_small_type_is_sold_out_and_carries_two_replicas(
    cloud: Cloud,  # noqa: F811
    aws: AwsProvider,
    eventually: Eventually,  # noqa: F811
) -> None:
    big = "g6.12xlarge"  # four of the GPU that g6.xlarge has one of
    cloud.ec2.spot_usd |= {(big, zone): 1.0 + n / 100 for n, zone in enumerate(ZONES)}
    cloud.ec2.sell(f"spot/{zone}/{TYPE}" for zone in ZONES)
    config = aws_config(
        cloud.ec2,
        CORRAL_AWS_INSTANCE_TYPES=f"{TYPE},{big}",
        CORRAL_AWS_AGENT_COMMAND=f"{sys.executable} -m workers.agent",
    )
    house = cloud.scaling.house
    cloud.rehouse(
        replace(
            house,
            provider=AwsProvider(config, aws._clients, "c0"),
            config=replace(house.config, accelerator="l4"),
        )
    )
    cloud.scaling.change(min_replicas=2, max_replicas=2)
    request = cloud.asker.ask("room for two?")
    eventually(lambda: len(cloud.routed()) == 2, "both replicas are routed to", 60)
    cloud.answered(eventually, request)
    [machine] = cloud.machines()
    assert (machine.offering, machine.n_places) == (f"spot/{ZONES[0]}/{big}", 4)
    assert list(Replica.objects.values_list("machine_id", flat=True)) == [machine.id] * 2
    assert len(cloud.ec2.instances()) == 1
    reasons = PoolDecision.objects.filter(kind=PoolDecisionKind.PURCHASE).latest("at").reasons
    assert reasons[-1].startswith("for each of 2 replicas without room: "), "0.5 each, on-demand 0.8"
    cloud.all_given_back(eventually)
