"""Exports: begun by an owner, written part by part by the control worker, read by owners, gone after a week.

A part and the position after it are one transaction: a worker that dies costs one part. Lives in Postgres, so that any
web process can hand it out and row-level security guards it.
"""

from __future__ import annotations

import gzip
import time
from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from django.db import transaction
from django.utils import timezone

from controlplane import ids
from controlplane.errors import ConflictError, NotFoundError
from controlplane.lifecycle import belongings
from controlplane.lifecycle.models import Export, ExportPart
from controlplane.operations import services as operations
from controlplane.operations.advance import Again, Claim, Done, handles
from controlplane.operations.models import OPEN, Operation
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.lifecycle")

KIND: Final = "export_organization"
KEEP: Final = timedelta(days=7)
ROWS_A_PART: Final = 1_000
MAX_KEPT: Final = 3  # exports of one organization at a time
_STEP_S: Final = 10.0
_MAX_S: Final = 24 * 3600.0


def begin(*, organization_id: UUID) -> Export:
    """A new export. Raises ConflictError while one is being written or too many are kept."""
    with tenant(organization_id):
        kept = list(Export.objects.select_for_update().filter(organization_id=organization_id))
        if len(kept) >= MAX_KEPT:
            raise ConflictError(f"{MAX_KEPT} exports are kept already: delete one first")
        busy = Operation.objects.filter(organization_id=organization_id, kind=KIND, state__in=OPEN)
        if busy.exists():
            raise ConflictError("an export is being written: wait until it has ended")
        export = Export(organization_id=organization_id, expires_at=timezone.now() + KEEP)
        export.operation_id = operations.begin(
            organization_id=organization_id, kind=KIND, subject=str(export), max_s=_MAX_S
        ).id
        export.save(force_insert=True)
        export.refresh_from_db()
    return export


def export(*, organization_id: UUID, export_id: UUID) -> Export:
    """One that has not expired. Raises NotFoundError, also for another tenant's."""
    found = Export.objects.filter(
        organization_id=organization_id, id=export_id, expires_at__gt=timezone.now()
    ).first()
    if found is None:
        raise NotFoundError("no such export, or it has expired", field="export")
    return found


def part(*, organization_id: UUID, export_id: UUID, n: int) -> bytes:
    """Its JSON lines. Raises NotFoundError."""
    export(organization_id=organization_id, export_id=export_id)
    found = ExportPart.objects.filter(organization_id=organization_id, export_id=export_id, n=n).first()
    if found is None:
        raise NotFoundError("no such part: they are numbered from 0", field="n")
    return gzip.decompress(bytes(found.data))


def delete(*, organization_id: UUID, export_id: UUID) -> None:
    """Before its time. Raises NotFoundError."""
    with tenant(organization_id):
        found = export(organization_id=organization_id, export_id=export_id)
        ExportPart.objects.filter(organization_id=organization_id, export_id=found.id).delete()
        Export.objects.filter(organization_id=organization_id, id=found.id).delete()


def forget_expired() -> int:
    """As operator: how many are gone now."""
    with transaction.atomic():
        late = list(Export.objects.filter(expires_at__lte=timezone.now()).values_list("id", flat=True)[:100])
        ExportPart.objects.filter(export_id__in=late).delete()
        Export.objects.filter(id__in=late).delete()
    return len(late)


@handles(KIND)
def step(claim: Claim) -> Again | Done:
    """Parts for some seconds, from where the last step stopped."""
    export_id = ids.from_text(ids.Prefix.EXPORT, claim.row.subject)
    found = Export.objects.filter(id=export_id, organization_id=claim.organization_id).first()
    if found is None:
        return Done(message="it was deleted meanwhile")
    kinds = belongings.kinds()
    labels = [model._meta.label for model in kinds]
    until = time.monotonic() + _STEP_S
    while time.monotonic() < until:
        label = found.position.get("kind", labels[0])
        after = found.position.get("after")
        if label not in labels:
            return Done({"n_parts": found.n_parts, "n_rows": found.n_rows}, "written")
        at = labels.index(label)
        lines = list(belongings.rows(kinds[at], found.organization_id, after, ROWS_A_PART))
        full = len(lines) == ROWS_A_PART
        following = labels[at + 1] if at + 1 < len(labels) else ""
        found.position = {"kind": label, "after": lines[-1][0]} if full else {"kind": following}
        _keep(found, [line for _, line in lines])
        claim.report(100 * at // len(labels), f"{found.n_rows} rows")
    return Again(claim.row.progress, f"{found.n_rows} rows", after_s=0.0)


def _keep(export: Export, lines: list[str]) -> None:
    with transaction.atomic():
        if lines:
            ExportPart.objects.create(
                organization_id=export.organization_id,
                export_id=export.id,
                n=export.n_parts,
                data=gzip.compress("".join(f"{line}\n" for line in lines).encode()),
            )
            export.n_parts += 1
            export.n_rows += len(lines)
        export.save(update_fields=["position", "n_parts", "n_rows"])
