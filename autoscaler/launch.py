"""Buying and giving back machines: the row first, then the provider, so that nothing is paid for twice.

Called by act.py and reconcile.py. The row holds the plan (which offers, best first): a crash between row and provider,
or a lost answer, leaves a pending row that reconcile completes with the same client token and the same plan. Proofs
are made here, given to the provider, and stored as digests only.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

import redis
import structlog
from django.db import IntegrityError, transaction
from django.utils import timezone

from autoscaler import market, quotas
from autoscaler.cell import Cell
from autoscaler.config import AutoscalerConfig
from autoscaler.models import AWAKE_PHASES, LIVE_PHASES, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.policy.market import LaunchPlan
from controlplane import ids
from controlplane.deployments.models import Deployment
from infra.providers.base import (
    CapacityError,
    LaunchSpec,
    OutcomeUnknownError,
    Provider,
    ProviderError,
    ProviderMachine,
)

log = structlog.get_logger("corral.autoscaler")


class QuotaReachedError(Exception):
    """Nothing that could be bought fits the quotas."""


_MAX_REASON = 500


@dataclass(frozen=True, slots=True)
class StandIn:
    """A machine that the pool orders for itself: offers in their order, and what it stands in for (None: nothing)."""

    names: tuple[str, ...]
    replaces: UUID | None = None
    # Bought to lie stopped, at this place of the reserve and at none of the pool.
    reserve_place: int | None = None


def launch(
    command_id: UUID,
    provider: Provider,
    config: AutoscalerConfig,
    cell: Cell,
    deployment: Deployment | None = None,
    stand_in: StandIn | None = None,
    n_replicas: int = 1,
    from_reserve: Callable[[], Machine | None] | None = None,
) -> Machine | None:
    """One machine for this command, of the offers of `stand_in` if given, else of what `n_replicas` without room are
    served by most cheaply; None when the pool has no place, a quota of the deployment's organization or of the house
    would be broken, or the provider has no machine. `from_reserve` starts one that lies stopped; it is called before
    anything is bought, where the buying policy says so.

    Called again with the same command, it answers the machine of the first call. Only who made the row asks
    the provider, since only they have the proof; a row left behind by a crash is completed by reconcile.
    """
    proof, digest = new_proof()
    machine = Machine.objects.filter(command_id=command_id).first()
    if machine is None:
        name = cell.keys.cell
        if stand_in is None:
            plan = market.plan(
                provider, config, name, command_id=command_id, n_replicas=n_replicas, deployment=deployment
            )
        else:
            plan = LaunchPlan(stand_in.names, ())
        if plan is not None and plan.from_reserve and from_reserve is not None:
            started = from_reserve()
            if started is not None:
                return started
        if plan is not None and not plan.names:
            log.warning("machine.no_offer", reasons=plan.reasons, retry_at_s=plan.retry_at_s)
            return None
        machine, is_ours = _insert(command_id, digest, provider, config, name, deployment, stand_in, plan)
        if machine is not None and is_ours:
            return machine if ask_provider(machine, proof, provider, config) else None
    return None if machine is None or machine.state == MachineState.GONE else machine


def ask_provider(machine: Machine, proof: str, provider: Provider, config: AutoscalerConfig) -> bool:
    """Have the machine of a pending row launched; False, and the row gone, if the provider refuses.

    Without the proof (lost with whoever made it) a fresh one replaces it first.
    """
    if not proof:
        proof, digest = new_proof()
        renewed = Machine.objects.filter(
            id=machine.id, state=MachineState.PENDING, enroll_used_at=None, provider_ref=""
        ).update(enroll_proof_digest=digest)
        if not renewed:
            return True  # it has enrolled meanwhile
    spec = LaunchSpec(
        machine_id=machine.id.hex,
        cell=machine.cell,
        enrol_url=config.enrol_url,
        engine=config.engine,
        model_cache=config.model_cache,
        redis=config.machine_redis,
        offerings=market.offerings_of(machine.launch_plan, machine.cell, provider.name),
        proof=proof,
    )
    try:
        launched = provider.launch(spec, machine.command_id.hex)
    except OutcomeUnknownError as error:  # reconcile finds it, or asks again
        log.warning("machine.outcome_unknown", machine=machine.id.hex, error=str(error))
        return True
    except ProviderError as error:
        log.warning("machine.refused", machine=machine.id.hex, code=error.code, error=str(error))
        if isinstance(error, CapacityError):
            market.note_refusals(error.refusals, machine.cell, provider.name)
        mark_gone(machine.id, f"{error.code}: {error}")
        return False
    market.note_refusals(launched.refusals, machine.cell, provider.name)
    adopt(machine, launched, config)
    log.info("machine.launched", machine=machine.id.hex, provider=provider.name)
    return True


def adopt(machine: Machine, seen: ProviderMachine, config: AutoscalerConfig) -> None:
    """Note the provider's name of a machine whose row does not have it yet."""
    adopted = (
        Machine.objects.filter(id=machine.id, provider_ref="")
        .exclude(state=MachineState.GONE)
        .update(
            provider_ref=seen.ref,
            launched_at=timezone.now(),
            offering=seen.offering,
            price_nano_per_h=market.price_nano_per_h(seen.offering, machine.cell, machine.provider),
            n_gpus=market.n_gpus(seen.offering, machine.cell, machine.provider),
            n_places=market.least_places([seen.offering], machine.cell, machine.provider, config),
        )
    )
    if adopted and seen.offering:
        market.note_given(seen.offering, machine.cell, machine.provider)


def terminate(machine_id: UUID, reason: str, provider: Provider, cell: Cell) -> bool:
    """Give a machine back; False if a replica serves on it or somebody else is doing it. What sleeps there ends."""
    with transaction.atomic():
        machine = (
            Machine.objects.select_for_update().exclude(state=MachineState.GONE).filter(id=machine_id).first()
        )
        if machine is None or Replica.objects.filter(machine_id=machine_id, phase__in=AWAKE_PHASES).exists():
            return False
        end_sleepers(machine_id, reason)
        # From here on nothing is placed on it, whatever becomes of us.
        Machine.objects.filter(id=machine_id).update(state=MachineState.DRAINING, reason=reason[:_MAX_REASON])
    if machine.provider_ref:
        provider.terminate(machine.provider_ref)
    gone(machine_id, reason, cell)
    return True


def end_sleepers(machine_id: UUID, reason: str) -> None:
    """In the transaction that has the machine's row locked, so that none of them wakes meanwhile."""
    now = timezone.now()
    Replica.objects.filter(machine_id=machine_id, phase=ReplicaPhase.SLEEPING).update(
        phase=ReplicaPhase.STOPPED, phase_at=now, stopped_at=now, reason_message=reason[:_MAX_REASON]
    )


def gone(machine_id: UUID, reason: str, cell: Cell) -> list[UUID]:
    """A machine is no more: its replicas failed, what they ran moves on, its Redis user is deleted.

    Answers the deployments concerned. Safe to repeat.
    """
    lost = list(Replica.objects.filter(machine_id=machine_id, phase__in=LIVE_PHASES))
    now = timezone.now()
    for replica in lost:
        Replica.objects.filter(id=replica.id, phase__in=LIVE_PHASES).update(
            phase=ReplicaPhase.FAILED,
            reason_code="machine_lost",
            reason_message=reason[:_MAX_REASON],
            stopped_at=now,
            phase_at=now,
        )
    mark_gone(machine_id, reason)
    try:
        for replica in lost:
            cell.withdraw_dead(replica.id.hex)
        cell.delete_machine(machine_id.hex)
    except redis.RedisError as error:  # the watcher and reconcile come back to it
        log.warning("machine.not_cleaned", machine=machine_id.hex, error=type(error).__name__)
    return [replica.deployment_id for replica in lost]


def mark_gone(machine_id: UUID, reason: str) -> bool:
    """The row is final; its place in the pool is free again."""
    marked = (
        Machine.objects.filter(id=machine_id)
        .exclude(state=MachineState.GONE)
        .update(state=MachineState.GONE, gone_at=timezone.now(), reason=reason[:_MAX_REASON])
    )
    if marked:
        log.info("machine.gone", machine=machine_id.hex, reason=reason)
    return bool(marked)


def new_proof() -> tuple[str, bytes]:
    """(a random 256-bit proof, its SHA-256)."""
    proof = secrets.token_urlsafe(32)
    return proof, proof_digest(proof)


def proof_digest(proof: str) -> bytes:
    return hashlib.sha256(proof.encode()).digest()


def _insert(
    command_id: UUID,
    digest: bytes,
    provider: Provider,
    config: AutoscalerConfig,
    cell_name: str,
    deployment: Deployment | None,
    stand_in: StandIn | None,
    plan: LaunchPlan | None,
) -> tuple[Machine | None, bool]:
    """The row of a new machine with its plan, at its place of the reserve or the lowest free one of the pool; None
    without a place; whether we made it.
    """
    place = None if stand_in is None else stand_in.reserve_place
    for slot in free_slots(cell_name, provider, config) if place is None else [None]:
        try:
            with transaction.atomic():
                names, most = _within_quotas(plan, provider, cell_name, deployment)
                machine = Machine.objects.create(
                    id=ids.new_id(),
                    provider=provider.name,
                    command_id=command_id,
                    enroll_proof_digest=digest,
                    cell=cell_name,
                    pool_slot=slot,
                    reserve_place=place,
                    launch_plan=names,
                    launched_for=None if deployment is None else deployment.organization_id,
                    # Until the provider says which of the plan it is, it counts as the dearest, and as the smallest.
                    n_gpus=most.n_gpus,
                    price_nano_per_h=most.price_nano_per_h,
                    n_places=market.least_places(names, cell_name, provider.name, config),
                    replaces=None if stand_in is None else stand_in.replaces,
                )
                return machine, True
        except QuotaReachedError as error:
            log.warning("machine.quota_reached", command=command_id.hex, reason=str(error))
            return None, False
        except IntegrityError:  # somebody took the place, or carried out this very command
            found = Machine.objects.filter(command_id=command_id).first()
            if found is not None:
                return found, False
    return Machine.objects.filter(command_id=command_id).first(), False  # it may have taken the last place


def free_slots(cell_name: str, provider: Provider, config: AutoscalerConfig) -> list[int]:
    """Places of the pool that no machine held a moment ago, lowest first; a unique constraint decides who gets it."""
    taken = set(
        Machine.objects.filter(cell=cell_name, provider=provider.name)
        .exclude(state=MachineState.GONE)
        .values_list("pool_slot", flat=True)
    )
    return [slot for slot in range(config.max_machines) if slot not in taken]


def _within_quotas(
    plan: LaunchPlan | None, provider: Provider, cell_name: str, deployment: Deployment | None
) -> tuple[list[str], quotas.Wanted]:
    """What of the plan may be bought, and the most it may add. Inside the transaction of the machine's row, which ends
    the lock. Raises QuotaReachedError."""
    quotas.lock()
    now = timezone.now()
    organization_id = None if deployment is None else deployment.organization_id
    zone = "UTC" if deployment is None else deployment.organization.timezone
    if plan is None:  # one kind of machine, and no price
        found = quotas.reached(organization_id, zone, cell_name, quotas.Wanted(), now)
        if found is not None:
            raise QuotaReachedError(found.sentence)
        return [], quotas.Wanted()
    names, most, broken = quotas.that_fit(plan.names, organization_id, zone, cell_name, provider.name, now)
    if broken is not None:
        raise QuotaReachedError(broken.sentence)
    return names, most
