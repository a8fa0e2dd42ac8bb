"""Keeps the day partitions of usage events ahead of time.

Called daily by beat and at every start of the stack. Late is not lost: events of a day without a partition go
to the default partition and are moved when theirs is made.
"""

from django.db import connection

DAYS_AHEAD = 7


def ensure_partitions(days_ahead: int = DAYS_AHEAD) -> int:
    """Make what is missing from yesterday to `days_ahead` (0-60) days from now; returns how many were made.

    Needs the operator role. Fails with a lock timeout after 2 s on a busy table: run it again.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_ensure_usage_partitions(%s)", [days_ahead])
        (n_made,) = cursor.fetchone()
    return int(n_made)
