"""Who acts in this transaction, for the audit log's triggers."""

from __future__ import annotations

from django.db import connection


def act_as(actor: str) -> None:
    """`actor`: an id of the API (usr_…, tok_…). Ends with the transaction; without one the log names the role."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT set_config('corral.actor', %s, true)", [actor])
