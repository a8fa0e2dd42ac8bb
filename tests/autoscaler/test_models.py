"""Rules of machines, replicas and decisions that the database keeps, and who may see or write them."""

from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.utils import timezone

from autoscaler.models import Decision, Machine, MachineState, Replica, ReplicaPhase, ScalerState
from controlplane import ids
from controlplane.deployments.models import Deployment
from controlplane.tenants.context import tenant
from tests.world import World


def machine(**values: Any) -> Machine:
    defaults: dict[str, Any] = {
        "provider": "local",
        "command_id": ids.new_id(),
        "enroll_proof_digest": b"p" * 32,
        "cell": "c0",
    }
    return Machine.objects.create(**(defaults | values))


def replica(deployment: Deployment, on: Machine, **values: Any) -> Replica:
    defaults: dict[str, Any] = {"organization_id": deployment.organization_id, "generation": 1, "slots": 8}
    return Replica.objects.create(deployment=deployment, machine=on, **(defaults | values))


def decision(deployment: Deployment, **values: Any) -> Decision:
    parts = ("observation", "spec", "memory_in", "commands", "memory_out", "reasons")
    empty: dict[str, Any] = {name: {} for name in parts}
    defaults: dict[str, Any] = {
        "organization_id": deployment.organization_id,
        "tick_id": ids.new_id(),
        "at": timezone.now(),
    }
    return Decision.objects.create(deployment=deployment, **(empty | defaults | values))


def test_one_command_launches_one_machine(db: None, as_operator) -> None:
    with as_operator():
        first = machine()
        with pytest.raises(IntegrityError, match="command_id"), transaction.atomic():
            machine(command_id=first.command_id)


def test_a_machine_is_gone_exactly_if_it_has_the_time_of_it(db: None, as_operator) -> None:
    with as_operator():
        for values in ({"state": MachineState.GONE}, {"gone_at": timezone.now()}):
            with pytest.raises(IntegrityError, match="machine_gone_has_time"), transaction.atomic():
                machine(**values)
        machine(state=MachineState.GONE, gone_at=timezone.now())


def test_two_living_machines_cannot_be_the_same_one_of_the_provider(db: None, as_operator) -> None:
    with as_operator():
        machine(provider_ref="i-1", state=MachineState.GONE, gone_at=timezone.now())
        machine(provider_ref="i-1")
        with pytest.raises(IntegrityError, match="provider_ref"), transaction.atomic():
            machine(provider_ref="i-1")


def test_unknown_states_and_phases_are_refused(deployment: Deployment, as_operator) -> None:
    with as_operator():
        with pytest.raises(IntegrityError, match="machine_state_known"), transaction.atomic():
            machine(state="tired")
        with pytest.raises(IntegrityError, match="replica_phase_known"), transaction.atomic():
            replica(deployment, machine(), phase="tired")


def test_a_replica_cannot_be_filed_under_another_tenant(
    world: World, deployment: Deployment, as_operator
) -> None:
    with as_operator(), pytest.raises(IntegrityError, match="same_tenant"), transaction.atomic():
        replica(deployment, machine(), organization_id=world.other_organization.id)
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")


def test_a_tenant_sees_its_replicas_and_decisions_and_writes_none(
    world: World, deployment: Deployment, as_operator
) -> None:
    with as_operator():
        row = replica(deployment, machine(), phase=ReplicaPhase.READY)
        decision(deployment)
    with tenant(world.organization.id):
        assert Replica.objects.get().id == row.id
        assert Decision.objects.count() == 1
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            Replica.objects.update(slots=9)
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            Machine.objects.exists()
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            ScalerState.objects.exists()
    with tenant(world.other_organization.id):
        assert not Replica.objects.exists()
        assert not Decision.objects.exists()


def test_a_tick_decides_once_per_deployment_and_a_decision_stays_as_it_is(
    deployment: Deployment, as_operator
) -> None:
    with as_operator():
        first = decision(deployment)
        with pytest.raises(IntegrityError, match="decision_once_per_tick"), transaction.atomic():
            decision(deployment, tick_id=first.tick_id)
        with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
            Decision.objects.update(reasons={"changed": True})


def test_of_two_who_saw_the_same_version_one_wins(deployment: Deployment, as_operator) -> None:
    with as_operator():
        ScalerState.objects.create(deployment=deployment, organization_id=deployment.organization_id)
        seen = ScalerState.objects.get(deployment=deployment).version
        mine = ScalerState.objects.filter(deployment=deployment, version=seen)
        assert [mine.update(version=seen + 1, lease_owner=owner) for owner in ("a", "b")] == [1, 0]
        assert ScalerState.objects.get().lease_owner == "a"
