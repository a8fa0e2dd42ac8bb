"""Service levels: what was kept and how fast budgets burn, with a chart; and one request's story."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from zoneinfo import ZoneInfo

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET

from controlplane.console import charts
from controlplane.console.access import MemberRequest, member_page
from controlplane.decisions import selectors
from controlplane.decisions.models import Outcome, RequestDecision
from controlplane.decisions.words import explain
from controlplane.deployments.selectors import slo_classes
from controlplane.policy.attained import PPM, WINDOWS, Alert, Counts, budget_left, burn_rate, burning
from controlplane.slo import attainment
from controlplane.slo.attainment import Scope
from controlplane.tenants.rights import Permission

RANGES: Final = (1, 7, 30)  # days
REFUSALS: Final = 20
_SHOWN: Final = ("5m", "1h", "6h", "3d")


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class, as the table shows it. Shares in percent."""

    name: str
    targets: str
    counts: Counts
    attained: float | None
    objective: float
    left: float | None
    misses: str
    rates: tuple[tuple[str, float, bool], ...]  # window, burn rate, whether it is above 1
    alert: Alert | None


@require_GET
@member_page(Permission.USAGE_READ)
def slo_page(request: MemberRequest) -> HttpResponse:
    organization_id, zone = request.membership.organization_id, request.membership.timezone
    now = timezone.now()
    days = _days(request)
    scope = Scope(organization_id)
    since = now - timedelta(days=days)
    rows = _rows(scope, since, now)
    refusals = RequestDecision.objects.filter(organization_id=organization_id, outcome=Outcome.REFUSED)
    context = {
        "now": now,
        "days": days,
        "ranges": RANGES,
        "zone": zone,
        "rows": rows,
        "chart": _chart(attainment.hours(scope, since=since, until=now), since, now, days, zone),
        "alerts": attainment.alerts(scope, limit=10),
        "refusals": list(refusals.order_by("-id")[:REFUSALS]),
    }
    return render(request, "console/slo.html", context)


@require_GET
@member_page(Permission.USAGE_READ)
def request_page(request: MemberRequest, request_id: str) -> HttpResponse:
    """Why it was refused, where it waits or runs, what it used."""
    found = selectors.request(
        organization_id=request.membership.organization_id, request_id=selectors.request_of(request_id)
    )
    context = {
        "now": timezone.now(),
        "found": found,
        "title": f"req_{found.id.hex}",
        "words": explain(found),
        "decision": found.decisions[-1] if found.decisions else None,
        "candidates": [_candidate(each) for each in _facts(found).get("candidates", [])],
        "prediction": _facts(found).get("prediction"),
        "limits": sorted(_facts(found).get("limits", {}).items()),
    }
    return render(request, "console/request.html", context)


def _rows(scope: Scope, since: datetime, now: datetime) -> list[ClassRow]:
    rates = attainment.rates(scope, now=now)
    known = {each.name: each for each in slo_classes()}
    none = Counts(0, 0, 0)
    rows = []
    for row in attainment.attained(scope, since=since, until=now):
        windows = {WINDOWS[name]: rates.get(row.slo_class, {}).get(name, none) for name in WINDOWS}
        promise = known.get(row.slo_class)
        burnt = [(name, round(burn_rate(windows[WINDOWS[name]]), 2)) for name in _SHOWN]
        left = budget_left(row.counts)
        rows.append(
            ClassRow(
                name=row.slo_class,
                targets="" if promise is None else _targets(promise.ttft_ms, promise.itl_ms),
                counts=row.counts,
                attained=100 * row.counts.n_good / row.counts.n if row.counts.n else None,
                objective=100 * (1 - row.counts.allowed_ppm / row.counts.n / PPM) if row.counts.n else 100.0,
                left=None if left is None else 100 * left,
                misses=", ".join(f"{n:,} {_MISS_WORDS[kind]}" for kind, n in row.misses.items() if n),
                rates=tuple((name, value, value > 1) for name, value in burnt),
                alert=burning(windows),
            )
        )
    order = {name: each.band for name, each in known.items()}
    return sorted(rows, key=lambda row: order.get(row.name, len(order)))


_MISS_WORDS: Final = {
    "failed": "failed",
    "ttft": "first token late",
    "itl": "tokens too slow",
    "deadline": "ended late",
    "refused": "refused",
}


def _chart(hours: list[attainment.Hour], since: datetime, now: datetime, days: int, zone: str) -> charts.Bars:
    """Requests that kept their promise and that did not, by hour of a day or by day."""
    tz = ZoneInfo(zone)
    by_hour = days == 1
    slots: list[datetime] = []
    at = since.astimezone(tz).replace(minute=0, second=0, microsecond=0)
    if not by_hour:
        at = at.replace(hour=0)
    while at <= now.astimezone(tz):
        slots.append(at)
        at = (at + (timedelta(hours=1) if by_hour else timedelta(days=1))).astimezone(tz)
    kept, missed = [0] * len(slots), [0] * len(slots)
    place = {_slot(slot, by_hour): i for i, slot in enumerate(slots)}
    for hour in hours:
        i = place.get(_slot(hour.at.astimezone(tz), by_hour))
        if i is not None:
            kept[i] += hour.n_good
            missed[i] += hour.n - hour.n_good
    labels = [slot.strftime("%H:%M" if by_hour else "%-d %b") for slot in slots]
    return charts.bars(labels, {"missed": missed, "kept": kept})


def _slot(at: datetime, by_hour: bool) -> str:
    return at.astimezone(UTC).strftime("%Y%m%d%H") if by_hour else at.strftime("%Y%m%d")


def _targets(ttft_ms: int, itl_ms: int) -> str:
    first = f"{ttft_ms} ms" if ttft_ms < 1_000 else f"{ttft_ms / 1000:g} s"
    if ttft_ms >= 120_000:
        first = f"{ttft_ms / 60_000:g} min"
    between = f"{itl_ms} ms" if itl_ms < 1_000 else f"{itl_ms / 1000:g} s"
    return f"first token {first}, then {between} each"


def _facts(found: selectors.Request) -> dict[str, Any]:
    return found.decisions[-1].facts if found.decisions else {}


def _candidate(told: list[Any]) -> dict[str, Any]:
    names = ("replica", "used", "slots", "cost", "n_prefill", "n_cached")
    return dict(zip(names, [*told, 0, 0], strict=False))


def _days(request: HttpRequest) -> int:
    text = request.GET.get("days", "")
    return int(text) if text.isdigit() and int(text) in RANGES else RANGES[1]
