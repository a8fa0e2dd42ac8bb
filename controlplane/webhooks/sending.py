"""Sends what is due: claimed first, sent outside of any transaction, then marked.

Run by the control worker (tasks.py), as operator. A claim moves `next_at` past the longest call; whoever dies between
sending and marking leaves it due again under the same id: at least once, never silently not. Slow receivers are bounded
by the time of a call, by few calls at once, and by few deliveries of one endpoint per round.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from django.conf import settings
from django.db import connection, transaction
from django.utils import timezone

from billing.money import Nano, format_usd
from controlplane import ids, mail, outbound
from controlplane.secretbox import SealError
from controlplane.webhooks import signing
from controlplane.webhooks.catalogue import CATALOGUE
from controlplane.webhooks.models import Delivery, Endpoint, EndpointState, Event, State
from controlplane.webhooks.services import emit, secrets_of

log = structlog.get_logger("corral.webhooks")

CLAIM_S: Final = 60
CALL_TIMEOUT_S: Final = 10.0
AT_ONCE: Final = 8
A_ROUND: Final = 16
PER_ENDPOINT: Final = 4  # of a round
# Waits between tries, in seconds, each times 0.8 to 1.2; the last is repeated until the delivery is too old.
BACKOFF_S: Final = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800)
GIVE_UP: Final = timedelta(days=3)
DISABLE_AFTER: Final = timedelta(days=3)
_MAX_ERROR: Final = 300

_CLAIM: Final = """
UPDATE webhooks_delivery SET next_at = clock_timestamp() + make_interval(secs => %s), n_attempts = n_attempts + 1
WHERE id IN (
    SELECT d.id FROM webhooks_delivery d
    WHERE d.state = 'pending' AND d.next_at <= clock_timestamp() AND d.id IN (
        SELECT ranked.id FROM (
            SELECT id, row_number() OVER (PARTITION BY endpoint_id, email ORDER BY next_at, id) AS place
            FROM (
                SELECT id, endpoint_id, email, next_at FROM webhooks_delivery
                WHERE state = 'pending' AND next_at <= clock_timestamp() ORDER BY next_at LIMIT 1000
            ) AS due
        ) AS ranked WHERE place <= %s
    )
    ORDER BY d.next_at, d.id LIMIT %s FOR UPDATE SKIP LOCKED
)
RETURNING id, n_attempts
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one call. `gone`: the receiver wants no more of these, ever."""

    delivered: bool
    status: int | None = None
    error: str = ""
    gone: bool = False


def send_due(budget_s: float = 20.0) -> int:
    """Rounds until nothing is due or the time is over; how many were tried."""
    deadline = time.monotonic() + budget_s
    n = 0
    while time.monotonic() < deadline:
        claimed = claim()
        if not claimed:
            return n
        n += len(claimed)
        send(claimed)
    return n


def claim() -> dict[UUID, int]:
    """Ids of what this process is to send now, with the number of the try."""
    with connection.cursor() as cursor:
        cursor.execute(_CLAIM, [CLAIM_S, PER_ENDPOINT, A_ROUND])
        return dict(cursor.fetchall())


def send(claimed: dict[UUID, int]) -> None:
    """Send and mark; calls run beside each other, rows are written by this thread alone."""
    found = Delivery.objects.filter(id__in=claimed).select_related("event", "endpoint", "organization")
    rows = [row for row in found if _may_go(row)]
    with ThreadPoolExecutor(max_workers=AT_ONCE) as pool:
        calls = [(row, pool.submit(_call, *_prepared(row))) for row in rows if row.endpoint is not None]
        for row in rows:
            if row.endpoint is None:
                mark(row, claimed[row.id], _mail(row))
        for row, call in calls:
            mark(row, claimed[row.id], call.result())


def mark(row: Delivery, attempt: int, outcome: Outcome) -> None:
    """Write down how it went, unless somebody else is at it by now."""
    now = timezone.now()
    values: dict[str, Any] = {"last_status": outcome.status, "last_error": outcome.error[:_MAX_ERROR]}
    if outcome.delivered:
        values |= {"state": State.DELIVERED, "delivered_at": now}
    elif outcome.gone or now - row.created_at > GIVE_UP:
        values |= {"state": State.FAILED}
    else:
        values |= {"next_at": now + timedelta(seconds=wait_s(attempt))}
    with transaction.atomic():
        mine = Delivery.objects.filter(id=row.id, n_attempts=attempt, state=State.PENDING).update(**values)
        if mine and row.endpoint is not None:
            _note_health(row.endpoint, outcome, now)
    log.info(
        "delivery.tried", delivery=row.id.hex, kind=row.event.kind, attempt=attempt, delivered=outcome.delivered,
        status=outcome.status,
    )  # fmt: skip


def wait_s(attempt: int) -> float:
    """Until the next try, after the `attempt`th (from 1)."""
    return BACKOFF_S[min(attempt, len(BACKOFF_S)) - 1] * random.uniform(0.8, 1.2)


def message_id(row: Delivery) -> str:
    """The same however often it is sent: receivers tell repeats by it."""
    return ids.to_text(ids.Prefix.EVENT, row.event_id)


def payload(row: Delivery) -> bytes:
    event = row.event
    value = {"type": event.kind, "timestamp": event.at.isoformat(timespec="milliseconds"), "data": event.data}
    return json.dumps(value, separators=(",", ":")).encode()


def _may_go(row: Delivery) -> bool:
    """Not to an endpoint that was disabled meanwhile."""
    if row.endpoint is None or row.endpoint.disabled_at is None:
        return True
    Delivery.objects.filter(id=row.id, state=State.PENDING).update(
        state=State.FAILED,
        last_error=f"the endpoint is disabled: {row.endpoint.disabled_reason}"[:_MAX_ERROR],
    )
    return False


def _prepared(row: Delivery) -> tuple[str, bytes, dict[str, str] | None]:
    assert row.endpoint is not None
    body = payload(row)
    try:
        secrets = secrets_of(row.endpoint)
    except SealError:
        return row.endpoint.url, body, None
    headers = signing.headers(message_id(row), int(time.time()), body, secrets)
    return (
        row.endpoint.url,
        body,
        {**headers, "Content-Type": "application/json", "User-Agent": "Corral-Webhooks/1"},
    )


def _call(url: str, body: bytes, headers: dict[str, str] | None) -> Outcome:
    if headers is None:
        return Outcome(False, error="its secret cannot be opened: rotate it")
    try:
        answer = outbound.post(
            url, body, headers, allowed=settings.ENV.outbound_allow, timeout_s=CALL_TIMEOUT_S
        )
    except (outbound.CallFailedError, outbound.RefusedAddressError) as error:
        return Outcome(False, error=str(error))
    if 200 <= answer.status < 300:
        return Outcome(True, answer.status)
    why = "redirects are not followed" if 300 <= answer.status < 400 else "the receiver refused"
    return Outcome(False, answer.status, f"{why}: status {answer.status}", gone=answer.status == 410)


def _mail(row: Delivery) -> Outcome:
    event = row.event
    data = {
        name.removesuffix("_nano").replace("_", " "): format_usd(Nano(value))
        if name.endswith("_nano")
        else value
        for name, value in event.data.items()
        if value != ""
    }
    sentence = CATALOGUE[event.kind].sentence
    context = {"organization": row.organization, "sentence": sentence, "data": data, "at": event.at}
    subject = f"[Corral] {row.organization.name}: {event.kind}"
    sent = mail.send(to=row.email, subject=subject, template="webhooks/event.txt", context=context)
    return Outcome(sent, error="" if sent else "the mail server did not take it")


def _note_health(endpoint: Endpoint, outcome: Outcome, now: datetime) -> None:
    kept = EndpointState.objects.filter(endpoint=endpoint)
    if outcome.delivered:
        kept.filter(failing_since__isnull=False).update(failing_since=None)
        return
    kept.filter(failing_since=None).update(failing_since=now)
    since = kept.values_list("failing_since", flat=True).first() or now
    if outcome.gone:
        reason = "it answered 410: gone"
    elif now - since > DISABLE_AFTER:
        reason = f"nothing was delivered for {DISABLE_AFTER.days} days"
    else:
        return
    if Endpoint.objects.filter(id=endpoint.id, disabled_at=None).update(
        disabled_at=now, disabled_reason=reason
    ):
        data = {"webhook_id": str(endpoint), "reason": reason}
        emit(organization_id=endpoint.organization_id, kind="webhook.disabled", data=data)


def forget(before: datetime, limit: int = 5_000) -> int:
    """Delete events that old, with their deliveries; how many."""

    old: Sequence[UUID] = list(
        Event.objects.filter(at__lt=before).order_by("at").values_list("id", flat=True)[:limit]
    )
    Delivery.objects.filter(event_id__in=old).delete()
    Event.objects.filter(id__in=old).delete()
    return len(old)
