"""Two tenants with people in them, for every test that asks who may see what.

Alice owns Acme, Bob is a developer there, Charlie owns Other and is a stranger to Acme. A test about
isolation is then two lines: what Bob sees, what Charlie must not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from uuid import UUID

    from autoscaler.models import Decision, Replica
    from controlplane.adapters.models import Adapter
    from controlplane.deployments.models import Deployment, ModelVersion
    from controlplane.tenants.models import Organization, Project, User

PASSWORD = "correct-horse-battery"


@dataclass(frozen=True, slots=True)
class World:
    """`organization` and `project` are Acme's; `other_…` are Charlie's."""

    alice: User
    bob: User
    charlie: User
    organization: Organization
    project: Project
    other_organization: Organization
    other_project: Project


@pytest.fixture
def world(db: None) -> World:
    """The two tenants, made through the services as the app role. Everybody's password is PASSWORD."""
    return build_world()


def build_world() -> World:
    """The same outside of a rolled-back transaction (for `django_db(transaction=True)`)."""
    from controlplane.tenants import services
    from controlplane.tenants.models import Role

    alice, bob, charlie = (
        services.create_user(email=f"{name}@example.org", password=PASSWORD, name=name.title())
        for name in ("alice", "bob", "charlie")
    )
    acme = services.create_organization(name="Acme", slug="acme", owner=alice)
    services.add_member(organization_id=acme.id, user=bob, role=Role.DEVELOPER)
    other = services.create_organization(name="Other", slug="other", owner=charlie)
    return World(
        alice=alice,
        bob=bob,
        charlie=charlie,
        organization=acme,
        project=services.create_project(organization_id=acme.id, name="Main", slug="main"),
        other_organization=other,
        other_project=services.create_project(organization_id=other.id, name="Main", slug="main"),
    )


def make_version(organization_id: UUID, *, digest: str = "a" * 64, **values: Any) -> ModelVersion:
    """A model version for the toy engine, up to 4096 tokens."""
    from controlplane.deployments import versions
    from controlplane.deployments.models import ModelSource

    defaults: dict[str, Any] = {
        "name": "toy",
        "source_kind": ModelSource.TOY,
        "source_uri": "",
        "size_bytes": 0,
        "max_model_len": 4096,
    }
    return versions.register(organization_id=organization_id, digest=digest, **(defaults | values))


def make_deployment(world: World, name: str = "toy-chat", **values: Any) -> Deployment:
    """A deployment of the toy engine in Acme's project, up to 2 replicas."""
    from controlplane.deployments import services

    defaults: dict[str, Any] = {"engine_profile": {"engine": "toy"}, "max_replicas": 2}
    if "model_version_id" not in values:
        defaults["model_version_id"] = make_version(world.organization.id).id
    return services.create_deployment(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name=name,
        **(defaults | values),
    )


def make_adapter(
    deployment: Deployment, name: str = "formal", *, digest: str = "f" * 64, rank: int = 8
) -> Adapter:
    """An adapter that is served, of files that nobody reads."""
    from pathlib import Path

    from controlplane.adapters import services
    from workers.modelcache.adapter import AdapterFacts, ImportedAdapter
    from workers.modelcache.manifest import Manifest

    row = services.register(
        organization_id=deployment.organization_id, deployment_id=deployment.id, name=name
    )
    manifest = Manifest(files=(), architecture="LoraAdapter", licence="", n_params=64, max_model_len=0)
    imported = ImportedAdapter(digest, Path("/nowhere"), manifest, AdapterFacts(rank, ("q_proj",), 64, 256))
    return services.mark_ready(
        organization_id=row.organization_id,
        adapter_id=row.id,
        imported=imported,
        source_uri="file:///nowhere",
    )


def make_replica(deployment: Deployment, **values: Any) -> tuple[Replica, Decision]:
    """A replica that is ready, on a machine of its own, and the decision to start it. Written as the house does."""
    from django.utils import timezone

    from autoscaler.models import Decision, Machine, MachineState, Replica, ReplicaPhase
    from autoscaler.specs import engine_digest
    from controlplane import ids
    from tests.database import acting_as

    with acting_as("corral_operator"):
        machine = values.pop("machine", None) or Machine.objects.create(
            provider="local",
            state=MachineState.READY,
            command_id=ids.new_id(),
            enroll_proof_digest=b"x" * 32,
            cell=deployment.cell,
            capabilities={"n_cpus": 8, "memory_bytes": 1 << 34, "gpus": []},
        )
        defaults: dict[str, Any] = {
            "phase": ReplicaPhase.READY,
            "generation": deployment.generation,
            "slots": 8,
            "spec_digest": engine_digest(deployment),
        }
        replica = Replica.objects.create(
            organization_id=deployment.organization_id,
            deployment=deployment,
            machine=machine,
            **(defaults | values),
        )
        decision = Decision.objects.create(
            organization_id=deployment.organization_id,
            deployment=deployment,
            tick_id=ids.new_id(),
            observation={"n_queued": 1, "replicas": [], "machines": [{"id": "of somebody"}]},
            spec={},
            memory_in={},
            memory_out={},
            commands=[{"kind": "start_replica", "machine_id": machine.id.hex}],
            reasons=["1 request waits"],
            at=timezone.now(),
        )
    return replica, decision


@pytest.fixture
def deployment(world: World) -> Deployment:
    """`toy-chat` of Acme."""
    return make_deployment(world)
