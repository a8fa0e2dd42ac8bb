"""Long operations of the autoscaler: rollouts of deployments, drains of replicas and machines.

Steps of controlplane/operations/advance.py, run by the control worker as operator. They look and order, and never
wait: the watcher, ticks and reconcile do the work, as ever. Imported by tasks.py, which registers them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from django.utils import timezone

from autoscaler.act import drain
from autoscaler.house import build_cell
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.observe import ELSEWHERE_Q
from autoscaler.specs import engine_digest
from controlplane import ids
from controlplane.deployments.models import Deployment, Phase
from controlplane.errors import ConflictError, NotFoundError
from controlplane.operations.advance import Again, Claim, Done, handles

ROLLOUT: Final = "rollout"
DRAIN_REPLICA: Final = "drain_replica"
DRAIN_MACHINE: Final = "drain_machine"
MAX_S: Final = {ROLLOUT: 3600.0, DRAIN_REPLICA: 900.0, DRAIN_MACHINE: 1800.0}
# A deployment that failed before is told so until its autoscaler has looked at the new wish.
SETTLING: Final = timedelta(seconds=15)


@handles(ROLLOUT)
def rollout(claim: Claim) -> Again | Done:
    """Until what runs is what was wanted: the engine as configured, the replicas that are kept, none left over."""
    row = claim.row
    deployment = (
        Deployment.objects.select_related("model_version")
        .filter(organization_id=claim.organization_id, id=ids.from_text(ids.Prefix.DEPLOYMENT, row.subject))
        .first()
    )
    if deployment is None:
        raise NotFoundError("no such deployment", field="deployment")
    if deployment.generation != row.params["generation"]:
        raise ConflictError(
            "another change came after this one; its own operation tells of it", code="superseded"
        )
    ours = Replica.objects.filter(deployment_id=deployment.id, phase__in=LIVE_PHASES).exclude(ELSEWHERE_Q)
    live = list(ours)
    if deployment.deleted_at is not None:
        if not live:
            return Done({"n_replicas": 0}, "nothing of it runs any more")
        return Again(_part(1, len(live) + 1), f"{_count(len(live))} still to end")
    if deployment.phase == Phase.FAILED and timezone.now() - row.created_at > SETTLING:
        raise ConflictError(deployment.last_error or "its replicas do not start", code="deployment_failed")
    digest = engine_digest(deployment)
    good = [each for each in live if each.spec_digest == digest and each.phase != ReplicaPhase.DRAINING]
    n_ready = sum(each.phase == ReplicaPhase.READY for each in good)
    n_old = len(live) - len(good)
    wanted = deployment.min_replicas
    n_more = max(len(good) - deployment.max_replicas, 0)
    if n_ready >= wanted and not n_old and not n_more:
        return Done(
            {"n_replicas": len(good), "n_ready": n_ready}, f"{n_ready} of {wanted} kept replicas are ready"
        )
    done, total = min(n_ready, wanted), wanted + n_old + n_more
    return Again(_part(done, total), f"{done} of {wanted} ready, {_count(n_old + n_more)} to end")


@handles(DRAIN_REPLICA)
def drain_replica(claim: Claim) -> Again | Done:
    """Until the replica has ended. What it runs finishes or moves on; the autoscaler replaces it if it is needed."""
    replica_id = ids.from_text(ids.Prefix.REPLICA, claim.row.subject)
    replica = Replica.objects.filter(organization_id=claim.organization_id, id=replica_id).first()
    if replica is None:
        raise NotFoundError("no such replica", field="replica")
    if replica.phase not in LIVE_PHASES:
        return Done({"phase": replica.phase}, "it has ended")
    drain(replica.id, f"asked for by {claim.row.actor}", build_cell())
    return Again(50, "finishes what it runs")


@handles(DRAIN_MACHINE)
def drain_machine(claim: Claim) -> Again | Done:
    """Until no replica lives on the machine; the pool gives it back then."""
    row = claim.row
    machine = Machine.objects.filter(id=ids.from_text(ids.Prefix.MACHINE, row.subject)).first()
    if machine is None:
        raise NotFoundError("no such machine", field="machine")
    n_live = Replica.objects.filter(machine=machine, phase__in=LIVE_PHASES).count()
    if machine.state == MachineState.GONE or (machine.state == MachineState.DRAINING and not n_live):
        return Done({"state": machine.state}, "nothing runs on it any more")
    if machine.state != MachineState.DRAINING:
        others = Replica.objects.filter(machine=machine, phase__in=LIVE_PHASES).exclude(
            organization_id=claim.organization_id
        )
        if others.exists() and not row.params.get("house"):
            raise ConflictError(
                "this machine is not yours to drain: drain your replicas on it", field="machine"
            )
        Machine.objects.filter(id=machine.id, state=machine.state).update(
            state=MachineState.DRAINING, reason=f"drain asked for by {row.actor}"
        )
        return Again(0, "takes nothing new")
    return Again(_part(1, n_live + 1), f"{_count(n_live)} still to end")


def _part(done: int, total: int) -> int:
    return 100 * done // total if total else 0


def _count(n: int) -> str:
    return f"{n} replica{'' if n == 1 else 's'}"
