"""Advances open operations: claims one, runs one step of its handler, writes down where it stands.

Called by the control worker (tasks.py) as operator. A claim is a compare-and-set that moves `next_at` past the lease:
of several workers one has it, and the operation of a worker that died is taken up when its lease is over: a step
may therefore run twice and must be written so. Steps that fail are tried again, later each time, a bounded number of
times; what is not done at its deadline has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from django.db import InterfaceError, OperationalError
from django.utils import timezone

from controlplane.errors import CorralError
from controlplane.operations.models import OPEN, Operation, State

log = structlog.get_logger("corral.operations")

LEASE_S: Final = 60.0
MAX_FAILURES: Final = 5
BACKOFF_S: Final = (1.0, 2.0, 5.0, 10.0)
_MAX_TEXT: Final = 500


class LostClaimError(RuntimeError):
    """Another worker has taken the operation: stop, and write nothing."""


@dataclass(frozen=True, slots=True)
class Again:
    """Not done: look again after `after_s`."""

    progress: int
    message: str
    after_s: float = 2.0


@dataclass(frozen=True, slots=True)
class Done:
    """It has succeeded."""

    result: dict[str, Any] = field(default_factory=dict)
    message: str = ""


class Claim:
    """An operation while this worker has it."""

    def __init__(self, row: Operation) -> None:
        self.row = row

    @property
    def organization_id(self) -> UUID:
        return self.row.organization_id

    def report(self, progress: int, message: str = "") -> None:
        """From within a long step, at least every LEASE_S: where it stands. Raises LostClaimError."""
        self._write(
            progress=min(max(progress, 0), 99),
            message=message[:_MAX_TEXT],
            next_at=timezone.now() + timedelta(seconds=LEASE_S),
        )

    def _write(self, **values: Any) -> None:
        found = Operation.objects.filter(pk=self.row.pk, version=self.row.version, state__in=OPEN)
        if not found.update(version=self.row.version + 1, **values):
            raise LostClaimError(str(self.row))
        self.row.version += 1


# A step: raises CorralError where it can never succeed; anything else is tried again.
Handler = Callable[[Claim], Again | Done]
_HANDLERS: Final[dict[str, Handler]] = {}


def handles(kind: str) -> Callable[[Handler], Handler]:
    """Register the handler of a kind. The module that does must be imported by its app's tasks.py."""

    def register(handler: Handler) -> Handler:
        _HANDLERS[kind] = handler
        return handler

    return register


def advance_due(limit: int) -> int:
    """One step of each operation that is due, oldest first, at most `limit`; how many ran."""
    due = Operation.objects.filter(state__in=OPEN, next_at__lte=timezone.now()).order_by("next_at", "id")
    n = 0
    for operation_id in list(due.values_list("id", flat=True)[:limit]):
        n += advance(operation_id)
    return n


def advance(operation_id: UUID) -> bool:
    """One step of one operation; False if it is not due, has ended, or somebody else has it."""
    claim = _claim(operation_id)
    if claim is None:
        return False
    try:
        _step(claim)
    except LostClaimError:
        log.warning("operation.lost", operation=operation_id.hex)
    return True


def _claim(operation_id: UUID) -> Claim | None:
    row = Operation.objects.filter(id=operation_id, state__in=OPEN).first()
    now = timezone.now()
    if row is None or row.next_at > now:
        return None
    claimed = Operation.objects.filter(pk=row.pk, version=row.version, state__in=OPEN).update(
        version=row.version + 1,
        state=State.RUNNING,
        started_at=row.started_at or now,
        next_at=now + timedelta(seconds=LEASE_S),
    )
    row.version += 1
    return Claim(row) if claimed else None


def _step(claim: Claim) -> None:
    row = claim.row
    handler = _HANDLERS.get(row.kind)
    if timezone.now() >= row.deadline_at:
        _fail(claim, "deadline_passed", f"not done in time; last: {row.message or 'not begun'}")
        return
    if handler is None:
        _fail(claim, "unknown_kind", f"nothing here handles {row.kind!r}")
        return
    try:
        outcome = handler(claim)
    except LostClaimError:
        raise
    except CorralError as error:
        _fail(claim, error.code, error.message)
    except (OperationalError, InterfaceError):
        raise  # the lease runs out, another turn takes it up
    except Exception as error:
        _stumble(claim, error)
    else:
        _settle(claim, outcome)


def _settle(claim: Claim, outcome: Again | Done) -> None:
    now = timezone.now()
    if isinstance(outcome, Done):
        claim._write(
            state=State.SUCCEEDED,
            progress=100,
            message=outcome.message[:_MAX_TEXT],
            result=outcome.result,
            finished_at=now,
        )
        log.info("operation.succeeded", operation=claim.row.id.hex, kind=claim.row.kind)
        return
    claim._write(
        progress=min(max(outcome.progress, 0), 99),
        message=outcome.message[:_MAX_TEXT],
        next_at=now + timedelta(seconds=outcome.after_s),
        n_failures=0,
    )


def _stumble(claim: Claim, error: Exception) -> None:
    n = claim.row.n_failures + 1
    log.warning(
        "operation.stumbled",
        operation=claim.row.id.hex,
        kind=claim.row.kind,
        n_failures=n,
        error=type(error).__name__,
        exc_info=error,
    )
    if n >= MAX_FAILURES:
        _fail(claim, "internal_error", "this is our fault and was logged")
        return
    after_s = BACKOFF_S[min(n, len(BACKOFF_S)) - 1]
    claim._write(n_failures=n, next_at=timezone.now() + timedelta(seconds=after_s))


def _fail(claim: Claim, code: str, message: str) -> None:
    claim._write(
        state=State.FAILED,
        error_code=code[:64],
        error_message=message[:_MAX_TEXT],
        finished_at=timezone.now(),
    )
    log.info("operation.failed", operation=claim.row.id.hex, kind=claim.row.kind, code=code)
