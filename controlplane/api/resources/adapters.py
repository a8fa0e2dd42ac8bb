"""LoRA adapters: a tenant's own weights on top of a deployment's model, uploaded, checked, served, retired."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar

from django.db.models import Model
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.adapters import files, selectors, services
from controlplane.adapters.models import NAME_SHAPE, Adapter, AdapterState
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.resources.operations import OperationOut, operation_out
from controlplane.api.values import AdapterId, Body, DeploymentId, ProjectId
from controlplane.tenants.rights import Permission

router = Router(tags=["adapters"])
_Name = Annotated[str, Field(pattern=NAME_SHAPE, examples=["formal"])]


class AdapterOut(Schema):
    """LoRA weights under a name. Programs send `model` to /v1."""

    etag_leaves_out: ClassVar[frozenset[str]] = frozenset({"not_served_because"})

    id: AdapterId
    project_id: ProjectId
    deployment_id: DeploymentId
    name: str = Field(examples=["formal"])
    model: str = Field(
        description="What programs send as `model`: deployment:adapter", examples=["chat:formal"]
    )
    state: AdapterState = Field(examples=["ready"])
    error_code: str = Field(description="Why its files were refused; empty otherwise", examples=[""])
    error_message: str = Field(examples=[""])
    not_served_because: str = Field(
        description="Empty for one that answers requests; else what is in its way", examples=[""]
    )
    base_digest: str = Field(description="Digest of the model version that it is for")
    digest: str = Field(description="SHA-256 of its manifest; empty until its files are checked")
    size_bytes: int
    rank: int | None = Field(description="The highest of its layers", examples=[16])
    modules: list[str] = Field(description="Kinds of layers that it changes", examples=[["q_proj", "v_proj"]])
    n_params: int | None
    created_at: datetime
    ready_at: datetime | None
    retired_at: datetime | None


class NewAdapterOut(AdapterOut):
    """A new adapter, and where its files go."""

    upload: dict[str, str] | None = Field(
        description="File name -> URL that takes it by PUT; null where this control plane has no object store: its "
        "operator then publishes the files (manage.py publish_adapter)",
        examples=[{"adapter_config.json": "https://example.org/…", "adapter_model.safetensors": "https://…"}],
    )
    upload_expires_at: datetime | None


class NewAdapter(Body):
    """An adapter to be. Its files come afterwards."""

    deployment_id: DeploymentId
    name: _Name


class AdapterQuery(PageQuery):
    """Which adapters."""

    project_id: ProjectId | None = None
    deployment_id: DeploymentId | None = None
    name: Annotated[str, Field(max_length=48)] | None = None
    state: AdapterState | None = None


def adapter_out(row: Adapter) -> AdapterOut:
    return AdapterOut(**_values(row))


def _values(row: Adapter) -> dict[str, Any]:
    return {
        "id": row.id,
        "project_id": row.project_id,
        "deployment_id": row.deployment_id,
        "name": row.name,
        "model": row.model,
        "state": AdapterState(row.state),
        "error_code": row.error_code,
        "error_message": row.error_message,
        "not_served_because": selectors.why_not_served(row),
        "base_digest": row.base_digest,
        "digest": row.digest,
        "size_bytes": row.size_bytes,
        "rank": row.rank,
        "modules": row.modules,
        "n_params": row.n_params,
        "created_at": row.created_at,
        "ready_at": row.ready_at,
        "retired_at": row.retired_at,
    }


def _current(request: ApiRequest, adapter_id: AdapterId, **_: object) -> tuple[Model, Any]:
    return selectors.adapter(
        organization_id=request.caller.organization_id, adapter_id=adapter_id
    ), adapter_out


@operation(router, "GET", "/adapters", Permission.DEPLOYMENTS_READ, Page[AdapterOut])
def list_adapters(request: ApiRequest, query: Query[AdapterQuery]) -> Page[AdapterOut]:
    """Adapters, newest first, refused and retired ones included."""
    rows = selectors.adapters(organization_id=request.caller.organization_id)
    for name in ("project_id", "deployment_id", "name", "state"):
        value = getattr(query, name)
        if value is not None:
            rows = rows.filter(**{name: value})
    return page(rows, query, adapter_out)


@operation(router, "POST", "/adapters", Permission.DEPLOYMENTS_WRITE, NewAdapterOut, status=201)
def create_adapter(request: ApiRequest, body: NewAdapter) -> NewAdapterOut:
    """Register an adapter of a deployment that has `max_loras` in its engine profile.

    PUT its two files, as PEFT saves them, to the URLs of the answer, then call `complete`. Nothing of it is served
    before its files were checked.
    """
    row = services.register(
        organization_id=request.caller.organization_id, deployment_id=body.deployment_id, name=body.name
    )
    urls = files.upload_urls(row.id)
    expires_at = None if urls is None else timezone.now() + timedelta(seconds=files.UPLOAD_S)
    return NewAdapterOut(**_values(row), upload=urls, upload_expires_at=expires_at)


@operation(router, "GET", "/adapters/{adapter_id}", Permission.DEPLOYMENTS_READ, AdapterOut)
def get_adapter(request: ApiRequest, adapter_id: AdapterId) -> AdapterOut:
    """One adapter, whether it is served, and if not, why."""
    return adapter_out(
        selectors.adapter(organization_id=request.caller.organization_id, adapter_id=adapter_id)
    )


@operation(
    router,
    "POST",
    "/adapters/{adapter_id}/complete",
    Permission.DEPLOYMENTS_WRITE,
    OperationOut,
    status=202,
)
def complete_adapter(request: ApiRequest, adapter_id: AdapterId) -> OperationOut:
    """Its files are uploaded: check them, and serve it if they can be.

    Safetensors only, of the rank and the layers that the deployment's model and engine take; what is refused says which
    file and why.
    """
    begun = services.begin_receiving(organization_id=request.caller.organization_id, adapter_id=adapter_id)
    request.operation_id = begun.id
    return operation_out(begun)


@operation(
    router,
    "DELETE",
    "/adapters/{adapter_id}",
    Permission.DEPLOYMENTS_WRITE,
    None,
    status=204,
    current=_current,
)
def retire_adapter(request: ApiRequest, adapter_id: AdapterId) -> None:
    """Retire an adapter: the next request for it is a 404, running answers end in peace.

    Its files are kept for a week.
    """
    services.retire(organization_id=request.caller.organization_id, adapter_id=adapter_id)
