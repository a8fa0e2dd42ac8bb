"""Upstreams: OpenAI-compatible endpoints elsewhere, attached to deployments."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Annotated, Any

from django.db.models import Model
from django.utils import timezone
from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.api.values import Body, DeploymentId, UpstreamId
from controlplane.deployments.models import NAME_SHAPE
from controlplane.outbound import MAX_URL
from controlplane.tenants.rights import Permission
from controlplane.upstreams import selectors, services
from controlplane.upstreams.models import TokenLimitField, Upstream, UpstreamRole
from controlplane.upstreams.services import Change

router = Router(tags=["upstreams"])

_Url = Annotated[str, Field(min_length=8, max_length=MAX_URL, examples=["https://api.example.org/v1"])]
_Model = Annotated[str, Field(min_length=1, max_length=200, description="What the endpoint calls the model")]
_Rate = Annotated[int, Field(ge=0, le=services.MAX_RATE)]


def _ranged(name: str, description: str) -> Any:
    least, most = services.RANGES[name]
    return Field(ge=least, le=most, description=description)


_Slots = Annotated[int, _ranged("slots", "Requests it is sent at once")]
_After = Annotated[
    int, _ranged("overflow_after_ms", "Of an overflow: a request waits so long before it goes there")
]
_Share = Annotated[int, _ranged("shadow_ppm", "Of a shadow: millionths of the requests that are copied")]
_ShadowRpm = Annotated[int, _ranged("shadow_rpm", "Of a shadow: most copies a minute")]
_ShadowBudget = Annotated[
    int, _ranged("shadow_budget_nano", "Of a shadow: most that copies may cost in a UTC day, nano-dollars")
]
_Connect = Annotated[int, _ranged("connect_ms", "Most that a connection may take")]
_First = Annotated[int, _ranged("first_token_ms", "Most that the first token may take")]
_Between = Annotated[int, _ranged("between_tokens_ms", "Most between two pieces of an answer")]
_Retries = Annotated[int, _ranged("n_retries", "Further tries, before the first token only")]
_Failures = Annotated[int, _ranged("breaker_failures", "Failures in a row after which it is left alone")]
_Pause = Annotated[int, _ranged("breaker_pause_ms", "For how long at first; doubled each time")]
_ApiKey = Annotated[
    str,
    Field(
        max_length=4096, description="Sent as bearer token; never shown again. Empty: none", examples=["sk-…"]
    ),
]
_Headers = Annotated[
    dict[str, str],
    Field(description="Sent with each request; the values are never shown again", examples=[{"X-Team": "a"}]),
]


class UpstreamOut(Schema):
    """An endpoint. Of its key and headers only the names are told."""

    id: UpstreamId
    name: str
    deployment_id: DeploymentId
    role: UpstreamRole
    target_deployment_id: DeploymentId | None = Field(
        description="Of a shadow that is a deployment of yours: that one; it has no address"
    )
    base_url: str
    model: str
    slots: int
    overflow_after_ms: int
    shadow_ppm: int
    shadow_rpm: int
    shadow_budget_nano: int
    connect_ms: int
    first_token_ms: int
    between_tokens_ms: int
    n_retries: int
    breaker_failures: int
    breaker_pause_ms: int
    extensions: bool = Field(description="Takes top_k, min_p, repetition_penalty and ignore_eos")
    stream_usage: bool = Field(description="Takes stream_options, by which it is asked for its counts")
    max_tokens_field: TokenLimitField
    input_nano_per_million: int = Field(
        description="What it takes for prompt tokens, nano-dollars per million"
    )
    cached_nano_per_million: int = Field(description="... for those that it has cached")
    output_nano_per_million: int = Field(description="... for completion tokens")
    has_api_key: bool
    header_names: list[str]
    enabled: bool
    created_at: datetime
    updated_at: datetime


class _Settings(Body):
    slots: _Slots | None = None
    overflow_after_ms: _After | None = None
    shadow_ppm: _Share | None = None
    shadow_rpm: _ShadowRpm | None = None
    shadow_budget_nano: _ShadowBudget | None = None
    connect_ms: _Connect | None = None
    first_token_ms: _First | None = None
    between_tokens_ms: _Between | None = None
    n_retries: _Retries | None = None
    breaker_failures: _Failures | None = None
    breaker_pause_ms: _Pause | None = None
    extensions: bool | None = None
    stream_usage: bool | None = None
    max_tokens_field: TokenLimitField | None = None
    input_nano_per_million: _Rate | None = None
    cached_nano_per_million: _Rate | None = None
    output_nano_per_million: _Rate | None = None
    api_key: _ApiKey | None = None
    headers: _Headers | None = None
    enabled: bool | None = None


class NewUpstream(_Settings):
    """An endpoint to be, by `base_url` and `model`; a shadow may be a second deployment instead, by
    `target_deployment_id`. Its address must be public, unless the operator allows others."""

    name: Annotated[str, Field(pattern=NAME_SHAPE, description="Unique in the organization")]
    deployment_id: DeploymentId
    role: UpstreamRole
    base_url: _Url | None = None
    model: _Model | None = None
    target_deployment_id: DeploymentId | None = Field(
        None, description="Of the same project; its answers to the copies are charged to that as any other's"
    )


class UpstreamChange(_Settings):
    """What is left out stays as it is; `api_key` "" and `headers` {} take them away."""

    role: UpstreamRole | None = None
    base_url: _Url | None = None
    model: _Model | None = None


class UpstreamQuery(PageQuery):
    """Which endpoints."""

    name: Annotated[str, Field(max_length=64)] | None = None
    deployment_id: DeploymentId | None = None
    role: UpstreamRole | None = None
    enabled: bool | None = None


class UpstreamUse(Schema):
    """What an endpoint was used for, and, of a shadow, how its answers compare. Money in nano-dollars."""

    upstream_id: UpstreamId
    since: date
    n_requests: int
    n_failed: int
    n_counted_here: int = Field(description="Requests without counts of the endpoint's own: counted by us")
    n_prompt_tokens: int
    n_cached_tokens: int
    n_completion_tokens: int
    cost_nano: int = Field(description="At the rates that are set for it")
    revenue_nano: int = Field(description="What callers were charged for these requests")
    margin_nano: int
    n_shadowed: int
    n_shadow_failed: int
    n_compared: int
    n_same: int = Field(description="Word for word what the caller was given")
    similarity_ppm: int | None = Field(description="Mean share of triples of words in common")
    shadow_first_token_ms: int | None
    own_first_token_ms: int | None
    shadow_duration_ms: int | None
    own_duration_ms: int | None
    shadow_cost_nano: int


class Consent(Schema):
    """Whether this organization's requests may be copied to shadows, and its prompts go to endpoints that others
    attached."""

    agreed: bool


class NewConsent(Body):
    """What is agreed from now on."""

    agreed: bool


class UseQuery(Schema):
    days: Annotated[int, Field(ge=1, le=366, description="Today and so many days before it, less one")] = 30


def upstream_out(row: Upstream) -> UpstreamOut:
    names = UpstreamOut.model_fields.keys() - {"enabled", "target_deployment_id"}
    told = {name: getattr(row, name) for name in names}
    return UpstreamOut(**told, target_deployment_id=row.target_id, enabled=row.disabled_at is None)


def _current(request: ApiRequest, upstream_id: UpstreamId, **_: object) -> tuple[Model, Any]:
    organization_id = request.caller.organization_id
    return selectors.upstream(organization_id=organization_id, upstream_id=upstream_id), upstream_out


def _change(body: _Settings) -> Change:
    return Change(**{n: v for n, v in body.model_dump().items() if n in Change.__dataclass_fields__})


@operation(router, "GET", "/upstreams", Permission.UPSTREAMS_READ, Page[UpstreamOut])
def list_upstreams(request: ApiRequest, query: Query[UpstreamQuery]) -> Page[UpstreamOut]:
    """Endpoints that are attached to deployments, newest first."""
    rows = selectors.upstreams(organization_id=request.caller.organization_id)
    rows = matching(rows, name=query.name, deployment_id=query.deployment_id, role=query.role)
    if query.enabled is not None:
        rows = rows.filter(disabled_at__isnull=query.enabled)
    return page(rows, query, upstream_out)


@operation(router, "POST", "/upstreams", Permission.UPSTREAMS_WRITE, UpstreamOut, status=201)
def create_upstream(request: ApiRequest, body: NewUpstream) -> UpstreamOut:
    """Attach an endpoint to a deployment: beside its replicas, as their overflow, or as a shadow that is sent copies of
    a share of the requests. It serves within seconds. Prompts of callers of this deployment leave this house with it:
    where it is shared, they must have agreed; to be copied, everybody must have."""
    return upstream_out(
        services.attach(
            organization_id=request.caller.organization_id,
            deployment_id=body.deployment_id,
            name=body.name,
            base_url=body.base_url or "",
            model=body.model or "",
            target_deployment_id=body.target_deployment_id,
            role=body.role.value,
            change=_change(_Settings(**body.model_dump(include=set(_Settings.model_fields)))),
        )
    )


@operation(router, "GET", "/upstreams/{upstream_id}", Permission.UPSTREAMS_READ, UpstreamOut)
def get_upstream(request: ApiRequest, upstream_id: UpstreamId) -> UpstreamOut:
    """One endpoint."""
    return upstream_out(
        selectors.upstream(organization_id=request.caller.organization_id, upstream_id=upstream_id)
    )


@operation(
    router, "PATCH", "/upstreams/{upstream_id}", Permission.UPSTREAMS_WRITE, UpstreamOut, current=_current
)
def change_upstream(request: ApiRequest, upstream_id: UpstreamId, body: UpstreamChange) -> UpstreamOut:
    """Change an endpoint, disable or enable it. Where it is called differently from now on, what it answers now may go
    on to its end."""
    return upstream_out(
        services.change_upstream(
            organization_id=request.caller.organization_id, upstream_id=upstream_id, change=_change(body)
        )
    )


@operation(
    router,
    "DELETE",
    "/upstreams/{upstream_id}",
    Permission.UPSTREAMS_WRITE,
    None,
    status=204,
    current=_current,
)
def delete_upstream(request: ApiRequest, upstream_id: UpstreamId) -> None:
    """Detach an endpoint. What it answers now may go on to its end."""
    services.detach(organization_id=request.caller.organization_id, upstream_id=upstream_id)


@operation(router, "GET", "/upstreams/{upstream_id}/use", Permission.UPSTREAMS_READ, UpstreamUse)
def get_upstream_use(request: ApiRequest, upstream_id: UpstreamId, query: Query[UseQuery]) -> UpstreamUse:
    """What an endpoint served, what that cost and earned, and how a shadow's answers compare."""
    organization_id = request.caller.organization_id
    selectors.upstream(organization_id=organization_id, upstream_id=upstream_id)
    since = timezone.now().date() - timedelta(days=query.days - 1)
    used = selectors.served(organization_id=organization_id, upstream_id=upstream_id, since=since)
    shadow = selectors.shadowed(organization_id=organization_id, upstream_id=upstream_id, since=since)
    return UpstreamUse(
        upstream_id=upstream_id,
        since=since,
        **{name: getattr(used, name) for name in used.__dataclass_fields__},
        margin_nano=used.margin_nano,
        n_shadowed=shadow.n,
        n_shadow_failed=shadow.n_failed,
        n_compared=shadow.n_compared,
        n_same=shadow.n_same,
        similarity_ppm=shadow.similarity_ppm,
        shadow_first_token_ms=shadow.first_token_ms,
        own_first_token_ms=shadow.own_first_token_ms,
        shadow_duration_ms=shadow.duration_ms,
        own_duration_ms=shadow.own_duration_ms,
        shadow_cost_nano=shadow.cost_nano,
    )


@operation(router, "GET", "/outside-consent", Permission.ORGANIZATION_READ, Consent)
def get_outside_consent(request: ApiRequest) -> Consent:
    """Whether this organization's requests may be copied to shadows, and its prompts go to endpoints that others
    attached."""
    return Consent(agreed=selectors.has_agreed(organization_id=request.caller.organization_id))


@operation(router, "PUT", "/outside-consent", Permission.UPSTREAMS_WRITE, Consent)
def set_outside_consent(request: ApiRequest, body: NewConsent) -> Consent:
    """Agree, or not any more, that this organization's requests are copied to shadows, and that its prompts go to
    endpoints that others attached. Copies end within a second."""
    services.set_consent(organization_id=request.caller.organization_id, agreed=body.agreed)
    return Consent(agreed=body.agreed)
