"""Makes three lists agree: our rows, the provider's machines, and what Redis holds of both.

Run by Celery every 15 s, and in part by the watcher when Redis was lost. A machine we pay for and do not know
is killed and reported; one that vanished takes its replicas along. Everything may be repeated, and run twice at
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

import redis
import structlog
from django.db.models import F, Q
from django.utils import timezone

from autoscaler import launch, market, metrics, prefetch, renewal, reserve, stopping
from autoscaler.act import act
from autoscaler.cell import Cell
from autoscaler.models import (
    LIVE_PHASES,
    Decision,
    Machine,
    MachineState,
    PoolDecision,
    Replica,
    ReplicaPhase,
)
from autoscaler.observe import machine_views
from autoscaler.policy.machines import Silence, lost, to_release
from autoscaler.specs import desired_spec
from autoscaler.tick import House
from autoscaler.types import MachineState as MachineViewState
from infra.providers.base import ProviderError, ProviderMachine, ProviderState

log = structlog.get_logger("corral.autoscaler")

MAX_PRUNED = 5000
# A row is written a moment before its machine exists; younger ones are left to whoever is launching them.
SETTLED_AFTER = timedelta(seconds=15)
RESTARTS_FORGIVEN_AFTER = timedelta(minutes=2)
ENDED_LATELY = timedelta(hours=6)
_IS_ID = re.compile(r"[0-9a-f]{32}")
MAX_ENDED = 1000  # of those that ended lately, the newest, looked at per pass


@dataclass(slots=True)
class Report:
    """What one pass did; `deployments` lost replicas and want a tick."""

    n_killed: int = 0
    n_gone: int = 0
    n_restarted: int = 0
    n_released: int = 0
    n_restored: int = 0
    n_prefetches: int = 0
    deployments: set[UUID] = field(default_factory=set)


def reconcile(house: House, now: datetime | None = None) -> Report:
    """One pass. A step that fails is logged and does not keep the others from running."""
    report, now = Report(), now or timezone.now()
    for step in (_machines, _release, _restore, _prefetch, _prune):
        _guarded(step.__name__, lambda step=step: step(house, report, now))  # type: ignore[misc]
    return report


def restore(house: House) -> int:
    """Users, desired replicas and routes of the cell as the rows say; how many things were put right."""
    report = Report()
    _restore(house, report, timezone.now())
    return report.n_restored


def check_machine(machine_id: UUID, house: House, silence: Silence | None = None) -> Report:
    """The machine's agent is silent: ask the provider about this one. It calls it running, and nobody has answered for
    long: the machine is ended, and what it ran moves on.
    """
    report = Report()
    machines = Machine.objects.filter(id=machine_id, provider=house.provider.name)
    row = machines.exclude(state=MachineState.GONE).first()
    if row is not None:
        listed = house.provider.describe()
        seen = {m.machine_id: m for m in listed if m.state is not ProviderState.GONE}
        _check(row, seen.get(row.id.hex), house, report, timezone.now())
        if silence is not None and not report.n_gone:
            _give_up_silent(row, seen.get(row.id.hex), silence, house, report)
    return report


def _give_up_silent(
    row: Machine, seen: ProviderMachine | None, silence: Silence, house: House, report: Report
) -> None:
    """Only of machines that did answer once: one that never has is given up by `machine_pending_timeout_s`.

    The instance first: if that fails, replicas that still serve without their agent go on until the next try.
    """
    why = lost(silence, house.config.agent_lost_s)
    if (
        not why
        or seen is None
        or seen.state in (ProviderState.AGENT_DOWN, ProviderState.GONE)
        or row.state not in (MachineState.READY, MachineState.DRAINING)
    ):
        return
    log.error("machine.lost", machine=row.id.hex, ref=seen.ref, reason=why)
    house.provider.terminate(seen.ref)
    _gone(row, why, house, report)


def _machines(house: House, report: Report, now: datetime) -> None:
    listed = [m for m in house.provider.describe() if m.state is not ProviderState.GONE]
    pool = Machine.objects.filter(provider=house.provider.name, cell=house.cell.keys.cell)
    rows = {row.id.hex: row for row in pool.exclude(state=MachineState.GONE)}
    for seen in listed:
        if seen.machine_id not in rows:
            usd = _orphan_usd(seen, house, now)
            log.error(
                "machine.unknown", ref=seen.ref, machine=seen.machine_id, usd=usd, remedy="it is being ended"
            )
            metrics.ORPHANS.inc()
            metrics.ORPHAN_DOLLARS.inc(usd)
            _guarded("terminate", lambda seen=seen: house.provider.terminate(seen.ref))  # type: ignore[misc]
            report.n_killed += 1
    by_id = {seen.machine_id: seen for seen in listed}
    for mid, row in rows.items():
        _guarded("check", lambda row=row, mid=mid: _check(row, by_id.get(mid), house, report, now))  # type: ignore[misc]


def _orphan_usd(seen: ProviderMachine, house: House, now: datetime) -> float:
    """What a machine that nobody knew has cost, at the last price of its offering."""
    price = market.price_nano_per_h(seen.offering, house.cell.keys.cell, house.provider.name)
    return round(price / 1e9 * max(now.timestamp() - seen.started_at_s, 0.0) / 3600, 6)


def _check(row: Machine, seen: ProviderMachine | None, house: House, report: Report, now: datetime) -> None:
    if seen is None:
        launched_s = (now - (row.launched_at or row.created_at)).total_seconds()
        if row.provider_ref and launched_s >= house.provider.lists_after_s:
            if house.config.spot_reserve:  # a pool without anything to stand in buys where it can, at once
                market.note_taken_back(row, now)
            _gone(row, "the provider does not list it any more", house, report)
        elif row.provider_ref:
            return
        elif now - row.created_at > SETTLED_AFTER:
            launch.ask_provider(row, "", house.provider, house.config)
        return
    if not row.provider_ref:
        launch.adopt(row, seen, house.config)
    if row.state in (*stopping.RESTING, MachineState.RESUMING):
        why = stopping.follow(row, seen, _keeper(house), now)
        if why:
            house.provider.terminate(seen.ref)
            _gone(row, why, house, report)
        return
    if seen.state is ProviderState.RUNNING and row.n_restarts and row.launched_at:
        if now - row.launched_at > RESTARTS_FORGIVEN_AFTER:
            Machine.objects.filter(id=row.id).update(n_restarts=0)
        return
    if (
        seen.state is not ProviderState.AGENT_DOWN
        or now - (row.launched_at or row.created_at) < SETTLED_AFTER
    ):
        return
    if row.state == MachineState.PENDING:
        house.provider.terminate(seen.ref)
        _gone(row, "its agent ended before it enrolled: see agent.log of the machine", house, report)
        return
    allowed = Machine.objects.filter(
        id=row.id, n_restarts=row.n_restarts, n_restarts__lt=house.config.agent_restarts
    ).update(n_restarts=F("n_restarts") + 1, launched_at=now)
    if allowed and house.provider.restart_agent(seen.ref):
        log.warning("machine.agent_restarted", machine=row.id.hex, n_restarts=row.n_restarts + 1)
        report.n_restarted += 1
    elif row.n_restarts >= house.config.agent_restarts:
        house.provider.terminate(seen.ref)
        _gone(row, f"its agent ended and was restarted {row.n_restarts} times already", house, report)


def _keeper(house: House) -> stopping.Keeper:
    return stopping.Keeper(house.config, house.provider, house.cell)


def _gone(row: Machine, reason: str, house: House, report: Report) -> None:
    report.deployments.update(launch.gone(row.id, reason, house.cell))
    report.n_gone += 1


def _release(house: House, report: Report, now: datetime) -> None:
    """Machines that nothing lives on any more. Those of the reserve lie down: what is up and empty is left to the
    pool's turn, what was given up is stopped where others end."""
    cell, n_reserve = house.cell.keys.cell, house.config.spot_reserve
    kept = {
        row.id.hex for row in reserve.rows(cell, house.provider.name) if reserve.is_member(row, n_reserve)
    }
    n_kept, keep_warm_s = market.kept_warm(house.config, house.cell.keys.cell, house.provider.name)
    commands = to_release(
        tuple(
            m
            for m in machine_views(house.config, cell)
            if m.id not in kept or m.state is not MachineViewState.READY
        ),
        now.timestamp(),
        keep_warm_s=keep_warm_s,
        pending_timeout_s=house.config.machine_pending_timeout_s,
        n_kept=n_kept,
    )
    for command in commands:
        row = Machine.objects.get(id=UUID(command.machine_id))
        if command.machine_id in kept and row.given_up_at is not None:
            stopping.stop(row.id, "reserve: spot serves again", _keeper(house), now)
        elif row.ready_at is None:  # replicas may be waiting for it in vain
            if row.provider_ref:
                house.provider.terminate(row.provider_ref)
            _gone(row, command.reason, house, report)
        elif act(command, None, house.provider, house.config, house.cell):
            log.info("machine.released", machine=command.machine_id, reason=command.reason)
            report.n_released += 1


def _restore(house: House, report: Report, now: datetime) -> None:
    cell = house.cell
    pool = Machine.objects.filter(provider=house.provider.name, cell=cell.keys.cell)
    for row in pool.exclude(state__in=(MachineState.GONE, *stopping.RESTING)):
        mid = row.id.hex
        if _restore_user(row, house):
            log.warning("machine.user_restored", machine=mid)
            report.n_restored += 1
        seen = cell.read_desired(mid)  # first: see Cell.restore_desired
        live = Replica.objects.filter(machine_id=row.id, phase__in=LIVE_PHASES)
        if cell.restore_desired(mid, {r.id.hex: desired_spec(r) for r in live}, seen):
            report.n_restored += 1
    _shut_out(house, report)
    _unroute(house, report, now)
    _withdraw(house, report, now)


def _restore_user(row: Machine, house: House) -> bool:
    """A Redis that came back without it, or with what let it in earlier, lets it in as its row says."""
    found = house.cell.user_digests(row.id.hex)
    if not row.redis_password_digest or found == frozenset(row.password_digests):
        return False
    row.refresh_from_db(fields=["redis_password_digest", "redis_password_next"])
    if not row.redis_password_digest or found == frozenset(row.password_digests):
        return False
    renewal.let_in(row.id, row.password_digests, house)
    return True


def _shut_out(house: House, report: Report) -> None:
    """Users of machines that are gone, stopped or without a valid password: made again by somebody who read the row a
    moment too early, or left there by a Redis that was away when they should have ended."""
    ids = [UUID(hex=mid) for mid in house.cell.machine_users() if _IS_ID.fullmatch(mid)]
    away = Q(state__in=(MachineState.GONE, *stopping.RESTING)) | Q(redis_password_digest="")
    for gone in Machine.objects.filter(away, id__in=ids).values_list("id", flat=True):
        house.cell.delete_user(gone.hex)
        log.warning("machine.user_deleted", machine=gone.hex)
        report.n_restored += 1


def _prefetch(house: House, report: Report, now: datetime) -> None:
    report.n_prefetches = prefetch.order(house.cell, house.provider.name, now)


def withdraw_ended(cell: Cell, ended: Sequence[tuple[str, str, str]]) -> int:
    """Requests bound to replicas that are over go back to the queue; from how many (replica, machine, deployment).

    They were withdrawn when they ended, but a Redis that came back without its last second, or was away just then,
    does not know: its record says `bound`, and no watcher looks at a replica that ended. Safe to repeat.
    """
    readings = cell.read_replicas(ended)
    trusted = [rid for rid, reading in readings.items() if reading.used > 0 or reading.is_routed]
    for rid in trusted:
        n_requeued = cell.withdraw_dead(rid)
        log.warning("replica.withdrawn_again", replica=rid, n_requeued=n_requeued)
    return len(trusted)


def _withdraw(house: House, report: Report, now: datetime) -> None:
    over = Replica.objects.filter(
        phase__in=(ReplicaPhase.STOPPED, ReplicaPhase.FAILED),
        stopped_at__gte=now - ENDED_LATELY,
        machine__cell=house.cell.keys.cell,
    )
    rows = over.order_by("-stopped_at").values_list("id", "machine_id", "deployment_id")[:MAX_ENDED]
    report.n_restored += withdraw_ended(house.cell, [(r.hex, m.hex, d.hex) for r, m, d in rows])


def _unroute(house: House, report: Report, now: datetime) -> None:
    """Replicas that Redis still gives work to although their row is over (Redis was away when it ended)."""
    recent = Q(phase__in=LIVE_PHASES) | Q(stopped_at__gte=now - ENDED_LATELY)
    for did in set(Replica.objects.filter(recent).values_list("deployment_id", flat=True)):
        for rid in house.cell.routed(did.hex):
            row = Replica.objects.filter(id=rid).first()
            if row is None or row.phase in (ReplicaPhase.STOPPED, ReplicaPhase.FAILED):
                house.cell.withdraw_dead(rid.hex)
            elif row.phase == ReplicaPhase.DRAINING:
                house.cell.drain(rid.hex)
            else:
                continue
            report.n_restored += 1


def _prune(house: House, report: Report, now: datetime) -> None:
    """Decisions are kept for some days; a bounded number goes per pass."""
    oldest = now - timedelta(days=house.config.decision_days)
    old = Decision.objects.filter(at__lt=oldest).order_by("at").values_list("id", flat=True)[:MAX_PRUNED]
    Decision.objects.filter(id__in=list(old)).delete()
    of_pools = PoolDecision.objects.filter(at__lt=oldest).order_by("at").values_list("id", flat=True)
    PoolDecision.objects.filter(id__in=list(of_pools[:MAX_PRUNED])).delete()


def _guarded(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except (ProviderError, redis.RedisError, OSError) as error:
        log.warning("reconcile.step_failed", step=what, error=f"{type(error).__name__}: {error}")
