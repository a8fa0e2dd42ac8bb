"""Machines' Redis passwords are short-lived: a new one beside the old, sealed for the agent; then the old one ends, and
with it every connection that was opened by it.

Run by a task every few seconds; policy/passwords.py says which step is due. Every step may be repeated, done twice at
once, or cut off anywhere: the row holds the digests that let the machine in, and is written before Redis is. Which
password the machine connects with it says in its beats, so that a Redis that forgot an offer locks nobody out.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

import redis
import structlog
from django.db.models import F, QuerySet
from django.db.models.functions import Coalesce
from django.utils import timezone

from autoscaler import records
from autoscaler.models import Machine, MachineState
from autoscaler.policy import passwords
from autoscaler.policy.passwords import Password, Step, Told
from autoscaler.tick import House
from workers.contract import Heartbeat
from workers.sealed import BoxError, seal_for

log = structlog.get_logger("corral.autoscaler")

MAX_PER_PASS: Final = 500  # of those that are due, the oldest first; the rest a pass later
_LIVE: Final = (MachineState.ENROLLED, MachineState.READY, MachineState.DRAINING)
_NO_KEY: Final = "its agent can open no new Redis password"
_NOT_TAKEN: Final = "it took no new Redis password"


def renew(house: House, now: datetime | None = None) -> set[UUID]:
    """One pass over the provider's machines in the cell; the deployments to tick: a machine of theirs leaves."""
    now = now or timezone.now()
    rows = list(
        Machine.objects.filter(cell=house.cell.keys.cell, provider=house.provider.name, state__in=_LIVE)
        .exclude(redis_password_digest="")
        .order_by(Coalesce("redis_password_at", "enroll_used_at", "created_at"), "id")[:MAX_PER_PASS]
    )
    touched: set[UUID] = set()
    try:
        beats = house.cell.read_agents([row.id.hex for row in rows])
    except redis.RedisError as error:
        log.warning("machine.passwords_not_renewed", error=type(error).__name__)
        return touched
    for row in rows:
        password = _password(row, beats.get(row.id.hex), house.config.machine_password_s)
        act = _STEPS.get(passwords.step(password, now.timestamp()))
        if act is None:
            continue
        try:
            touched |= act(row, password, house, now)
        except redis.RedisError as error:  # every step may be repeated
            log.warning("machine.password_not_renewed", machine=row.id.hex, error=type(error).__name__)
    return touched


def _password(row: Machine, beat: Heartbeat | None, valid_s: float) -> Password:
    said = "" if beat is None else beat.password
    told = Told.NOTHING
    if said:
        told = {row.redis_password_digest: Told.PRESENT, row.redis_password_next: Told.NEXT}.get(said, told)
    since = row.redis_password_at or row.enroll_used_at or row.created_at
    offered = row.redis_password_offered_at if row.redis_password_next else None
    return Password(
        since_s=since.timestamp(),
        valid_s=valid_s,
        n_offers=row.redis_password_offers,
        offered_at_s=None if offered is None else offered.timestamp(),
        told=told,
        can_take=_box_key(row) != "",
        is_leaving=row.state == MachineState.DRAINING,
        ends_at_s=None if row.ends_at is None else row.ends_at.timestamp(),
    )


def _box_key(row: Machine) -> str:
    """What its agent said to seal for; '' for one of the version before."""
    key = row.capabilities.get("box_public")
    return key if isinstance(key, str) else ""


def _offer(row: Machine, password: Password, house: House, now: datetime) -> set[UUID]:
    counted = F("redis_password_offers") + 1
    plain = secrets.token_urlsafe(32)
    try:
        box = seal_for(_box_key(row), plain.encode())
    except BoxError:  # it said nonsense: as if it took nothing
        _as_seen(row).update(redis_password_offers=counted)
        return set()
    digest = hashlib.sha256(plain.encode()).hexdigest()
    ours = _as_seen(row).update(
        redis_password_next=digest, redis_password_offered_at=now, redis_password_offers=counted
    )
    if ours:
        let_in(row.id, (row.redis_password_digest, digest), house)
        life_ms = round(passwords.box_life_s(password.valid_s) * 1000)
        house.cell.offer_password(row.id.hex, box, life_ms)
    return set()


def _finish(row: Machine, password: Password, house: House, now: datetime) -> set[UUID]:
    mid, cell = row.id.hex, house.cell
    let_in(row.id, (row.redis_password_next,), house)
    n_connections = cell.disconnect(mid)
    replaced = _as_seen(row).update(
        redis_password_digest=row.redis_password_next,
        redis_password_next="",
        redis_password_at=now,
        redis_password_offered_at=None,
        redis_password_offers=0,
    )
    cell.end_offer(mid)
    if replaced:
        log.info("machine.password_replaced", machine=mid, n_connections=n_connections)
    return set()


def _withdraw(row: Machine, password: Password, house: House, now: datetime) -> set[UUID]:
    house.cell.end_offer(row.id.hex)
    if _as_seen(row).update(redis_password_next="", redis_password_offered_at=None):
        let_in(row.id, (row.redis_password_digest,), house)
        log.warning("machine.password_not_taken", machine=row.id.hex, n_offers=row.redis_password_offers)
    return set()


def _leave(row: Machine, password: Password, house: House, now: datetime) -> set[UUID]:
    left_s = passwords.ends_at_s(password, now.timestamp()) - now.timestamp()
    why = _NOT_TAKEN if password.can_take else _NO_KEY
    if row.provider_ref:
        house.provider.leaving(row.provider_ref, left_s)
    return set(records.machine_leaves(row.id, round(left_s * 1000), why))


def _end(row: Machine, password: Password, house: House, now: datetime) -> set[UUID]:
    """Dead, with all its connections: what still runs there is given up by its silence, and resumes elsewhere."""
    if _as_seen(row).update(redis_password_digest="", redis_password_next="", redis_password_offered_at=None):
        log.error("machine.password_over", machine=row.id.hex, since=_since(password))
        house.cell.delete_user(row.id.hex)
    return set()


def let_in(machine_id: UUID, digests: Iterable[str], house: House) -> None:
    """Its Redis user has these passwords and no others, unless the machine is gone: then it has no user.

    Who gives a machine back marks the row first: either they delete this user, or we see the mark. Raises
    redis.RedisError.
    """
    house.cell.set_user(machine_id.hex, *digests)
    if not Machine.objects.filter(id=machine_id).exclude(state=MachineState.GONE).exists():
        house.cell.delete_user(machine_id.hex)


def _as_seen(row: Machine) -> QuerySet[Machine]:
    """The row if nobody has changed its passwords since, and it still exists."""
    return Machine.objects.filter(
        id=row.id,
        redis_password_digest=row.redis_password_digest,
        redis_password_next=row.redis_password_next,
        state__in=_LIVE,
    )


def _since(password: Password) -> str:
    return datetime.fromtimestamp(password.since_s, UTC).isoformat()


_STEPS: Final[dict[Step, Callable[[Machine, Password, House, datetime], set[UUID]]]] = {
    Step.OFFER: _offer,
    Step.FINISH: _finish,
    Step.WITHDRAW: _withdraw,
    Step.LEAVE: _leave,
    Step.END: _end,
}
