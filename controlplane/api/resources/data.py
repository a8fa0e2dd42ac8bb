"""All of an organization's data: exports of it, and its erasure. For owners only."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Annotated, Any

from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.values import Body, ErasureId, ExportId
from controlplane.lifecycle import erasure, exports
from controlplane.lifecycle.models import Erasure, ErasureState, Export
from controlplane.operations.models import Operation, State
from controlplane.tenants.rights import Permission

router = Router(tags=["data"])


class ExportOut(Schema):
    """A copy of everything that belongs to the organization, without secrets. Gone at `expires_at`."""

    id: ExportId
    state: State
    progress: int = Field(description="percent")
    message: str
    n_parts: int = Field(description="of JSON lines, numbered from 0; final once it has succeeded")
    n_rows: int
    created_at: datetime
    expires_at: datetime


class ExportPartOut(Schema):
    """Some of the rows, each `{"table": …, "row": {…}}`."""

    n: int
    rows: list[dict[str, Any]]


class NewErasure(Body):
    """`confirm` is the organization's slug, so that nobody erases by mistake."""

    confirm: Annotated[str, Field(max_length=60)]
    grace_days: Annotated[
        int, Field(ge=0, le=erasure.MAX_GRACE.days, description="until then it can be cancelled")
    ] = erasure.GRACE.days


class ErasureOut(Schema):
    """An erasure under way. At `due_at` the organization is suspended, half an hour later its data goes."""

    id: ErasureId
    state: ErasureState
    requested_at: datetime
    due_at: datetime


def export_out(row: Export) -> ExportOut:
    works = Operation.objects.filter(organization_id=row.organization_id)
    work = works.filter(id=row.operation_id).first() if row.operation_id else None
    return ExportOut(
        id=row.id,
        state=State(work.state)
        if work
        else State.SUCCEEDED,  # rows of operations may be forgotten before the export is
        progress=work.progress if work else 100,
        message=(work.error_message or work.message) if work else "",
        n_parts=row.n_parts,
        n_rows=row.n_rows,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def erasure_out(row: Erasure) -> ErasureOut:
    return ErasureOut(
        id=row.id, state=ErasureState(row.state), requested_at=row.requested_at, due_at=row.due_at
    )


@operation(router, "GET", "/organization/exports", Permission.DATA_READ, Page[ExportOut])
def list_exports(request: ApiRequest, query: Query[PageQuery]) -> Page[ExportOut]:
    """Exports that have not expired, newest first."""
    rows = Export.objects.filter(
        organization_id=request.caller.organization_id, expires_at__gt=timezone.now()
    )
    return page(rows, query, export_out)


@operation(router, "POST", "/organization/exports", Permission.DATA_WRITE, ExportOut, status=201)
def create_export(request: ApiRequest) -> ExportOut:
    """Export everything that belongs to the organization.

    It is written in the background: read it again until `state` is `succeeded`, then fetch its parts.
    """
    return export_out(exports.begin(organization_id=request.caller.organization_id))


@operation(router, "GET", "/organization/exports/{export_id}", Permission.DATA_READ, ExportOut)
def get_export(request: ApiRequest, export_id: ExportId) -> ExportOut:
    """One export."""
    return export_out(exports.export(organization_id=request.caller.organization_id, export_id=export_id))


@operation(router, "GET", "/organization/exports/{export_id}/parts/{n}", Permission.DATA_READ, ExportPartOut)
def get_export_part(
    request: ApiRequest, export_id: ExportId, n: Annotated[int, Field(ge=0, le=2**31 - 1)]
) -> ExportPartOut:
    """One part of an export, at most a thousand rows."""
    found = exports.part(organization_id=request.caller.organization_id, export_id=export_id, n=n)
    return ExportPartOut(n=n, rows=[json.loads(line) for line in found.splitlines()])


@operation(router, "DELETE", "/organization/exports/{export_id}", Permission.DATA_WRITE, None, status=204)
def delete_export(request: ApiRequest, export_id: ExportId) -> None:
    """Delete an export before it expires."""
    exports.delete(organization_id=request.caller.organization_id, export_id=export_id)


@operation(router, "GET", "/organization/erasure", Permission.DATA_READ, ErasureOut)
def get_erasure(request: ApiRequest) -> ErasureOut:
    """The erasure under way; 404 where none was asked for."""
    return erasure_out(erasure.current(organization_id=request.caller.organization_id))


@operation(router, "PUT", "/organization/erasure", Permission.DATA_WRITE, ErasureOut)
def request_erasure(request: ApiRequest, body: NewErasure) -> ErasureOut:
    """Erase the organization and everything that belongs to it, or set another date for that.

    Nothing happens until `due_at`; until then it can be cancelled. Then it is suspended, and nobody can bring it back.
    """
    return erasure_out(
        erasure.request(
            organization_id=request.caller.organization_id,
            confirm=body.confirm,
            grace=timedelta(days=body.grace_days),
        )
    )


@operation(router, "DELETE", "/organization/erasure", Permission.DATA_WRITE, None, status=204)
def cancel_erasure(request: ApiRequest) -> None:
    """Take an erasure back that has not begun."""
    erasure.cancel(organization_id=request.caller.organization_id)
