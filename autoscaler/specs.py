"""From a deployment's row to what the policy scales by and what an agent is told to run.

Called by tick, observe, act and reconcile. The deployment comes with its model version and, for `scaler_spec`, its
organization loaded; only the file names of a version in an object store are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from autoscaler import resting
from autoscaler.config import AutoscalerConfig
from autoscaler.models import Replica, ReplicaPhase
from autoscaler.types import ScalerSpec
from controlplane.deployments.models import Deployment, ModelSource, ModelVersion
from controlplane.rollouts.models import CANARY_STATES, EngineProfile, Rollout
from controlplane.rollouts.profiles import digest_of
from controlplane.upstreams.services import sealed_for
from infra.objectstore import Place, signed_urls
from workers.contract import ReplicaSpec

N_CANARY = 1  # replicas of what a rollout tries out: enough for its share, and the least that can be lost
USUAL_LEADS = 5  # what is usual is what the last so many starts' durations have shown


def scaler_spec(deployment: Deployment, config: AutoscalerConfig) -> ScalerSpec:
    """The owner's wishes and the pool's limits, as the policy takes them."""
    suspended_at = deployment.organization.suspended_at
    rungs, stakes = resting.rungs(deployment, config)
    return ScalerSpec(
        generation=deployment.generation,
        min_replicas=deployment.min_replicas,
        max_replicas=deployment.max_replicas,
        idle_timeout_s=float(deployment.idle_timeout_s),
        slots=slots(deployment),
        deleted=deployment.deleted_at is not None,
        n_canary=N_CANARY if candidate(deployment) is not None else 0,
        suspended_at_s=None if suspended_at is None else suspended_at.timestamp(),
        suspension_grace_s=config.suspension_grace_s,
        max_machines=config.max_machines,
        machine_timeout_s=config.machine_pending_timeout_s,
        lead_s=config.forecast_lead_s,
        usual_s=USUAL_LEADS * config.forecast_lead_s,
        rungs=rungs,
        stakes=stakes,
    )


def slots(deployment: Deployment) -> int:
    """Requests a replica runs at once: what its engine batches."""
    return slots_of(deployment.engine_profile)


def slots_of(settings: Mapping[str, Any]) -> int:
    return max(1, int(settings.get("max_num_seqs", 64)))


def engine_digest(deployment: Deployment) -> str:
    """Of what a replica of this deployment runs, and of its row in rollouts.EngineProfile."""
    return digest_of(deployment.model_version.digest, deployment.engine_profile)


def candidate(deployment: Deployment) -> EngineProfile | None:
    """What a rollout of this deployment tries out at present."""
    found = (
        Rollout.objects.select_related("candidate", "candidate__model_version")
        .filter(deployment_id=deployment.id, state__in=CANARY_STATES)
        .first()
    )
    if found is None or found.base_digest != engine_digest(deployment):
        return None  # somebody changed what the deployment runs: the rollout is over
    return found.candidate


def replica_spec(
    deployment: Deployment, replica_id: UUID, tried: EngineProfile | None = None
) -> dict[str, Any]:
    """The ReplicaSpec of a new replica, as JSON, to be kept in its row. `tried`: of a canary."""
    version = deployment.model_version if tried is None else tried.model_version
    settings = deployment.engine_profile if tried is None else tried.settings
    spec = ReplicaSpec(
        replica=replica_id.hex,
        deployment=deployment.id.hex,
        model_digest=version.digest,
        model_source=_source(version),
        profile=settings,
        slots=slots_of(settings),
        canary=tried is not None,
    )
    found: dict[str, Any] = msgspec.to_builtins(spec)
    return found


def desired_spec(replica: Replica) -> ReplicaSpec:
    """What the agent is told about a live replica."""
    is_draining = replica.phase == ReplicaPhase.DRAINING
    sleeps = replica.phase == ReplicaPhase.SLEEPING
    spec = msgspec.convert({**replica.spec, "drain": is_draining, "sleep": sleeps}, ReplicaSpec)
    if spec.model_source.startswith("s3://") and replica.phase in (
        ReplicaPhase.STARTING,
        ReplicaPhase.LOADING,
    ):
        spec.model_urls = signed_files(spec.model_source, spec.model_digest)
    if spec.upstream is not None and not is_draining:
        # Sealed anew whenever the agent is told, and kept nowhere else.
        public_hex = str(replica.machine.capabilities.get("box_public", ""))
        spec.upstream.sealed = sealed_for(UUID(hex=spec.upstream.upstream), public_hex)
    return spec


def signed_files(source: str, digest: str) -> dict[str, list[str]]:
    """Signed anew whenever the agent is told, and kept nowhere else."""
    version = ModelVersion.objects.filter(digest=digest).exclude(manifest={}).first()
    names = [entry["name"] for entry in version.manifest.get("files", [])] if version is not None else []
    return signed_urls(Place.parse(source), digest, names)


def _source(version: ModelVersion) -> str:
    if version.source_kind == ModelSource.TOY:
        return ""
    if "://" in version.source_uri:
        return version.source_uri
    path = Path(version.source_uri)
    return path.as_uri() if path.is_absolute() else version.source_uri
