"""Endpoints elsewhere have a replica each, on a machine of their own, that nobody scales and the watcher routes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from django.utils import timezone

from autoscaler import external, records, services
from autoscaler.models import LIVE_PHASES, Machine, Replica, ReplicaPhase
from autoscaler.observe import observe
from autoscaler.reconcile import check_machine, reconcile
from autoscaler.specs import scaler_spec
from autoscaler.tick import House
from autoscaler.watch.recorder import Recorder
from autoscaler.watch.watcher import Watcher
from controlplane.policy.upstream import MOST, price_factor
from controlplane.upstreams import services as upstreams
from controlplane.upstreams.models import Upstream, UpstreamReplica
from controlplane.upstreams.services import Change
from tests.autoscaler.conftest import Scaling
from tests.autoscaler.fakes import FakeProvider
from tests.world import make_deployment
from workers import sealed
from workers.contract import Heartbeat, ReplicaSpec, ReplicaStatus, UpstreamSecret
from workers.contract import ReplicaPhase as Reported

KEY = sealed.new_key()


class Elsewhere:
    """Acme's deployment with one endpoint attached, and everything turned by hand."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self.provider = FakeProvider()
        self.provider.name = "external"
        made = external.external_house(scaling.house)
        self.house: House = replace(made, provider=self.provider)
        self.recorder = Recorder(scaling.house)
        self.now_s = 100.0
        self.watcher = Watcher(scaling.house.cell, self.recorder, stale_after_s=2.0, clock=lambda: self.now_s)

    def attach(self, role: str = "overflow", **values: Any) -> Upstream:
        return upstreams.attach(
            organization_id=self.scaling.world.organization.id,
            deployment_id=self.scaling.deployment.id,
            name=f"elsewhere-{role}",
            base_url="https://api.example.org/v1",
            model="their-model",
            role=role,
            change=Change(**{"slots": 8, "api_key": "sk-theirs", **values}),
        )

    def keep(self) -> list[Replica]:
        external.keep(self.house)
        return list(
            Replica.objects.filter(phase__in=LIVE_PHASES, machine__provider="external").order_by("id")
        )

    def enrol(self) -> Machine:
        machine = Machine.objects.get(provider="external")
        services.enrol(
            machine_id=machine.id.hex,
            proof=self.provider.proofs[machine.id.hex],
            capabilities={"box_public": sealed.public_of(KEY)},
            cell=self.house.cell,
        )
        records.machine_answers(machine.id)
        return machine

    def ready(self) -> Replica:
        self.keep()
        self.enrol()
        [replica] = self.keep()
        self.beat(replica, 1)
        self.say(replica, Reported.READY)
        return replica

    def say(self, replica: Replica, phase: Reported) -> None:
        status = ReplicaStatus(replica=replica.id.hex, phase=phase, slots=replica.slots)
        keys = self.house.cell.keys.machine(replica.machine_id.hex)
        self.recorder.step()
        self.turn()
        self.house.cell.redis.publish(keys.event_channel, msgspec.json.encode(status))
        for _ in range(50):
            if Replica.objects.get(id=replica.id).phase == phase.value:
                return
            self.turn()
        raise AssertionError(f"{phase.value} was not heard")

    def turn(self) -> None:
        self.now_s += 0.3
        self.watcher.step(0.05)
        self.recorder.step()

    def beat(self, replica: Replica, seq: int, slots: int | None = None, note: str = "") -> None:
        keys = self.house.cell.keys.machine(replica.machine_id.hex)
        beat = Heartbeat(
            machine=replica.machine_id.hex, seq=seq, at_ms=0, replica=replica.id.hex, phase=Reported.READY,
            slots=replica.slots if slots is None else slots, note=note,
        )  # fmt: skip
        self.house.cell.redis.set(keys.heartbeat(replica.id.hex), msgspec.json.encode(beat))

    def members(self, what: str) -> set[bytes]:
        keys = self.house.cell.keys
        name = keys.overflow if what == "ovf" else keys.replicas
        return set(self.house.cell.redis.smembers(name(self.scaling.deployment.id.hex)))  # type: ignore[arg-type]


@pytest.fixture
def elsewhere(scaling: Scaling) -> Elsewhere:
    return Elsewhere(scaling)


def test_an_attached_endpoint_has_a_replica_whose_credentials_only_its_machine_reads(
    elsewhere: Elsewhere,
) -> None:
    assert elsewhere.keep() == []
    assert elsewhere.provider.n_launch_calls == 0  # nothing is attached, so nothing runs
    upstream = elsewhere.attach(output_nano_per_million=5)
    assert elsewhere.keep() == elsewhere.keep() == []  # its machine is on the way
    assert elsewhere.provider.n_launch_calls == 1
    machine = elsewhere.enrol()
    [replica] = elsewhere.keep()
    assert elsewhere.keep() == [replica]
    assert (replica.slots, replica.machine_id) == (8, machine.id)
    fields: Any = elsewhere.house.cell.redis.hgetall(
        elsewhere.house.cell.keys.machine(machine.id.hex).desired
    )
    spec = msgspec.json.decode(fields[replica.id.hex.encode()], type=ReplicaSpec)
    assert spec.upstream is not None
    assert (spec.upstream.base_url, spec.upstream.tokenizers) == ("https://api.example.org/v1", ["toy"])
    secret = msgspec.json.decode(sealed.open_box(KEY, spec.upstream.sealed), type=UpstreamSecret)
    assert secret.api_key == "sk-theirs"
    assert "sk-theirs" not in str(replica.spec) + str(fields)
    assert replica.spec["upstream"]["sealed"] == ""
    assert UpstreamReplica.objects.get().upstream_id == upstream.id


def test_a_change_replaces_the_replica_and_detaching_ends_it(elsewhere: Elsewhere) -> None:
    upstream = elsewhere.attach()
    organization_id = upstream.organization_id
    first = elsewhere.ready()
    upstreams.change_upstream(
        organization_id=organization_id, upstream_id=upstream.id, change=Change(output_nano_per_million=7)
    )
    assert elsewhere.keep() == [first]  # a price is no reason
    assert UpstreamReplica.objects.get().output_nano_per_million == 7
    upstreams.change_upstream(
        organization_id=organization_id, upstream_id=upstream.id, change=Change(api_key="sk-new")
    )
    old, new = elsewhere.keep()
    assert (old.id, old.phase, new.phase) == (first.id, ReplicaPhase.DRAINING, ReplicaPhase.STARTING)
    upstreams.change_upstream(
        organization_id=organization_id, upstream_id=upstream.id, change=Change(enabled=False)
    )
    assert {row.phase for row in elsewhere.keep()} == {ReplicaPhase.DRAINING}
    upstreams.detach(organization_id=organization_id, upstream_id=upstream.id)
    assert {row.phase for row in elsewhere.keep()} == {ReplicaPhase.DRAINING}
    reconcile(elsewhere.house)  # what drains needs no credentials


def test_one_that_fails_is_not_started_again_at_once(elsewhere: Elsewhere) -> None:
    elsewhere.attach()
    replica = elsewhere.ready()
    elsewhere.say(replica, Reported.FAILED)
    assert elsewhere.keep() == []
    Replica.objects.filter(id=replica.id).update(stopped_at=replica.created_at.replace(year=2020))
    assert len(elsewhere.keep()) == 1


def test_an_overflow_is_routed_apart_and_its_slots_follow_what_its_replica_offers(
    elsewhere: Elsewhere,
) -> None:
    elsewhere.attach()
    replica = elsewhere.ready()
    rid, cell = replica.id.hex, elsewhere.house.cell
    assert (elsewhere.members("ovf"), elsewhere.members("reps")) == ({rid.encode()}, set())
    record: Any = cell.redis.hgetall(cell.keys.replica(rid))
    assert (record[b"ext"], record[b"after"], record[b"slots"]) == (b"1", b"1000", b"8")
    for seq, slots in ((2, 0), (3, 1), (4, 8)):
        elsewhere.beat(replica, seq, slots, "open upstream_failed")
        for _ in range(50):
            elsewhere.turn()
            if cell.redis.hget(cell.keys.replica(rid), "slots") == str(slots).encode():
                break
        else:
            raise AssertionError(f"never {slots} slots")
    elsewhere.scaling.queue("one")  # nobody else is there
    assert cell.redis.smembers(cell.keys.replica_live(rid)) == {b"one"}


def test_the_scaler_neither_counts_nor_ends_it_and_sees_what_it_took(elsewhere: Elsewhere) -> None:
    scaling = elsewhere.scaling
    elsewhere.attach()
    replica = elsewhere.ready()
    scaling.queue("one", "two")
    spec = scaler_spec(scaling.seen(), scaling.house.config)
    seen = observe(scaling.seen(), spec, scaling.house.config, scaling.house.cell, timezone.now())
    assert (seen.n_queued, seen.replicas, seen.n_machines) == (2, (), 0)
    assert scaling.tick().decision is not None
    assert Machine.objects.filter(provider="fake").count() == 1  # one of ours is on its way
    report = check_machine(replica.machine_id, scaling.house)  # another provider's: not gone
    assert (report.n_gone, Replica.objects.get(id=replica.id).phase) == (0, ReplicaPhase.READY)
    reconcile(scaling.house)
    assert Machine.objects.get(id=replica.machine_id).gone_at is None


def test_a_shadow_is_found_under_its_own_id_and_given_no_requests(elsewhere: Elsewhere) -> None:
    upstreams.set_consent(organization_id=elsewhere.scaling.world.organization.id, agreed=True)
    upstream = elsewhere.attach("shadow")
    replica = elsewhere.ready()
    cell = elsewhere.house.cell
    assert elsewhere.members("ovf") | elsewhere.members("reps") == set()
    copies = cell.keys.replicas(upstream.id.hex)
    assert cell.redis.smembers(copies) == {replica.id.hex.encode()}
    elsewhere.scaling.queue("one")
    elsewhere.turn()
    assert cell.redis.scard(cell.keys.replica_live(replica.id.hex)) == 0
    upstreams.change_upstream(
        organization_id=upstream.organization_id, upstream_id=upstream.id, change=Change(shadow_ppm=7)
    )
    assert elsewhere.keep() == [replica]  # a share is the gateways' business
    upstreams.detach(organization_id=upstream.organization_id, upstream_id=upstream.id)
    elsewhere.keep()
    elsewhere.turn()
    assert cell.redis.exists(copies) == 0


def test_a_shadow_that_is_a_deployment_needs_no_replica(elsewhere: Elsewhere) -> None:
    scaling = elsewhere.scaling
    organization_id = scaling.world.organization.id
    upstreams.set_consent(organization_id=organization_id, agreed=True)
    second = make_deployment(scaling.world, "second", model_version_id=scaling.deployment.model_version_id)
    upstreams.attach(
        organization_id=organization_id,
        deployment_id=scaling.deployment.id,
        name="second",
        role="shadow",
        target_deployment_id=second.id,
        change=Change(),
    )
    assert (elsewhere.keep(), Machine.objects.filter(provider="external").count()) == ([], 0)


def test_what_a_token_costs_weighs_in_routing() -> None:
    assert price_factor(0, 100) == 1.0
    assert price_factor(100, 0) == MOST
    factors = [price_factor(cost, 100) for cost in (0, 1, 50, 100, 200, 10_000)]
    assert factors == sorted(factors)
    assert factors[3] == 5.0
