"""How large a deployment's requests have been of late: what scaling asks billing's rows, past billing's code.

Read by autoscaler/gpuwork.py as operator. Sizes only, never who asked or what.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from django.db import connection

SEEN_FOR: Final = timedelta(days=1)
MAX_SIZES: Final = 2_000  # the newest; more tell nothing new


def request_sizes(
    *, organization_id: UUID, deployment_id: UUID, now: datetime, limit: int = MAX_SIZES
) -> list[tuple[int, int]]:
    """(prompt, answer) in tokens of its newest requests that were answered, none older than a day."""
    query = (
        "SELECT n_prompt_tokens, n_completion_tokens FROM billing_usageevent WHERE organization_id = %s "
        "AND deployment_id = %s AND admitted_at > %s AND n_completion_tokens > 0 ORDER BY admitted_at DESC LIMIT %s"
    )
    with connection.cursor() as cursor:
        cursor.execute(query, [organization_id, deployment_id, now - SEEN_FOR, limit])
        return [(int(n_prompt), int(n_output)) for n_prompt, n_output in cursor.fetchall()]
