"""Long operations: what takes longer than a call, to be followed until it ends."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import OperationId
from controlplane.operations import services
from controlplane.operations.models import Operation, State
from controlplane.tenants.rights import Permission

router = Router(tags=["operations"])


class OperationError(Schema):
    """Why an operation failed."""

    code: str
    detail: str


class OperationOut(Schema):
    """A long operation. It is over when `state` is succeeded or failed."""

    id: OperationId
    kind: str = Field(description="rollout, drain_replica, drain_machine, …")
    subject: str = Field(description="Id of what it works on")
    state: State
    progress: Annotated[int, Field(ge=0, le=100)]
    message: str = Field(description="What it does now, for people")
    result: dict[str, Any] | None = Field(description="Null until it has succeeded")
    error: OperationError | None = Field(description="Null unless it has failed")
    actor: str = Field(description="Who asked for it")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    deadline_at: datetime = Field(description="It is given up then")


class OperationQuery(PageQuery):
    """Which operations."""

    kind: Annotated[str, Field(max_length=40)] | None = None
    subject: Annotated[str, Field(max_length=64)] | None = None
    state: State | None = None


def operation_out(row: Operation) -> OperationOut:
    return OperationOut(
        id=row.id,
        kind=row.kind,
        subject=row.subject,
        state=State(row.state),
        progress=row.progress,
        message=row.message,
        result=row.result,
        error=OperationError(code=row.error_code, detail=row.error_message) if row.error_code else None,
        actor=row.actor,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        deadline_at=row.deadline_at,
    )


@operation(router, "GET", "/operations", Permission.ORGANIZATION_READ, Page[OperationOut])
def list_operations(request: ApiRequest, query: Query[OperationQuery]) -> Page[OperationOut]:
    """Long operations, newest first. Those that ended are kept for 30 days."""
    rows = Operation.objects.filter(organization_id=request.caller.organization_id)
    for name in ("kind", "subject", "state"):
        value = getattr(query, name)
        if value is not None:
            rows = rows.filter(**{name: value})
    return page(rows, query, operation_out)


@operation(router, "GET", "/operations/{operation_id}", Permission.ORGANIZATION_READ, OperationOut)
def get_operation(request: ApiRequest, operation_id: OperationId) -> OperationOut:
    """One long operation: its state, how far it is, and how it ended."""
    organization_id = request.caller.organization_id
    return operation_out(services.operation(organization_id=organization_id, operation_id=operation_id))
