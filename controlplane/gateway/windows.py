"""Budgets with windows as the admission script takes them, how their counters are seeded, and what a refusal says.

Called by the key cache (once per key and half minute) and by admission; costs nothing for a key without any. Which
window it is decides the script, by the clock of Redis.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from zoneinfo import ZoneInfo

import msgspec

from billing.money import Nano, format_usd
from controlplane.gateway.directory import BudgetRow, KeyDirectory
from controlplane.gateway.errors import ApiError
from controlplane.policy import periods
from controlplane.policy.periods import Buckets, Period
from workers import scripts
from workers.keys import CellKeys
from workers.redis_client import Client

_LEVELS: Final = {"key": 1, "prj": 2, "org": 3}
_SUBJECTS: Final = {"key": "API key", "prj": "project", "org": "organization"}
_NO_BUCKETS: Final = Buckets(0, 0)
# A counter outlives its window by an hour more than any request lives (lua/lib_windows.lua).
_LIFE_AFTER_MS: Final = 25_200_000
_encode: Final = msgspec.msgpack.Encoder().encode


@dataclass(frozen=True, slots=True)
class WindowBudget:
    """One budget. `packed` is its part of the script's argument."""

    id: str
    name: str
    scope: str
    limit_nano: int
    model: str
    period: Period
    timezone: str
    buckets: Buckets
    packed: msgspec.Raw

    async def seed(
        self, redis: Client, keys: CellKeys, directory: KeyDirectory, start_ms: int, end_ms: int
    ) -> None:
        """Give the cell what was booked here in the window that starts at `start_ms`. Raises DirectoryUnavailable and
        RedisError."""
        cut = self.buckets
        from_ms = start_ms - cut.n * cut.width_ms
        sums = await directory.spent_in_window(self.id, from_ms, end_ms, cut.width_ms)
        life_ms = max(end_ms - time.time_ns() // 1_000_000, 0) + cut.n * cut.width_ms + _LIFE_AFTER_MS
        pairs = [part for pair in sums.items() for part in pair]
        await redis.evalsha(
            scripts.SEED_WINDOW,
            (),
            (keys.prefix, self.id, start_ms, end_ms, cut.width_ms, cut.n, life_ms, *pairs),
        )

    def refusal(self, retry_ms: int, limit_nano: int) -> ApiError:
        """429 that names the budget, when there is money again, and who can raise it."""
        per = "rolling" if self.period is Period.ROLLING else self.period.value
        what = f"the budget {self.name!r} of this {_SUBJECTS[self.scope]} ({format_usd(Nano(limit_nano))} per {per})"
        if self.period is Period.ROLLING:
            hours = self.buckets.n * self.buckets.width_ms / 3_600_000
            what = what.replace("per rolling", f"in {hours:g} hours")
        elif self.period is Period.TOTAL:
            what = what.replace(" per total", "")
        headers = [
            (b"x-should-retry", b"false"),
            (b"x-corral-limit", b"budget"),
            (b"x-corral-scope", self.scope.encode()),
            (b"x-corral-budget", b"bud_" + self.id.encode()),
        ]
        retry_after_s = None
        if retry_ms < 0:
            when = "is used up"
        elif retry_ms <= 1_000:
            when, retry_after_s = (
                "is held by requests that run now: try again when they have ended",
                retry_ms / 1000,
            )
        else:
            retry_after_s = retry_ms / 1000
            reset = datetime.fromtimestamp(time.time() + retry_after_s, tz=UTC).astimezone(
                ZoneInfo(self.timezone)
            )
            headers.append((b"x-corral-budget-reset", reset.isoformat(timespec="seconds").encode()))
            again = "begins anew" if self.period is not Period.ROLLING else "has money again"
            when = f"is used up: it {again} at {reset.isoformat(timespec='seconds')}"
        return ApiError(
            429,
            "insufficient_quota",
            f"{what} {when}; an owner, admin or billing member can raise it (PATCH /api/v1/budgets/bud_{self.id})",
            type_="insufficient_quota",
            retry_after_s=retry_after_s,
            headers=tuple(headers),
        )


def of(rows: Iterable[BudgetRow]) -> tuple[WindowBudget, ...]:
    """Budgets from a key's record, with the edges of the windows near now."""
    return tuple(_made(row, time.time_ns() // 1_000_000) for row in rows)


def argument(budgets: tuple[WindowBudget, ...], model: str, base: str = "") -> tuple[list[msgspec.Raw], ...]:
    """The script's last argument, or none where no budget concerns this model. What an adapter of `base` uses counts
    under the budgets of both."""
    packed = [budget.packed for budget in budgets if not budget.model or budget.model in (model, base)]
    return (packed,) if packed else ()


def _made(row: BudgetRow, now_ms: int) -> WindowBudget:
    rolling = row.period is Period.ROLLING
    cut = periods.buckets(row.rolling_hours or 1) if rolling else _NO_BUCKETS
    edges = () if rolling else periods.edges_ms(row.period, row.timezone, now_ms)
    values: list[Any] = [row.id, _LEVELS[row.scope], row.limit_nano, cut.width_ms, cut.n, *edges]
    return WindowBudget(
        row.id,
        row.name,
        row.scope,
        row.limit_nano,
        row.model,
        row.period,
        row.timezone,
        cut,
        msgspec.Raw(_encode(values)),
    )
