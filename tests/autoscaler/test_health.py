"""A machine whose agent tells of a sick GPU: nothing new, its successor first, drained, ended; and why is to be read.

Reports are what the agent's real probe makes of a library of ours (tests/workers/agent/fake_nvml.py).
"""

from __future__ import annotations

from datetime import timedelta
from io import StringIO
from typing import Any

import msgspec
import pytest
from django.core.management import call_command
from django.utils import timezone

from autoscaler import explaining, health, reconcile, selectors
from autoscaler.models import Decision, Machine, MachineState, PoolDecision, PoolDecisionKind
from controlplane.console import fleet
from controlplane.tenants.context import tenant
from tests.autoscaler.conftest import Scaling
from tests.workers.agent.fake_nvml import FakeNvml, Gpu
from workers.agent.gpuhealth import GpuReader
from workers.contract import Heartbeat, ReplicaPhase


def _beat(scaling: Scaling, machine: Machine, *gpus: Gpu) -> None:
    beat = Heartbeat(
        machine=machine.id.hex,
        seq=1,
        at_ms=0,
        phase=ReplicaPhase.READY,
        gpus=GpuReader(FakeNvml(*gpus)).read() if gpus else (),
    )
    key = scaling.house.cell.keys.machine(machine.id.hex).heartbeat()
    scaling.house.cell.redis.set(key, msgspec.json.encode(beat))


@pytest.fixture
def serving(scaling: Scaling) -> Machine:
    """A machine with a replica that serves."""
    scaling.configure(max_machines=2, replicas_per_machine=1)
    scaling.queue("a")
    scaling.tick()
    machine = scaling.machine_up()
    scaling.tick()
    replica = scaling.replica()
    scaling.report(replica, ReplicaPhase.READY)
    scaling.beat(replica, 1)
    return machine


def test_a_sick_machine_is_replaced_first_drained_and_ended(scaling: Scaling, serving: Machine) -> None:
    first = scaling.replica()
    _beat(scaling, serving, Gpu(), Gpu(xids=[31]))
    assert health.look(scaling.house) == set()
    _beat(scaling, serving, Gpu(), Gpu(xids=[31, 79]))
    assert health.look(scaling.house) == {scaling.deployment.id}
    why = "quarantined: GPU 1: XID 79: fell off the bus"
    row = Machine.objects.get(id=serving.id)
    assert (row.state, row.reason) == (MachineState.DRAINING, why)
    assert scaling.provider.left == [serving.provider_ref]
    assert health.look(scaling.house) == set(), "once"

    scaling.tick()
    assert scaling.machine().id != serving.id, "its successor is bought"
    first.refresh_from_db()
    assert first.phase == ReplicaPhase.READY.value, "and it serves on until then"
    successor = scaling.machine_up()
    scaling.tick()
    second = scaling.replica()
    assert second.machine_id == successor.id != serving.id
    scaling.report(second, ReplicaPhase.READY)
    scaling.beat(second, 1)
    scaling.tick()
    first.refresh_from_db()
    assert first.phase == ReplicaPhase.DRAINING.value
    scaling.report(first, ReplicaPhase.STOPPED)
    reconcile.reconcile(scaling.house)
    row.refresh_from_db()
    assert row.state == MachineState.GONE
    assert serving.provider_ref in scaling.provider.terminated
    assert not scaling.house.cell.has_user(serving.id.hex), "its credential is dead"


def test_why_is_in_the_decision_and_it_replays(scaling: Scaling, serving: Machine) -> None:
    _beat(scaling, serving, Gpu(remapped=(0, 1, 0, 1)))
    health.look(scaling.house)
    row = PoolDecision.objects.get(kind=PoolDecisionKind.HEALTH)
    assert row.reasons == [f"{serving.id.hex} is sick: GPU 0: has bad memory and none to spare"]
    assert explaining.replay(row).same
    out = StringIO()
    call_command("explain", "decision", str(row), stdout=out)
    said = out.getvalue()
    assert f"order   quarantine mch_{serving.id.hex} (GPU 0: has bad memory and none to spare)" in said
    assert f"mch_{serving.id.hex} GPU 0: has_remap_failed True, shutdown_c 92" in said
    Machine.objects.filter(id=serving.id).update(ends_at=timezone.now() + timedelta(seconds=10))
    scaling.tick()
    reasons = " ".join(reason for row in Decision.objects.all() for reason in row.reasons)
    assert "quarantined: GPU 0: has bad memory and none to spare" in reasons, (
        "the tenant's own decision says it, too"
    )


def test_why_is_told_to_whose_replicas_live_on_it_only(scaling: Scaling, serving: Machine) -> None:
    _beat(scaling, serving, Gpu(n_ecc=1))
    health.look(scaling.house)
    why = "quarantined: GPU 0: 1 uncorrectable memory errors"
    with tenant(scaling.world.organization.id):
        assert [machine.reason for machine in selectors.machines()] == [why]
        assert selectors.machine(machine_id=serving.id).reason == why
        seen = fleet.fleet_of(organization_id=scaling.world.organization.id, now=timezone.now())
        assert [row.leaves_because for row in seen.replicas] == [why]
    with tenant(scaling.world.other_organization.id):
        assert selectors.machines() == []


@pytest.mark.parametrize(
    "said", [b"nonsense", b'{"machine":"x","seq":1,"at_ms":0,"gpus":[{"index":0,"lost":"x"}]}', None]
)
def test_a_machine_that_says_nothing_or_speaks_for_another_is_left_alone(
    scaling: Scaling, serving: Machine, said: Any
) -> None:
    key = scaling.house.cell.keys.machine(serving.id.hex).heartbeat()
    scaling.house.cell.redis.delete(key)
    if said is not None:
        scaling.house.cell.redis.set(key, said)
    assert health.look(scaling.house) == set()
    assert not PoolDecision.objects.filter(kind=PoolDecisionKind.HEALTH).exists()
