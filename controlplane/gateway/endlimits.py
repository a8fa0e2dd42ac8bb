"""Limits on the end customers of a project as the admission script takes them: a level below the key, for requests
that name a customer. Called by the key cache (once per key and half minute) and by admission; a project without any has
None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from controlplane.gateway.directory import EndCustomerRow, Limits

_NO_WEIGHT: Final = 0  # the fair queue knows no end customers
Scope = tuple[str | int, ...]  # id, rpm, input_tpm, output_tpm, max_concurrency, budget_nano, weight


@dataclass(frozen=True, slots=True)
class EndLimits:
    """Of one project. `each`: by pseudonym, `others`: of who is not in it, None for no limits."""

    project: str
    others: Limits | None
    each: dict[str, Limits]
    budgeted: bool

    def scope(self, customer: str) -> Scope | None:
        """What is taken for this customer; None where nothing limits it, or none is named."""
        limits = self.each.get(customer, self.others)
        return None if limits is None or not customer else (f"{self.project}.{customer}", *limits, _NO_WEIGHT)


def of(rows: Iterable[EndCustomerRow], project: str, part: Callable[[Limits], Limits]) -> EndLimits | None:
    """From a key's record. `part`: this cell's of them."""
    each = {row.customer: part(row.limits.values()) for row in rows}
    if not each:
        return None
    others = each.pop("", None)
    budgeted = any(limits[4] >= 0 for limits in (*each.values(), *([others] if others else [])))
    return EndLimits(project, others, each, budgeted)


def argument(scope: Scope, windows: tuple[list[msgspec.Raw], ...]) -> tuple[dict[str, Any]]:
    """The script's last argument, with the window budgets in it."""
    return ({"e": scope, "w": windows[0]} if windows else {"e": scope},)
