"""The audit log as its page shows it: who changed what, and which fields became what. Reads only, one tenant's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from controlplane import ids
from controlplane.audit.models import Entry, Seal
from controlplane.tenants.models import ManagementToken, Member

MAX_TEXT: Final = 120  # characters of a value; the API has all of it
KINDS_SEEN_IN: Final = 2000  # newest entries
_NOISE: Final = frozenset({"id", "organization_id", "pepper"})
_HOUSE: Final = "role "  # begins the actor where a role of the database acted: a command of the operator


@dataclass(frozen=True, slots=True)
class Filters:
    """`thing` of any kind; `before`: an entry's number."""

    kind: str = ""
    action: str = ""
    thing: UUID | None = None
    before: int | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One entry. `fields`: name, before, after; '' where there was or is nothing. `link`: its place in the chain."""

    id: int
    at: datetime
    who: str
    who_id: str
    action: str
    kind: str
    thing: UUID
    name: str
    fields: tuple[tuple[str, str, str], ...]
    is_erased: bool
    link: int | None


def newest(*, organization_id: UUID, filters: Filters, limit: int) -> list[Change]:
    """At most so many, newest first."""
    rows = Entry.objects.filter(organization_id=organization_id).select_related("seal").order_by("-id")
    if filters.kind:
        rows = rows.filter(kind=filters.kind)
    if filters.action:
        rows = rows.filter(action=filters.action)
    if filters.thing:
        rows = rows.filter(thing=filters.thing)
    if filters.before is not None:
        rows = rows.filter(id__lt=filters.before)
    found = list(rows[:limit])
    names = _names(organization_id, {row.actor for row in found})
    return [_change(row, names) for row in found]


def kinds(*, organization_id: UUID) -> list[str]:
    """What was changed lately."""
    lately = Entry.objects.filter(organization_id=organization_id).order_by("-id")[:KINDS_SEEN_IN]
    return sorted(set(lately.values_list("kind", flat=True)))


def n_sealed(*, organization_id: UUID) -> int:
    """Links of the chain."""
    last = Seal.objects.filter(organization_id=organization_id).order_by("-n").first()
    return last.n if last else 0


def _change(row: Entry, names: dict[str, str]) -> Change:
    seal: Seal | None = getattr(row, "seal", None)
    changes: dict[str, list[Any]] = row.changes
    is_house = row.actor.startswith(_HOUSE)
    return Change(
        id=row.pk,
        at=row.at,
        who="operator" if is_house else names.get(row.actor, row.actor),
        who_id=row.actor,
        action=row.action,
        kind=row.kind,
        thing=row.thing,
        name=next(
            (_text(v) for key in ("name", "email", "url") for v in reversed(changes.get(key, ())) if v), ""
        ),
        fields=tuple(
            (field, _text(before), _text(after))
            for field, (before, after) in sorted(changes.items())
            if field not in _NOISE
        ),
        is_erased=row.redacted is not None,
        link=seal.n if seal else None,
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _names(organization_id: UUID, actors: Iterable[str]) -> dict[str, str]:
    """People by e-mail, tokens by name; who left is known by id alone."""
    users: dict[UUID, str] = {}
    tokens: dict[UUID, str] = {}
    for actor in actors:
        for prefix, wanted in ((ids.Prefix.USER, users), (ids.Prefix.MANAGEMENT_TOKEN, tokens)):
            try:
                wanted[ids.from_text(prefix, actor)] = actor
            except ids.InvalidIdError:
                continue
    members = Member.objects.filter(organization_id=organization_id, user_id__in=users).select_related("user")
    named = {users[member.user_id]: member.user.email for member in members}
    rows = ManagementToken.objects.filter(organization_id=organization_id, id__in=tokens)
    return named | {tokens[row.id]: f"token {row.name}" for row in rows}
