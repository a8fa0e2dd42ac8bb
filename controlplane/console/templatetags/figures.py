"""How the console writes figures: money, counts, durations, ages, ids; and its charts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from django import template
from django.utils import timezone

from billing.money import Nano, format_usd
from controlplane import ids
from controlplane.console import charts

register = template.Library()

DASH: Final = "–"
_TONES: Final = {
    "ready": "ok",
    "starting": "busy",
    "loading": "busy",
    "waking": "busy",
    "resuming": "busy",
    "stopping": "busy",
    "pending": "busy",
    "draining": "warn",
    "failed": "bad",
    "idle": "rest",
    "sleeping": "rest",
    "stopped": "rest",
    "deleted": "rest",
}
_RESULTS: Final = {
    "stop": "done",
    "length": "max tokens",
    "budget": "budget used up",
    "abort": "cancelled",
}
_STAGES: Final = {
    "waking": "waking up",
    "launching_machine": "launching a machine",
    "starting_machine": "starting a stopped machine",
    "waking_replica": "waking a replica",
    "starting_replica": "starting a replica",
    "loading_model": "loading the model",
}


@register.filter
def bound(scopes: dict[str, list[str]] | None) -> str:
    """What a key is bound to, in a few words."""
    words = {"routes": "route", "models": "model", "ip_ranges": "network"}
    parts = []
    for name, word in words.items():
        values = (scopes or {}).get(name)
        if values is not None:
            many = "" if len(values) == 1 else "s"
            parts.append(
                values[0] if name == "models" and len(values) == 1 else f"{len(values)} {word}{many}"
            )
    return ", ".join(parts)


@register.filter
def usd(amount: int | None) -> str:
    """Exact dollars of nano-dollars."""
    return DASH if amount is None else format_usd(Nano(int(amount)))


@register.filter
def usd_short(amount: int | None) -> str:
    """Dollars for a tile or an axis: cents from a dollar on, otherwise three significant digits."""
    if amount is None:
        return DASH
    dollars = abs(amount) / 1e9
    if dollars >= 1 or dollars == 0:
        text = f"{dollars:,.2f}"
    else:
        text = f"{float(f'{dollars:.3g}'):.12f}".rstrip("0")
        text = text if len(text.partition(".")[2]) >= 2 else f"{dollars:.2f}"
    return f"{'-' if amount < 0 else ''}${text}"


@register.filter
def count(value: int | None) -> str:
    """`1,234`, and from a million on `1.23 M`."""
    if value is None:
        return DASH
    if value >= 1_000_000_000:
        return f"{value / 1e9:.2f} B"
    return f"{value / 1e6:.2f} M" if value >= 1_000_000 else f"{value:,}"


@register.filter
def rate(value: float | None) -> str:
    """A rate per second with the digits that mean something."""
    if value is None:
        return DASH
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.2f}"


@register.filter
def ms(value: int | None) -> str:
    """`840 ms`, `1.25 s`, `2 min 5 s`."""
    if value is None:
        return DASH
    if value < 1000:
        return f"{value} ms"
    if value < 60_000:
        return f"{value / 1000:.2f}".rstrip("0").rstrip(".") + " s"
    minutes, seconds = divmod(round(value / 1000), 60)
    return f"{minutes} min {seconds} s"


@register.filter
def ago(at: datetime | None, now: datetime | None = None) -> str:
    """Age of an instant in one unit: `now`, `12 s`, `5 min`, `3 h`, `4 d`."""
    if at is None:
        return "never"
    seconds = int(((now or timezone.now()) - at).total_seconds())
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago" if seconds >= 2 else "now"


@register.filter
def age(at: datetime, now: datetime) -> str:
    """Time since an instant in one unit: `5 min`."""
    return ago(at, now).removesuffix(" ago").replace("now", "0 s")


@register.filter
def until(at: datetime | None, now: datetime) -> str:
    """Time to an instant in one unit: `in 5 min`."""
    if at is None:
        return "never"
    seconds = max(int((at - now).total_seconds()), 0)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"in {seconds // size} {unit}"
    return f"in {seconds} s"


@register.filter
def api_id(value: UUID, prefix: str) -> str:
    """The id as the API writes it."""
    return ids.to_text(ids.Prefix(prefix), value)


@register.filter
def short_id(value: UUID | None) -> str:
    """The last characters of an id: UUIDv7 begin alike."""
    return DASH if value is None else f"…{value.hex[-8:]}"


@register.filter
def tone(phase: str) -> str:
    """Colour class of a phase."""
    return _TONES.get(phase, "rest")


@register.filter
def words(name: str) -> str:
    """A name of code as people read it: `api_key` is an API key."""
    return name.replace("_", " ").replace("api ", "API ").replace("scim ", "SCIM ").replace("slo ", "SLO ")


@register.filter
def gib(n_bytes: int | None) -> str:
    """Memory of a machine."""
    return DASH if not n_bytes else f"{n_bytes / 2**30:.0f} GiB"


@register.filter
def stage_words(name: str) -> str:
    return _STAGES.get(name, name.replace("_", " "))


@register.filter
def result_words(finish_reason: str) -> str:
    """How a request ended, for people: `stop` reads as if somebody had stopped it."""
    return _RESULTS.get(finish_reason, finish_reason)


@register.filter
def percent_of(part: int, whole: int) -> int:
    return round(100 * part / whole) if whole else 0


@register.inclusion_tag("console/_spark.html")
def sparkline(spark: charts.Spark, label: str, tint: str = "") -> dict[str, Any]:
    return {"spark": spark, "label": label, "tint": tint}


@register.inclusion_tag("console/_bars.html")
def bar_chart(chart: charts.Bars, label: str) -> dict[str, Any]:
    """Bars with every n-th label below, so that about eight are readable."""
    step = max(1, -(-len(chart.bars) // 8))
    last = len(chart.bars) - 1
    shown: Sequence[charts.Bar] = [bar for index, bar in enumerate(chart.bars) if (last - index) % step == 0]
    return {"chart": chart, "labels": shown, "label": label}


@register.inclusion_tag("console/_count_bars.html")
def count_chart(chart: charts.Bars, label: str) -> dict[str, Any]:
    """The same for counts."""
    return bar_chart(chart, label)
