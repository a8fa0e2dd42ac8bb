"""Limits and budgets of a LiteLLM row as ours: pure.

LiteLLM's tpm counts prompt and answer together (or one of them, by a setting); ours are two limits. Its budgets are
floats of dollars per duration; `1d`, `7d` and `30d` are windows of the calendar there, and so they become ours. A
budget without a duration is for good: what was spent of it there is taken off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from typing import Any, Final

from controlplane.litellm.planned import PlannedBudget
from controlplane.policy.periods import MAX_ROLLING_HOURS, Period
from controlplane.tenants.limits import Limits

NANO: Final = 1_000_000_000
_MOST: Final = (1 << 31) - 1
_MOST_NANO: Final = (1 << 63) - 1
_DURATION: Final = re.compile(r"\s*(\d+)\s*(mo|s|m|h|d|w)\w*\s*\Z", re.I)
_HOURS: Final = {"h": 1, "d": 24, "w": 168, "mo": 730}
_WORDS: Final = {"daily": "1d", "weekly": "7d", "monthly": "30d"}
# Told about a row: (what, remedy).
Tell = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Spending:
    """What a row may use and spend."""

    limits: Limits
    budgets: tuple[PlannedBudget, ...]


def spending_of(row: Any, shared: Any, spent: Decimal, counts: str, tell: Tell) -> Spending:
    """`row` has the limits as attributes; what it lacks it takes from `shared` (a row of the budget table), if any."""

    def value(name: str) -> Any:
        own = getattr(row, name, None)
        return own if own is not None or shared is None else getattr(shared, name, None)

    def count(name: str) -> int | None:
        found = value(name)
        if found is None or found < 0:
            return None
        if found > _MOST:
            tell(f"{name} of {found} became {_MOST}", "that is the most that can be set")
        return min(int(found), _MOST)

    tpm = count("tpm_limit")
    if tpm is not None and counts == "total":
        tell(
            "tpm_limit counts prompt and answer together there; here each of the two is limited to it",
            "set input_tpm and output_tpm as it suits",
        )
    limits = Limits(
        rpm=count("rpm_limit"),
        input_tpm=tpm if counts in ("total", "input") else None,
        output_tpm=tpm if counts in ("total", "output") else None,
        max_concurrency=count("max_parallel_requests"),
    )
    if value("tpd_limit") is not None:
        tell("tpd_limit (tokens per day) has no counterpart", "set a budget per day")
    budgets = list(_budgets(value, spent, tell))
    total = [each for each in budgets if each.period is Period.TOTAL and each.hard and not each.model]
    if total:  # one of the five limits, enforced in the same call
        limits = replace(limits, budget_nano=min(each.limit_nano for each in total))
    return Spending(limits, tuple(each for each in budgets if each not in total))


def _budgets(value: Callable[[str], Any], spent: Decimal, tell: Tell) -> Iterator[PlannedBudget]:
    duration = value("budget_duration")
    for field, hard in (("max_budget", True), ("soft_budget", False)):
        amount = value(field)
        if amount is not None:
            yield _budget("litellm" if hard else "litellm soft", amount, duration, hard, "", spent, tell)
    for window in value("budget_limits") or ():
        if isinstance(window, dict) and window.get("max_budget") is not None:
            length = window.get("budget_duration")
            yield _budget(f"litellm {length}", window["max_budget"], length, True, "", Decimal(0), tell)
    for model, each in sorted(dict(value("model_max_budget") or {}).items()):
        config = each if isinstance(each, dict) else {"budget_limit": each}
        amount = config.get("budget_limit", config.get("max_budget"))
        if amount is not None and len(model) <= 64:
            length = config.get("time_period", config.get("budget_duration"))
            yield _budget(f"litellm {model}", amount, length, True, model, Decimal(0), tell)


def _budget(
    name: str, amount: Any, duration: Any, hard: bool, model: str, spent: Decimal, tell: Tell
) -> PlannedBudget:
    limit = nano(amount)
    period, hours = window_of(duration) if duration else (Period.TOTAL, None)
    if duration and period is Period.TOTAL:
        tell(
            f"a budget per {duration} has no window of that length here; what is left of it is for good",
            f"budgets reach back {MAX_ROLLING_HOURS // 24} days at most: raise it when it should begin anew",
        )
    elif period is Period.ROLLING:
        tell(
            f"a budget per {duration} begins anew at fixed times there; here it reaches back as far at any time",
            "choose a window of the calendar if that suits better",
        )
    if period is Period.TOTAL and not model:
        limit = max(limit - nano(spent), 0)
    elif spent > 0 and not model:
        tell(
            "what was spent in the present window there does not count here",
            "the first window may spend its budget once more",
        )
    return PlannedBudget(name[:120], limit, period, hours, hard, model)


def window_of(duration: Any) -> tuple[Period, int | None]:
    """(period, hours of a rolling one); TOTAL where there is no window of that length."""
    text = _WORDS.get(str(duration).strip().lower(), str(duration))
    found = _DURATION.match(text)
    if found is None:
        return Period.TOTAL, None
    n, unit = int(found[1]), found[2].lower()
    if (n, unit) in ((1, "d"), (24, "h")):
        return Period.DAY, None
    if (n, unit) in ((7, "d"), (1, "w")):
        return Period.WEEK, None
    if (n, unit) in ((30, "d"), (1, "mo")):
        return Period.MONTH, None
    hours = 1 if unit in ("s", "m") else n * _HOURS[unit]
    return (Period.ROLLING, hours) if 1 <= hours <= MAX_ROLLING_HOURS else (Period.TOTAL, None)


def nano(dollars: Any) -> int:
    """Nano-dollars, from what was written; negative and infinite amounts are none at all."""
    try:
        amount = Decimal(str(dollars))
    except InvalidOperation:
        return 0
    if not amount.is_finite():
        return _MOST_NANO if amount == Decimal("Infinity") else 0
    return max(0, min(int((amount * NANO).to_integral_value(ROUND_HALF_EVEN)), _MOST_NANO))
