"""Deployments, model versions and service classes: what is served, and how well."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from django.db.models import Model
from ninja import Field, Query, Router, Schema

from autoscaler.longoperations import MAX_S, ROLLOUT
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, DeploymentId, ModelVersionId, ProjectId
from controlplane.deployments import selectors, services, versions
from controlplane.deployments.models import MAX_WINDOW_TOKENS, Admission, Deployment, ModelVersion, Phase
from controlplane.deployments.profiles import MAX_REASON
from controlplane.operations import services as operations
from controlplane.policy.ordering import QueueOrder
from controlplane.tenants.rights import Permission

router = Router(tags=["deployments"])
_Replicas = Annotated[int, Field(ge=0, le=services.MAX_REPLICAS)]
_IdleS = Annotated[int, Field(ge=0, le=services.MAX_IDLE_TIMEOUT_S)]
_Window = Annotated[int, Field(ge=0, le=MAX_WINDOW_TOKENS)]
Reasons = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=MAX_REASON)]]
_Word = Annotated[str, Field(min_length=1, max_length=64)]


class DeploymentOut(Schema):
    """A model version served under a name."""

    id: DeploymentId
    project_id: ProjectId
    name: str = Field(description="The `model` that programs send to /v1")
    model_version_id: ModelVersionId
    engine_profile: dict[str, Any]
    min_replicas: int
    max_replicas: int
    idle_timeout_s: int
    slo_class: str
    queue_order: QueueOrder
    locality_window_tokens: int
    admission: Admission = Field(description="When a request is refused although its limits allow it")
    price: str
    phase: Phase
    last_error: str
    generation: int
    created_at: datetime


class NewDeployment(Body):
    """A deployment to be."""

    project_id: ProjectId
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,63}$")]
    model_version_id: ModelVersionId
    engine_profile: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings insisted on; the rest is compiled (GET …/profiles says why)",
    )
    profile_reasons: Reasons = Field(
        default_factory=dict, description="Setting -> why it is insisted on", examples=[{}]
    )
    min_replicas: _Replicas = 0
    max_replicas: Annotated[int, Field(ge=1, le=services.MAX_REPLICAS)] = 1
    idle_timeout_s: _IdleS = 300
    slo_class: _Word = "interactive"
    queue_order: QueueOrder = QueueOrder.EDF
    locality_window_tokens: _Window = 2_000
    admission: Admission = Admission.AUTO
    price: _Word = "standard"


class DeploymentChange(Body):
    """What is left out stays as it is."""

    model_version_id: ModelVersionId | None = None
    engine_profile: dict[str, Any] | None = None
    profile_reasons: Reasons = Field(
        default_factory=dict, description="Setting -> why it is insisted on", examples=[{}]
    )
    min_replicas: _Replicas | None = None
    max_replicas: Annotated[int, Field(ge=1, le=services.MAX_REPLICAS)] | None = None
    idle_timeout_s: _IdleS | None = None
    slo_class: _Word | None = None
    queue_order: QueueOrder | None = None
    locality_window_tokens: _Window | None = None
    admission: Admission | None = None
    price: _Word | None = None


class DeploymentQuery(PageQuery):
    """Which deployments."""

    project_id: ProjectId | None = None
    name: Annotated[str, Field(max_length=64)] | None = None
    phase: Phase | None = None


class ModelVersionOut(Schema):
    """One exact set of weights."""

    id: ModelVersionId
    digest: str
    name: str
    source_kind: str
    size_bytes: int
    n_params: int | None
    max_model_len: int = Field(description="Longest prompt and completion together, tokens")
    licence: str = Field(description="SPDX identifier; empty where it is not known")
    created_at: datetime
    retired_at: datetime | None = Field(description="Nothing new is served from it since")


class ModelVersionQuery(PageQuery):
    """Which model versions."""

    name: Annotated[str, Field(max_length=120)] | None = None
    licence: Annotated[str, Field(max_length=64)] | None = None
    retired: bool | None = None


class SloClassOut(Schema):
    """A promise of speed."""

    name: str
    band: int = Field(description="Order in the fair queue; 0 is served first")
    ttft_ms: int = Field(description="Target time to the first token")
    itl_ms: int = Field(description="Target time between tokens, on average over an answer")
    deadline_s: int = Field(description="Target time to the last token")
    objective_ppm: int = Field(description="Millionths of the requests that must meet all targets")


class SloClasses(Schema):
    """All service classes, first served first."""

    data: list[SloClassOut]


def deployment_out(row: Deployment) -> DeploymentOut:
    return DeploymentOut(
        id=row.id,
        project_id=row.project_id,
        name=row.name,
        model_version_id=row.model_version_id,
        engine_profile=row.engine_profile,
        min_replicas=row.min_replicas,
        max_replicas=row.max_replicas,
        idle_timeout_s=row.idle_timeout_s,
        slo_class=row.slo_class.name,
        queue_order=QueueOrder(row.queue_order),
        locality_window_tokens=row.locality_window_tokens,
        admission=Admission(row.admission),
        price=row.price_version.name,
        phase=Phase(row.phase),
        last_error=row.last_error,
        generation=row.generation,
        created_at=row.created_at,
    )


def version_out(row: ModelVersion) -> ModelVersionOut:
    return ModelVersionOut(
        id=row.id,
        digest=row.digest,
        name=row.name,
        source_kind=row.source_kind,
        size_bytes=row.size_bytes,
        n_params=row.n_params,
        max_model_len=row.max_model_len,
        licence=row.licence,
        created_at=row.created_at,
        retired_at=row.retired_at,
    )


def _found(request: ApiRequest, deployment_id: UUID) -> Deployment:
    return selectors.deployment(organization_id=request.caller.organization_id, deployment_id=deployment_id)


def _current(request: ApiRequest, deployment_id: DeploymentId, **_: object) -> tuple[Model, Any]:
    return _found(request, deployment_id), deployment_out


def _current_version(request: ApiRequest, version_id: ModelVersionId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return selectors.model_version(organization_id=organization_id, model_version_id=version_id), version_out


def _roll_out(request: ApiRequest, deployment_id: UUID) -> None:
    """An operation that ends when what runs is what is wanted now; its address is a header of the answer."""
    row = Deployment.objects.get(organization_id=request.caller.organization_id, id=deployment_id)
    request.operation_id = operations.begin(
        organization_id=request.caller.organization_id,
        kind=ROLLOUT,
        subject=str(row),
        params={"generation": row.generation},
        max_s=MAX_S[ROLLOUT],
    ).id


@operation(router, "GET", "/deployments", Permission.DEPLOYMENTS_READ, Page[DeploymentOut])
def list_deployments(request: ApiRequest, query: Query[DeploymentQuery]) -> Page[DeploymentOut]:
    """Deployments, newest first."""
    rows = Deployment.objects.filter(
        organization_id=request.caller.organization_id, deleted_at=None
    ).select_related("price_version", "slo_class")
    rows = matching(rows, project_id=query.project_id, name=query.name, phase=query.phase)
    return page(rows, query, deployment_out)


@operation(router, "POST", "/deployments", Permission.DEPLOYMENTS_WRITE, DeploymentOut, status=201)
def create_deployment(request: ApiRequest, body: NewDeployment) -> DeploymentOut:
    """Serve a model version under a name. `Operation-Location` names the rollout to follow."""
    made = services.create_deployment(
        organization_id=request.caller.organization_id, **{**body.model_dump(), **_ids(body)}
    )
    _roll_out(request, made.id)
    return deployment_out(_found(request, made.id))


@operation(router, "GET", "/deployments/{deployment_id}", Permission.DEPLOYMENTS_READ, DeploymentOut)
def get_deployment(request: ApiRequest, deployment_id: DeploymentId) -> DeploymentOut:
    """One deployment."""
    return deployment_out(_found(request, deployment_id))


@operation(
    router,
    "PATCH",
    "/deployments/{deployment_id}",
    Permission.DEPLOYMENTS_WRITE,
    DeploymentOut,
    current=_current,
)
def change_deployment(
    request: ApiRequest, deployment_id: DeploymentId, body: DeploymentChange
) -> DeploymentOut:
    """Change what is wanted; the autoscaler makes it so. `Operation-Location` names the rollout to follow."""
    change = services.Change(**{**body.model_dump(), **_ids(body)})
    before = _found(request, deployment_id).generation
    changed = services.update_deployment(
        organization_id=request.caller.organization_id, deployment_id=deployment_id, change=change
    )
    if changed.generation != before:
        _roll_out(request, deployment_id)
    return deployment_out(_found(request, deployment_id))


@operation(
    router,
    "DELETE",
    "/deployments/{deployment_id}",
    Permission.DEPLOYMENTS_WRITE,
    None,
    status=204,
    current=_current,
)
def delete_deployment(request: ApiRequest, deployment_id: DeploymentId) -> None:
    """Stop serving it: its replicas are drained, its name is free again."""
    services.delete_deployment(organization_id=request.caller.organization_id, deployment_id=deployment_id)
    _roll_out(request, deployment_id)


@operation(router, "GET", "/model-versions", Permission.DEPLOYMENTS_READ, Page[ModelVersionOut])
def list_model_versions(request: ApiRequest, query: Query[ModelVersionQuery]) -> Page[ModelVersionOut]:
    """Model versions, newest first. `manage.py deploy` registers them."""
    rows = ModelVersion.objects.filter(organization_id=request.caller.organization_id)
    for name in ("name", "licence"):
        value = getattr(query, name)
        if value is not None:
            rows = rows.filter(**{name: value})
    if query.retired is not None:
        rows = rows.filter(retired_at__isnull=not query.retired)
    return page(rows, query, version_out)


@operation(router, "GET", "/model-versions/{version_id}", Permission.DEPLOYMENTS_READ, ModelVersionOut)
def get_model_version(request: ApiRequest, version_id: ModelVersionId) -> ModelVersionOut:
    """One model version."""
    return version_out(
        selectors.model_version(organization_id=request.caller.organization_id, model_version_id=version_id)
    )


@operation(
    router,
    "POST",
    "/model-versions/{version_id}/retire",
    Permission.DEPLOYMENTS_WRITE,
    ModelVersionOut,
    current=_current_version,
)
def retire_model_version(request: ApiRequest, version_id: ModelVersionId) -> ModelVersionOut:
    """Serve nothing new from a model version. Deployments that have it go on."""
    return version_out(
        versions.retire(organization_id=request.caller.organization_id, model_version_id=version_id)
    )


@operation(router, "GET", "/slo-classes", Permission.DEPLOYMENTS_READ, SloClasses)
def list_slo_classes(request: ApiRequest) -> SloClasses:
    """Service classes, first served first."""
    return SloClasses(
        data=[
            SloClassOut(
                name=row.name,
                band=row.band,
                ttft_ms=row.ttft_ms,
                itl_ms=row.itl_ms,
                deadline_s=row.deadline_s,
                objective_ppm=row.objective_ppm,
            )
            for row in selectors.slo_classes()
        ]
    )


def _ids(body: Schema) -> dict[str, UUID | None]:
    """Ids as they are inside; dumping writes them as they are outside."""
    return {name: getattr(body, name) for name in ("project_id", "model_version_id") if hasattr(body, name)}
