"""Which delivered usage may be booked, and as what: pure, no I/O.

Called by intake for every entry of a machine's usage stream. A machine may be hostile or mad, so nothing it
says is taken on trust where the admission record of the trusted side knows better: who is charged, at which
price, and at most how many tokens. Must never raise on any input: a refusal is an answer.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Final
from uuid import UUID

import msgspec

from controlplane import ids
from controlplane.tenants.end_customers import SHAPE as END_CUSTOMER
from workers.contract import UsageEvent, decode_usage

# A witness may come late (its machine was cut off) but not from another age; the far end of the window also
# bounds what a wrong clock can do to the partitions.
OLDEST: Final = timedelta(days=35)
NEWEST: Final = timedelta(hours=1)
# The gateway makes the id as it admits the request.
ID_TO_ADMISSION: Final = timedelta(hours=1)

# Who may have counted tokens: an engine of ours, or what stands for one that is elsewhere.
COUNTED_BY: Final = ("", "upstream", "tokenizer", "estimate")
_INT32: Final = (1 << 31) - 1
_INT16: Final = (1 << 15) - 1
_MODEL_LENGTH: Final = 64


class Refusal(enum.Enum):
    """Why an entry is put aside instead of booked. The values label a metric."""

    UNDECODABLE = "undecodable"
    BAD_ID = "bad_id"
    OUT_OF_RANGE = "out_of_range"
    OTHER_MACHINE = "other_machine"  # it names a machine it was not delivered by
    OTHER_REQUEST = "other_request"  # tenant, deployment or price differ from what was admitted
    UNKNOWN_PRICE = "unknown_price"
    NOT_STORABLE = "not_storable"  # the database refused the row itself


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry as it lies in the usage stream of `machine_id`."""

    machine_id: str
    entry_id: str  # Redis stream id, `<ms>-<seq>`
    payload: bytes
    from_spool: bool = False

    @property
    def delivered_at_ms(self) -> int:
        """Redis' own time of delivery."""
        return int(self.entry_id.partition("-")[0])


@dataclass(frozen=True, slots=True)
class Admission:
    """What the trusted side wrote down when it admitted the request: bare hex ids, tokens held."""

    deployment: str
    key: str
    project: str
    org: str
    price_version: str
    n_output_held: int
    # The gateway was first, as nearly always: its holds went back already.
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """A delivery that may be booked: ids parsed, counts within what was held."""

    delivery: Delivery
    event: UsageEvent
    request_id: UUID
    day: date
    organization_id: UUID
    project_id: UUID
    api_key_id: UUID
    deployment_id: UUID
    replica_id: UUID | None
    machine_id: UUID
    price_version_id: UUID
    n_completion: int
    admitted_at: datetime
    # The admission record is gone (Redis was emptied, or the witness came later than it lives).
    unverified: bool
    # The machine claimed more completion tokens than were held; the tenant pays for no more than that.
    capped: bool
    # Nothing is held for it any more, or nothing is known to be.
    settled: bool


def decode(delivery: Delivery) -> UsageEvent | Refusal:
    """The event inside, or UNDECODABLE; BAD_ID where its request id could be no key of a request."""
    try:
        event = decode_usage(delivery.payload)
        ids.from_wire(event.request_id)
    except ids.InvalidIdError:
        return Refusal.BAD_ID
    except (msgspec.DecodeError, ValueError):
        return Refusal.UNDECODABLE
    return event


def vet(delivery: Delivery, event: UsageEvent, admission: Admission | None, now: datetime) -> Usage | Refusal:
    """What to book for this event, or why not. `admission` is None where its record is gone."""
    if event.machine != delivery.machine_id:
        return Refusal.OTHER_MACHINE
    if not _in_range(event):
        return Refusal.OUT_OF_RANGE
    if admission is not None and _claims(event) != _admitted(admission):
        return Refusal.OTHER_REQUEST
    n_completion = (
        event.n_completion if admission is None else min(event.n_completion, admission.n_output_held)
    )
    try:
        request_id = ids.from_wire(event.request_id)
        made_at = datetime.fromtimestamp(ids.created_ms(request_id) / 1000, tz=UTC)
        admitted_at = datetime.fromtimestamp(event.admitted_at_ms / 1000, tz=UTC)
        if not now - OLDEST <= made_at <= now + NEWEST or abs(admitted_at - made_at) > ID_TO_ADMISSION:
            return Refusal.OUT_OF_RANGE
        return Usage(
            delivery=delivery,
            event=event,
            request_id=request_id,
            day=made_at.date(),
            organization_id=ids.from_wire(event.org),
            project_id=ids.from_wire(event.project),
            api_key_id=ids.from_wire(event.key),
            deployment_id=ids.from_wire(event.deployment),
            replica_id=ids.from_wire(event.replica) if event.replica else None,
            machine_id=ids.from_wire(event.machine),
            price_version_id=ids.from_wire(event.price_version),
            n_completion=n_completion,
            admitted_at=admitted_at,
            unverified=admission is None,
            capped=n_completion < event.n_completion,
            settled=admission is None or admission.settled,
        )
    except ids.InvalidIdError:
        return Refusal.BAD_ID
    except (ValueError, OverflowError, OSError):  # an instant outside of the calendar
        return Refusal.OUT_OF_RANGE


def first_per_request(usages: list[Usage]) -> tuple[list[Usage], list[Usage]]:
    """(the first delivery of each request, the others), both in the order given."""
    seen: dict[UUID, Usage] = {}
    others = [usage for usage in usages if seen.setdefault(usage.request_id, usage) is not usage]
    return list(seen.values()), others


def _claims(event: UsageEvent) -> tuple[str, ...]:
    return event.deployment, event.key, event.project, event.org, event.price_version


def _admitted(admission: Admission) -> tuple[str, ...]:
    return admission.deployment, admission.key, admission.project, admission.org, admission.price_version


def _in_range(event: UsageEvent) -> bool:
    counts = (
        event.n_prompt,
        event.n_cached,
        event.n_completion,
        event.duration_ms,
        event.first_token_ms or 0,
    )
    return (
        all(0 <= count <= _INT32 for count in counts)
        and event.n_cached <= event.n_prompt
        and 0 <= event.attempts <= _INT16
        and 100 <= event.status <= 599
        and 0 < len(event.model) <= _MODEL_LENGTH
        and event.model.isprintable()
        and END_CUSTOMER.match(event.end_customer) is not None
        and event.counted_by in COUNTED_BY
    )
