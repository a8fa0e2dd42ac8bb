"""The audit log: what was changed, by whom, and the chain that shows that nothing was changed since."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from ninja import Field, Query, Router, Schema

from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.paging import Page, PageQuery, matching, page
from controlplane.audit.models import Entry, Seal
from controlplane.tenants.rights import Permission

router = Router(tags=["audit"])


class EntryOut(Schema):
    """One change of one thing."""

    id: int
    at: datetime
    actor: str = Field(description="tok_… or usr_…, or the database role of the house")
    action: str = Field(description="create, update or delete")
    kind: str
    thing: str = Field(description="32 hex digits, as in its id")
    changes: dict[str, list[Any]] = Field(description="Field to [before, after]")
    n: int | None = Field(description="Its link of the chain; null until it is sealed, seconds later")
    hash: str | None


class EntryQuery(PageQuery):
    """Which entries."""

    kind: str | None = Field(default=None, max_length=40)
    thing: UUID | None = None


def entry_out(row: Entry) -> EntryOut:
    seal: Seal | None = getattr(row, "seal", None)
    return EntryOut(
        id=row.pk,
        at=row.at,
        actor=row.actor,
        action=row.action,
        kind=row.kind,
        thing=row.thing.hex,
        changes=row.changes,
        n=seal.n if seal else None,
        hash=bytes(seal.hash).hex() if seal else None,
    )


@operation(router, "GET", "/audit", Permission.AUDIT_READ, Page[EntryOut])
def list_audit(request: ApiRequest, query: Query[EntryQuery]) -> Page[EntryOut]:
    """Changes, newest first."""
    rows = Entry.objects.filter(organization_id=request.caller.organization_id).select_related("seal")
    rows = matching(rows, kind=query.kind, thing=query.thing)
    return page(rows, query, entry_out)
