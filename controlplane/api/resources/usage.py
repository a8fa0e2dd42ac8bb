"""Usage: what was served and what it cost, in sums and request by request. From the booked events, seconds behind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from django.conf import settings
from django.db.models import Q, QuerySet
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from billing.models import UsageEvent
from billing.selectors import SUMS, events
from controlplane import ids
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import matching
from controlplane.api.values import DeploymentId, KeyId, ProjectId
from controlplane.errors import InvalidInputError
from controlplane.tenants.end_customers import MAX_ID, pseudonym
from controlplane.tenants.rights import Permission

router = Router(tags=["usage"])

MAX_SPAN: Final = timedelta(days=92)
MAX_ROWS: Final = 1000


class GroupBy(StrEnum):
    """What sums are made for."""

    PROJECT = "project"
    KEY = "key"
    MODEL = "model"
    DAY = "day"
    END_CUSTOMER = "end_customer"


_COLUMNS: Final = {
    GroupBy.PROJECT: "project_id",
    GroupBy.KEY: "api_key_id",
    GroupBy.MODEL: "model",
    GroupBy.DAY: "day",
    GroupBy.END_CUSTOMER: "end_customer",
}
_PREFIXES: Final = {GroupBy.PROJECT: ids.Prefix.PROJECT, GroupBy.KEY: ids.Prefix.API_KEY}


class UsageQuery(Schema):
    """Which requests: admitted in a span of time, by default the last 30 days."""

    since: datetime | None = Field(default=None, description="Inclusive; with time zone")
    until: datetime | None = Field(default=None, description="Exclusive; default now")
    project_id: ProjectId | None = None
    key_id: KeyId | None = None
    model: str | None = Field(default=None, max_length=64)
    end_customer: str | None = Field(
        default=None,
        max_length=MAX_ID,
        description="Your own id, as sent in safety_identifier, user or X-Corral-End-Customer",
    )


class SumsQuery(UsageQuery):
    """Which requests, and how they are summed."""

    group_by: GroupBy = GroupBy.DAY


class UsageRow(Schema):
    """Sums of one group."""

    group: str = Field(
        description="Id of a project or key, name of a model, pseudonym of an end customer (empty: none), or a UTC day"
    )
    n_requests: int
    n_failed: int
    n_prompt_tokens: int
    n_cached_tokens: int = Field(description="Part of n_prompt_tokens, served from the prefix cache")
    n_completion_tokens: int
    cost_nano: int


class Usage(Schema):
    """Sums, the dearest group first (days: the newest)."""

    since: datetime
    until: datetime
    group_by: GroupBy
    data: list[UsageRow]


class RequestOut(Schema):
    """One finished request."""

    id: str = Field(pattern="^req_[0-9a-f]{32}$")
    project_id: ProjectId
    key_id: KeyId
    deployment_id: DeploymentId
    model: str
    status: int
    finish_reason: str
    n_prompt_tokens: int
    n_cached_tokens: int
    n_completion_tokens: int
    attempts: int = Field(description="Replicas it was handed to")
    admitted_at: datetime
    first_token_ms: int | None
    duration_ms: int
    cost_nano: int


class RequestsQuery(UsageQuery):
    """Which page of requests."""

    limit: int = Field(default=50, ge=1, le=200)
    cursor: str | None = Field(
        default=None, pattern="^req_[0-9a-f]{32}$", description="The last id of the page before"
    )


class RequestPage(Schema):
    """Requests, newest first."""

    data: list[RequestOut]
    next_cursor: str | None


@operation(router, "GET", "/usage", Permission.USAGE_READ, Usage)
def get_usage(request: ApiRequest, query: Query[SumsQuery]) -> Usage:
    """Requests, tokens and cost, summed by project, key, model, end customer or day. At most 1,000 groups."""
    since, until = _span(query)
    column = _COLUMNS[query.group_by]
    sums = (
        _events(request, query, since, until)
        .values(column)
        .annotate(**SUMS)
        .order_by("-day" if query.group_by is GroupBy.DAY else "-cost", column)[:MAX_ROWS]
    )
    rows = [
        UsageRow(
            group=_name(query.group_by, row[column]),
            n_requests=row["n_requests"],
            n_failed=row["n_failed"],
            n_prompt_tokens=row["n_prompt"],
            n_cached_tokens=row["n_cached"],
            n_completion_tokens=row["n_completion"],
            cost_nano=row["cost"],
        )
        for row in sums
    ]
    return Usage(since=since, until=until, group_by=query.group_by, data=rows)


@operation(router, "GET", "/requests", Permission.USAGE_READ, RequestPage)
def list_requests(request: ApiRequest, query: Query[RequestsQuery]) -> RequestPage:
    """Finished requests, newest first."""
    since, until = _span(query)
    rows = _events(request, query, since, until)
    if query.cursor is not None:
        last = _booked(request, query.cursor)
        if last is None:
            raise InvalidInputError("cursor: not one that a page gave", field="cursor")
        rows = rows.filter(
            Q(admitted_at__lt=last.admitted_at)
            | Q(admitted_at=last.admitted_at, request_id__lt=last.request_id)
        )
    found = list(rows.order_by("-admitted_at", "-request_id")[: query.limit + 1])
    shown = [request_out(row) for row in found[: query.limit]]
    return RequestPage(data=shown, next_cursor=shown[-1].id if len(found) > query.limit else None)


def _span(query: UsageQuery) -> tuple[datetime, datetime]:
    until = query.until or timezone.now()
    for name, value in (("since", query.since), ("until", until)):
        if value is not None and value.tzinfo is None:
            raise InvalidInputError(f"{name}: give a time zone, for example {value.isoformat()}Z", field=name)
    try:
        since = query.since or until - timedelta(days=30)
        if not since < until <= since + MAX_SPAN:
            raise InvalidInputError(
                f"since: must be before until, at most {MAX_SPAN.days} days", field="since"
            )
        # In UTC: the database knows no offsets beyond sixteen hours. Room for the days around it.
        (since - timedelta(days=2)).astimezone(UTC), (until + timedelta(days=2)).astimezone(UTC)
        return since.astimezone(UTC), until.astimezone(UTC)
    except OverflowError:
        raise InvalidInputError("until: out of range", field="until") from None


def _events(request: ApiRequest, query: UsageQuery, since: datetime, until: datetime) -> QuerySet[UsageEvent]:
    rows = events(organization_id=request.caller.organization_id, since=since, until=until)
    rows = matching(rows, project_id=query.project_id, api_key_id=query.key_id, model=query.model)
    if query.end_customer is not None:
        whose = pseudonym(settings.ENV.digest_secret, request.caller.organization_id.hex, query.end_customer)
        rows = rows.filter(end_customer=whose)
    return rows


def _booked(request: ApiRequest, text: str) -> UsageEvent | None:
    try:
        found = ids.from_text(ids.Prefix.REQUEST, text)
        day = ids.day_of(found)
    except (ValueError, OverflowError, OSError):
        return None
    return UsageEvent.objects.filter(
        organization_id=request.caller.organization_id, day=day, request_id=found
    ).first()


def _name(group: GroupBy, value: Any) -> str:
    return ids.to_text(_PREFIXES[group], value) if group in _PREFIXES else str(value)


def request_out(row: UsageEvent) -> RequestOut:
    return RequestOut(
        id=ids.to_text(ids.Prefix.REQUEST, row.request_id),
        project_id=row.project_id,
        key_id=row.api_key_id,
        deployment_id=row.deployment_id,
        model=row.model,
        status=row.status,
        finish_reason=row.finish_reason,
        n_prompt_tokens=row.n_prompt_tokens,
        n_cached_tokens=row.n_cached_tokens,
        n_completion_tokens=row.n_completion_tokens,
        attempts=row.attempts,
        admitted_at=row.admitted_at,
        first_token_ms=row.first_token_ms,
        duration_ms=row.duration_ms,
        cost_nano=row.cost_nano,
    )
