"""Sessions of people, ended from outside: their organization's provider went away, or they did."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from allauth.usersessions.models import UserSession
from django.contrib.sessions.models import Session
from django.db.models import QuerySet

ORGANIZATION: Final = "organization"  # in UserSession.data: hex of who vouched


def note_vouched(session_key: str, organization_id: UUID) -> None:
    """Remember in the list of sessions who vouched for this one."""
    UserSession.objects.filter(session_key=session_key).update(data={ORGANIZATION: organization_id.hex})


def end_vouched(*, organization_id: UUID, user_id: UUID | None = None) -> None:
    """End the sessions that this organization's providers vouched for, of all people or of one."""
    rows = UserSession.objects.filter(data__organization=organization_id.hex)
    _end(rows if user_id is None else rows.filter(user_id=user_id))


def end_all(*, user_id: UUID) -> None:
    """End every session of a person."""
    _end(UserSession.objects.filter(user_id=user_id))


def _end(rows: QuerySet[UserSession]) -> None:
    keys = list(rows.values_list("session_key", flat=True))
    Session.objects.filter(session_key__in=keys).delete()
    UserSession.objects.filter(session_key__in=keys).delete()
