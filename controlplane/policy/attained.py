"""Whether a finished request kept what it was promised, and how fast a budget of misses burns: pure.

A request is good when it succeeded and met all targets of its class: first token, time between tokens (its mean over
the answer: what readers notice, and what an engine is asked for), last token. Bad are misses, our failures, and
refusals for want of capacity. What its client did wrong, or ended before anything could be judged, does not count.

An objective of 99 % allows one miss in a hundred: the error budget. Its burn rate is the share of misses over the share
allowed; 1 uses the budget up exactly in its period. Alerts are those of the Google SRE workbook, chapter 5
(multiwindow, multi-burn-rate alerts): a burn rate that uses `budget_share` of the budget of 30 days within the long
window, and is still burning in the short one, a twelfth of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

PPM: Final = 1_000_000
PERIOD_S: Final = 30 * 86_400
CLIENT_GONE: Final = 499
# Below so many requests in the long window, or misses in it, a rate says nothing.
MIN_REQUESTS: Final = 20
MIN_MISSES: Final = 3


class Missed(StrEnum):
    """Which part of the promise was not kept first; what a miss is counted under."""

    FAILED = "failed"
    TTFT = "ttft"
    ITL = "itl"
    DEADLINE = "deadline"


@dataclass(frozen=True, slots=True)
class Targets:
    """What was promised."""

    ttft_ms: int
    itl_ms: int
    deadline_s: int


def judge(
    targets: Targets,
    *,
    status: int,
    first_token_ms: int | None,
    duration_ms: int,
    n_completion: int,
    attempts: int = 1,
) -> tuple[bool, Missed | None]:
    """(counts, what was missed). `first_token_ms` is None where no token was made, or an earlier attempt made it: then
    the first token is not judged, and neither is the pace."""
    if status >= 500:
        return True, Missed.FAILED
    if status != CLIENT_GONE and status >= 400:
        return False, None
    if status == CLIENT_GONE:
        if first_token_ms is None:  # it waited; longer than it should have, or its client was in a hurry
            return (True, Missed.TTFT) if attempts == 1 and duration_ms > targets.ttft_ms else (False, None)
        return True, Missed.TTFT if first_token_ms > targets.ttft_ms else None
    if first_token_ms is not None:
        if first_token_ms > targets.ttft_ms:
            return True, Missed.TTFT
        if n_completion > 1 and (duration_ms - first_token_ms) > targets.itl_ms * (n_completion - 1):
            return True, Missed.ITL
    if duration_ms > targets.deadline_s * 1000:
        return True, Missed.DEADLINE
    return True, None


class Counts(NamedTuple):
    """Requests of a window: all that count, the good ones, and the misses allowed, in millionths of a request."""

    n: int
    n_good: int
    allowed_ppm: int

    @property
    def n_bad(self) -> int:
        return self.n - self.n_good


def burn_rate(counts: Counts) -> float:
    """Share of misses over the share allowed; 0 without requests."""
    return counts.n_bad * PPM / counts.allowed_ppm if counts.allowed_ppm else 0.0


def budget_left(counts: Counts) -> float | None:
    """Share of the error budget that is left, below 0 when overdrawn; None without requests."""
    return 1 - counts.n_bad * PPM / counts.allowed_ppm if counts.allowed_ppm else None


class Alert(NamedTuple):
    """Two windows in seconds, and the burn rate that both must reach."""

    severity: str
    long_s: int
    short_s: int
    budget_share: float

    @property
    def rate(self) -> float:
        return self.budget_share * PERIOD_S / self.long_s


PAGE, TICKET = "page", "ticket"
# Burn rates 14.4, 6 and 1.
ALERTS: Final = (
    Alert(PAGE, 3_600, 300, 0.02),
    Alert(PAGE, 6 * 3_600, 1_800, 0.05),
    Alert(TICKET, 3 * 86_400, 6 * 3_600, 0.10),
)
# All windows that rates are told for, by name.
WINDOWS: Final = {"5m": 300, "30m": 1_800, "1h": 3_600, "6h": 6 * 3_600, "3d": 3 * 86_400}


def burning(by_window_s: dict[int, Counts]) -> Alert | None:
    """The gravest alert that these windows give."""
    for alert in ALERTS:
        long, short = by_window_s[alert.long_s], by_window_s[alert.short_s]
        if (
            long.n >= MIN_REQUESTS
            and long.n_bad >= MIN_MISSES
            and burn_rate(long) >= alert.rate
            and burn_rate(short) >= alert.rate
        ):
            return alert
    return None
