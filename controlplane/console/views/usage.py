"""Usage: totals and a chart per day and model, the requests behind them, and the same as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID
from zoneinfo import ZoneInfo

from django.http import HttpResponse, QueryDict
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET

from billing.models import UsageEvent
from billing.money import Nano, format_usd
from controlplane import ids
from controlplane.console import charts, usage
from controlplane.console.access import MemberRequest, member_page
from controlplane.tenants import selectors

RANGES: Final = (7, 30, 90)  # days
PAGE_ROWS: Final = 50
CSV_COLUMNS: Final = (
    "request_id", "admitted_at", "model", "api_key", "status", "finish_reason", "prompt_tokens", "cached_tokens",
    "completion_tokens", "ttft_ms", "duration_ms", "cost_usd",
)  # fmt: skip


@require_GET
@member_page()
def usage_page(request: MemberRequest) -> HttpResponse:
    organization_id, zone = request.membership.organization_id, request.membership.timezone
    days = _days(request.GET)
    filters = _filters(request.GET)
    first = _first_day(days, zone)
    rows = usage.by_day(organization_id=organization_id, first=first, zone=zone)
    requests = usage.recent(
        organization_id=organization_id, limit=PAGE_ROWS + 1, filters=filters, since=_midnight(first, zone)
    )
    more = len(requests) > PAGE_ROWS
    requests = requests[:PAGE_ROWS]
    context = {
        "now": timezone.now(),
        "days": days,
        "ranges": RANGES,
        "zone": zone,
        "rows": rows,
        "total": usage.total(rows),
        "chart": _chart(rows, first, days),
        "models": sorted({row.model for row in rows}),
        "keys": selectors.api_keys(organization_id=organization_id),
        "filters": filters,
        "requests": requests,
        "older": _query(days, filters, before=requests[-1].admitted_at) if more else "",
        "export": _query(days, filters),
    }
    fragment = request.headers.get("HX-Target") == "requests"
    return render(request, "console/_usage_requests.html" if fragment else "console/usage.html", context)


@require_GET
@member_page()
def usage_csv(request: MemberRequest) -> HttpResponse:
    """The requests of the range as CSV, newest first; at most usage.MAX_EXPORT_ROWS."""
    first = _first_day(_days(request.GET), request.membership.timezone)
    events = usage.export(
        organization_id=request.membership.organization_id,
        since=_midnight(first, request.membership.timezone),
        filters=_filters(request.GET),
    )
    response = HttpResponse(content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="corral-usage-{first.isoformat()}.csv"'
    writer = csv.writer(response)
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_rows(events))
    return response


def _csv_rows(events: Iterator[UsageEvent]) -> Iterator[Sequence[object]]:
    for event in events:
        yield (
            str(event),
            event.admitted_at.astimezone(UTC).isoformat(timespec="milliseconds"),
            _plain(event.model),
            ids.to_text(ids.Prefix.API_KEY, event.api_key_id),
            event.status,
            event.finish_reason,
            event.n_prompt_tokens,
            event.n_cached_tokens,
            event.n_completion_tokens,
            "" if event.first_token_ms is None else event.first_token_ms,
            event.duration_ms,
            format_usd(Nano(event.cost_nano)).removeprefix("$").replace(",", ""),
        )


def _plain(text: str) -> str:
    """Never a formula, whatever opens the file."""
    return f"'{text}" if text[:1] in "=+-@\t\r" else text


def _chart(rows: Sequence[usage.DayModel], first: date, days: int) -> charts.Bars:
    """Cost per day, stacked by model."""
    dates = [first + timedelta(days=offset) for offset in range(days)]
    cost = {(row.day, row.model): row.cost_nano for row in rows}
    models = sorted({row.model for row in rows})
    series = {model: [cost.get((day, model), 0) for day in dates] for model in models}
    return charts.bars([day.strftime("%-d %b") for day in dates], series)


def _days(query: QueryDict) -> int:
    text = query.get("days", "")
    return int(text) if text.isdigit() and int(text) in RANGES else RANGES[0]


def _filters(query: QueryDict) -> usage.Filters:
    """Whatever is malformed filters nothing: the address bar is an input like any other."""
    outcome = query.get("outcome", "")
    return usage.Filters(
        model=query.get("model", "")[:64].replace("\x00", ""),
        outcome=outcome if outcome in ("ok", "failed") else "",
        key_id=_key_id(query.get("key", "")),
        before=_instant(query.get("before", "")),
    )


def _key_id(text: str) -> UUID | None:
    try:
        return ids.from_text(ids.Prefix.API_KEY, text)
    except ids.InvalidIdError:
        return None


def _instant(text: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else None


def _query(days: int, filters: usage.Filters, before: datetime | None = None) -> str:
    values: dict[str, Any] = {"days": days}
    if filters.model:
        values["model"] = filters.model
    if filters.outcome:
        values["outcome"] = filters.outcome
    if filters.key_id:
        values["key"] = ids.to_text(ids.Prefix.API_KEY, filters.key_id)
    if before:
        values["before"] = before.isoformat()
    return urlencode(values)


def _first_day(days: int, zone: str) -> date:
    return timezone.now().astimezone(ZoneInfo(zone)).date() - timedelta(days=days - 1)


def _midnight(day: date, zone: str) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
