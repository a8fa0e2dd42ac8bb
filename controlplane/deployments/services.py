"""Writes about deployments: what should be served. The autoscaler makes it so.

Every change of what is wanted raises `generation`, leaves one log line, and tells the gateways after commit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from django.db.models import F
from django.utils import timezone

from billing.prices import DEFAULT_PRICE, price_in_force
from controlplane.deployments import profiles, selectors, sharing, versions
from controlplane.deployments.models import (
    MAX_WINDOW_TOKENS,
    Admission,
    Deployment,
    Phase,
    SloClass,
    this_cell,
)
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.policy.ordering import QueueOrder
from controlplane.rollouts.profiles import overrides, record
from controlplane.saving import check_fields, insert
from controlplane.tenants import invalidation
from controlplane.tenants import selectors as tenants
from controlplane.tenants.context import tenant
from controlplane.upstreams import services as upstreams

log = structlog.get_logger("corral.deployments")

MAX_REPLICAS = 1000
MAX_IDLE_TIMEOUT_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to change of a deployment; None leaves a value as it is."""

    min_replicas: int | None = None
    max_replicas: int | None = None
    idle_timeout_s: int | None = None
    slo_class: str | None = None
    queue_order: str | None = None
    locality_window_tokens: int | None = None
    admission: str | None = None
    engine_profile: Mapping[str, object] | None = None  # replaces all overrides; the rest is compiled
    profile_reasons: Mapping[str, str] = field(default_factory=dict)  # knob -> why it is overridden
    model_version_id: UUID | None = None
    price: str | None = None  # name of a price; its version now in force is taken


def create_deployment(
    *,
    organization_id: UUID,
    project_id: UUID,
    name: str,
    model_version_id: UUID,
    engine_profile: Mapping[str, object] | None = None,
    profile_reasons: Mapping[str, str] | None = None,
    min_replicas: int = 0,
    max_replicas: int = 1,
    idle_timeout_s: int = 300,
    slo_class: str = "interactive",
    queue_order: str = QueueOrder.EDF,
    locality_window_tokens: int = 2_000,
    admission: str = Admission.AUTO,
    price: str = DEFAULT_PRICE,
) -> Deployment:
    """Serve a model version under `name` in this cell.

    Raises NotFoundError, InvalidInputError or ConflictError (name).
    """
    with tenant(organization_id):
        tenants.project(organization_id=organization_id, project_id=project_id)
        version = versions.servable(organization_id, model_version_id)
        slo = _slo_class(slo_class)
        chosen = profiles.choose(version, slo, engine_profile or {}, profile_reasons)
        deployment = Deployment(
            organization_id=organization_id,
            project_id=project_id,
            name=name,
            model_version=version,
            engine_profile=chosen.profile,
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            idle_timeout_s=idle_timeout_s,
            slo_class=slo,
            queue_order=_queue_order(queue_order),
            locality_window_tokens=locality_window_tokens,
            admission=_admission(admission),
            price_version=price_in_force(organization_id=organization_id, at=timezone.now(), name=price),
        )
        _check(deployment)
        insert(
            deployment,
            taken={"deployment_name_unique": ("name", f"the project has a deployment {name!r} already")},
        )
        record(deployment, chosen)
        _publish(deployment)
    log.info("deployment.created", organization=organization_id.hex, deployment=deployment.id.hex)
    return deployment


def ensure_deployment(
    *,
    organization_id: UUID,
    project_id: UUID,
    name: str,
    model_version_id: UUID,
    engine_profile: Mapping[str, object],
    min_replicas: int = 0,
    max_replicas: int = 1,
    idle_timeout_s: int = 300,
    slo_class: str | None = None,
    queue_order: str | None = None,
    locality_window_tokens: int | None = None,
    admission: str | None = None,
) -> Deployment:
    """The deployment of this name, created if missing and changed only where it differs. May run twice.

    None leaves what there is, and is the ordinary value for a new one.
    """
    with tenant(organization_id):
        found = Deployment.objects.filter(
            organization_id=organization_id,
            project_id=project_id,
            name=name,
            cell=this_cell(),
            deleted_at=None,
        ).first()
        if found is None:
            return create_deployment(
                organization_id=organization_id,
                project_id=project_id,
                name=name,
                model_version_id=model_version_id,
                engine_profile=engine_profile,
                min_replicas=min_replicas,
                max_replicas=max_replicas,
                idle_timeout_s=idle_timeout_s,
                slo_class=slo_class or "interactive",
                queue_order=queue_order or QueueOrder.EDF,
                locality_window_tokens=2_000 if locality_window_tokens is None else locality_window_tokens,
                admission=admission or Admission.AUTO,
            )
        return update_deployment(
            organization_id=organization_id,
            deployment_id=found.id,
            change=Change(
                model_version_id=model_version_id,
                engine_profile=engine_profile,
                min_replicas=min_replicas,
                max_replicas=max_replicas,
                idle_timeout_s=idle_timeout_s,
                slo_class=slo_class,
                queue_order=queue_order,
                locality_window_tokens=locality_window_tokens,
                admission=admission,
            ),
        )


def update_deployment(
    *, organization_id: UUID, deployment_id: UUID, change: Change, expected_generation: int | None = None
) -> Deployment:
    """Change what is wanted; nothing happens where nothing differs.

    `expected_generation` refuses (ConflictError) if somebody changed the deployment since it was read; a
    change that races with this very call is refused in any case.
    """
    with tenant(organization_id):
        deployment = selectors.deployment(organization_id=organization_id, deployment_id=deployment_id)
        seen = deployment.generation if expected_generation is None else expected_generation
        before = _wanted(deployment)
        chosen = _apply(deployment, change)
        after = _wanted(deployment)
        if before == after and seen == deployment.generation:
            return deployment
        _check(deployment)
        check_fields(deployment)
        changed = Deployment.objects.filter(
            organization_id=organization_id, id=deployment_id, deleted_at=None, generation=seen
        ).update(**after, generation=F("generation") + 1, updated_at=timezone.now())
        if not changed:
            raise ConflictError("the deployment was changed meanwhile: read it again", field="generation")
        if chosen is not None:
            record(deployment, chosen)
        _publish(deployment)
        deployment = selectors.deployment(organization_id=organization_id, deployment_id=deployment_id)
    log.info(
        "deployment.changed",
        organization=organization_id.hex,
        deployment=deployment_id.hex,
        generation=deployment.generation,
        fields=[name for name in after if before[name] != after[name]],
    )
    return deployment


def delete_deployment(*, organization_id: UUID, deployment_id: UUID) -> None:
    """Stop serving it; its replicas are drained and its name is free again. Raises NotFoundError."""
    with tenant(organization_id):
        deployment = selectors.deployment(organization_id=organization_id, deployment_id=deployment_id)
        now = timezone.now()
        Deployment.objects.filter(organization_id=organization_id, id=deployment_id, deleted_at=None).update(
            deleted_at=now, updated_at=now, phase=Phase.DELETED, generation=F("generation") + 1
        )
        sharing.withdraw_all(organization_id=organization_id, deployment_id=deployment_id)
        upstreams.detach_all(organization_id=organization_id, deployment_id=deployment_id)
        _publish(deployment)
    log.info("deployment.deleted", organization=organization_id.hex, deployment=deployment_id.hex)


def _apply(deployment: Deployment, change: Change) -> profiles.Chosen | None:
    """The changes made on the row in memory; what was compiled, where that was necessary."""
    organization_id = deployment.organization_id
    is_compiled = any(
        v is not None for v in (change.engine_profile, change.model_version_id, change.slo_class)
    )
    given, reasons = overrides(deployment) if is_compiled else ({}, {})  # before what names them changes
    for name in ("min_replicas", "max_replicas", "idle_timeout_s", "locality_window_tokens"):
        value = getattr(change, name)
        if value is not None:
            setattr(deployment, name, value)
    if change.queue_order is not None:
        deployment.queue_order = _queue_order(change.queue_order)
    if change.admission is not None:
        deployment.admission = _admission(change.admission)
    if change.slo_class is not None:
        deployment.slo_class = _slo_class(change.slo_class)
    if change.model_version_id is not None and change.model_version_id != deployment.model_version_id:
        deployment.model_version = versions.servable(organization_id, change.model_version_id)
    chosen = None
    if is_compiled:
        given = given if change.engine_profile is None else dict(change.engine_profile)
        chosen = profiles.choose(
            deployment.model_version, deployment.slo_class, given, {**reasons, **change.profile_reasons}
        )
        deployment.engine_profile = chosen.profile
    if change.price is not None:
        deployment.price_version = price_in_force(
            organization_id=organization_id, at=timezone.now(), name=change.price
        )
    return chosen


def _wanted(deployment: Deployment) -> dict[str, object]:
    names = (
        "min_replicas",
        "max_replicas",
        "idle_timeout_s",
        "slo_class_id",
        "queue_order",
        "locality_window_tokens",
        "admission",
        "engine_profile",
        "model_version_id",
        "price_version_id",
    )
    return {name: getattr(deployment, name) for name in names}


def _slo_class(name: str) -> SloClass:
    classes = {slo.name: slo for slo in selectors.slo_classes()}
    if name not in classes:
        raise InvalidInputError(f"slo_class={name!r}: choose one of {', '.join(classes)}", field="slo_class")
    return classes[name]


def _queue_order(name: str) -> str:
    if name not in list(QueueOrder):
        raise InvalidInputError(
            f"queue_order={name!r}: choose one of {', '.join(QueueOrder)}", field="queue_order"
        )
    return QueueOrder(name).value


def _admission(name: str) -> str:
    if name not in Admission.values:
        raise InvalidInputError(
            f"admission={name!r}: choose one of {', '.join(Admission.values)}", field="admission"
        )
    return Admission(name).value


def _check(deployment: Deployment) -> None:
    if not 0 <= deployment.min_replicas <= MAX_REPLICAS:
        raise InvalidInputError(
            f"min_replicas={deployment.min_replicas}: must be from 0 to {MAX_REPLICAS}", field="min_replicas"
        )
    low = max(1, deployment.min_replicas)
    if not low <= deployment.max_replicas <= MAX_REPLICAS:
        raise InvalidInputError(
            f"max_replicas={deployment.max_replicas}: must be from {low} to {MAX_REPLICAS}",
            field="max_replicas",
        )
    if not 0 <= deployment.idle_timeout_s <= MAX_IDLE_TIMEOUT_S:
        raise InvalidInputError(
            f"idle_timeout_s={deployment.idle_timeout_s}: must be from 0 to {MAX_IDLE_TIMEOUT_S}",
            field="idle_timeout_s",
        )
    if not 0 <= deployment.locality_window_tokens <= MAX_WINDOW_TOKENS:
        raise InvalidInputError(
            f"locality_window_tokens={deployment.locality_window_tokens}: must be from 0 to {MAX_WINDOW_TOKENS}",
            field="locality_window_tokens",
        )


def _publish(deployment: Deployment) -> None:
    invalidation.publish_after_commit(
        invalidation.deployment_ref(deployment.id), invalidation.project_ref(deployment.project_id)
    )
