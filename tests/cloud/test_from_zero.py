"""From nothing to a served request on simulated spot machines, with the real control loop, agents and toy engine."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from autoscaler import reconcile
from autoscaler.identity import Expected
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Offer, Replica
from autoscaler.tick import House
from autoscaler.watch.recorder import Recorder
from autoscaler.watch.watcher import Watcher
from infra.providers.aws.provider import AwsProvider
from tests.autoscaler.conftest import Scaling, eventually, operator_db, scaling  # noqa: F401 - fixtures
from tests.cloud.asking import Asker
from tests.cloud.conftest import TYPE, aws_config
from tests.cloud.ec2 import REGION, ZONES, Ec2
from tests.cloud.hypervisor import Hypervisor
from tests.cloud.imds import certificate

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "operator"])


@dataclass
class Cloud:
    scaling: Scaling
    ec2: Ec2
    hypervisor: Hypervisor
    watcher: Watcher
    recorder: Recorder
    asker: Asker

    def rehouse(self, house: House) -> None:
        """From now on the control loop works with this configuration and provider."""
        self.scaling.house = self.recorder.house = house

    def wake(self, *requests: str) -> None:
        self.scaling.queue(*requests)
        cell = self.scaling.house.cell
        cell.redis.publish(cell.keys.wake_channel, self.scaling.deployment.id.hex)

    def routed(self) -> list[str]:
        return [r.hex for r in self.scaling.house.cell.routed(self.scaling.deployment.id.hex)]

    def machines(self) -> list[Machine]:
        return list(Machine.objects.exclude(state=MachineState.GONE).order_by("created_at"))

    def answered(self, eventually: Callable[..., None], request: str) -> str:  # noqa: F811
        """The text of its answer, which was whole."""
        eventually(lambda: self.asker.answer(request)[1], "the request is answered", 180)
        text, end = self.asker.answer(request)
        assert end is not None
        assert (end.error, end.n_completion) == (None, 8)
        return text

    def all_given_back(self, eventually: Callable[..., None]) -> None:  # noqa: F811
        """Nobody wants the model any more: the control worker itself gives everything back, and nothing is left that a
        row does not know of, or that a command bought twice."""
        self.scaling.change(deleted_at=timezone.now())
        self.recorder.want_tick(self.scaling.deployment.id.hex)
        eventually(
            lambda: not Replica.objects.filter(phase__in=LIVE_PHASES).exists(), "the replicas have ended", 30
        )
        house = self.scaling.house
        cold = replace(house, config=replace(house.config, machine_keep_warm_s=0.0))
        eventually(lambda: reconcile.reconcile(cold) and not self.ec2.alive(), "all is given back", 30)
        eventually(lambda: self.machines() == [], "and the rows say so", 10)
        assert_nothing_left(self.ec2)


def assert_nothing_left(ec2: Ec2) -> None:
    """No machine runs; each that ever did is in one row; and no command bought two."""
    assert ec2.alive() == []
    bought = {i.id: {t["key"]: t["value"] for t in i.get_tags()} for i in ec2.instances()}
    rows = {m.provider_ref: m for m in Machine.objects.exclude(provider_ref="")}
    assert set(bought) == set(rows), "an orphan, or a machine that never was"
    for ref, tags in bought.items():
        assert (tags["corral:token"], tags["corral:machine"]) == (
            rows[ref].command_id.hex,
            rows[ref].id.hex,
        )
    assert len({tags["corral:token"] for tags in bought.values()}) == len(bought), "bought twice"


@pytest.fixture
def cloud(
    scaling: Scaling,  # noqa: F811
    ec2: Ec2,
    aws: AwsProvider,
    live_server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Cloud]:
    """The control worker's threads over a simulated region; zero machines at the end, or the test fails."""
    from controlplane.api import internal

    pem = tmp_path / "certificate.pem"
    pem.write_bytes(certificate())
    monkeypatch.setattr(internal, "build_cell", lambda: scaling.house.cell)
    monkeypatch.setattr(internal, "expected_identity", lambda: Expected(pem, REGION, ec2.ami))
    ec2.boot_s = 0.3
    aws = AwsProvider(
        aws_config(ec2, CORRAL_AWS_AGENT_COMMAND=f"{sys.executable} -m workers.agent"), aws._clients, "c0"
    )
    scaling.configure(provider="aws", enrol_url=f"{live_server.url}/internal/enrol", max_machines=3)
    scaling.house = replace(scaling.house, provider=aws)
    recorder = Recorder(scaling.house)
    watcher = Watcher(scaling.house.cell, recorder, stale_after_s=2.0)
    guests = Path(tempfile.mkdtemp(prefix="guests"))  # sockets lie below it, and their paths must be short
    hypervisor = Hypervisor(ec2, guests, ec2.environ)
    hypervisor.start()
    recorder.start()
    watcher.start()
    asker = Asker(scaling.house.cell, scaling.deployment.id.hex)
    yield Cloud(scaling, ec2, hypervisor, watcher, recorder, asker)
    asker.close()
    watcher.stop()
    recorder.stop()
    for machine in aws.describe():
        aws.terminate(machine.ref)
    hypervisor.stop()
    shutil.rmtree(guests)
    assert ec2.alive() == []


def test_a_request_buys_a_spot_machine_that_serves_and_is_given_back(
    cloud: Cloud,
    eventually: Callable[..., None],  # noqa: F811
) -> None:
    cloud.ec2.sell([f"spot/{ZONES[0]}/{TYPE}"])  # the cheapest zone has none
    cloud.wake("first")
    eventually(lambda: len(cloud.routed()) == 1, "a replica is routed to", 60)
    [machine] = cloud.machines()
    assert machine.offering == f"spot/{ZONES[1]}/{TYPE}"
    assert machine.price_nano_per_h == 310_000_000
    eventually(lambda: cloud.machines()[0].state == MachineState.READY, "its agent has told the recorder")
    assert cloud.ec2.alive() == [machine.provider_ref]
    assert Offer.objects.get(name=f"spot/{ZONES[0]}/{TYPE}").n_refusals == 1

    # Somebody else's machine under our tags: paid for, unknown, ended. Ours is left alone.
    stray = cloud.scaling.house.provider.launch(replace(_spec_of(cloud), machine_id="ee" * 16), "f" * 32)
    assert len(cloud.ec2.alive()) == 2
    report = reconcile.reconcile(cloud.scaling.house)
    eventually(
        lambda: stray.ref not in cloud.ec2.alive() or reconcile.reconcile(cloud.scaling.house), "it is ended"
    )
    assert cloud.ec2.alive() == [machine.provider_ref]
    assert report.n_gone == 0

    # Nobody wants the model any more: the replica goes, then its machine.
    cloud.scaling.change(deleted_at=timezone.now())
    cloud.recorder.want_tick(cloud.scaling.deployment.id.hex)
    eventually(
        lambda: not Replica.objects.filter(phase__in=LIVE_PHASES).exists(), "the replica has ended", 30
    )
    given_back = replace(
        cloud.scaling.house, config=replace(cloud.scaling.house.config, machine_keep_warm_s=0.0)
    )
    eventually(
        lambda: reconcile.reconcile(given_back) and not cloud.ec2.alive(), "the machine is given back", 30
    )
    assert cloud.machines() == []


def _spec_of(cloud: Cloud) -> Any:
    from autoscaler import market
    from infra.providers.base import LaunchSpec

    names = Offer.objects.filter(is_spot=False).values_list("name", flat=True)
    return LaunchSpec(
        machine_id="ee" * 16,
        cell="c0",
        enrol_url="http://127.0.0.1:1/internal/enrol",
        engine="toy",
        offerings=market.offerings_of(names, "c0", "aws"),
        proof="",
    )


def test_a_notice_orders_the_replacement_before_the_machine_goes(
    cloud: Cloud,
    eventually: Callable[..., None],  # noqa: F811
) -> None:
    cloud.wake("first")
    eventually(lambda: len(cloud.routed()) == 1, "a replica is routed to", 60)
    [first] = cloud.machines()
    old = cloud.routed()[0]
    cloud.hypervisor.guests[first.provider_ref].imds.recommend_rebalance()
    eventually(
        lambda: Machine.objects.get(id=first.id).state == MachineState.DRAINING, "the advice is heard", 10
    )
    eventually(lambda: len(cloud.machines()) == 2, "a replacement is ordered", 20)
    assert old in cloud.routed(), "it serves on until its successor does"
    eventually(lambda: set(cloud.routed()) - {old}, "the successor is routed to", 60)
    assert Machine.objects.filter(id=first.id, ends_at__gt=timezone.now()).exists()
    cloud.hypervisor.notice(first.provider_ref, 3)
    eventually(lambda: first.provider_ref not in cloud.ec2.alive(), "it is taken", 15)
    eventually(lambda: old not in cloud.routed(), "and not routed to any more", 15)
    assert len(cloud.routed()) == 1
    assert len(cloud.ec2.alive()) == 1


@pytest.mark.engine
def test_weights_come_from_an_object_store_to_a_machine_that_never_had_them(
    cloud: Cloud,
    s3: dict[str, str],
    tmp_path: Path,
    eventually: Callable[..., None],  # noqa: F811
) -> None:
    from controlplane.deployments import importing, versions
    from infra.objectstore import Place, publish

    organization = cloud.scaling.world.organization
    version = importing.register(organization_id=organization.id, source="tiny", var=tmp_path)
    store, place = importing.store(tmp_path), Place("models", "e2e")
    publish(store.path(version.digest), store.manifest(version.digest), place, lambda name, size: None)
    versions.move(organization_id=organization.id, model_version_id=version.id, source_uri=place.uri)
    profile = {"max_num_seqs": 4, "max_model_len": 256}
    cloud.scaling.change(model_version_id=version.id, engine_profile=profile)
    cloud.scaling.configure(engine="vllm")
    cloud.recorder.house = cloud.scaling.house
    shutil.rmtree(tmp_path / "models")  # nowhere but in the bucket
    cloud.wake("first")
    eventually(lambda: len(cloud.routed()) == 1, "a replica with these weights is routed to", 110)
    [guest] = cloud.hypervisor.guests.values()
    assert (guest.var / "models" / version.digest / "model.safetensors").exists()
    on_disk = b"".join(path.read_bytes() for path in guest.var.rglob("*.json") if path.is_file())
    assert b"X-Amz-Signature" not in on_disk, "signed URLs are kept nowhere"
    assert b"X-Amz-Signature" not in (guest.var / "console.log").read_bytes()
    assert "X-Amz" not in str(Replica.objects.get().spec)
