"""The tenant of the drills: an organization, project and key of its own, and a deployment per run, removed again.

Called by `manage.py drill`, as operator. Nothing of any other tenant is read or touched.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from uuid import UUID

from autoscaler.models import LIVE_PHASES, Replica
from controlplane.deployments import importing, versions
from controlplane.deployments import services as deployments
from controlplane.deployments.models import Deployment, ModelVersion
from controlplane.errors import NotFoundError
from controlplane.settings import ENV
from controlplane.tenants import key_services, limit_services
from controlplane.tenants import services as tenants
from controlplane.tenants.limits import Limits
from infra.drills.scene import Scene

SLUG = "drills"
OWNER_EMAIL = "drills@corral.local"
# Every kind of limit is kept, none is reached: so their counters are part of what is checked.
LIMITS = Limits(
    rpm=1_000_000,
    input_tpm=1_000_000_000,
    output_tpm=1_000_000_000,
    max_concurrency=100_000,
    budget_nano=1_000_000 * 1_000_000_000,
)
TOY_STEP_MS = 20.0
SERVES_WITHIN_S = 240.0
GONE_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class DrillTenant:
    """Ids and the key, whose text exists nowhere else."""

    organization_id: UUID
    project_id: UUID
    key_id: UUID
    api_key: str = field(repr=False)
    version: ModelVersion


def prepare(engine: str, model: str, *, place: str = "") -> DrillTenant:
    """The tenant, a fresh key, and the model registered for it. Raises InvalidInputError for a wrong model.

    `place`: s3://… where its weights go first; machines fetch them from there, those of the toy engine as well.
    """
    owner = tenants.ensure_user(email=OWNER_EMAIL, password=secrets.token_urlsafe(24), name="Drills")
    organization = tenants.ensure_organization(name="Drills", slug=SLUG, owner=owner)
    project = tenants.ensure_project(organization_id=organization.id, name="Drills", slug=SLUG)
    limit_services.set_organization_limits(organization_id=organization.id, limits=LIMITS)
    limit_services.set_project_limits(organization_id=organization.id, project_id=project.id, limits=LIMITS)
    _sweep(organization.id)
    version = importing.register(
        organization_id=organization.id,
        source=model if engine != "toy" else "tiny" if place else "toy",
        var=ENV.var,
    )
    if place:
        version = _published(version, place)
    key, text = key_services.create_api_key(
        organization_id=organization.id, project_id=project.id, name="drill", limits=LIMITS
    )
    return DrillTenant(organization.id, project.id, key.id, text, version)


def _published(version: ModelVersion, place: str) -> ModelVersion:
    from infra.objectstore import Place, publish

    store, where = importing.store(ENV.var), Place.parse(place)
    publish(store.path(version.digest), store.verify(version.digest), where, lambda name, size: None)
    return versions.move(
        organization_id=version.organization_id, model_version_id=version.id, source_uri=where.uri
    )


def unseen_key(tenant: DrillTenant) -> tuple[UUID, str]:
    """Id and text of another key, which no gateway has seen."""
    key, text = key_services.create_api_key(
        organization_id=tenant.organization_id,
        project_id=tenant.project_id,
        name="drill, unseen",
        limits=Limits(),
    )
    return key.id, text


def _sweep(organization_id: UUID) -> None:
    """Deployments of a drill that was killed: nobody else has any here, and only one drill runs at a time."""
    for row in Deployment.objects.filter(organization_id=organization_id, deleted_at=None):
        deployments.delete_deployment(organization_id=organization_id, deployment_id=row.id)


def profile(engine: str, n_slots: int) -> dict[str, object]:
    """An engine that runs all streams in one batch. The toy is paced like a small GPU; its faults can be called."""
    slots = max(n_slots, 1)
    if engine == "toy":
        return {
            "engine": "toy",
            "max_model_len": 32_768,
            "max_num_seqs": slots,
            "toy_step_ms": TOY_STEP_MS,
            "toy_faults": True,
        }
    # float32: the dtype in which a resumed greedy answer continues exactly.
    return {"engine": "vllm", "dtype": "float32", "max_model_len": 2048, "max_num_seqs": slots}


def deploy(tenant: DrillTenant, name: str, engine: str, n_slots: int) -> UUID:
    """A deployment of exactly one replica, no spare one.

    Of class `batch`: on a busy computer the interactive class would cut its slots to keep its pace, and streams that
    still wait cannot be struck.
    """
    profile_ = profile(engine, n_slots)
    profile_["max_model_len"] = min(int(str(profile_["max_model_len"])), tenant.version.max_model_len)
    return deployments.create_deployment(
        organization_id=tenant.organization_id,
        project_id=tenant.project_id,
        name=name,
        model_version_id=tenant.version.id,
        engine_profile=profile_,
        min_replicas=1,
        max_replicas=1,
        slo_class="batch",
    ).id


def wait_until_it_serves(scene: Scene) -> None:
    """DrillError when it never does; the deployment's `last_error` then says why."""
    scene.wait(lambda: len(scene.routed()) == 1, "the drill's deployment serves", SERVES_WITHIN_S)


def remove(tenant: DrillTenant, deployment_id: UUID, scene: Scene) -> None:
    """Delete the deployment and wait until its replicas are gone."""
    try:
        deployments.delete_deployment(organization_id=tenant.organization_id, deployment_id=deployment_id)
    except NotFoundError:
        return
    scene.wait(lambda: n_live_replicas(deployment_id) == 0, "the drill's replicas are gone", GONE_WITHIN_S)


def n_live_replicas(deployment_id: UUID) -> int:
    return Replica.objects.filter(deployment_id=deployment_id, phase__in=LIVE_PHASES).count()


def end_of(replica_id: str) -> str:
    """`code: sentence` of a replica that is over, '' while it is not."""
    row = Replica.objects.filter(id=UUID(hex=replica_id)).exclude(phase__in=LIVE_PHASES).first()
    return "" if row is None else f"{row.reason_code or row.phase}: {row.reason_message}"


def forget_key(tenant: DrillTenant, key_id: UUID) -> None:
    key_services.revoke_api_key(organization_id=tenant.organization_id, key_id=key_id)
