"""Requests explained: what was decided about them and why, where they stand, what they used."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from ninja import Field, Query, Router, Schema

from controlplane import ids
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, page
from controlplane.api.resources.usage import RequestOut, request_out
from controlplane.api.values import DeploymentId, KeyId, ProjectId
from controlplane.decisions import selectors
from controlplane.decisions.models import Outcome, RequestDecision
from controlplane.decisions.words import decision_in_words, explain
from controlplane.tenants.rights import Permission

router = Router(tags=["usage"])
# What the wire leaves out where it is nothing.
_UNSAID: dict[str, Any] = {"slot_s": 0, "ahead_s": 0, "most_ahead_s": None, "slots": 0}
_NAMES = ("replica", "used", "slots", "cost", "n_prefill_tokens", "n_cached_tokens")


class CandidateOut(Schema):
    """A replica that was considered, as the gateway saw it then."""

    replica_id: str = Field(pattern="^rep_")
    used: int = Field(description="Slots taken")
    slots: int
    cost: float = Field(description="Of placing the request there, in prompt tokens; the least ranks first")
    n_prefill_tokens: int = Field(description="Prompt tokens before it whose first token was awaited")
    n_cached_tokens: int = Field(description="Of its prompt, probably in the replica's cache")


class PredictionOut(Schema):
    """What was expected of the request. Seconds."""

    ttft_p50_s: float
    ttft_p90_s: float
    target_s: float
    attainment: float = Field(description="Probability of meeting the target")
    slot_s: float = Field(description="How long it would keep a slot")
    ahead_s: float = Field(description="Slot time that waited before it in its fair order")
    most_ahead_s: float | None = Field(
        description="The most that the target allows; null: nothing is refused by it"
    )
    slots: int


class RequestDecisionOut(Schema):
    """One decision about one request. Never holds its text."""

    request_id: str = Field(pattern="^req_[0-9a-f]{32}$")
    at: datetime
    outcome: Outcome
    status: int = Field(description="Of the refusal; 0 where it was admitted")
    code: str
    slo_class: str
    project_id: ProjectId
    key_id: KeyId
    deployment_id: DeploymentId | None
    model: str
    message: str
    retry_after_s: float | None
    limit: str = Field(description="The limit that refused, if one did")
    limit_scope: str
    limits: dict[str, str] = Field(description="What the limits stood at, as in the rate-limit headers")
    n_prompt_tokens: int = Field(description="Estimate")
    n_output_tokens_held: int
    n_output_tokens_expected: int
    band: int
    queue_order: str
    admission: str
    waits_for_replica: bool
    prediction: PredictionOut | None
    replica_id: str = Field(description="Where it went; empty: nowhere yet")
    candidates: list[CandidateOut]
    words: list[str]


class RequestDetail(Schema):
    """All that is known of a request. Admissions are kept as decisions for a sample, refusals always, for a week."""

    id: str = Field(pattern="^req_[0-9a-f]{32}$")
    stage: str = Field(description="refused, queued, running or ended")
    words: list[str] = Field(description="Its story in sentences")
    queued_before: int | None = Field(description="Waiting requests that go first or were admitted before it")
    waits_for: str = Field(
        description="While nothing serves its deployment: waking, launching_machine, starting_replica, loading_model"
    )
    eta_ms: int | None = Field(
        description="Until something is expected to serve it; null where that is unknown"
    )
    replica_id: str | None = Field(description="Where it runs")
    usage: RequestOut | None = Field(description="Once it is booked")
    decisions: list[RequestDecisionOut]


class DecisionsQuery(PageQuery):
    """Which decisions."""

    outcome: Outcome | None = None
    code: str | None = Field(default=None, max_length=40, description="For example slo_unattainable")
    project_id: ProjectId | None = None
    key_id: KeyId | None = None


def decision_out(row: RequestDecision) -> RequestDecisionOut:
    facts: dict[str, Any] = row.facts
    said = facts.get("prediction")
    replica = facts.get("replica", "")
    return RequestDecisionOut(
        request_id=ids.to_text(ids.Prefix.REQUEST, row.request_id),
        at=row.at,
        outcome=Outcome(row.outcome),
        status=row.status,
        code=row.code,
        slo_class=row.slo_class,
        project_id=row.project_id,
        key_id=row.api_key_id,
        deployment_id=row.deployment_id,
        model=row.model,
        message=facts.get("message", ""),
        retry_after_s=facts.get("retry_after_s"),
        limit=facts.get("limit", ""),
        limit_scope=facts.get("scope", ""),
        limits=facts.get("limits", {}),
        n_prompt_tokens=facts.get("n_prompt", 0),
        n_output_tokens_held=facts.get("n_output_max", 0),
        n_output_tokens_expected=facts.get("n_output_expected", 0),
        band=facts.get("band", 0),
        queue_order=facts.get("order", ""),
        admission=facts.get("admission", ""),
        waits_for_replica=facts.get("waits_for_replica", False),
        prediction=None if said is None else PredictionOut(**(_UNSAID | said)),
        replica_id=f"rep_{replica}" if replica else "",
        candidates=[_candidate(each) for each in facts.get("candidates", [])],
        words=decision_in_words(row),
    )


def _candidate(told: list[Any]) -> CandidateOut:
    values = dict(zip(_NAMES, [*told, 0, 0], strict=False))
    return CandidateOut(replica_id=f"rep_{values.pop('replica')}", **values)


@operation(router, "GET", "/requests/{request_id}", Permission.USAGE_READ, RequestDetail)
def get_request(request: ApiRequest, request_id: str) -> RequestDetail:
    """One request, by the id that its answer or refusal carried: why it was refused, where it waits or runs, what it
    used."""
    found = selectors.request(
        organization_id=request.caller.organization_id, request_id=selectors.request_of(request_id)
    )
    live = found.live
    return RequestDetail(
        id=ids.to_text(ids.Prefix.REQUEST, found.id),
        stage=found.stage,
        words=explain(found),
        queued_before=None if live is None else live.n_before,
        waits_for="" if live is None else live.waits_for,
        eta_ms=None if live is None else live.eta_ms,
        replica_id=f"rep_{live.replica}" if live is not None and live.replica else None,
        usage=None if found.booked is None else request_out(found.booked),
        decisions=[decision_out(row) for row in found.decisions],
    )


@operation(router, "GET", "/request-decisions", Permission.USAGE_READ, Page[RequestDecisionOut])
def list_request_decisions(request: ApiRequest, query: Query[DecisionsQuery]) -> Page[RequestDecisionOut]:
    """Decisions about requests, newest first: all refusals of the last week, and a sample of the admissions."""
    rows = RequestDecision.objects.filter(organization_id=request.caller.organization_id)
    wanted = {
        "outcome": query.outcome,
        "code": None if query.code is None else query.code,
        "project_id": query.project_id,
        "api_key_id": query.key_id,
    }
    rows = rows.filter(**{name: value for name, value in wanted.items() if value is not None})
    return page(rows, query, decision_out)
