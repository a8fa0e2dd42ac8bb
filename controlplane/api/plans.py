"""`?plan=true` on a write: what it would change, cost and disrupt, and then none of it.

The call runs as it would, in its transaction, which is then undone: nothing is kept, published or remembered under an
Idempotency-Key. What it would have changed is read from the audit entries that its triggers wrote (audit/models.py), so
that a write of tomorrow is planned without a line of its own. Called by middleware.py for every write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

from django.db import connection
from django.http import HttpRequest, HttpResponse

from controlplane import ids
from controlplane.api.plandocument import Change, FieldChange, Plan, Written
from controlplane.api.planeffects import cost_of, disruption_of
from controlplane.errors import InvalidInputError

CONTENT_TYPE: Final = "application/vnd.corral.plan+json"
MAX_ENTRIES: Final = 1000  # changes listed; `n_changes` counts them all
# What an entry must never show, should a table's trigger forget to leave it out.
_SECRET: Final = re.compile(r"secret|password|digest|lookup|pepper|cipher|sealed|private|credential|last4")
_OF_THE_ROW: Final = frozenset({"id", "organization_id", "created_by_id"})
# How the API names things: kind of an entry to the prefix of its id.
_PREFIXES: Final = {
    "organization": ids.Prefix.ORGANIZATION,
    "project": ids.Prefix.PROJECT,
    "member": ids.Prefix.MEMBER,
    "user": ids.Prefix.USER,
    "api_key": ids.Prefix.API_KEY,
    "service_account": ids.Prefix.SERVICE_ACCOUNT,
    "management_token": ids.Prefix.MANAGEMENT_TOKEN,
    "model_version": ids.Prefix.MODEL_VERSION,
    "deployment": ids.Prefix.DEPLOYMENT,
    "adapter": ids.Prefix.ADAPTER,
    "grantee": ids.Prefix.ORGANIZATION,
    "price_version": ids.Prefix.PRICE_VERSION,
    "budget": ids.Prefix.BUDGET,
    "operation": ids.Prefix.OPERATION,
    "grant": ids.Prefix.GRANT,
    "webhook": ids.Prefix.WEBHOOK,
    "quota": ids.Prefix.QUOTA,
    "upstream": ids.Prefix.UPSTREAM,
    "end_customer_limits": ids.Prefix.END_CUSTOMER_LIMITS,
}


def is_asked(request: HttpRequest) -> bool:
    """Whether this write is only to be planned. Raises InvalidInputError for anything but true or false."""
    said = request.GET.getlist("plan")
    if not said or said == ["false"]:
        return False
    if said != ["true"]:
        raise InvalidInputError("plan: send plan=true, or leave it out", field="plan")
    return True


def preview(
    request: HttpRequest, organization_id: UUID, answer: Callable[[Any], HttpResponse]
) -> HttpResponse:
    """The plan of a write, or the refusal it would meet. The caller undoes the transaction."""

    with _own_entries(organization_id) as entries:
        response = answer(request)
        if response.status_code >= 400:
            return response
        written = list(entries())
    plan = Plan(
        status=response.status_code,
        n_changes=len(written),
        changes=[_change(each) for each in written[:MAX_ENTRIES]],
        cost=cost_of(organization_id, written),
        disrupts=disruption_of(organization_id, written),
    )
    return HttpResponse(
        plan.model_dump_json(),
        content_type=CONTENT_TYPE,
        headers={"Cache-Control": "no-store"},
    )


@contextmanager
def _own_entries(organization_id: UUID) -> Iterator[Callable[[], Iterator[Written]]]:
    """Inside, what this transaction writes to the audit log from here on."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT coalesce(max(id), 0) FROM audit_entry WHERE organization_id = %s", [organization_id]
        )
        newest = cursor.fetchone()[0]

    first = ids.new_id()

    def entries() -> Iterator[Written]:
        from controlplane.audit.models import Entry
        from controlplane.operations.models import Operation

        rows = Entry.objects.raw(
            "SELECT * FROM audit_entry WHERE organization_id = %s AND id > %s "
            "AND xid = pg_current_xact_id_if_assigned() ORDER BY id",
            [organization_id, newest],
        )
        for row in rows:
            yield Written(row.action, row.kind, row.thing, row.changes)
        # Work, not configuration: operations are not in the audit log.
        begun = Operation.objects.filter(organization_id=organization_id, actor=_actor(), id__gt=first)
        for operation in begun.order_by("id"):
            changes = {"kind": [None, operation.kind], "subject": [None, operation.subject]}
            yield Written("create", "operation", operation.id, changes)

    yield entries


def _actor() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('corral.actor', true)")
        return str(cursor.fetchone()[0] or "")


def _change(written: Written) -> Change:
    prefix = _PREFIXES.get(written.kind)
    thing = ids.to_text(prefix, written.thing) if prefix else written.thing.hex
    name = written.after("name") or written.before("name")
    fields = [
        FieldChange(field=_outside(field), before=_shown(field, before), after=_shown(field, after))
        for field, (before, after) in sorted(written.changes.items())
        if field not in _OF_THE_ROW and "last4" not in field
    ]
    return Change(
        action=written.action,
        kind=written.kind,
        id=None if written.action == "create" else thing,
        name=name if isinstance(name, str) else None,
        fields=fields,
    )


def _outside(field: str) -> str:
    """As the API calls it."""
    return "slo_class" if field == "slo_class_id" else field


def _shown(field: str, value: Any) -> Any:
    if value is None:
        return None
    if _SECRET.search(field):
        return "[secret]"
    prefix = _PREFIXES.get(field.removesuffix("_id")) if field.endswith("_id") else None
    if prefix is not None:
        try:
            return ids.to_text(prefix, UUID(str(value)))
        except ValueError:
            return value
    return value
