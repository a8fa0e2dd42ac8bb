"""Slows down guessing of passwords: counts failed sign-ins per e-mail and address, and per address.

In Postgres, where the users are, so it adds no way to fail. A window begins with the first failure and ends a
fixed time later. Bounded: an address that is over its limit adds no rows, and old rows go as new ones come.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Final

from django.db import connection

from controlplane.console.models import SignInFailures

WINDOW: Final = timedelta(minutes=15)
# Somebody who forgot which of their passwords it was needs some tries; an address may be a whole office.
MAX_PER_EMAIL: Final = 8
MAX_PER_ADDRESS: Final = 60
_PRUNE_ROWS: Final = 100

_COUNT: Final = """
INSERT INTO console_signinfailures AS f (subject, n_failures, since) VALUES (%(subject)s, 1, %(now)s)
ON CONFLICT (subject) DO UPDATE SET
    n_failures = CASE WHEN f.since < %(window)s THEN 1 ELSE least(f.n_failures + 1, 32000) END,
    since = CASE WHEN f.since < %(window)s THEN %(now)s ELSE f.since END
"""
_PRUNE: Final = """
DELETE FROM console_signinfailures WHERE subject IN (
    SELECT subject FROM console_signinfailures WHERE since < %(window)s LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED)
"""


def wait_s(*, email: str, address: str, now: datetime) -> int:
    """Seconds until this address may try this e-mail again; 0 = now."""
    limits = {
        _subject("pair", email, address): MAX_PER_EMAIL,
        _subject("address", address): MAX_PER_ADDRESS,
    }
    rows = SignInFailures.objects.filter(subject__in=limits, since__gt=now - WINDOW)
    over = [row for row in rows if row.n_failures >= limits[bytes(row.subject)]]
    return max((int((row.since + WINDOW - now).total_seconds()) + 1 for row in over), default=0)


def count_failure(*, email: str, address: str, now: datetime) -> None:
    """A password was wrong, or there is no such user: the same for both."""
    window = now - WINDOW
    with connection.cursor() as cursor:
        cursor.execute(_PRUNE, {"window": window, "limit": _PRUNE_ROWS})
        for subject in (_subject("address", address), _subject("pair", email, address)):
            cursor.execute(_COUNT, {"subject": subject, "now": now, "window": window})


def forget(*, email: str, address: str) -> None:
    """The right password came: its earlier failures no longer count for this pair."""
    SignInFailures.objects.filter(subject=_subject("pair", email, address)).delete()


def _subject(kind: str, *parts: str) -> bytes:
    """Hashed, so that the table names nobody who mistyped."""
    text = "\x00".join((kind, *(part.strip().lower() for part in parts)))
    return hashlib.sha256(text.encode()).digest()
