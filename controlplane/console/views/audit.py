"""The audit log: every change of what the organization owns, by whom, and its place in the sealed chain."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlencode
from uuid import UUID

from django.http import HttpResponse, QueryDict
from django.shortcuts import render
from django.utils import timezone
from django.views.decorators.http import require_GET

from controlplane.console import changes
from controlplane.console.access import MemberRequest, member_page
from controlplane.tenants.rights import Permission

PAGE_ROWS: Final = 50
ACTIONS: Final = ("create", "update", "delete")
_MAX_ID: Final = 2**63 - 1


@require_GET
@member_page(Permission.AUDIT_READ)
def audit_log(request: MemberRequest) -> HttpResponse:
    organization_id = request.membership.organization_id
    kinds = changes.kinds(organization_id=organization_id)
    filters = _filters(request.GET)
    rows = changes.newest(organization_id=organization_id, filters=filters, limit=PAGE_ROWS + 1)
    more, rows = len(rows) > PAGE_ROWS, rows[:PAGE_ROWS]
    context = {
        "now": timezone.now(),
        "rows": rows,
        "kinds": kinds,
        "actions": ACTIONS,
        "filters": filters,
        "n_sealed": changes.n_sealed(organization_id=organization_id),
        "older": _query(filters, before=rows[-1].id) if more else "",
        "newest": _query(filters),
    }
    return render(request, "console/audit.html", context)


def _filters(query: QueryDict) -> changes.Filters:
    """Whatever is malformed filters nothing: the address bar is an input like any other."""
    action, before = query.get("action", ""), query.get("before", "")
    return changes.Filters(
        kind=query.get("kind", "")[:40].replace("\x00", ""),
        action=action if action in ACTIONS else "",
        thing=_thing(query.get("thing", "")),
        before=_number(before),
    )


def _number(text: str) -> int | None:
    found = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_ID)) else None
    return found if found is not None and found <= _MAX_ID else None


def _thing(text: str) -> UUID | None:
    """An id as the API writes it (key_…), or its 32 digits alone."""
    try:
        return UUID(text.strip().rpartition("_")[2])
    except ValueError:
        return None


def _query(filters: changes.Filters, before: int | None = None) -> str:
    values = {"kind": filters.kind, "action": filters.action}
    values["thing"] = filters.thing.hex if filters.thing else ""
    values["before"] = "" if before is None else str(before)
    return urlencode({name: value for name, value in values.items() if value})
