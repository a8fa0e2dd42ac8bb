"""Quotas: how many machines, GPU-hours and dollars an hour the organization may have, and has."""

from __future__ import annotations

from typing import Annotated

from django.utils import timezone
from ninja import Field, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.values import MAX_64, Body
from controlplane.quotas import selectors, services
from controlplane.quotas.models import QuotaKind
from controlplane.tenants.rights import Permission

router = Router(tags=["quotas"])


class QuotaOut(Schema):
    """One kind of quota. `spend_rate` is in nano-dollars an hour; GPU-hours are those of a calendar window."""

    kind: QuotaKind
    limit: int | None = Field(description="What holds: the lower of the two; null: no limit")
    own: int | None = Field(description="Set by the organization itself")
    ceiling: int | None = Field(description="Set by the house's operator; `own` cannot exceed it")
    used: int = Field(description="By machines that were bought for the organization's deployments")


class QuotasOut(Schema):
    """Every kind."""

    data: list[QuotaOut]


class QuotaValue(Body):
    """A limit of one's own."""

    limit: Annotated[int, Field(ge=0, le=MAX_64, examples=[8])]


def _out(organization_id: object, limit: selectors.Limit) -> QuotaOut:
    used = selectors.own_use(organization_id=organization_id, kind=limit.kind, now=timezone.now())  # type: ignore[arg-type]
    return QuotaOut(kind=limit.kind, limit=limit.limit, own=limit.own, ceiling=limit.ceiling, used=used)


def _one(request: ApiRequest, kind: QuotaKind) -> QuotaOut:
    organization_id = request.caller.organization_id
    found = selectors.limits(organization_id=organization_id)
    return _out(organization_id, next(each for each in found if each.kind is kind))


@operation(router, "GET", "/quotas", Permission.QUOTAS_READ, QuotasOut)
def list_quotas(request: ApiRequest) -> QuotasOut:
    """Every kind of quota with what is used. No machine is launched that would break one."""
    organization_id = request.caller.organization_id
    return QuotasOut(
        data=[_out(organization_id, each) for each in selectors.limits(organization_id=organization_id)]
    )


@operation(router, "PUT", "/quotas/{kind}", Permission.QUOTAS_WRITE, QuotaOut)
def set_quota(request: ApiRequest, kind: QuotaKind, body: QuotaValue) -> QuotaOut:
    """Set the organization's own limit, up to the house's ceiling. Machines that run stay."""
    services.set_own(organization_id=request.caller.organization_id, kind=kind, limit=body.limit)
    return _one(request, kind)


@operation(router, "DELETE", "/quotas/{kind}", Permission.QUOTAS_WRITE, None, status=204)
def clear_quota(request: ApiRequest, kind: QuotaKind) -> None:
    """Only the house's ceiling holds then."""
    services.clear_own(organization_id=request.caller.organization_id, kind=kind)
