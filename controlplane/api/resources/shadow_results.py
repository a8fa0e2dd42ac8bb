"""What shadows made of the requests that they were copied: one by one, and in sum beside what callers were given.

On the router of upstreams, whose paths these are under. Reads only: copies are made by the gateways and kept for a
month (controlplane/upstreams). It never shows texts, which are not kept.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import date, datetime, timedelta

from django.utils import timezone
from ninja import Field, Query, Schema

from controlplane import ids
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.resources import upstreams
from controlplane.api.values import UpstreamId
from controlplane.tenants.rights import Permission
from controlplane.upstreams import selectors
from controlplane.upstreams.models import ShadowResult


class ShadowResultQuery(PageQuery):
    """Which results."""

    failed: bool | None = Field(default=None, description="true: the shadow gave no answer; false: it did")
    is_same: bool | None = Field(default=None, description="Of greedy requests: letter for letter, or not")


class ShadowResultOut(Schema):
    """What a shadow made of one request beside the caller's own answer. Nothing of it was shown, or billed to the
    caller. Times to tokens are known of callers that stream."""

    request_id: str = Field(pattern="^req_[0-9a-f]{32}$")
    at: datetime
    status: int
    code: str
    finish_reason: str
    first_token_ms: int | None
    itl_us: int | None = Field(description="Mean gap between tokens, microseconds")
    duration_ms: int
    n_prompt_tokens: int
    n_completion_tokens: int
    cost_nano: int
    own_finish_reason: str
    own_first_token_ms: int | None
    own_itl_us: int | None
    own_duration_ms: int | None
    own_n_completion_tokens: int | None
    is_same: bool | None = Field(description="Letter for letter; only of requests at temperature 0")
    similarity_ppm: int | None


class Compared(Schema):
    """A figure of the shadow beside the callers' own, over copies that have both."""

    n: int
    p50: float | None
    p99: float | None
    own_p50: float | None
    own_p99: float | None
    difference_p50: float | None = Field(description="Of each pair: the shadow's less the caller's own")
    difference_p99: float | None


class ShadowSummaryOut(Schema):
    """Whether callers would have noticed the shadow in place of what answered them. Shares in millionths."""

    upstream_id: UpstreamId
    since: date
    n: int = Field(description="Copies that were answered, or failed")
    n_failed: int
    n_compared: int = Field(description="... whose texts should be the same: of requests at temperature 0")
    same_ppm: int | None = Field(description="Share of those that are, letter for letter")
    similarity_ppm: int | None = Field(description="Mean share of triples of words in common, of all")
    same_finish_ppm: int | None = Field(description="Share with the caller's own finish reason")
    first_token_ms: Compared
    itl_us: Compared
    duration_ms: Compared
    completion_tokens: Compared
    cost_nano: int
    errors: dict[str, int] = Field(description="Failed copies by code")
    skipped: dict[str, int] = Field(
        description="Chosen and not copied: `crowded`, `rate`, `busy`, `budget` or `lost`"
    )


def shadow_out(row: ShadowResult) -> ShadowResultOut:
    told = {name: getattr(row, name) for name in ShadowResultOut.model_fields}
    return ShadowResultOut(**(told | {"request_id": ids.to_text(ids.Prefix.REQUEST, row.request_id)}))


@operation(
    upstreams.router,
    "GET",
    "/upstreams/{upstream_id}/shadow-results",
    Permission.UPSTREAMS_READ,
    Page[ShadowResultOut],
)
def list_shadow_results(
    request: ApiRequest, upstream_id: UpstreamId, query: Query[ShadowResultQuery]
) -> Page[ShadowResultOut]:
    """What a shadow made of the requests it was copied, newest first; kept for a month."""
    organization_id = request.caller.organization_id
    selectors.upstream(organization_id=organization_id, upstream_id=upstream_id)
    rows = selectors.shadow_results(organization_id=organization_id, upstream_id=upstream_id)
    if query.failed is not None:
        rows = rows.exclude(status=200) if query.failed else rows.filter(status=200)
    rows = matching(rows, is_same=query.is_same)
    return page(rows, query, shadow_out)


@operation(
    upstreams.router,
    "GET",
    "/upstreams/{upstream_id}/shadow-summary",
    Permission.UPSTREAMS_READ,
    ShadowSummaryOut,
)
def get_shadow_summary(
    request: ApiRequest, upstream_id: UpstreamId, query: Query[upstreams.UseQuery]
) -> ShadowSummaryOut:
    """How a shadow compares with what callers were given: texts, finish reasons, tokens, times (p50 and p99 of both,
    and of the differences), errors, and what was not copied. Over the results that are kept."""
    organization_id = request.caller.organization_id
    selectors.upstream(organization_id=organization_id, upstream_id=upstream_id)
    since = timezone.now().date() - timedelta(days=query.days - 1)
    found = selectors.shadow_summary(organization_id=organization_id, upstream_id=upstream_id, since=since)
    return ShadowSummaryOut(upstream_id=upstream_id, since=since, **asdict(found))
