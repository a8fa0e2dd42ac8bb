"""`?plan=true` on a write: what it would change, cost and disrupt, and then none of it.

The call runs as it would, in its transaction, which is then undone: nothing is kept, published or remembered under an
Idempotency-Key. What it would have changed is read from the audit entries that its triggers wrote (audit/models.py), so
that a write of tomorrow is planned without a line of its own. Called by middleware.py for every write.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from django.db import connection
from django.http import HttpRequest, HttpResponse
from ninja import Field, Schema

from controlplane import ids
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
    "grantee": ids.Prefix.ORGANIZATION,
    "price_version": ids.Prefix.PRICE_VERSION,
    "budget": ids.Prefix.BUDGET,
    "operation": ids.Prefix.OPERATION,
    "grant": ids.Prefix.GRANT,
    "webhook": ids.Prefix.WEBHOOK,
    "quota": ids.Prefix.QUOTA,
}


@dataclass(frozen=True, slots=True)
class Written:
    """One audit entry of the planned call."""

    action: str
    kind: str
    thing: UUID
    changes: dict[str, list[Any]]

    def before(self, field: str) -> Any:
        return self.changes.get(field, [None, None])[0]

    def after(self, field: str) -> Any:
        return self.changes.get(field, [None, None])[1]


class FieldChange(Schema):
    """One field of one thing. JSON has no word for "was not there": that is null too."""

    field: str
    before: Any = None
    after: Any = None


class Change(Schema):
    """One thing that would be created, changed or deleted."""

    action: str = Field(description="create, update or delete", examples=["update"])
    kind: str = Field(examples=["deployment"])
    id: str | None = Field(description="Null for what would be created: its id is not known before")
    name: str | None = None
    fields: list[FieldChange]


class FromTo(Schema):
    """Nano-dollars an hour, before and after."""

    before: int
    after: int


class Cost(Schema):
    """What the change does to the rate of spending on machines. A replica's part of its machine is reckoned."""

    machine_nano_per_h: int = Field(description="Price of one machine", examples=[1_006_000_000])
    replicas_per_machine: int
    least_nano_per_h: FromTo = Field(description="With the least replicas that are kept")
    most_nano_per_h: FromTo = Field(description="With the most replicas that load may bring")


class ReplicaHit(Schema):
    """A replica that would be drained."""

    id: str
    deployment: str
    phase: str
    why: str = Field(description="deleted, replaced, surplus or drained")
    n_streams: int | None = Field(description="Requests it runs now; null where that cannot be asked")


class KeyHit(Schema):
    """A key or token that would stop working."""

    id: str
    name: str
    ends_at: datetime | None = Field(description="Null: at once")
    last_used_at: datetime | None


class NarrowedKey(Schema):
    """A key that would go on with less."""

    id: str
    name: str
    loses: list[str] = Field(
        description="In words: what it may no longer do",
        examples=[["models other than chat", "the alias gpt-4o"]],
    )


class MemberHit(Schema):
    """A person who would lose rights."""

    id: str
    email: str
    loses: list[str] = Field(description="Permissions, as in docs/permissions.md")


class GrantHit(Schema):
    """A tenant who could no longer call a deployment."""

    name: str = Field(description="The model they send")
    grantee_id: str


class Disruption(Schema):
    """Who would notice. Empty lists: nobody."""

    replicas: list[ReplicaHit]
    n_streams: int | None = Field(description="In flight on those replicas; they end or move on")
    keys: list[KeyHit]
    narrowed: list[NarrowedKey]
    tokens: list[KeyHit]
    members: list[MemberHit]
    grants: list[GrantHit]
    summary: list[str] = Field(description="The same in sentences")


class Plan(Schema):
    """What a write would do, sent with `?plan=true`. Nothing of it happened."""

    status: int = Field(description="What the call itself would answer", examples=[201])
    n_changes: int
    changes: list[Change]
    cost: Cost | None = Field(description="Null: it costs what it cost before")
    disrupts: Disruption


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
    from controlplane.api.planeffects import cost_of, disruption_of

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
