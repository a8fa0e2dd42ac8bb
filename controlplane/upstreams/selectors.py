"""Reads about endpoints elsewhere, scoped by organization, save for those that say they need the operator role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any, Final
from uuid import UUID

from django.db import connection
from django.db.models import Avg, Count, Q, QuerySet, Sum

from controlplane.errors import NotFoundError
from controlplane.upstreams.models import (
    OutsideConsent,
    ShadowResult,
    ShadowSkip,
    Upstream,
    UpstreamDay,
    UpstreamRole,
)


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint was used for over some days. Money in nano-dollars."""

    n_requests: int = 0
    n_failed: int = 0
    n_counted_here: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_completion_tokens: int = 0
    cost_nano: int = 0
    revenue_nano: int = 0

    @property
    def margin_nano(self) -> int:
        return self.revenue_nano - self.cost_nano


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What shadow answers were like. Milliseconds are means over those that have them."""

    n: int = 0
    n_failed: int = 0
    n_compared: int = 0
    n_same: int = 0
    similarity_ppm: int | None = None
    first_token_ms: int | None = None
    own_first_token_ms: int | None = None
    duration_ms: int | None = None
    own_duration_ms: int | None = None
    n_completion_tokens: int = 0
    cost_nano: int = 0


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of the shadow beside the request's own, over copies that have both. `difference`: of each pair, the
    shadow's less the own, so its p99 is what a caller in a hundred would lose at least."""

    n: int = 0
    p50: float | None = None
    p99: float | None = None
    own_p50: float | None = None
    own_p99: float | None = None
    difference_p50: float | None = None
    difference_p99: float | None = None


@dataclass(frozen=True, slots=True)
class ShadowSummary:
    """How a shadow did against the answers that callers were given. Shares in millionths; None where nothing is known.
    `errors`: failed copies by code; `skipped`: requests that were chosen and not copied, by reason."""

    n: int
    n_failed: int
    n_compared: int
    same_ppm: int | None
    similarity_ppm: int | None
    same_finish_ppm: int | None
    first_token_ms: Compared
    itl_us: Compared
    duration_ms: Compared
    completion_tokens: Compared
    cost_nano: int
    errors: dict[str, int]
    skipped: dict[str, int]


def upstreams(*, organization_id: UUID, deployment_id: UUID | None = None) -> QuerySet[Upstream]:
    found = Upstream.objects.filter(organization_id=organization_id).select_related("deployment")
    return found if deployment_id is None else found.filter(deployment_id=deployment_id)


def upstream(*, organization_id: UUID, upstream_id: UUID) -> Upstream:
    """One endpoint. Raises NotFoundError, also for another tenant's."""
    found = upstreams(organization_id=organization_id).filter(id=upstream_id).first()
    if found is None:
        raise NotFoundError("no such upstream", field="upstream")
    return found


def served(*, organization_id: UUID, upstream_id: UUID, since: date) -> Served:
    """From this UTC day on."""
    rows = UpstreamDay.objects.filter(
        organization_id=organization_id, upstream_id=upstream_id, day__gte=since
    )
    sums = rows.aggregate(**{name: Sum(name) for name in Served.__dataclass_fields__})
    return Served(**{name: value or 0 for name, value in sums.items()})


def served_by(*, organization_id: UUID, since: date) -> dict[UUID, Served]:
    """Of every endpoint that served something from this UTC day on."""
    rows = UpstreamDay.objects.filter(organization_id=organization_id, day__gte=since)
    sums = rows.values("upstream_id").annotate(**{name: Sum(name) for name in Served.__dataclass_fields__})
    found: list[Any] = list(sums.order_by("upstream_id"))
    return {
        row["upstream_id"]: Served(**{name: row[name] or 0 for name in Served.__dataclass_fields__})
        for row in found
    }


def shadow_results(*, organization_id: UUID, upstream_id: UUID) -> QuerySet[ShadowResult]:
    return ShadowResult.objects.filter(organization_id=organization_id, upstream_id=upstream_id)


def shadowed(*, organization_id: UUID, upstream_id: UUID, since: date) -> Shadowed:
    """Sums and means of what a shadow answered since this UTC day."""
    rows = shadow_results(organization_id=organization_id, upstream_id=upstream_id).filter(
        at__date__gte=since
    )
    found = rows.aggregate(
        n=Count("id"),
        n_failed=Count("id", filter=~Q(status=200)),
        n_compared=Count("id", filter=Q(is_same__isnull=False)),
        n_same=Count("id", filter=Q(is_same=True)),
        similarity_ppm=Avg("similarity_ppm"),
        first_token_ms=Avg("first_token_ms"),
        own_first_token_ms=Avg("own_first_token_ms"),
        duration_ms=Avg("duration_ms"),
        own_duration_ms=Avg("own_duration_ms"),
        n_completion_tokens=Sum("n_completion_tokens"),
        cost_nano=Sum("cost_nano"),
    )
    counts = ("n", "n_failed", "n_compared", "n_same", "n_completion_tokens", "cost_nano")
    told: dict[str, Any] = {
        name: int(value or 0) if name in counts else None if value is None else round(value)
        for name, value in found.items()
    }
    return Shadowed(**told)


_FIGURES: Final = {
    "first_token_ms": ("first_token_ms", "own_first_token_ms"),
    "itl_us": ("itl_us", "own_itl_us"),
    "duration_ms": ("duration_ms", "own_duration_ms"),
    "completion_tokens": ("n_completion_tokens", "own_n_completion_tokens"),
}
_MAX_CODES: Final = 20


def _statement() -> str:
    """Of one shadow since an instant: one pass over its rows, which are bounded (intake.py)."""
    figures = []
    for one, other in _FIGURES.values():
        quantiles = ", ".join(
            f"percentile_cont({share}) WITHIN GROUP (ORDER BY {what}) "
            f"FILTER (WHERE status = 200 AND {one} IS NOT NULL AND {other} IS NOT NULL)"
            for what in (one, other, f"{one} - {other}")
            for share in (0.5, 0.99)
        )
        figures.append(f"count({one} + {other}) FILTER (WHERE status = 200), {quantiles}")
    return f"""
        SELECT count(*), count(*) FILTER (WHERE status <> 200), count(is_same), count(*) FILTER (WHERE is_same),
            avg(similarity_ppm), count(*) FILTER (WHERE status = 200 AND own_finish_reason <> ''),
            count(*) FILTER (WHERE status = 200 AND finish_reason = own_finish_reason AND own_finish_reason <> ''),
            coalesce(sum(cost_nano), 0), {", ".join(figures)}
        FROM upstreams_shadowresult WHERE organization_id = %s AND upstream_id = %s AND at >= %s
    """  # noqa: S608 - names of ours


_SUMMARY: Final = _statement()


def shadow_summary(*, organization_id: UUID, upstream_id: UUID, since: date) -> ShadowSummary:
    """What the copies since this UTC day say, of those that are kept."""
    start = datetime.combine(since, time(), tzinfo=UTC)
    with connection.cursor() as cursor:
        cursor.execute(_SUMMARY, [organization_id, upstream_id, start])
        n, n_failed, n_compared, n_same, similarity, n_finished, n_same_finish, cost, *rest = (
            cursor.fetchone()
        )
    found = dict(zip(_FIGURES, (Compared(*rest[i : i + 7]) for i in range(0, len(rest), 7)), strict=True))
    rows = shadow_results(organization_id=organization_id, upstream_id=upstream_id).filter(at__gte=start)
    codes = rows.exclude(status=200).values_list("code").annotate(n=Count("id")).order_by("-n", "code")
    skips = ShadowSkip.objects.filter(
        organization_id=organization_id, upstream_id=upstream_id, day__gte=since
    )
    return ShadowSummary(
        n=n,
        n_failed=n_failed,
        n_compared=n_compared,
        same_ppm=_share_ppm(n_same, n_compared),
        similarity_ppm=None if similarity is None else round(similarity),
        same_finish_ppm=_share_ppm(n_same_finish, n_finished),
        cost_nano=int(cost),
        errors=dict(codes[:_MAX_CODES]),
        skipped=dict(skips.values_list("reason").annotate(total=Sum("n")).order_by("reason")),
        **found,
    )


def _share_ppm(part: int, whole: int) -> int | None:
    return part * 1_000_000 // whole if whole else None


def has_agreed(*, organization_id: UUID) -> bool:
    """Whether this organization's prompts may go to shadows, and to endpoints that others attached."""
    return OutsideConsent.objects.filter(organization_id=organization_id).exists()


def that_agreed(organization_ids: Iterable[UUID]) -> set[UUID]:
    """Of these organizations; for whoever shares a deployment with them, which sees nothing else of them."""
    wanted = list(organization_ids)
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM corral_outside_agreed(%s::uuid[])", [wanted])
        return {row[0] for row in cursor.fetchall()}


def serving(*, deployment_id: UUID) -> QuerySet[Upstream]:
    """Endpoints that answer (or would, if enabled) requests of a deployment: shadows do not."""
    return Upstream.objects.filter(deployment_id=deployment_id).exclude(role=UpstreamRole.SHADOW)
