"""The end of adapters' files: those retired long enough ago, those of a tenant that is erased, uploads that never came.

Called by tasks.py and by the erasure (controlplane/lifecycle), as operator. Equal files of two tenants lie in one place
and stay while either has them. Machines drop theirs by themselves (workers/agent/adapters.py).
"""

from __future__ import annotations

from datetime import datetime
from typing import Final
from uuid import UUID

import structlog

from controlplane.adapters import files, selectors
from controlplane.adapters.models import Adapter, AdapterState
from controlplane.adapters.services import RETENTION, UPLOAD_TIME
from infra.objectstore import ObjectStoreError

log = structlog.get_logger("corral.adapters")
_AT_ONCE: Final = 100


def purge_retired(now: datetime) -> int:
    """How many lost their files. What fails is tried again at the next turn."""
    due = Adapter.objects.filter(state=AdapterState.RETIRED, retired_at__lte=now - RETENTION, purged_at=None)
    return sum(_purge(row, now) for row in due.order_by("retired_at")[:_AT_ONCE])


def purge_organization(organization_id: UUID, now: datetime) -> None:
    """All files of a tenant that is erased, which does not wait. Raises ObjectStoreError: the erasure goes on later."""
    rows = Adapter.objects.filter(organization_id=organization_id)
    rows.exclude(state=AdapterState.RETIRED).update(state=AdapterState.RETIRED, retired_at=now)
    for row in rows.filter(purged_at=None):
        if not _purge(row, now):
            raise ObjectStoreError("an adapter's files could not be deleted yet")


def give_up_waiting(now: datetime) -> int:
    """Registrations whose files never came are refused."""
    stale = Adapter.objects.filter(state=AdapterState.AWAITING, created_at__lte=now - UPLOAD_TIME)
    return stale.update(
        state=AdapterState.REFUSED,
        error_code="not_uploaded",
        error_message="its files did not come within a day",
    )


def _purge(row: Adapter, now: datetime) -> bool:
    if row.digest and row.digest not in selectors.digests_in_use([row.digest]):
        try:
            files.purge(row.digest, row.source_uri)
        except ObjectStoreError as error:
            log.warning("adapter.not_purged", adapter=row.id.hex, error=str(error))
            return False
    return bool(Adapter.objects.filter(id=row.id, purged_at=None).update(purged_at=now))
