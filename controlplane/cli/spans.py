"""Instants as people say them: 15m, 2h, 7d ago, or as ISO 8601."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from controlplane.cli.failures import Failure

_AGO = re.compile(r"(\d{1,5})([smhd])\Z")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def instant(text: str, now: datetime | None = None) -> datetime:
    """Raises Failure that shows how to say it."""
    found = _AGO.match(text)
    if found:
        return (now or datetime.now(UTC)) - timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise Failure(f"{text!r} is no time: say 15m, 2h, 7d, or 2026-11-02T09:30:00Z") from None
    return at if at.tzinfo else at.astimezone()
