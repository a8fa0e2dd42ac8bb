"""Engine profiles of a deployment, with the reason of every setting; and rollouts of new ones as watched canaries."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.resources.deployments import Reasons
from controlplane.api.values import (
    Body,
    DeploymentId,
    EngineProfileId,
    ModelVersionId,
    OperationId,
    RolloutId,
)
from controlplane.deployments import selectors
from controlplane.errors import InvalidInputError
from controlplane.policy.canary import Limits
from controlplane.rollouts import services
from controlplane.rollouts.models import EngineProfile, Rollout, RolloutState, Wanted
from controlplane.rollouts.profiles import current, profile
from controlplane.tenants.rights import Permission
from workers.engine.base import EngineProfile as Settings
from workers.engine.vllm_args import argv, engine_args

router = Router(tags=["deployments"])
_Scalar = str | int | float | bool | None
_DEFAULT = Limits()


class SettingOut(Schema):
    """One setting of an engine."""

    name: str
    value: _Scalar
    reason: str = Field(description="Why it is so, in a sentence")
    inputs: dict[str, Any] = Field(
        description="The figures that led to it; `instead_of` is what was replaced"
    )
    overridden: bool = Field(description="Somebody insisted on it")


class EngineProfileOut(Schema):
    """What replicas of a deployment are started with, and why."""

    id: EngineProfileId
    number: int = Field(description="Counts the deployment's profiles from 1")
    digest: str = Field(description="Of settings and weights; replicas started with it carry the same")
    is_current: bool = Field(description="It is what the deployment wants now")
    model_version_id: ModelVersionId
    slo_class: str = Field(description="Whose pace it was compiled for")
    hardware: str = Field(description="What one replica runs on", examples=["4xl4"])
    settings: list[SettingOut]
    forecast: dict[str, Any] = Field(
        description="What the performance model expects; empty where it says nothing"
    )
    warnings: list[str]
    arguments: list[str] = Field(description="As flags of `vllm serve`; empty for another engine")
    created_at: datetime


class LimitsOut(Schema):
    """When a rollout goes on, and when back."""

    alpha: float = Field(description="Probability of a wrong decision of each kind, over the whole rollout")
    tolerance: float = Field(description="By how much the shares of errors and missed promises may be worse")
    slower_tolerance: float = Field(
        description="The same of the share of slower requests, at most 0.5 between equals"
    )
    slower_ratio: float = Field(description="Tokens count as slower from so many times the time on")
    min_requests: int = Field(description="Of the canary in each step, before it goes on")
    step_max_s: float = Field(description="After so long a step is decided by what is there")
    max_deaths: int = Field(description="Processes of the canary that may fail")


class RolloutOut(Schema):
    """A new profile or model version on its way to all of a deployment's traffic, or back."""

    id: RolloutId
    deployment_id: DeploymentId
    profile_number: int = Field(description="The engine profile that is tried")
    state: RolloutState
    reason: str
    steps_ppm: list[int] = Field(
        description="Shares of the requests in millionths, one per step", examples=[[50_000, 500_000]]
    )
    step: int
    share_ppm: int = Field(description="Of the requests that go to the canary now")
    step_at: datetime
    paused: bool
    wanted: Wanted = Field(description="What an operator ordered; empty: nothing")
    verdict: str = Field(description="Why it is in this state")
    limits: LimitsOut
    evidence: list[dict[str, Any]] = Field(description="Every decision with what it was made from")
    operation_id: OperationId | None
    created_at: datetime
    finished_at: datetime | None


class NewLimits(Body):
    """What is left out is as the default says."""

    alpha: Annotated[float, Field(ge=1e-6, le=0.2)] = _DEFAULT.alpha
    tolerance: Annotated[float, Field(ge=0.001, le=0.5)] = _DEFAULT.tolerance
    slower_tolerance: Annotated[float, Field(ge=0.01, le=0.5)] = _DEFAULT.slower_tolerance
    slower_ratio: Annotated[float, Field(ge=1, le=10)] = _DEFAULT.slower_ratio
    min_requests: Annotated[int, Field(ge=1, le=100_000)] = _DEFAULT.min_requests
    step_max_s: Annotated[float, Field(ge=10, le=604_800)] = _DEFAULT.step_max_s
    max_deaths: Annotated[int, Field(ge=0, le=10)] = _DEFAULT.max_deaths


class NewRollout(Body):
    """A rollout to be: another profile, another model version, or both."""

    model_version_id: ModelVersionId | None = None
    engine_profile: dict[str, Any] | None = Field(
        default=None, description="Settings insisted on, in place of those now; the rest is compiled"
    )
    profile_reasons: Reasons = Field(
        default_factory=dict, description="Setting -> why it is insisted on", examples=[{}]
    )
    steps_ppm: Annotated[
        list[Annotated[int, Field(ge=1, le=services.MAX_SHARE_PPM)]],
        Field(min_length=1, max_length=services.MAX_STEPS, examples=[[50_000, 500_000]]),
    ] = Field(default_factory=lambda: list(services.STEPS_PPM))
    limits: NewLimits = Field(default_factory=NewLimits)
    reason: Annotated[str, Field(max_length=300)] = ""


class Ordered(StrEnum):
    """What an operator can order."""

    PROMOTE = "promote"
    ABORT = "abort"


class RolloutChange(Body):
    """What is left out stays as it is."""

    paused: bool | None = Field(
        default=None, description="The share stays as it is; a regression still decides"
    )
    wanted: Ordered | None = None


class RolloutQuery(PageQuery):
    """Which rollouts."""

    state: RolloutState | None = None


def profile_out(row: EngineProfile, now: str) -> EngineProfileOut:
    is_vllm = row.settings.get("engine") == "vllm"
    return EngineProfileOut(
        id=row.id,
        number=row.number,
        digest=row.digest,
        is_current=row.digest == now,
        model_version_id=row.model_version_id,
        slo_class=row.slo_class,
        hardware=row.hardware,
        settings=[SettingOut(**value) for value in row.chosen],
        forecast=row.forecast,
        warnings=row.warnings,
        arguments=argv(engine_args(Settings.from_json(row.settings))) if is_vllm else [],
        created_at=row.created_at,
    )


def rollout_out(row: Rollout) -> RolloutOut:
    return RolloutOut(
        id=row.id,
        deployment_id=row.deployment_id,
        profile_number=row.candidate.number,
        state=RolloutState(row.state),
        reason=row.reason,
        steps_ppm=row.steps_ppm,
        step=row.step,
        share_ppm=row.share_ppm,
        step_at=row.step_at,
        paused=row.paused,
        wanted=Wanted(row.wanted),
        verdict=row.verdict,
        limits=LimitsOut(**row.limits),
        evidence=row.evidence,
        operation_id=row.operation_id,
        created_at=row.created_at,
        finished_at=row.finished_at,
    )


def _now(request: ApiRequest, deployment_id: UUID) -> str:
    """Digest of what the deployment wants now. NotFoundError for another tenant's."""
    deployment = selectors.deployment(
        organization_id=request.caller.organization_id, deployment_id=deployment_id
    )
    row = current(deployment)
    return "" if row is None else row.digest


def _current(
    request: ApiRequest, deployment_id: DeploymentId, rollout_id: RolloutId, **_: object
) -> tuple[Model, Any]:
    return _found(request, deployment_id, rollout_id), rollout_out


def _found(request: ApiRequest, deployment_id: UUID, rollout_id: UUID) -> Rollout:
    return services.rollout(
        organization_id=request.caller.organization_id, deployment_id=deployment_id, rollout_id=rollout_id
    )


@operation(
    router,
    "GET",
    "/deployments/{deployment_id}/profiles",
    Permission.DEPLOYMENTS_READ,
    Page[EngineProfileOut],
)
def list_engine_profiles(
    request: ApiRequest, deployment_id: DeploymentId, query: Query[PageQuery]
) -> Page[EngineProfileOut]:
    """Engine profiles of a deployment, newest first, each setting with its reason."""
    now = _now(request, deployment_id)
    rows = EngineProfile.objects.filter(
        organization_id=request.caller.organization_id, deployment_id=deployment_id
    )
    return page(rows, query, lambda row: profile_out(row, now))


@operation(
    router,
    "GET",
    "/deployments/{deployment_id}/profiles/{number}",
    Permission.DEPLOYMENTS_READ,
    EngineProfileOut,
)
def get_engine_profile(
    request: ApiRequest, deployment_id: DeploymentId, number: Annotated[int, Field(ge=1, le=2**31 - 1)]
) -> EngineProfileOut:
    """One engine profile of a deployment, by its number."""
    now = _now(request, deployment_id)
    row = profile(organization_id=request.caller.organization_id, deployment_id=deployment_id, number=number)
    return profile_out(row, now)


@operation(
    router, "GET", "/deployments/{deployment_id}/rollouts", Permission.DEPLOYMENTS_READ, Page[RolloutOut]
)
def list_rollouts(
    request: ApiRequest, deployment_id: DeploymentId, query: Query[RolloutQuery]
) -> Page[RolloutOut]:
    """Rollouts of a deployment, newest first."""
    _now(request, deployment_id)
    rows = Rollout.objects.filter(
        organization_id=request.caller.organization_id, deployment_id=deployment_id
    ).select_related("candidate")
    rows = matching(rows, state=query.state)
    return page(rows, query, rollout_out)


@operation(
    router,
    "POST",
    "/deployments/{deployment_id}/rollouts",
    Permission.DEPLOYMENTS_WRITE,
    RolloutOut,
    status=201,
)
def begin_rollout(request: ApiRequest, deployment_id: DeploymentId, body: NewRollout) -> RolloutOut:
    """Try another profile or model version on a share of the requests.

    It is promoted step by step, or rolled back by itself where it is worse. `Operation-Location` names what to follow.
    """
    try:
        limits = Limits(**body.limits.model_dump())
    except ValueError as error:
        raise InvalidInputError(f"limits: {error}", field="limits") from None
    made = services.begin(
        organization_id=request.caller.organization_id,
        deployment_id=deployment_id,
        model_version_id=body.model_version_id,
        engine_profile=body.engine_profile,
        profile_reasons=body.profile_reasons,
        steps_ppm=body.steps_ppm,
        limits=limits,
        reason=body.reason,
    )
    request.operation_id = made.operation_id
    return rollout_out(_found(request, deployment_id, made.id))


@operation(
    router,
    "GET",
    "/deployments/{deployment_id}/rollouts/{rollout_id}",
    Permission.DEPLOYMENTS_READ,
    RolloutOut,
)
def get_rollout(request: ApiRequest, deployment_id: DeploymentId, rollout_id: RolloutId) -> RolloutOut:
    """One rollout, with what its decisions were made from."""
    return rollout_out(_found(request, deployment_id, rollout_id))


@operation(
    router,
    "PATCH",
    "/deployments/{deployment_id}/rollouts/{rollout_id}",
    Permission.DEPLOYMENTS_WRITE,
    RolloutOut,
    current=_current,
)
def order_rollout(
    request: ApiRequest, deployment_id: DeploymentId, rollout_id: RolloutId, body: RolloutChange
) -> RolloutOut:
    """Pause an open rollout or let it go on, promote it at once, or abort it."""
    services.order(
        organization_id=request.caller.organization_id,
        deployment_id=deployment_id,
        rollout_id=rollout_id,
        paused=body.paused,
        wanted=None if body.wanted is None else Wanted(body.wanted.value),
    )
    return rollout_out(_found(request, deployment_id, rollout_id))
