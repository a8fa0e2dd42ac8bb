"""Begins rollouts and takes an operator's orders for them. The control worker goes on (canary.py).

A rollout tries a new profile or model version beside what a deployment serves; the deployment itself changes only when
it is promoted. Whoever changes profile or model version of the deployment meanwhile supersedes the rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final
from uuid import UUID

import structlog
from django.db.models import F
from django.utils import timezone

from controlplane.adapters.models import OPEN, Adapter
from controlplane.deployments import profiles, selectors
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.operations import services as operations
from controlplane.operations.models import OPEN as OPEN_OPERATIONS
from controlplane.operations.models import Operation
from controlplane.policy.canary import Limits
from controlplane.rollouts.models import OPEN_STATES, PPM, Rollout, Wanted
from controlplane.rollouts.profiles import digest_of, overrides, record
from controlplane.saving import insert
from controlplane.tenants import invalidation
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.rollouts")

CANARY: Final = "canary"  # the kind of its operation
STEPS_PPM: Final = (50_000, 250_000, 500_000)
MAX_STEPS: Final = 8
MAX_SHARE_PPM: Final = 500_000  # a canary that has more is no canary
START_S: Final = 3_600.0  # of the operation, beside its steps


def begin(
    *,
    organization_id: UUID,
    deployment_id: UUID,
    model_version_id: UUID | None = None,
    engine_profile: Mapping[str, object] | None = None,
    profile_reasons: Mapping[str, str] | None = None,
    steps_ppm: Sequence[int] = STEPS_PPM,
    limits: Limits | None = None,
    reason: str = "",
) -> Rollout:
    """Try another profile, model version or both. `engine_profile` replaces the overrides, as in a change.

    Raises NotFoundError, InvalidInputError, or ConflictError while another rollout is open.
    """
    limits = limits or Limits()
    _check_steps(steps_ppm)
    with tenant(organization_id):
        deployment = selectors.deployment(organization_id=organization_id, deployment_id=deployment_id)
        now_runs = digest_of(deployment.model_version.digest, deployment.engine_profile)
        max_model_len = int(deployment.engine_profile["max_model_len"])
        given, reasons = overrides(deployment)
        given = given if engine_profile is None else {"engine": deployment.engine, **engine_profile}
        if model_version_id is not None:
            deployment.model_version = selectors.model_version(
                organization_id=organization_id, model_version_id=model_version_id
            )
            if deployment.model_version.retired_at is not None:
                raise InvalidInputError(
                    "model_version_id: it was retired; choose another", field="model_version_id"
                )
            served = Adapter.objects.filter(
                organization_id=organization_id, deployment_id=deployment_id, state__in=OPEN
            ).exclude(base_digest=deployment.model_version.digest)
            if served.exists():
                raise InvalidInputError(
                    "model_version_id: adapters are served that were made for the present weights, and a canary "
                    "cannot choose its requests: retire them, or change the deployment",
                    field="model_version_id",
                )
        chosen = profiles.choose(
            deployment.model_version, deployment.slo_class, given, {**reasons, **(profile_reasons or {})}
        )
        if digest_of(deployment.model_version.digest, chosen.profile) == now_runs:
            raise InvalidInputError(
                "engine_profile: this is what the deployment runs already; change a setting or the model version",
                field="engine_profile",
            )
        if chosen.profile["max_model_len"] < max_model_len:
            raise InvalidInputError(
                f"engine_profile: max_model_len = {chosen.profile['max_model_len']} is less than the {max_model_len} "
                "that clients may send now, and a canary cannot choose its requests: set it, or change the deployment",
                field="engine_profile",
            )
        candidate = record(deployment, chosen)
        rollout = Rollout(
            organization_id=organization_id,
            deployment_id=deployment_id,
            candidate=candidate,
            generation=deployment.generation,
            base_digest=now_runs,
            reason=reason,
            steps_ppm=list(steps_ppm),
            step_at=timezone.now(),
            limits=asdict(limits),
            verdict="its first replica starts",
        )
        insert(
            rollout,
            taken={"rollout_one_open": ("deployment_id", "a rollout of this deployment is open already")},
        )
        begin_operation(rollout)
        # Its autoscaler looks at once.
        invalidation.publish_after_commit(invalidation.deployment_ref(deployment_id))
    log.info(
        "rollout.begun",
        organization=organization_id.hex,
        rollout=rollout.id.hex,
        deployment=deployment_id.hex,
    )
    return rollout


def begin_operation(rollout: Rollout) -> None:
    """The operation that carries it on; the open one if there is one."""
    limits = Limits(**rollout.limits)
    operation = operations.begin(
        organization_id=rollout.organization_id,
        kind=CANARY,
        subject=str(rollout),
        params={"deployment": str(rollout.deployment)},
        max_s=START_S + limits.step_max_s * len(rollout.steps_ppm),
    )
    Rollout.objects.filter(organization_id=rollout.organization_id, id=rollout.id).update(
        operation_id=operation.id
    )
    rollout.operation_id = operation.id


def order(
    *,
    organization_id: UUID,
    deployment_id: UUID,
    rollout_id: UUID,
    paused: bool | None = None,
    wanted: Wanted | None = None,
) -> Rollout:
    """Pause or go on, promote at once, or abort. Raises NotFoundError; ConflictError for one that has ended."""
    with tenant(organization_id):
        found = rollout(organization_id=organization_id, deployment_id=deployment_id, rollout_id=rollout_id)
        values: dict[str, Any] = {}
        if paused is not None:
            values["paused"] = paused
        if wanted is not None:
            values["wanted"] = wanted
        if values and not found.is_open:
            raise ConflictError(f"the rollout has ended: {found.state}", field="state")
        if values:
            # A step of the worker may come between: the order stands beside what it writes.
            Rollout.objects.filter(
                organization_id=organization_id, id=rollout_id, state__in=OPEN_STATES
            ).update(version=F("version") + 1, **values)
            found.refresh_from_db()
    log.info("rollout.ordered", organization=organization_id.hex, rollout=rollout_id.hex, **values)
    return found


def rollout(*, organization_id: UUID, deployment_id: UUID, rollout_id: UUID) -> Rollout:
    """Raises NotFoundError, also for another tenant's."""
    found = (
        Rollout.objects.select_related("candidate", "deployment")
        .filter(organization_id=organization_id, deployment_id=deployment_id, id=rollout_id)
        .first()
    )
    if found is None:
        raise NotFoundError("no such rollout", field="rollout_id")
    return found


def adopt(rollout: Rollout) -> None:
    """The deployment wants from now on what was tried out. Nothing happens where it does already; ConflictError where
    somebody changed it otherwise."""
    with tenant(rollout.organization_id):
        candidate = rollout.candidate
        rows = Deployment.objects.filter(organization_id=rollout.organization_id, id=rollout.deployment_id)
        row = rows.select_related("model_version").get()
        runs = digest_of(row.model_version.digest, row.engine_profile)
        if runs == candidate.digest:
            return
        changed = runs == rollout.base_digest and rows.filter(
            generation=row.generation, deleted_at=None
        ).update(
            engine_profile=candidate.settings,
            model_version_id=candidate.model_version_id,
            generation=F("generation") + 1,
            updated_at=timezone.now(),
        )
        if not changed:
            raise ConflictError("the deployment was changed otherwise meanwhile", code="superseded")
        invalidation.publish_after_commit(
            invalidation.deployment_ref(row.id), invalidation.project_ref(row.project_id)
        )


def mend() -> int:
    """Open rollouts that no operation carries on get one: nothing may hold a canary for ever. Run by the clock."""
    carried = Operation.objects.filter(state__in=OPEN_OPERATIONS, kind=CANARY).values_list("id", flat=True)
    left = Rollout.objects.filter(state__in=OPEN_STATES).exclude(operation_id__in=list(carried))
    left = left.select_related("deployment")[:100]
    for row in left:
        begin_operation(row)
    return len(left)


def _check_steps(steps_ppm: Sequence[int]) -> None:
    if not 1 <= len(steps_ppm) <= MAX_STEPS:
        raise InvalidInputError(f"steps_ppm: give 1 to {MAX_STEPS} shares", field="steps_ppm")
    if list(steps_ppm) != sorted(set(steps_ppm)) or not 0 < steps_ppm[0] <= steps_ppm[-1] <= MAX_SHARE_PPM:
        raise InvalidInputError(
            f"steps_ppm={list(steps_ppm)}: give rising shares from 1 to {MAX_SHARE_PPM} millionths "
            f"({MAX_SHARE_PPM / PPM:.0%})",
            field="steps_ppm",
        )
